"""Volumes become images of the stated size, scale and range, and only the patient counts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medical_data.errors import SeriesRefused
from medical_data.preprocess import (
    MARGIN_MM,
    PreprocessConfig,
    TooLittleBody,
    body_mask,
    evenly,
    images_from_volume,
)
from medical_data.volume import Volume

TISSUE_HU, LUNG_HU = 40.0, -800.0
FIELD_MM = 400.0


def grid(spacing: tuple[float, float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates in mm (posterior, left) from the centre of a square field of view."""
    axes = [(np.arange(round(FIELD_MM / s)) + 0.5) * s - FIELD_MM / 2 for s in spacing]
    y, x = np.meshgrid(*axes, indexing="ij")
    return y, x


def ellipse(
    y: NDArray[np.float64], x: NDArray[np.float64], centre: tuple[float, float], radii: tuple[float, float]
) -> NDArray[np.bool_]:
    return ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1.0


def chest(
    spacing: tuple[float, float, float] = (5.0, 2.0, 2.0),
    slices: int = 12,
    couch: bool = False,
    arm: bool = False,
    legs: bool = False,
    noise: float = 0.0,
) -> Volume:
    """A body of 300 x 180 mm with two lungs, alike in all slices; on a couch, with an arm, or two legs."""
    y, x = grid(spacing[1:])
    hu = np.full(y.shape, -1000.0)
    if legs:
        for side in (-1, 1):
            hu[ellipse(y, x, (0, side * 90), (70, 70))] = TISSUE_HU
    else:
        hu[ellipse(y, x, (0, 0), (90, 150))] = TISSUE_HU
        for side in (-1, 1):
            hu[ellipse(y, x, (0, side * 65), (60, 45))] = LUNG_HU
    if arm:
        hu[ellipse(y, x, (0, 180), (18, 15))] = TISSUE_HU
    if couch:  # a hollow shell that touches the back
        hu[(abs(y - 92) < 2.1) & (abs(x) < 190)] = 0.0
        hu[(abs(y - 130) < 2.1) & (abs(x) < 190)] = 0.0
        hu[(abs(abs(x) - 190) < 2.1) & (y > 90) & (y < 132)] = 0.0
    stack = np.repeat(hu[None], slices, axis=0)
    stack += noise * np.random.default_rng(0).standard_normal(stack.shape)
    return Volume(hu=stack.astype(np.float32), spacing_mm=spacing)


def extent(image: NDArray[np.float32]) -> tuple[float, float]:
    """Height and width in pixels of what is brighter than halfway between air and tissue, by its profile."""
    bright = np.clip((image + 1) / (image.max() + 1), 0, 1)
    filled = np.maximum(bright, 0)
    rows, columns = filled.max(axis=1), filled.max(axis=0)
    return float(rows.sum()), float(columns.sum())


def test_slices_have_the_stated_shape_and_range() -> None:
    images = images_from_volume(chest(noise=20.0), PreprocessConfig(size=48, images_per_patient=5))
    assert images.shape == (5, 1, 48, 48)
    assert images.dtype == np.float32
    assert images.flags.c_contiguous
    assert images.min() >= -1.0
    assert images.max() <= 1.0


@settings(max_examples=20, deadline=None)
@given(st.floats(-1500, 900), st.floats(10, 2500), st.floats(-450, 2000))
def test_window_maps_hu_linearly_and_clips(low: float, width: float, tissue: float) -> None:
    hu = np.full((1, 40, 40), tissue, dtype=np.float32)
    config = PreprocessConfig(size=16, window_hu=(low, low + width))
    images = images_from_volume(Volume(hu=hu, spacing_mm=(5, 4, 4)), config)
    expected = np.clip(2 * (tissue - low) / width - 1, -1, 1)
    assert np.abs(images - expected).max() < 1e-3


@pytest.mark.parametrize("spacing", [(5.0, 2.0, 2.0), (5.0, 1.0, 2.0), (5.0, 3.1, 2.0)])
def test_aspect_ratio_is_kept_and_the_body_fills_the_frame(spacing: tuple[float, float, float]) -> None:
    image = images_from_volume(chest(spacing), PreprocessConfig(size=64))[0, 0]
    height, width = extent(image)
    assert height / width == pytest.approx(180 / 300, abs=0.03)
    assert width == pytest.approx(64 * 300 / (300 + 2 * MARGIN_MM), abs=1.5)


def test_pixel_size_of_the_scanner_does_not_matter() -> None:
    coarse, fine = (
        images_from_volume(chest((5.0, s, s)), PreprocessConfig(size=32, images_per_patient=1)) for s in (2.0, 0.8)
    )
    assert np.abs(coarse - fine).mean() < 0.03
    assert np.corrcoef(coarse.ravel(), fine.ravel())[0, 1] > 0.99


