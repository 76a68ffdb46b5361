from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medical_data.errors import ImpossibleGeometry, ImpossibleHU
from medical_data.volume import Volume


def any_volume(seed: int, *, oblique: float = 0.3) -> Volume:
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    if oblique == 0:
        axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1.0, 1.0], size=(3, 1))
    shape = tuple(int(n) for n in rng.integers(1, 6, size=3))
    return Volume(
        hu=rng.integers(-1000, 1000, size=shape).astype(np.float32),
        spacing_mm=tuple(rng.uniform(0.5, 5, size=3)),
        origin_mm=tuple(rng.uniform(-200, 200, size=3)),
        direction=tuple(tuple(row) for row in axes),
    )


def voxels_in_space(volume: Volume) -> dict[tuple[float, float, float], float]:
    """Patient coordinate of every voxel centre → its HU: what a permutation must not change."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in volume.hu.shape), indexing="ij"), axis=-1)
    steps = np.asarray(volume.direction) * np.asarray(volume.spacing_mm)[:, None]
    points = index.reshape(-1, 3) @ steps + np.asarray(volume.origin_mm)
    return {
        tuple(float(v) for v in point.round(4) + 0.0): float(hu)
        for point, hu in zip(points, volume.hu.ravel(), strict=True)
    }


@given(seed=st.integers(0, 2**32 - 1), oblique=st.sampled_from([0.0, 1.0]))
def test_canonical_moves_no_voxel_in_space(seed: int, oblique: float) -> None:
    volume = any_volume(seed, oblique=oblique)
    canonical = volume.canonical()
    before, after = voxels_in_space(volume), voxels_in_space(canonical)
    assert len(before) == len(after) == volume.hu.size
    for point, hu in after.items():
        near = min(before, key=lambda p: sum((a - b) ** 2 for a, b in zip(p, point, strict=True)))
        assert np.allclose(near, point, atol=1e-3)
        assert before[near] == hu


@given(seed=st.integers(0, 2**32 - 1), oblique=st.sampled_from([0.0, 1.0]))
def test_canonical_grows_to_superior_posterior_left_and_is_idempotent(seed: int, oblique: float) -> None:
    canonical = any_volume(seed, oblique=oblique).canonical()
    rows = np.asarray(canonical.direction)
    superior_posterior_left = [rows[0, 2], rows[1, 1], rows[2, 0]]
    assert min(superior_posterior_left) >= 0
    if oblique == 0:
        np.testing.assert_array_equal(superior_posterior_left, 1)
    again = canonical.canonical()
    np.testing.assert_array_equal(again.hu, canonical.hu)
    assert again.direction == canonical.direction
    assert again.origin_mm == canonical.origin_mm
    assert again.spacing_mm == canonical.spacing_mm


def test_canonical_of_a_coronal_volume() -> None:
    hu = np.arange(24, dtype=np.float32).reshape(2, 3, 4)  # axes: Anterior, Inferior, Left
    volume = Volume(
        hu=hu, spacing_mm=(5, 2, 1), origin_mm=(10, 20, 30), direction=((0, -1, 0), (0, 0, -1), (1, 0, 0))
    ).canonical()
    np.testing.assert_array_equal(volume.hu, hu[::-1, ::-1].transpose(1, 0, 2))
    assert volume.spacing_mm == (2, 5, 1)
    assert volume.origin_mm == (10, 15, 26)
    assert volume.direction == ((0, 0, 1), (0, 1, 0), (1, 0, 0))


def test_voxels_are_read_only_and_contiguous() -> None:
    volume = Volume(hu=np.zeros((2, 3, 4), np.float32)[:, ::-1], spacing_mm=(1, 1, 1))
    assert volume.hu.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        volume.hu[0, 0, 0] = 1


@pytest.mark.parametrize(
    "hu",
    [
        np.zeros((2, 2, 2)),
        np.zeros((2, 2), np.float32),
        np.zeros((0, 2, 2), np.float32),
        np.full((1, 1, 1), np.nan, np.float32),
        np.full((1, 1, 1), -np.inf, np.float32),
    ],
)
def test_impossible_hu(hu: np.ndarray) -> None:
    with pytest.raises(ImpossibleHU, match="hu = "):
        Volume(hu=hu, spacing_mm=(1, 1, 1))


@pytest.mark.parametrize(
    "geometry",
    [
        {"spacing_mm": (1, 0, 1)},
        {"spacing_mm": (1, -1, 1)},
        {"spacing_mm": (1, np.nan, 1)},
        {"spacing_mm": (1, 1)},
        {"origin_mm": (0, 0, np.inf)},
        {"direction": ((0, 0, 1), (0, 1, 0), (0, 1, 0))},
        {"direction": ((0, 0, 2), (0, 1, 0), (1, 0, 0))},
        {"direction": ((0, 0, np.nan), (0, 1, 0), (1, 0, 0))},
    ],
)
def test_impossible_geometry(geometry: dict[str, object]) -> None:
    with pytest.raises(ImpossibleGeometry, match=next(iter(geometry))):
        Volume(**{"hu": np.zeros((1, 1, 1), np.float32), "spacing_mm": (1, 1, 1)} | geometry)  # type: ignore[arg-type]
