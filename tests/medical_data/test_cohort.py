"""A cohort is whole patients, split once and for all, read once, and without a trace of who they are."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medical_data.cache import CacheCorrupted
from medical_data.cohort import (
    Cohort,
    CohortRefused,
    DataLimits,
    EmbeddedSource,
    FolderSource,
    SharedPixels,
    TooFewPatients,
    prepare_cohort,
    split_by_patient,
)
from medical_data.deidentify import Pseudonymizer, site_secret
from medical_data.errors import MedicalDataError
from medical_data.preprocess import PreprocessConfig

SMALL = PreprocessConfig(size=16, images_per_patient=4)
LIMITS = DataLimits()
NAMES = [f"Doe^Jane {n}" for n in range(5)]


def write_scan(file: Path, *, seed: int, shape: str = "body") -> None:
    """A soft-tissue cylinder in air (or one with a core of bone, or only a couch) with its own noise, as NIfTI."""
    y, x = np.mgrid[-20:20, -20:20]
    tissue = y == 0 if shape == "couch" else y**2 + x**2 < 15**2
    hu = np.where(tissue, 40.0, -1000.0)
    if shape == "bone":
        hu[y**2 + x**2 < 6**2] = 900.0
    body = hu[None].repeat(6, axis=0)
    body += np.random.default_rng(seed).normal(0, 15, body.shape)
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.rint(body.T).astype(np.int16), np.diag([4.0, 4.0, 5.0, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, file)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Five patients of one series each."""
    for seed, name in enumerate(NAMES):
        write_scan(tmp_path / "scans" / name / "ct.nii.gz", seed=seed)
    return tmp_path / "scans"


def prepare(scans: Path, preprocess: PreprocessConfig = SMALL, limits: DataLimits = LIMITS) -> Cohort:
    return prepare_cohort(
        source=FolderSource(folder=scans), preprocess=preprocess, limits=limits, home=scans.parent / "home"
    )


def caches(scans: Path) -> list[Path]:
    return sorted(p for p in (scans.parent / "home" / "cache").iterdir() if p.is_dir())


def pseudonyms_of(scans: Path) -> dict[str, str]:
    keyed = Pseudonymizer(site_secret(scans.parent / "home" / "secret"))
    return {keyed.pseudonym(name): name for name in NAMES}


def test_patients_images_and_parts(scans: Path) -> None:
    cohort = prepare(scans)
    assert cohort.images.shape == (20, 1, 16, 16)
    assert cohort.images.dtype == np.float32
    assert np.abs(cohort.images).max() <= 1.0
    assert cohort.images.std() > 0.1
    assert set(cohort.pseudonyms) == set(pseudonyms_of(scans))
    assert cohort.patient.dtype == np.int32
    assert np.bincount(cohort.patient).tolist() == [4] * 5
    assert cohort.held_out.sum() == 1
    train, held_out = cohort.rows("train"), cohort.rows("held_out")
    assert sorted([*train, *held_out]) == list(range(20))
    assert not set(cohort.patient[train]) & set(cohort.patient[held_out])
    assert np.array_equal(np.unique(cohort.patient[held_out]), np.flatnonzero(cohort.held_out))
    with pytest.raises(ValueError, match=r"^part = 'test'"):
        cohort.rows("test")  # type: ignore[arg-type]


def test_images_are_mapped_and_read_only(scans: Path) -> None:
    cohort = prepare(scans)
    assert isinstance(cohort.images, np.memmap)
    for array in (cohort.images, cohort.patient, cohort.held_out):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_images_belong_to_their_patient(scans: Path) -> None:
    write_scan(scans / NAMES[3] / "ct.nii.gz", seed=3, shape="bone")
    cohort = prepare(scans)
    by_patient = [cohort.images[cohort.patient == p].max() for p in range(5)]
    brightest = cohort.pseudonyms[int(np.argmax(by_patient))]
    assert pseudonyms_of(scans)[brightest] == NAMES[3]