def test_resampling_equals_the_slow_reference() -> None:
    from skimage.transform import resize

    rng = np.random.default_rng(3)
    hu = rng.uniform(-400, 400, (1, 130, 130)).astype(np.float32)  # all body: the box is the whole slice
    image = images_from_volume(Volume(hu=hu, spacing_mm=(3, 2, 2)), PreprocessConfig(size=50, window_hu=(-1000, 1000)))[
        0, 0
    ]
    reference = resize(hu[0], (50, 50), order=1, mode="edge", anti_aliasing=True) / 1000
    assert np.abs(image - reference)[1:-1, 1:-1].max() < 1e-4


def test_the_couch_does_not_count() -> None:
    config = PreprocessConfig(size=64)
    alone, lying = chest(), chest(couch=True)
    assert np.abs(body_mask(lying).astype(int) - body_mask(alone)).mean() < 0.002
    with_couch, without = (images_from_volume(v, config)[0, 0] for v in (lying, alone))
    assert extent(with_couch[:40])[1] == pytest.approx(extent(without[:40])[1], abs=1)
    assert np.abs(with_couch - without)[:40].mean() < 0.03  # above the back the picture is the same
    assert not body_mask(
        Volume(hu=np.where(chest(couch=True).hu == 0, 0, -1000).astype(np.float32), spacing_mm=(5, 2, 2))
    ).any()


def test_lungs_belong_to_the_body() -> None:
    volume = chest()
    y, x = grid((2.0, 2.0))
    body = ellipse(y, x, (0, 0), (90, 150))
    assert (body_mask(volume)[0] != body).mean() < 0.01


def test_an_arm_does_not_widen_the_frame_but_a_second_leg_does() -> None:
    assert np.array_equal(body_mask(chest(arm=True)), body_mask(chest()))
    legs = np.flatnonzero(body_mask(chest(legs=True))[0].any(axis=0)) * 2.0 - FIELD_MM / 2
    assert legs.min() == pytest.approx(-160, abs=4)
    assert legs.max() == pytest.approx(160, abs=4)


def test_a_body_cut_by_the_field_of_view_is_kept_to_the_edge() -> None:
    whole = chest()
    cut = Volume(hu=whole.hu[:, :, 60:140], spacing_mm=whole.spacing_mm)  # through both lungs
    mask = body_mask(cut)
    assert mask[:, [67, 133]][:, :, [0, 1, -2, -1]].all()  # chest wall in front and behind, to the last pixel
    image = images_from_volume(cut, PreprocessConfig(size=64))[0, 0]
    assert (image[:, [0, 31, 32, 63]] > -0.9).any()


def test_slices_without_body_are_dropped() -> None:
    volume = chest(slices=20)
    hu = volume.hu.copy()
    hu[:6] = -1000.0
    hu[15:] = -1000.0
    hu[15:, 90:110, 90:110] = TISSUE_HU  # 40 x 40 mm of a frame of about 300 x 300 mm
    images = images_from_volume(Volume(hu=hu, spacing_mm=volume.spacing_mm), PreprocessConfig(images_per_patient=50))
    assert len(images) == 9
    assert all(image.mean() > -0.9 for image in images)


def test_images_come_evenly_from_feet_to_head() -> None:
    hu = np.stack([np.full((60, 60), z * 10.0 - 200, dtype=np.float32) for z in range(40)])
    images = images_from_volume(
        Volume(hu=hu, spacing_mm=(2, 4, 4)),
        PreprocessConfig(size=8, images_per_patient=4, window_hu=(-200, 200)),
    )
    assert np.round((images.mean(axis=(1, 2, 3)) + 1) * 20).tolist() == [5, 15, 25, 35]


def test_a_single_slice_gives_one_image() -> None:
    assert images_from_volume(chest(slices=1), PreprocessConfig(size=32)).shape == (1, 1, 32, 32)


