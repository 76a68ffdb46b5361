"""Studies get the same patients everywhere; partitions keep them whole, lose none and leave test patients out."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from custom.strict import ConfigError, build
from custom.study import datasets
from custom.study.datasets import (
    FASHION_MNIST,
    DatasetConfig,
    StudyData,
    central,
    load,
    natural_labels,
    read_idx,
    sites_of,
)
from medical_data.cohort import Cohort
from medical_data.partition import PartitionRefused
from medical_data.preprocess import PreprocessConfig

FASHION = PreprocessConfig(size=28)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_idx(file: Path, values: np.ndarray) -> None:
    """Written by hand, after the format's description."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    file.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Five images of each of three labels to train and three to test; an image's pixels are 40 times its label."""
    for prefix, of_each in (("train", 5), ("t10k", 3)):
        labels = np.tile(np.arange(3, dtype=np.uint8), of_each)
        images = np.repeat(labels * 40, 28 * 28).reshape(-1, 28, 28).copy()
        images[:, 0, 0] = np.arange(len(labels))  # tells images apart
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def study(counts: list[int], labels: list[int], test: list[bool]) -> StudyData:
    """Patients with these many images, each image filled with its patient's number."""
    patient = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    images = (patient / 1000).astype(np.float32)[:, None, None, None] * np.ones((1, 1, 2, 2), np.float32)
    return StudyData(images=images, patient=patient, label=np.array(labels), test=np.array(test))


def owners(cohort: Cohort) -> dict[str, list[float]]:
    """Pixels of each patient's images, after checking that the cohort is sorted and grouped."""
    assert list(cohort.pseudonyms) == sorted(cohort.pseudonyms)
    assert cohort.patient.dtype == np.int32
    assert cohort.images.dtype == np.float32
    assert (np.diff(cohort.patient) >= 0).all()
    assert set(cohort.patient.tolist()) == set(range(len(cohort.pseudonyms)))
    assert cohort.held_out.shape == (len(cohort.pseudonyms),)
    return {
        name: cohort.images[cohort.patient == index, 0, 0, 0].tolist() for index, name in enumerate(cohort.pseudonyms)
    }


# --- configuration ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "mnist", "train": 10, "test": 5}, "dataset.kind"),
        ({"kind": "fashion_mnist", "train": 1, "test": 5}, "dataset.train = 1"),
        ({"kind": "fashion_mnist", "train": 10, "test": 0}, "dataset.test = 0"),
        ({"kind": "fashion_mnist", "train": 10, "test": 5, "slices": 4}, "leave it out for fashion_mnist"),
        ({"kind": "folder", "train": 10, "test": 5}, "name a folder with scans"),
        ({"kind": "folder", "train": 10, "test": 5, "folder": "/x", "patients_per_hospital": 4}, "leave it out"),
        ({"kind": "embedded", "train": 10, "test": 5, "slices": 4}, "dataset.patients_per_hospital = None"),
        ({"kind": "embedded", "train": 10, "test": 5, "slices": 1, "patients_per_hospital": 9}, "dataset.slices = 1"),
        ({"kind": "embedded", "train": 20, "test": 5, "slices": 4, "patients_per_hospital": 8}, "24 patients in all"),
        (
            {"kind": "embedded", "train": 9, "test": 5, "slices": 4, "patients_per_hospital": 8, "folder": "/x"},
            "not read",
        ),
        ({"kind": "fashion_mnist", "train": 10, "test": 5, "seed": 1}, "unknown"),
    ],
)
def test_impossible_configurations_are_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DatasetConfig, values, "dataset")


def test_study_data_that_contradict_themselves_are_refused() -> None:
    data = study([1, 2], [0, 1], [False, True])
    for change in (
        {"patient": np.array([0, 0, 2], np.int32)},
        {"patient": np.array([1, 1, 1], np.int32)},
        {"patient": np.array([0, 1, 0], np.int32)},
        {"test": np.ones(2, np.bool_)},
        {"label": np.zeros(3, np.int64)},
    ):
        with pytest.raises(ConfigError):
            replace(data, **change)


# --- Fashion-MNIST ---


def test_a_handwritten_data_set_is_read_balanced_and_scaled(tiny: Path) -> None:
    config = DatasetConfig(kind="fashion_mnist", train=7, test=6, folder=str(tiny))
    data = load(config, FASHION, tiny)
    assert data.images.shape == (13, 1, 28, 28)
    assert data.images.dtype == np.float32
    assert data.patient.tolist() == list(range(13))
    assert data.test.tolist() == [False] * 7 + [True] * 6
    assert np.bincount(data.label[:7]).tolist() == [3, 2, 2]
    assert np.bincount(data.label[7:]).tolist() == [2, 2, 2]
    np.testing.assert_allclose(data.images[:, 0, 5, 5], data.label * 40 / 127.5 - 1, rtol=1e-6)
    again = load(config, FASHION, tiny)
    assert np.array_equal(again.images, data.images)
    larger = load(replace(config, train=10), FASHION, tiny)
    pool = {image.tobytes() for image in larger.images[~larger.test]}
    assert {image.tobytes() for image in data.images[~data.test]} < pool
    assert len(pool) == 10
    assert np.array_equal(larger.images[larger.test], data.images[data.test])


