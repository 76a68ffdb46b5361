from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medical_data.phantom_raster import Grid, Segments, ellipse, ellipsoid, smooth_noise, tubes


def grid_of(rotation: float = 0.1, pixel_mm: float = 2.0) -> Grid:
    z = np.arange(-30, 31, 5, dtype=np.float32)
    return Grid(z=z, shape=(40, 48), pixel_mm=pixel_mm, centre_mm=(3.0, -5.0), rotation_rad=rotation)


def all_points(grid: Grid) -> np.ndarray:
    x, y, z = np.broadcast_arrays(*grid.xyz)
    return np.stack([x, y, z], axis=-1).astype(np.float64)


@given(rotation=st.floats(-3, 3), row=st.integers(-50, 100), column=st.integers(-50, 100))
def test_index_inverts_points(rotation: float, row: int, column: int) -> None:
    grid = grid_of(rotation)
    x, y = grid.points(np.array(row), np.array(column))
    assert [float(v) for v in grid.index(x, y)] == pytest.approx([row, column], abs=1e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 200), radius=st.floats(0.3, 12))
def test_tubes_equal_the_distance_to_every_voxel(seed: int, count: int, radius: float) -> None:
    rng = np.random.default_rng(seed)
    grid = grid_of()
    ends = rng.uniform(-70, 70, (2, count, 3)).astype(np.float32)
    radii = (radius * rng.uniform(0.5, 1, (count, 2))).astype(np.float32)
    cover = tubes(grid, Segments(ends[0], ends[1], radii))

    points = all_points(grid)
    expected = np.zeros(cover.shape)
    for a, b, (r_a, r_b) in zip(ends[0].astype(float), ends[1].astype(float), radii.astype(float), strict=True):
        f = np.clip((points - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
        distance = np.linalg.norm(points - a - f[..., None] * (b - a), axis=-1)
        r = r_a + f * (r_b - r_a)
        here = np.clip((r - distance) / grid.pixel_mm + 0.5, 0, 1) * np.minimum(1, 2 * r / grid.pixel_mm)
        expected = np.maximum(expected, here)
    assert cover.dtype == np.float32
    assert cover == pytest.approx(expected, abs=2e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_an_ellipsoid_is_whole_within_its_box(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = grid_of(pixel_mm=1.0)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    axes = (rotation * rng.uniform(5, 14, 3)[:, None]).astype(np.float32)
    centre = rng.uniform(-25, 25, 3).astype(np.float32)
    box, cover = ellipsoid(grid, centre, axes)
    whole = np.zeros((grid.z.size, *grid.shape), np.float32)
    whole[box] = cover
    local = (all_points(grid) - centre) @ axes.T.astype(float) / (np.linalg.norm(axes, axis=1) ** 2)
    p = np.linalg.norm(local, axis=-1)
    assert whole[p > 1.3].max(initial=0) == 0
    assert whole[p < 0.7].min(initial=1) == 1


def test_an_ellipse_is_a_distance_near_its_contour() -> None:
    angle = np.linspace(0, 2 * np.pi, 90, dtype=np.float32)
    a, b = 120.0, 80.0
    contour = np.stack([a * np.cos(angle), b * np.sin(angle)])
    normal = np.stack([np.cos(angle) / a, np.sin(angle) / b])
    normal /= np.linalg.norm(normal, axis=0)
    for step in (-4.0, 0.0, 4.0):
        x, y = (contour + step * normal).astype(np.float32)
        assert ellipse(x, y, a, b) == pytest.approx(np.full(90, step), abs=0.2)


def test_a_crop_is_the_same_place() -> None:
    grid = grid_of()
    box = (slice(2, 9), slice(5, 31), slice(7, 40))
    part = grid.crop(box)
    assert part.shape == (26, 33)
    for whole, cut, where in zip(grid.xyz, part.xyz, (box, box, box), strict=True):
        full = np.broadcast_to(whole, (grid.z.size, *grid.shape))[where]
        assert np.broadcast_to(cut, full.shape) == pytest.approx(full, abs=1e-3)


def test_noise_belongs_to_the_place_and_not_to_the_slices_cut() -> None:
    grid = grid_of()
    cut = grid.crop((slice(3, 4), slice(None), slice(None)))
    whole, one = (smooth_noise(g, 20.0, np.random.default_rng(1)) for g in (grid, cut))
    assert np.array_equal(whole[3:4], one)
    assert whole.dtype == np.float32
    assert np.abs(np.diff(whole, axis=2)).max() < 1.0  # 2 mm of 20 between knots of unit variance
    assert whole.std() > 0.3
