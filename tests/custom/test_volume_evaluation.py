"""Volumes are judged in three planes, as `evaluate` judges slices, and by how their slices follow each other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from custom import evaluation, volume_evaluation
from custom.evaluation import Distances, evaluate
from custom.pictures import grey_levels
from custom.volume_evaluation import (
    PLANES,
    Continuity,
    Plane,
    VolumeColumn,
    VolumeEvaluation,
    continuity,
    evaluate_volumes,
    fewest_volumes,
)
from medical_data.phantom import PhantomConfig, phantom_volume
from medical_data.preprocess import PreprocessConfig, images_from_volume

Volumes = NDArray[np.float32]

PREPROCESS = PreprocessConfig(spatial_dims=3, size=32, spacing_mm=(6.5, 13, 13), images_per_patient=1)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chests() -> Volumes:
    """Of twelve phantom patients."""
    config = PhantomConfig(hospital=2, patients=12, slices=32, matrix=64, seed=1)
    return np.concatenate([images_from_volume(phantom_volume(config, i), PREPROCESS) for i in range(12)])


def mixed(volumes: Volumes, *, seed: int = 0) -> Volumes:
    """Every slice in its place, and of any patient."""
    rng = np.random.default_rng(seed)
    return np.stack([volumes[rng.permutation(len(volumes)), :, d] for d in range(volumes.shape[2])], axis=2)


def stacked(volumes: Volumes, *, seed: int = 0) -> Volumes:
    """Slices of any patient from anywhere."""
    rng = np.random.default_rng(seed)
    shape = len(volumes), volumes.shape[2]
    chosen = volumes[rng.integers(len(volumes), size=shape), 0, rng.integers(volumes.shape[2], size=shape)]
    return chosen[:, None]


def noisy(volumes: Volumes, sigma: float) -> Volumes:
    noise = np.random.default_rng(5).standard_normal(volumes.shape)
    return np.clip(volumes + sigma * noise, -1, 1).astype(np.float32)


# --- how slices follow each other ---


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 3), depth=st.integers(2, 5), edge=st.integers(2, 5))
def test_correlation_is_the_ncc_weighted_by_contrast(seed: int, count: int, depth: int, edge: int) -> None:
    volumes = np.random.default_rng(seed).uniform(-1, 1, (count, 1, depth, edge, edge)).astype(np.float32)
    ncc, weights, changes = [], [], []
    for (volume,) in volumes:
        for one, other in pairwise(volume):
            ncc.append(np.corrcoef(one.ravel(), other.ravel())[0, 1])
            weights.append(one.std() * other.std())
            changes.append(np.abs(one - other).mean())
    found = continuity(volumes)
    assert found.correlation == pytest.approx(np.average(ncc, weights=weights), abs=1e-5)
    assert found.change == pytest.approx(50 * np.mean(changes), abs=1e-4)


def test_real_chests_are_told_from_slices_that_do_not_belong_together(chests: Volumes) -> None:
    """Each single chest from each single broken one, so a set of them all the more."""
    real = [continuity(one[None]) for one in chests]
    broken = [continuity(one[None]) for one in (*mixed(chests), *stacked(chests))]
    assert min(one.correlation for one in real) > 0.98
    assert max(one.correlation for one in broken) < 0.9
    assert max(one.change for one in real) < 0.6 * min(one.change for one in broken)


def test_noise_and_smoothness_show_on_either_side_of_real_chests(chests: Volumes) -> None:
    one, other = continuity(chests[:6]), continuity(chests[6:])
    noise, smooth = continuity(noisy(chests, 0.1)), continuity(gaussian_filter(chests, (0, 0, 1, 0, 0)))
    chance = abs(one.correlation - other.correlation)
    assert min(one.correlation, other.correlation) - noise.correlation > 5 * chance
    assert smooth.correlation > max(one.correlation, other.correlation)
    assert smooth.change < 0.75 * min(one.change, other.change)
    assert noise.change > 1.5 * max(one.change, other.change)


def test_air_says_nothing(chests: Volumes) -> None:
    air = np.full((len(chests), 1, 16, 32, 32), -1, np.float32)
    bare = continuity(chests)
    for around in (air, noisy(air, 0.002)):
        padded = continuity(np.concatenate([around, chests, around], axis=2))
        assert padded.correlation == pytest.approx(bare.correlation, abs=2e-3)
        assert padded.change < bare.change
    assert continuity(air) == Continuity(correlation=0.0, change=0.0)


def test_change_is_in_percent_of_the_window() -> None:
    stripes = np.ones((2, 1, 6, 4, 4), np.float32)
    stripes[:, :, ::2] = -1
    assert continuity(stripes).change == 100
    assert continuity(stripes / 4).change == 25


# --- the whole ---


def test_evaluate_volumes(
    chests: Volumes, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(volume_evaluation, "SLICES_PER_PLANE", 4)
    passed = []

    def counting(images: Volumes) -> NDArray[np.uint8]:
        passed.append(images.shape)
        return grey_levels(images)

    monkeypatch.setattr(evaluation, "grey_levels", counting)
    held_out, train = chests[::2], chests[1::2]
    generated, untrained = mixed(train), noisy(np.zeros_like(train), 1.0)

    state = torch.get_rng_state()
    result = evaluate_volumes(generated, held_out, train=train, untrained=untrained, images_per_patient=1, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
    assert passed == [(24, 1, 32, 32)] * 12  # four sets in three planes, each once

    assert (result.volumes, result.held_out_volumes, result.image_size) == (6, 6, (32, 32, 32))
    assert (result.slices_per_plane, result.kid_subset_size, result.prc_neighbours) == (4, 12, 6)
    assert (result.ms_ssim_scales, result.primary) == (2, "EffNet-KID")
    assert result.untrained is not None

    # What the planes show: every axial slice of the mixed volumes is a real one, the others are cut to pieces.
    real, broken = result.baseline, result.generated
    assert abs(broken.planes["axial"].effnet.kid_mean) < 0.02
    for plane in ("coronal", "sagittal"):
        assert broken.planes[plane].effnet.kid_mean > 0.08 > 5 * abs(real.planes[plane].effnet.kid_mean)
    assert abs(real.effnet.kid_mean) < 0.1 * broken.effnet.kid_mean < 0.1 * result.untrained.effnet.kid_mean
    assert real.effnet.fd < broken.effnet.fd < result.untrained.effnet.fd
    assert result.untrained.ms_ssim < 0.2 < real.ms_ssim < 1
    for column in (real, broken):
        for figure in ("fd", "kid_mean", "kid_std", "precision", "recall"):
            by_plane = [getattr(one.effnet, figure) for one in column.planes.values()]
            assert getattr(column.effnet, figure) == pytest.approx(np.mean(by_plane))

    # And how slices follow each other: the mixed ones like those of two patients, the real ones like those held out.
    gap = result.held_out.correlation - result.shuffled.correlation
    assert gap > 0.1
    assert abs(real.continuity.correlation - result.held_out.correlation) < 0.02 * gap
    assert abs(broken.continuity.correlation - result.shuffled.correlation) < 0.5 * gap
    assert result.untrained.continuity.correlation < 0.05

    # Each plane is what `evaluate` makes of its slices.
    slices = [
        one[:, :, [4, 12, 20, 28]].transpose(0, 2, 1, 3, 4).reshape(-1, 1, 32, 32)
        for one in (generated, held_out, train)
    ]
    axial = evaluate(slices[0], slices[1], train=slices[2], images_per_patient=4, seed=7)
    assert result.generated.planes["axial"].effnet == axial.generated.effnet
    assert result.baseline.planes["axial"].effnet == axial.baseline.effnet


def test_each_plane_is_cut_across_its_axis() -> None:
    volumes = np.zeros((2, 1, 16, 24, 32), np.float32)
    volumes += np.arange(16)[:, None, None] + 100 * np.arange(24)[:, None] + 10_000 * np.arange(32)
    volumes[1] *= -1
    for plane, axis, step, shape in (
        ("axial", 16, 1, (24, 32)),
        ("coronal", 24, 100, (16, 32)),
        ("sagittal", 32, 10_000, (16, 24)),
    ):
        cut = volume_evaluation._slices(volumes, PLANES[plane])
        assert cut.shape == (16, 1, *shape)
        wanted = [int((i + 0.5) * axis / 8) * step for i in range(8)]  # the middles of eight equal stretches
        assert cut[:8, 0, 0, 0].tolist() == wanted
        assert (cut[8:] == -cut[:8]).all()


@settings(max_examples=50)
@given(images_per_patient=st.integers(1, 50))
def test_the_fewest_volumes_are_enough_for_every_figure(images_per_patient: int) -> None:
    """Precision and recall look beyond a patient's own slices: there must be as many."""
    slices = volume_evaluation.SLICES_PER_PLANE
    fewest = fewest_volumes(images_per_patient)
    assert fewest * slices > evaluation.prc_neighbours(images_per_patient * slices)
    assert fewest >= max(6, images_per_patient + 1)