@given(st.integers(1, 500), st.integers(1, 64))
def test_evenly_spaced_indices(count: int, most: int) -> None:
    chosen = evenly(count, most)
    assert len(chosen) == min(count, most)
    gaps = np.diff(chosen)
    assert abs(chosen[0] - (count - 1 - chosen[-1])) <= 1
    assert chosen[0] >= 0
    assert chosen[-1] < count
    assert all(gaps > 0)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def test_patches_have_the_stated_voxel_size() -> None:
    # A ball of 50 mm radius: its volume in voxels of 4 x 3 x 2.5 mm, whatever the scanner's grid was.
    spacing = (3.0, 1.5, 1.5)
    axes = [(np.arange(round(160 / s)) + 0.5) * s - 80 for s in spacing]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    ball = np.where(z**2 + y**2 + x**2 <= 50**2, 0.0, -1000.0).astype(np.float32)
    config = PreprocessConfig(spatial_dims=3, size=48, spacing_mm=(4, 3, 2.5), window_hu=(-1000, 0))
    images = images_from_volume(Volume(hu=ball, spacing_mm=spacing), config)
    assert images.shape == (1, 1, 48, 48, 48)
    voxels = ((images + 1) / 2).sum()
    assert voxels == pytest.approx(4 / 3 * math.pi * 50**3 / (4 * 3 * 2.5), rel=0.03)
    profile = ((images[0, 0] + 1) / 2).max(axis=(1, 2)).sum(), ((images[0, 0] + 1) / 2).max(axis=(0, 1)).sum()
    assert profile == pytest.approx((100 / 4, 100 / 2.5), abs=1.5)


def test_patches_tile_the_body_and_hold_enough_of_it() -> None:
    config = PreprocessConfig(spatial_dims=3, size=16, spacing_mm=(5, 5, 5), images_per_patient=100)
    volume = chest(slices=32)
    images = images_from_volume(volume, config)
    assert images.shape[1:] == (1, 16, 16, 16)
    # 32 x 38 x 62 voxels: 2 x 3 x 4 tiles, of which those in the corners beside the ellipse may drop out.
    assert 16 <= len(images) <= 24
    few = images_from_volume(volume, PreprocessConfig(**{**asdict(config), "images_per_patient": 3}))
    assert len(few) == 3
    every = {image.tobytes() for image in images}
    assert all(image.tobytes() in every for image in few)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_no_body_is_refused(spatial_dims: int) -> None:
    config = PreprocessConfig(spatial_dims=spatial_dims, spacing_mm=(5, 5, 5) if spatial_dims == 3 else None)
    air = Volume(hu=np.full((6, 64, 64), -1000, dtype=np.float32), spacing_mm=(5, 2, 2))
    with pytest.raises(TooLittleBody, match=r"^body fraction = 0.0: ") as refusal:
        images_from_volume(air, config)
    assert isinstance(refusal.value, SeriesRefused)


def test_one_slice_is_no_patch() -> None:
    with pytest.raises(TooLittleBody):
        images_from_volume(chest(slices=1), PreprocessConfig(spatial_dims=3, size=64, spacing_mm=(5, 5, 5)))


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(3, 40), st.integers(3, 40)),
    st.tuples(*[st.floats(0.3, 8)] * 3),
    st.sampled_from([2, 3]),
    st.integers(0, 2**16),
)
def test_any_volume_gives_valid_images_or_is_refused(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], dims: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    hu = rng.uniform(-3024, 3071, shape).astype(np.float32)
    hu[:, : shape[1] // 2] = rng.uniform(-100, 100)
    config = PreprocessConfig(
        spatial_dims=dims, size=16, images_per_patient=3, spacing_mm=(3, 3, 3) if dims == 3 else None
    )
    try:
        images = images_from_volume(Volume(hu=hu, spacing_mm=spacing), config)
    except TooLittleBody:
        return
    assert images.shape[1:] == (1, *[16] * dims)
    assert 1 <= len(images) <= 3
    assert np.isfinite(images).all()
    assert np.abs(images).max() <= 1.0


def test_configuration_survives_json() -> None:
    for config in (PreprocessConfig(), PreprocessConfig(spatial_dims=3, spacing_mm=(2, 2, 2))):
        again = PreprocessConfig(**json.loads(json.dumps(asdict(config))))
        assert again == config
        assert isinstance(again.window_hu, tuple)
        hash(again)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spatial_dims", 4),
        ("spatial_dims", 1),
        ("size", 4),
        ("size", 64.0),
        ("size", True),
        ("images_per_patient", 0),
        ("window_hu", (600.0, -1000.0)),
        ("window_hu", (0.0,)),
        ("window_hu", (-1000.0, float("nan"))),
        ("spacing_mm", (1.0, 1.0, 1.0)),
    ],
)
def test_impossible_configurations_name_the_argument(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} = .*: "):
        PreprocessConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0), (1.0, 0.0, 1.0), (1.0, float("inf"), 1.0), (5.0, 26.0, 26.0)])
def test_patches_need_a_voxel_size(spacing: tuple[float, ...] | None) -> None:
    with pytest.raises(ValueError, match=r"^spacing_mm = "):
        PreprocessConfig(spatial_dims=3, spacing_mm=spacing)  # type: ignore[arg-type]
