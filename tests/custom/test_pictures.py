"""PNG grids show every pixel of every slice, state the window and are written whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from custom.pictures import (
    BACKGROUND,
    GAP,
    WIDE_GAP,
    grey_levels,
    middle_planes,
    real_and_generated,
    sample_grid,
    viewable,
    write_png,
)
from medical_data.preprocess import PreprocessConfig

WINDOW = (-1000.0, 600.0)


def ramps(count: int, size: int) -> NDArray[np.float32]:
    """Slices that all differ in every pixel position."""
    values = np.linspace(-1, 1, count * size * size, dtype=np.float32)
    return values.reshape(count, 1, size, size)


@given(st.integers(0, 255))
def test_every_grey_level_survives(level: int) -> None:
    image = np.full((1, 1, 3, 3), level / 127.5 - 1, np.float32)
    assert (grey_levels(image) == level).all()


def test_ends_of_the_window_are_black_and_white() -> None:
    image = np.array([[[[-1.0, 0.0, 1.0]]]], np.float32)
    assert grey_levels(image).ravel().tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((2, 1, 8, 8)), "float64"),
        (np.zeros((2, 8, 8), np.float32), r"\(2, 8, 8\)"),
        (np.zeros((2, 3, 8, 8), np.float32), r"\[N, 1, H, W\] or \[N, 1, D, H, W\]"),
        (np.zeros((2, 1, 8), np.float32), r"\(2, 1, 8\)"),
        (np.zeros((2, 2, 8, 8, 8), np.float32), r"\(2, 2, 8, 8, 8\)"),
        (np.zeros((2, 1, 8, 8, 8, 8), np.float32), r"\(2, 1, 8, 8, 8, 8\)"),
        (np.zeros((0, 1, 8, 8), np.float32), "non-empty"),
        (np.full((2, 1, 8, 8), np.nan, np.float32), "non-finite"),
        (np.full((2, 1, 8, 8), 1.01, np.float32), "clip it"),
    ],
)
def test_impossible_images_are_refused(images: NDArray[np.float32], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        grey_levels(images)


@pytest.mark.parametrize(("size", "factor"), [(16, 8), (32, 4), (48, 3), (69, 2), (64, 2), (128, 1), (160, 1)])
def test_grid_holds_every_slice_enlarged_without_interpolation(tmp_path: Path, size: int, factor: int) -> None:
    images = ramps(5, size)
    file = tmp_path / "new" / "grid.png"
    sample_grid(images, file, title="five", window_hu=WINDOW, columns=3)
    picture = np.asarray(Image.open(file))
    edge = size * factor + GAP
    for index, slice_ in enumerate(grey_levels(images)[:, 0]):
        top, left = 32 + index // 3 * edge, 32 + index % 3 * edge
        shown = picture[top : top + size * factor, left : left + size * factor]
        assert (shown[::factor, ::factor] == slice_).all()
        assert (shown[factor - 1 :: factor, factor - 1 :: factor] == slice_).all()


def test_the_window_is_stated_and_readable(tmp_path: Path) -> None:
    images = -np.ones((1, 1, 16, 16), np.float32)
    pictures = []
    for window in (WINDOW, (-160.0, 240.0)):
        file = tmp_path / f"{window[0]}.png"
        sample_grid(images, file, title="t", window_hu=window)
        with Image.open(file) as picture:
            assert f"{window[0]:g} to {window[1]:g} HU" in picture.text["Description"]
            pictures.append(np.asarray(picture))
    below = pictures[0][-32:]  # the footer
    assert below.max() > 200
    assert pictures[0].shape != pictures[1].shape or (below != pictures[1][-32:]).any()


def test_a_long_title_is_not_cut(tmp_path: Path) -> None:
    short, long = tmp_path / "s.png", tmp_path / "l.png"
    sample_grid(ramps(1, 16), short, title="t", window_hu=WINDOW)
    sample_grid(ramps(1, 16), long, title="a title much wider than one slice of sixteen pixels", window_hu=WINDOW)
    with Image.open(short) as one, Image.open(long) as other:
        assert other.width > one.width
        margin = np.asarray(other)[:32, -16:]
    assert (margin == margin[0, 0]).all()


def test_real_and_generated_stand_side_by_side(tmp_path: Path) -> None:
    real, generated = np.full((4, 1, 64, 64), -0.5, np.float32), np.full((6, 1, 64, 64), 0.5, np.float32)
    file = tmp_path / "pair.png"
    real_and_generated(real, generated, file, window_hu=WINDOW, columns=2)
    with Image.open(file) as picture:
        shown = np.asarray(picture)
        assert picture.text["Description"].startswith("held-out patients (real), generated")
    columns_of = [
        np.nonzero((shown == grey_levels(images)[0, 0, 0, 0]).sum(axis=0) > 100)[0] for images in (real, generated)
    ]
    assert columns_of[0].max() < columns_of[1].min()


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one size"):
        real_and_generated(ramps(2, 16), ramps(2, 32), tmp_path / "pair.png", window_hu=WINDOW)


@pytest.mark.parametrize(
    ("window", "columns"), [((600.0, -1000.0), 8), ((-1e6, 600.0), 8), ((float("nan"), 0.0), 8), (WINDOW, 0)]
)
def test_impossible_layout_is_refused(tmp_path: Path, window: tuple[float, float], columns: int) -> None:
    with pytest.raises(ValueError, match=r"window_hu|columns"):
        sample_grid(ramps(2, 16), tmp_path / "grid.png", title="t", window_hu=window, columns=columns)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "grid.png"
    sample_grid(ramps(2, 16), file, title="t", window_hu=WINDOW)
    before = file.read_bytes()

    def fails(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)  # after the bytes were written, before they are the picture
    with pytest.raises(OSError, match="disk full"):
        write_png(Image.new("L", (4, 4)), file, text={})
    assert file.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["grid.png"]


def test_a_picture_is_replaced_and_never_rewritten_in_place(tmp_path: Path) -> None:
    file, reader = tmp_path / "grid.png", tmp_path / "reader"
    sample_grid(ramps(2, 16), file, title="t", window_hu=WINDOW)
    before = file.read_bytes()
    reader.hardlink_to(file)  # what a program sees that opened the old picture
    sample_grid(-ramps(2, 16), file, title="t", window_hu=WINDOW)
    assert reader.read_bytes() == before != file.read_bytes()


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        sample_grid(ramps(3, 32), tmp_path / f"{name}.png", title="t", window_hu=WINDOW)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# --- volumes ---


def cells(*shape: int) -> NDArray[np.float32]:
    """Volumes that all differ in every voxel."""
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape[0], 1, *shape[1:])


def test_slices_are_viewable_as_they_are() -> None:
    images = ramps(3, 16)
    assert viewable(images, PreprocessConfig(size=16)) is images


def test_viewable_takes_only_what_the_preprocessing_makes() -> None:
    volumes = PreprocessConfig(spatial_dims=3, size=16, spacing_mm=(1, 1, 1))
    with pytest.raises(ValueError, match=r"give non-empty float32 \[N, 1, D, H, W\]"):
        viewable(ramps(2, 16), volumes)
    with pytest.raises(ValueError, match=r"give non-empty float32 \[N, 1, H, W\]"):
        viewable(cells(2, 16, 16, 16), PreprocessConfig(size=16))


def test_every_voxel_of_a_volume_has_a_grey_level() -> None:
    volumes = cells(2, 4, 5, 6)
    levels = grey_levels(volumes)
    assert (levels.shape, levels.dtype) == (volumes.shape, np.uint8)
    assert (levels[:, 0, 2] == grey_levels(volumes[:, :, 2])[:, 0]).all()


@given(st.tuples(*[st.integers(1, 9)] * 4), st.floats(0.5, 20))
def test_the_planes_of_cubic_voxels_are_the_middle_ones_unchanged(shape: tuple[int, ...], mm: float) -> None:
    """Written anew, voxel by voxel: rows from Superior to Inferior, columns from the patient's Right to Left."""
    volumes = cells(*shape)
    count, depth, height, width = shape
    pictures = middle_planes(volumes, (mm, mm, mm))
    assert pictures.shape == (count, 1, max(depth, height), 2 * width + height + 2 * GAP)
    shown = np.zeros(pictures.shape, bool)

    def at(image: int, row: int, column: int, high: int) -> np.float32:
        place = image, 0, (max(depth, height) - high) // 2 + row, column
        shown[place] = True
        return pictures[place]

    for image in range(count):
        volume = volumes[image, 0]
        for y in range(height):
            for x in range(width):
                assert at(image, y, x, height) == volume[depth // 2, y, x]
        for z in range(depth):
            for x in range(width):
                assert at(image, depth - 1 - z, width + GAP + x, depth) == volume[z, height // 2, x]
            for y in range(height):
                assert at(image, depth - 1 - z, 2 * (width + GAP) + y, depth) == volume[z, y, width // 2]
    assert (grey_levels(pictures)[~shown] == BACKGROUND).all()


def test_proportions_are_true_and_no_slice_is_lost() -> None:
    volumes = np.zeros((1, 1, 8, 6, 6), np.float32)
    volumes += np.linspace(-1, 1, 8, dtype=np.float32)[:, None, None]  # brighter towards Superior
    thick = middle_planes(volumes, (3.0, 1.0, 1.0))[0, 0]
    assert thick.shape == (24, 6 + GAP + 6 + GAP + 6)
    places = np.clip((np.arange(24) + 0.5) / 3 - 0.5, 0, 7)
    wanted = np.interp(places, np.arange(8), np.linspace(-1, 1, 8))[::-1]
    for column in (6 + GAP, 6 + GAP + 6 + GAP):
        assert thick[:, column] == pytest.approx(wanted, abs=1e-6)
    thin = middle_planes(volumes, (1.0, 2.0, 2.0))[0, 0]
    assert thin.shape == (12, 12 + GAP + 12 + GAP + 12)
    assert thin[2:10, 12 + GAP] == pytest.approx(np.linspace(1, -1, 8), abs=1e-6)


def test_a_grid_of_volumes_is_visible_and_not_too_wide(tmp_path: Path) -> None:
    pictures = middle_planes(cells(5, 16, 32, 32), (1.0, 1.0, 1.0))
    sample_grid(pictures, tmp_path / "grid.png", title="five", window_hu=WINDOW)
    shown = np.asarray(Image.open(tmp_path / "grid.png"))
    high, wide = 4 * 32 + WIDE_GAP, 4 * pictures.shape[3] + WIDE_GAP
    assert shown.shape == (2 * high - WIDE_GAP + 64, 3 * wide - WIDE_GAP + 64)  # 3 in a row instead of 8
    for index, levels in enumerate(grey_levels(pictures)[:, 0]):
        top, left = 32 + index // 3 * high, 32 + index % 3 * wide
        assert (shown[top : top + high - WIDE_GAP : 4, left : left + wide - WIDE_GAP : 4] == levels).all()


def test_real_and_generated_volumes_stand_side_by_side(tmp_path: Path) -> None:
    config = PreprocessConfig(spatial_dims=3, size=16, spacing_mm=(1, 2, 2))
    real, generated = (np.full((3, 1, 16, 16, 16), grey, np.float32) for grey in (-0.5, 0.5))
    real_and_generated(viewable(real, config), viewable(generated, config), tmp_path / "pair.png", window_hu=WINDOW)
    shown = np.asarray(Image.open(tmp_path / "pair.png"))
    columns_of = [
        np.nonzero((shown == grey_levels(one)[0, 0, 0, 0, 0]).sum(axis=0) > 100)[0] for one in (real, generated)
    ]
    assert columns_of[0].max() < columns_of[1].min()


def test_volumes_are_no_picture_by_themselves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t = float32 \(2, 1, 8, 8, 8\): give non-empty float32 \[N, 1, H, W\]"):
        sample_grid(cells(2, 8, 8, 8), tmp_path / "grid.png", title="t", window_hu=WINDOW)
    assert not list(tmp_path.iterdir())