def test_seven_held_out_patients_are_enough(chests: Volumes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_evaluation, "SLICES_PER_PLANE", 2)
    small = chests[:, :, ::2, ::2, ::2]
    result = evaluate_volumes(noisy(small[:6], 0.3), small[5:], train=small[:6], images_per_patient=1, seed=0)
    assert (result.volumes, result.held_out_volumes, result.untrained) == (6, 7, None)
    assert result.generated.effnet.kid_mean > 5 * abs(result.baseline.effnet.kid_mean)
    assert json.loads(json.dumps(result.to_json()))["held_out"] == dataclasses.asdict(result.held_out)


def some_evaluation(**changes: object) -> VolumeEvaluation:
    figures = Distances(fd=81.25, kid_mean=0.1234, kid_std=0.0056, precision=0.5, recall=0.25)
    sagittal = dataclasses.replace(figures, kid_mean=0.4321)
    column = VolumeColumn(
        effnet=figures,
        inception=None,
        planes={plane: Plane(effnet=sagittal if plane == "sagittal" else figures, inception=None) for plane in PLANES},
        ms_ssim=0.375,
        continuity=Continuity(correlation=0.9876, change=1.5),
    )
    values: dict[str, object] = {
        "generated": column,
        "baseline": column,
        "untrained": None,
        "held_out": Continuity(correlation=0.9921, change=1.26),
        "shuffled": Continuity(correlation=0.8199, change=7.51),
        "volumes": 20,
        "held_out_volumes": 7,
        "image_size": (32, 32, 32),
        "slices_per_plane": 8,
        "kid_subset_size": 28,
        "prc_neighbours": 10,
        "ms_ssim_scales": 2,
        "seed": 0,
    }
    return VolumeEvaluation(**(values | changes))  # type: ignore[arg-type]