def test_what_cannot_be_read_is_refused_with_a_remedy(tiny: Path, tmp_path: Path) -> None:
    config = DatasetConfig(kind="fashion_mnist", train=6, test=6, folder=str(tiny))
    with pytest.raises(ConfigError, match=r"apt-get install dataset-fashion-mnist"):
        load(replace(config, folder=str(tmp_path / "nowhere")), FASHION, tiny)
    with pytest.raises(ConfigError, match=r"preprocess.size = 32"):
        load(config, PreprocessConfig(size=32), tiny)
    with pytest.raises(ConfigError, match=r"dataset.train = 16: .*about 15"):
        load(replace(config, train=16), FASHION, tiny)
    with pytest.raises(ConfigError, match=r"dataset.test = 10: .*about 9"):
        load(replace(config, test=10), FASHION, tiny)
    labels = tiny / "t10k-labels-idx1-ubyte.gz"
    write_idx(labels, np.zeros(8, np.uint8))
    with pytest.raises(ConfigError, match="as many labels as images"):
        load(config, FASHION, tiny)
    labels.unlink()
    with pytest.raises(ConfigError, match=r"FileNotFoundError.*apt-get install"):
        load(config, FASHION, tiny)


@pytest.mark.parametrize(
    "content",
    [
        b"not compressed",
        gzip.compress(b"\0\0\x08\x01\0\0\0\x04abc"),  # a byte short
        gzip.compress(b"\0\0\x08\x01\0\0\0\x02abc"),  # a byte too many
        gzip.compress(b"\0\0\x0d\x01\0\0\0\x03abc"),  # another type
        gzip.compress(b"\0\0\x08\x03\0\0\0\x03abc"),  # other dimensions
        gzip.compress(b"\0\0"),
        gzip.compress(b"\0\0\x08\x01\0\0\0\x03abc")[:-6],
    ],
)
def test_broken_idx_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "labels.gz"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"dataset\.folder"):
        read_idx(file, dims=1)


def test_an_idx_file_is_read_in_its_own_order(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "images.gz", values)
    assert np.array_equal(read_idx(tmp_path / "images.gz", dims=3), values)


def test_the_real_data_set() -> None:
    if not Path(FASHION_MNIST).is_dir():
        pytest.skip(f"no Fashion-MNIST at {FASHION_MNIST}: apt-get install dataset-fashion-mnist")
    data = load(DatasetConfig(kind="fashion_mnist", train=300, test=100), FASHION, Path())
    assert data.images.shape == (400, 1, 28, 28)
    assert (float(data.images.min()), float(data.images.max())) == (-1.0, 1.0)
    assert np.bincount(data.label[~data.test]).tolist() == [30] * 10
    assert np.bincount(data.label[data.test]).tolist() == [10] * 10
    sandals, shirts = (data.images[data.label == label].mean() for label in (5, 0))
    assert sandals < -0.5 < shirts  # a sandal is mostly background


# --- scans ---


def test_the_embedded_hospitals_are_the_labels(tmp_path: Path) -> None:
    config = DatasetConfig(kind="embedded", train=6, test=3, patients_per_hospital=4, slices=2)
    preprocess = PreprocessConfig(size=16, images_per_patient=2)
    data = load(config, preprocess, tmp_path / "a")
    assert data.images.shape[1:] == (1, 16, 16)
    assert len(data.label) == 9
    assert np.bincount(data.label[data.test]).tolist() == [1, 1, 1]
    assert np.bincount(data.label[~data.test]).tolist() == [2, 2, 2]
    again = load(config, preprocess, tmp_path / "b")
    assert np.array_equal(again.images, data.images)
    assert np.array_equal(again.test, data.test)


def test_natural_labels_are_of_counts_and_bodies() -> None:
    slim, full = np.full((1, 8, 8), -1, np.float32), np.zeros((1, 8, 8), np.float32)
    images = np.stack([full, slim, slim, full, full, slim])
    patient = np.array([0, 1, 1, 2, 2, 3], np.int32)
    assert natural_labels(images, patient, PreprocessConfig()).tolist() == [0, 1, 2, 0]
    assert natural_labels(images[3:5], np.zeros(2, np.int32), PreprocessConfig()).tolist() == [0]
    # A window that begins above the threshold: whatever is not clipped to its end is body.
    high = PreprocessConfig(window_hu=(-100.0, 300.0))
    assert natural_labels(images, patient, high).tolist() == [0, 1, 2, 0]