def test_second_start_reads_no_scan(scans: Path) -> None:
    first = prepare(scans)
    for file in scans.rglob("*.nii.gz"):
        status = file.stat()
        file.write_bytes(b"\0" * status.st_size)  # nothing could be read from these
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = prepare(scans)
    assert second.manifest_sha256 == first.manifest_sha256
    assert np.array_equal(first.images, second.images)
    assert len(caches(scans)) == 1


def test_opening_a_cache_imports_no_reader(scans: Path) -> None:
    prepare(scans)
    code = f"""
import sys
from pathlib import Path
from medical_data.cohort import DataLimits, FolderSource, prepare_cohort
from medical_data.preprocess import PreprocessConfig
cohort = prepare_cohort(source=FolderSource(folder=Path({str(scans)!r})), limits=DataLimits(),
    preprocess=PreprocessConfig(size=16, images_per_patient=4), home=Path({str(scans.parent / "home")!r}))
assert cohort.images.shape == (20, 1, 16, 16)
print(*sorted(set(sys.modules) & {{"monai", "torch", "pydicom", "nibabel", "scipy", "skimage", "tqdm"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert len(caches(scans)) == 1


def touch(scans: Path) -> None:
    os.utime(scans / NAMES[0] / "ct.nii.gz", (1, 1))


def add_patient(scans: Path) -> None:
    write_scan(scans / "Roe^Richard" / "ct.nii", seed=99)


def add_linked_folder(scans: Path) -> None:
    write_scan(scans.parent / "elsewhere" / "ct.nii", seed=98)
    (scans / "linked").symlink_to(scans.parent / "elsewhere")


def rename(scans: Path) -> None:
    (scans / NAMES[0]).rename(scans / "Roe^Mary")


def new_secret(scans: Path) -> None:
    (scans.parent / "home" / "secret").unlink()


@pytest.mark.parametrize("change", [touch, add_patient, add_linked_folder, rename, new_secret])
def test_a_changed_source_makes_a_new_cache(scans: Path, change: object) -> None:
    prepare(scans)
    change(scans)  # type: ignore[operator]
    prepare(scans)
    assert len(caches(scans)) == 2


def test_every_configuration_has_its_own_cache(scans: Path) -> None:
    cohorts = [
        prepare(scans),
        prepare(scans, replace(SMALL, size=24)),
        prepare(scans, replace(SMALL, window_hu=(-200.0, 200.0))),
        prepare(scans, limits=DataLimits(split_seed=1)),
        prepare(scans, limits=DataLimits(max_images_per_patient=2)),
        prepare(scans, PreprocessConfig(spatial_dims=3, size=8, images_per_patient=4, spacing_mm=(5, 5, 5))),
    ]
    assert len(caches(scans)) == len(cohorts)
    assert len({c.manifest_sha256 for c in cohorts}) == len(cohorts)
    assert cohorts[4].images.shape == (10, 1, 16, 16)
    assert cohorts[5].images.shape[1:] == (1, 8, 8, 8)
    assert not np.array_equal(cohorts[0].images, cohorts[2].images)


def test_the_same_preparation_twice_is_the_same(scans: Path) -> None:
    first = prepare(scans)
    images = np.array(first.images)
    (cache,) = caches(scans)
    cache.rename(scans.parent / "aside")
    second = prepare(scans)
    assert second.manifest_sha256 == first.manifest_sha256
    assert np.array_equal(images, second.images)


@pytest.mark.parametrize("name", ["images.npy", "manifest.json"])
def test_a_corrupted_cache_is_refused(scans: Path, name: str) -> None:
    prepare(scans)
    (cache,) = caches(scans)
    with (cache / name).open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    with pytest.raises(CacheCorrupted, match=name):
        prepare(scans)


def test_series_of_one_patient_are_pooled_and_then_limited(scans: Path) -> None:
    write_scan(scans / NAMES[0] / "follow up" / "ct.nii.gz", seed=50, shape="bone")
    cohort = prepare(scans)
    assert len(cohort.pseudonyms) == 5
    index = [pseudonyms_of(scans)[p] for p in cohort.pseudonyms].index(NAMES[0])
    own = cohort.images[cohort.patient == index]
    assert len(own) == 4
    assert sorted(image.max() > 0.8 for image in own) == [False, False, True, True]  # two of each series


def test_manifest_records_the_patients(scans: Path) -> None:
    cohort = prepare(scans)
    (cache,) = caches(scans)
    raw = (cache / "manifest.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == cohort.manifest_sha256
    manifest = json.loads(raw)
    assert manifest["series"] == {"accepted": 5, "refused": {}}
    assert manifest["preprocess"]["size"] == 16
    for index, entry in enumerate(manifest["patients"]):
        own = np.ascontiguousarray(cohort.images[cohort.patient == index])
        assert entry == {
            "pseudonym": cohort.pseudonyms[index],
            "images": len(own),
            "part": "held_out" if cohort.held_out[index] else "train",
            "pixels_sha256": hashlib.sha256(own.tobytes()).hexdigest(),
        }


def test_nothing_identifying_in_the_cache(scans: Path) -> None:
    prepare(scans)
    (cache,) = caches(scans)
    for file in cache.iterdir():
        content = file.read_bytes().lower()
        for trace in (b"doe", b"jane", b"nii", str(scans.parent).encode().lower()):
            assert trace not in content, file.name
    report = cache.with_name(f"{cache.name}.inspection.json")
    assert report.stat().st_mode & 0o077 == 0
    assert json.loads(report.read_text())["counts"]["patients_accepted"] == 5


def test_refused_series_are_counted(scans: Path) -> None:
    write_scan(scans / NAMES[0] / "couch.nii.gz", seed=60, shape="couch")
    (scans / "notes.txt").write_text("not an image")
    prepare(scans)
    (cache,) = caches(scans)
    series = json.loads((cache / "manifest.json").read_bytes())["series"]
    assert series["accepted"] == 5
    assert series["refused"] == {"TooLittleBody": 1}
    report = json.loads(cache.with_name(f"{cache.name}.inspection.json").read_text())
    assert report["counts"]["files_found"] == 7
    assert report["refusals"] == series["refused"]


def test_too_few_patients_are_refused_with_a_report(scans: Path) -> None:
    with pytest.raises(TooFewPatients, match=r"^usable patients = 5: the site's limit is 6") as refusal:
        prepare(scans, limits=DataLimits(min_patients=6))
    assert "Doe" not in str(refusal.value)
    assert str(scans) not in str(refusal.value)
    (report,) = (scans.parent / "home" / "cache").glob("*.inspection.json")
    assert report.name in str(refusal.value)
    assert caches(scans) == []


@pytest.mark.parametrize("more", [False, True])
def test_one_scan_under_two_patients_is_refused(scans: Path, more: bool) -> None:
    copy = scans / "Copy" / "ct.nii.gz"
    copy.parent.mkdir()
    copy.write_bytes((scans / NAMES[0] / "ct.nii.gz").read_bytes())
    if more:  # the copy hides among other series of its patient
        write_scan(scans / "Copy" / "own.nii.gz", seed=70)
    with pytest.raises(SharedPixels, match=r"4 images of p\w{32} equal images of p\w{32}") as refusal:
        prepare(scans)
    assert "Copy" not in str(refusal.value)
    assert "Doe" not in str(refusal.value)
    assert caches(scans) == []


def test_places_that_cannot_be(scans: Path) -> None:
    with pytest.raises(CohortRefused, match=r"^folder = not a folder"):
        prepare(scans / "nowhere")
    with pytest.raises(CohortRefused, match=r"^home = inside the source folder"):
        prepare_cohort(
            source=FolderSource(folder=scans), preprocess=SMALL, limits=LIMITS, home=scans / NAMES[0] / "home"
        )
    assert not (scans / NAMES[0] / "home").exists()
    assert not (scans.parent / "home").exists()


@given(st.sets(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers())
def test_split_is_by_patient_and_seeded(patients: set[str], fraction: float, seed: int) -> None:
    pseudonyms = tuple(sorted(patients))
    limits = DataLimits(held_out_fraction=fraction, split_seed=seed)
    held_out = split_by_patient(pseudonyms, limits)
    assert held_out.shape == (len(pseudonyms),)
    assert held_out.sum() == min(max(round(fraction * len(pseudonyms)), 1), len(pseudonyms) - 1)
    back = split_by_patient(pseudonyms[::-1], limits)[::-1]
    assert np.array_equal(held_out, back)


def test_split_depends_on_the_seed_and_takes_everyone_in_turn() -> None:
    pseudonyms = tuple(f"p{n}" for n in range(20))
    times = np.zeros(20)
    for seed in range(400):
        times += split_by_patient(pseudonyms, DataLimits(split_seed=seed))
    # Binomial(400, 1/4): 100 give or take 8.7; five standard deviations.
    assert times.min() > 56
    assert times.max() < 144
    with pytest.raises(ValueError, match="a split needs two"):
        split_by_patient(("p0",), LIMITS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_patients", 1),
        ("min_patients", 2.0),
        ("max_images_per_patient", 0),
        ("held_out_fraction", 0.0),
        ("held_out_fraction", 1.0),
        ("held_out_fraction", float("nan")),
        ("split_seed", 0.5),
    ],
)
def test_impossible_limits_name_the_argument(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} = .*: give"):
        DataLimits(**{name: value})  # type: ignore[arg-type]


def test_impossible_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^format = 'png'"):
        FolderSource(folder=tmp_path, format="png")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^patients = 0"):
        EmbeddedSource(hospital=0, patients=0)


def test_embedded_cohort_is_the_same_on_every_machine(tmp_path: Path) -> None:
    source = EmbeddedSource(hospital=1, patients=5, slices=10, matrix=64, seed=3)
    first, second = (
        prepare_cohort(source=source, preprocess=SMALL, limits=LIMITS, home=tmp_path / name)
        for name in ("here", "there")
    )
    assert len(first.pseudonyms) == 5
    assert first.images.shape == (20, 1, 16, 16)  # the fifth patient has two series: still four images
    assert first.manifest_sha256 == second.manifest_sha256
    assert np.array_equal(first.images, second.images)
    assert not (tmp_path / "here" / "secret").exists()
    (written,) = (p for p in (tmp_path / "here" / "embedded").iterdir() if p.is_dir())
    assert len(list(written.rglob("*.dcm"))) == 60
    other = prepare_cohort(source=replace(source, hospital=2), preprocess=SMALL, limits=LIMITS, home=tmp_path / "here")
    assert not set(other.pseudonyms) & set(first.pseudonyms)


def test_real_patients(shared_ct: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for patient in shared_ct.iterdir():
        if patient.is_dir() and patient.name != "edge_cases":
            (scans / patient.name).symlink_to(patient)
    cohort = prepare(scans, PreprocessConfig(size=64))
    assert len(cohort.pseudonyms) == 30  # 14 DICOM and 8 NIfTI volumes, 8 single slices
    assert sorted(np.bincount(cohort.patient)) == [1] * 8 + [16] * 22
    assert cohort.held_out.sum() == round(0.25 * 30)
    # Every image shows tissue: not empty, not one value.
    assert (cohort.images.reshape(len(cohort.images), -1) > -0.5).mean(axis=1).min() > 0.1
    assert cohort.images.reshape(len(cohort.images), -1).std(axis=1).min() > 0.05
    (cache,) = caches(scans)
    series = json.loads((cache / "manifest.json").read_bytes())["series"]
    assert series == {"accepted": 30, "refused": {"NotCT": 22}}  # the label masks
    for file in cache.iterdir():
        content = file.read_bytes()
        assert b"STS" not in content
        assert b"TCGA" not in content


def test_errors_are_of_one_family() -> None:
    for error in (CohortRefused, TooFewPatients, SharedPixels, CacheCorrupted):
        assert issubclass(error, MedicalDataError)