def test_table_is_aligned_and_says_what_it_shows() -> None:
    column = some_evaluation().generated
    with_inception = dataclasses.replace(column, inception=dataclasses.replace(column.effnet, fd=12345.678))
    for result in (
        some_evaluation(),
        some_evaluation(untrained=column),
        some_evaluation(generated=with_inception, baseline=with_inception),
    ):
        lines = result.table().splitlines()
        figures = lines[:-4]
        assert len({len(line) for line in figures}) == 1
        assert max(map(len, lines)) <= 120
        assert figures[0].endswith("held out  shuffled")
        assert ("untrained" in figures[0]) == (result.untrained is not None)
        assert any(line.startswith("EffNet-KID ") and "0.1234 ± 0.0056" in line for line in figures)
        assert any(line.startswith("EffNet-KID sagittal ") and "0.4321" in line for line in figures)
        assert any(
            line.startswith("slice-to-slice correlation") and line.endswith("0.9921    0.8199") for line in figures
        )
        assert any(line.startswith("slice-to-slice change") and "7.51 %" in line for line in figures)
        inception = result.generated.inception is not None
        assert any(line.startswith("FID ") and "12345.68" in line for line in figures) == inception
        assert result.primary == ("KID" if inception else "EffNet-KID")
        assert f"Look at {result.primary} " in lines[-2]
        assert "20 volumes a column, 7 held out, 32x32x32" in lines[-4]


def test_json_holds_every_figure() -> None:
    result = some_evaluation()
    read = json.loads(json.dumps(result.to_json()))
    assert read["generated"]["effnet"]["kid_mean"] == 0.1234
    assert read["generated"]["planes"]["sagittal"]["effnet"]["kid_mean"] == 0.4321
    assert read["generated"]["continuity"] == {"correlation": 0.9876, "change": 1.5}
    assert (read["version"], read["primary"], read["image_size"]) == (1, "EffNet-KID", [32, 32, 32])
    assert read.keys() == {"version", "primary", *(field.name for field in dataclasses.fields(VolumeEvaluation))}


def cubes(count: int, edge: int = 12) -> Volumes:
    return np.random.default_rng(0).uniform(-1, 1, (count, 1, edge, edge, edge)).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"generated": cubes(8) * 2}, "generated spans"),
        ({"generated": cubes(8)[:, :, 0]}, r"give non-empty float32 \[N, 1, D, H, W\]"),
        ({"train": cubes(8).astype(np.float64)}, "train = float64"),
        ({"untrained": np.full_like(cubes(8), np.inf)}, "untrained holds non-finite"),
        ({"held_out": cubes(5)}, "held_out = 5 volumes: give at least 6"),
        ({"images_per_patient": 8}, "at least 9"),
        ({"images_per_patient": 0}, "images_per_patient = 0"),
        ({"generated": cubes(8, 13)}, "volumes of one size"),
        ({name: cubes(8, 10) for name in ("generated", "held_out", "train")}, "at least 11"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_impossible_arguments_are_refused_before_any_work(
    change: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(evaluation, "_extractor", never)
    arguments = {name: cubes(8) for name in ("generated", "held_out", "train")} | {"images_per_patient": 1, "seed": 0}
    with pytest.raises(ValueError, match=said):
        evaluate_volumes(**(arguments | change))


def test_volumes_are_not_taken_for_slices() -> None:
    with pytest.raises(ValueError, match=r"give non-empty float32 \[N, 1, H, W\]"):
        evaluate(cubes(12), cubes(12), train=cubes(12), images_per_patient=1, seed=0)