def test_real_scans_from_any_home_are_the_same_study(shared_ct: Path, tmp_path: Path) -> None:
    names = ["STS_025", "STS_002", "STS_034", "STS_001", "TCGA-17-Z013", "TCGA-17-Z017", "TCGA-50-5044"]
    (tmp_path / "scans").mkdir()
    for name in names:
        (tmp_path / "scans" / name).symlink_to(shared_ct / name)
    config = DatasetConfig(kind="folder", train=4, test=2, folder=str(tmp_path / "scans"))
    preprocess = PreprocessConfig(size=16, images_per_patient=3)
    data, again = (load(config, preprocess, tmp_path / home) for home in ("a", "b"))
    assert np.array_equal(again.images, data.images)
    assert np.array_equal(again.label, data.label)
    assert np.array_equal(again.test, data.test)
    assert (len(data.label), int(data.test.sum())) == (6, 2)
    counts = np.bincount(data.patient)
    assert set(counts.tolist()) == {1, 3}
    assert np.array_equal(counts == 1, data.label == 0)
    with pytest.raises(ConfigError, match="7 usable patients"):
        load(replace(config, train=6), preprocess, tmp_path / "a")


# --- sites ---

patients = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3), st.booleans()), min_size=2, max_size=60)


@settings(max_examples=60, deadline=None)
@given(
    patients,
    st.integers(1, 5),
    st.one_of(st.none(), st.sampled_from([0.1, 0.5, 10.0])),
    st.integers(0, 2**31),
    st.sampled_from([0.01, 0.2, 0.9]),
)
def test_every_pool_patient_is_at_one_site(
    drawn: list[tuple[int, int, bool]], sites: int, alpha: float | None, seed: int, fraction: float
) -> None:
    test = [one[2] for one in drawn]
    test[0] = False
    data = study([one[0] for one in drawn], [one[1] for one in drawn], test)
    try:
        cohorts = sites_of(data, sites=sites, alpha=alpha, seed=seed, held_out_fraction=fraction)
    except PartitionRefused:
        assert alpha is not None or test.count(False) < 2 * sites
        return
    assert len(cohorts) == sites
    found: dict[str, list[float]] = {}
    for cohort in cohorts:
        own = owners(cohort)
        assert not found.keys() & own.keys()
        found |= own
        held_out, count = int(cohort.held_out.sum()), len(own)
        assert count >= 2
        assert held_out == min(max(round(fraction * count), 1), count - 1)
    wanted = {
        f"patient-{index:07d}": [pytest.approx(index / 1000)] * drawn[index][0]
        for index in range(len(drawn))
        if not test[index]
    }
    assert found == wanted
    everybody = central(cohorts)
    assert owners(everybody) == found
    flags = {n: bool(h) for c in cohorts for n, h in zip(c.pseudonyms, c.held_out, strict=True)}
    assert {n: bool(h) for n, h in zip(everybody.pseudonyms, everybody.held_out, strict=True)} == flags
    for part in ("train", "held_out"):
        pixels = [cohort.images[cohort.rows(part), 0, 0, 0] for cohort in cohorts]
        assert sorted(everybody.images[everybody.rows(part), 0, 0, 0]) == sorted(np.concatenate(pixels))


def test_sites_depend_on_the_seed_and_on_nothing_else() -> None:
    data = study([1] * 80, [index % 4 for index in range(80)], [index % 5 == 0 for index in range(80)])
    first, again, other = (sites_of(data, sites=4, alpha=0.3, seed=seed) for seed in (1, 1, 2))
    assert [c.manifest_sha256 for c in first] == [c.manifest_sha256 for c in again]
    assert len({c.manifest_sha256 for c in (*first, *other)}) == 8
    assert not first[0].images.flags.writeable


def test_a_small_alpha_skews_labels() -> None:
    data = study([1] * 400, [index % 4 for index in range(400)], [False] * 400)

    def largest_share(alpha: float | None) -> float:
        cohorts = sites_of(data, sites=4, alpha=alpha, seed=0)
        labels = [data.label[[int(name[-7:]) for name in cohort.pseudonyms]] for cohort in cohorts]
        return float(np.mean([np.bincount(own).max() / len(own) for own in labels]))

    assert largest_share(0.1) > 0.6 > 0.4 > largest_share(None)


def test_partitions_with_a_single_patient_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    data = study([1] * 6, [0] * 6, [False] * 6)
    lonely, fair = np.array([0, 0, 0, 0, 0, 1]), np.array([0, 1, 0, 1, 0, 1])
    seeds = []

    def dirichlet(labels: object, *, sites: int, alpha: float, seed: int) -> np.ndarray:
        seeds.append(seed)
        return fair if len(seeds) == 3 else lonely

    monkeypatch.setattr(datasets, "dirichlet", dirichlet)
    assert [len(c.pseudonyms) for c in sites_of(data, sites=2, alpha=1.0, seed=5)] == [3, 3]
    assert seeds == [5, 5 + 2**32, 5 + 2**33]
    with pytest.raises(PartitionRefused, match="101 draws left one of 2 sites with a single patient"):
        sites_of(data, sites=2, alpha=1.0, seed=5)


def test_impossible_partitions_are_refused() -> None:
    data = study([1] * 6, [0] * 6, [True] + [False] * 5)
    for sites in (0, 3):
        with pytest.raises(PartitionRefused):
            sites_of(data, sites=sites, alpha=None, seed=0)
    with pytest.raises(PartitionRefused, match="alpha"):
        sites_of(data, sites=2, alpha=0.0, seed=0)
    for fraction in (0.0, 1.0):
        with pytest.raises(ConfigError, match="held_out_fraction"):
            sites_of(data, sites=2, alpha=None, seed=0, held_out_fraction=fraction)
    with pytest.raises(ConfigError, match="seed = -1"):
        sites_of(data, sites=2, alpha=None, seed=-1)
    site = sites_of(data, sites=1, alpha=None, seed=0)[0]
    with pytest.raises(ConfigError, match="5 patients at two sites"):
        central((site, site))
    with pytest.raises(ConfigError, match="cohorts = 0"):
        central(())


def test_all_test_patients_are_held_out() -> None:
    data = study([2, 1, 3], [0, 1, 1], [True, False, True])
    cohort = datasets.test_cohort(data)
    assert {name: len(own) for name, own in owners(cohort).items()} == {"patient-0000000": 2, "patient-0000002": 3}
    assert cohort.rows("held_out").tolist() == [0, 1, 2, 3, 4]
    assert cohort.rows("train").size == 0
    with pytest.raises(ConfigError, match=r"data\.test"):
        datasets.test_cohort(study([1, 1], [0, 0], [False, False]))


def test_colour_collections_are_read_in_greys(tmp_path: Path) -> None:
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    colours, label = rng.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8), np.arange(40) % 10
    records = np.concatenate([label[:, None].astype(np.uint8), colours.reshape(40, -1)], axis=1)
    cifar, svhn = tmp_path / "cifar", tmp_path / "svhn"
    cifar.mkdir(), svhn.mkdir()
    (cifar / "data_batch_1.bin").write_bytes(records[:20].tobytes())
    (cifar / "data_batch_2.bin").write_bytes(records[20:].tobytes())
    (cifar / "test_batch.bin").write_bytes(records[:20].tobytes())
    digits = np.where(label == 0, 10, label)[:, None].astype(np.uint8)  # SVHN says 10 for zero
    for part in ("train", "test"):
        savemat(svhn / f"{part}_32x32.mat", {"X": colours.transpose(2, 3, 1, 0), "y": digits})
    preprocess = PreprocessConfig(spatial_dims=2, size=32, window_hu=(-1000, 600), images_per_patient=1)
    for kind, folder in (("cifar10", cifar), ("svhn", svhn)):
        config = build(DatasetConfig, {"kind": kind, "train": 40, "test": 20, "folder": str(folder)}, "dataset")
        data = load(config, preprocess, tmp_path / "home")
        grey = 0.299 * colours[:, 0] + 0.587 * colours[:, 1] + 0.114 * colours[:, 2]  # slow and obvious
        assert np.abs((data.images[:40, 0] + 1) * 127.5 - grey).max() <= 0.51
        assert (data.label[:40] == label).all()
        assert data.test.sum() == 20


@pytest.mark.parametrize(("kind", "said"), [("cifar10", "data_batch_1.bin"), ("svhn", "train_32x32.mat")])
def test_a_missing_colour_collection_says_what_to_do(kind: str, said: str, tmp_path: Path) -> None:
    preprocess = PreprocessConfig(spatial_dims=2, size=32, window_hu=(-1000, 600), images_per_patient=1)
    config = build(DatasetConfig, {"kind": kind, "train": 40, "test": 20, "folder": str(tmp_path)}, "dataset")
    with pytest.raises(ConfigError, match=said):
        load(config, preprocess, tmp_path / "home")
    with pytest.raises(ConfigError, match=said):
        build(DatasetConfig, {"kind": kind, "train": 40, "test": 20}, "dataset")
