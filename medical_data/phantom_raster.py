"""Shapes in patient millimetres → how much of each voxel they cover.

Coverage is in [0, 1] with an edge one pixel wide (the partial volume effect in the plane). Across slices the plane is
thin: a shape counts where the slice's central plane cuts it. All arrays are float32, axes [D, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# float32 throughout; numpy's stubs lose the width in mixed arithmetic, the tests do not.
Array = NDArray[np.floating[Any]]

# Tubes rasterised together, each on a patch as large as the largest of them needs: they are sorted by size before.
_TUBES_AT_ONCE = 128

# z, y, x in mm: the knots of random fields fill this box; beyond it a field continues its edge.
_NOISE_BOX_MM = ((-150.0, 400.0), (-320.0, 320.0), (-320.0, 320.0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Voxel centres in the patient's own axes: x to Left, y to Posterior, z to Superior, in mm.

    Attributes:
        z: slice positions, float32 [D].
        shape: pixels along H and along W.
        pixel_mm: distance of pixel centres.
        centre_mm: (x, y) of the image centre before rotation, that is, how far the patient lies off centre.
        rotation_rad: roll of the patient about z.
    """

    z: Array
    shape: tuple[int, int]
    pixel_mm: float
    centre_mm: tuple[float, float]
    rotation_rad: float

    @cached_property
    def _rotation(self) -> Array:
        c, s = np.cos(self.rotation_rad), np.sin(self.rotation_rad)
        return np.array([[c, s], [-s, c]], dtype=np.float32)

    def points(self, row: NDArray[np.intp], column: NDArray[np.intp]) -> tuple[Array, Array]:
        """(x, y) of pixel centres in mm; rows and columns broadcast."""
        middle_row, middle_column = ((n - 1) / 2 for n in self.shape)
        v = (row - middle_row).astype(np.float32) * self.pixel_mm + self.centre_mm[1]
        u = (column - middle_column).astype(np.float32) * self.pixel_mm + self.centre_mm[0]
        r = self._rotation
        return (r[0, 0] * u + r[0, 1] * v).astype(np.float32), (r[1, 0] * u + r[1, 1] * v).astype(np.float32)

    def index(self, x: Array, y: Array) -> tuple[Array, Array]:
        """(row, column) of points in mm, as real numbers: the inverse of :meth:`points`."""
        r = self._rotation
        u, v = r[0, 0] * x + r[1, 0] * y - self.centre_mm[0], r[0, 1] * x + r[1, 1] * y - self.centre_mm[1]
        middle_row, middle_column = ((n - 1) / 2 for n in self.shape)
        return v / self.pixel_mm + middle_row, u / self.pixel_mm + middle_column

    @cached_property
    def xyz(self) -> tuple[Array, Array, Array]:
        """x [1, H, W], y [1, H, W] and z [D, 1, 1] in mm."""
        x, y = self.points(np.arange(self.shape[0])[:, None], np.arange(self.shape[1])[None, :])
        return x[None], y[None], self.z[:, None, None]

    def box(self, x: tuple[float, float], y: tuple[float, float]) -> tuple[slice, slice, slice]:
        """The voxels of all slices that hold the given ranges of x and y in mm."""
        corners = np.array([(u, v) for u in x for v in y], dtype=np.float32)
        rows, columns = self.index(corners[:, 0], corners[:, 1])
        return (
            slice(None),
            slice(max(int(rows.min()), 0), max(int(rows.max()) + 2, 0)),
            slice(max(int(columns.min()), 0), max(int(columns.max()) + 2, 0)),
        )

    def crop(self, box: tuple[slice, slice, slice]) -> Grid:
        """The grid of a box of its voxels, as :meth:`box` returns it."""
        z = self.z[box[0]]
        spans = [s.indices(n)[:2] for s, n in zip(box[1:], self.shape, strict=True)]
        shift = [((low + high) / 2 - n / 2) * self.pixel_mm for (low, high), n in zip(spans, self.shape, strict=True)]
        return Grid(
            z=z,
            shape=(spans[0][1] - spans[0][0], spans[1][1] - spans[1][0]),
            pixel_mm=self.pixel_mm,
            centre_mm=(self.centre_mm[0] + shift[1], self.centre_mm[1] + shift[0]),
            rotation_rad=self.rotation_rad,
        )

    def inside(self, distance: Array) -> Array:
        """Coverage of the shape whose signed distance in mm (negative inside) is given."""
        return np.asarray(np.clip(distance * np.float32(-1 / self.pixel_mm) + np.float32(0.5), 0, 1))


def ellipse(x: Array, y: Array, half_x: Array | float, half_y: Array | float, square: float = 0.0) -> Array:
    """Signed distance to an ellipse around 0, in mm, exact to first order near the contour.

    p = |(x/a, y/b)|, distance = (p − s) / |∇p|, with s = 1 − square · cos 4φ swelling the diagonals.
    """
    u, v = x / half_x, y / half_y
    p2 = u * u + v * v + np.float32(1e-6)
    p = np.sqrt(p2)
    slope = np.sqrt((u / half_x) ** 2 + (v / half_y) ** 2) + np.float32(1e-6)
    edge: Array | float = 1.0
    if square:
        cos_2 = (u * u - v * v) / p2
        edge = 1 + square - 2 * square * cos_2 * cos_2
    return (p - edge) * p / slope


def ellipsoid(grid: Grid, centre: Array, axes: Array) -> tuple[tuple[slice, slice, slice], Array]:
    """Coverage of an ellipsoid and the box of voxels outside which it is 0.

    Args:
        grid: the voxels.
        centre: (x, y, z) in mm, shape (3,).
        axes: semi-axes as row vectors in mm, orthogonal, shape (3, 3).
    """
    reach = np.sqrt((axes**2).sum(axis=0))
    lengths = np.sqrt((axes**2).sum(axis=1))
    row, column = (float(v) for v in grid.index(centre[0], centre[1]))
    margin = float(np.hypot(reach[0], reach[1])) / grid.pixel_mm + 2
    near = np.flatnonzero(np.abs(grid.z - centre[2]) <= reach[2] + grid.pixel_mm)
    if near.size == 0:
        return (slice(0, 0), slice(0, 0), slice(0, 0)), np.zeros((0, 0, 0), np.float32)
    low, high = max(int(row - margin), 0), max(int(row + margin) + 1, 0)
    left, right = max(int(column - margin), 0), max(int(column + margin) + 1, 0)
    box = (slice(int(near[0]), int(near[-1]) + 1), slice(low, high), slice(left, right))
    x, y, z = grid.xyz
    plane = (slice(None), *box[1:])
    offset = (x[plane] - centre[0], y[plane] - centre[1], z[box[0]] - centre[2])
    p2: Array = np.float32(1e-6) + sum(
        ((sum(o * float(axis[i]) for i, o in enumerate(offset)) / float(n * n)) ** 2)
        for axis, n in zip(axes, lengths, strict=True)
    )
    p = np.sqrt(p2)
    return box, grid.inside((p - 1) * float(lengths.min()))


class Segments(NamedTuple):
    """Straight pieces of round tubes in mm.

    Attributes:
        start: (x, y, z) of one end of each, shape (N, 3).
        end: the other end, shape (N, 3).
        radius: at both ends, shape (N, 2).
    """

    start: Array
    end: Array
    radius: Array


def tubes(grid: Grid, segments: Segments) -> Array:
    """Coverage of round tubes with hemispherical ends, their union, float32 [D, H, W].

    Args:
        grid: the voxels.
        segments: those thinner than a pixel cover it in part.
    """
    start, end, radius = segments
    height, width = grid.shape
    cover = np.zeros((grid.z.size, height, width), dtype=np.float32)
    widest = radius.max(axis=1) + grid.pixel_mm
    low, high = np.minimum(start[:, 2], end[:, 2]) - widest, np.maximum(start[:, 2], end[:, 2]) + widest
    segment, plane = np.nonzero((grid.z >= low[:, None]) & (grid.z <= high[:, None]))
    if segment.size == 0:
        return cover
    a, b, r, z = start[segment], end[segment], radius[segment], grid.z[plane]
    # The part of the segment within reach of the plane, in fractions of its length.
    rise = b[:, 2] - a[:, 2]
    rise = np.where(np.abs(rise) < 1e-3, np.float32(1e-3), rise)
    cuts = np.stack([(z - widest[segment] - a[:, 2]) / rise, (z + widest[segment] - a[:, 2]) / rise])
    first, last = np.clip(cuts.min(axis=0), 0, 1)[:, None], np.clip(cuts.max(axis=0), 0, 1)[:, None]
    rows, columns = grid.index(*(np.stack([a + f * (b - a) for f in (first, last)])[..., i] for i in (0, 1)))
    reach = widest[segment] / grid.pixel_mm
    top = np.floor(rows.min(axis=0) - reach).astype(np.intp)
    left = np.floor(columns.min(axis=0) - reach).astype(np.intp)
    extent = np.maximum(np.ceil(rows.max(axis=0) + reach) - top, np.ceil(columns.max(axis=0) + reach) - left)
    by_size = np.argsort(extent, kind="stable")
    for chunk in np.array_split(by_size, -(-by_size.size // _TUBES_AT_ONCE)):
        step = np.arange(int(extent[chunk].max()) + 1)
        row, column = (top[chunk, None] + step)[:, :, None], (left[chunk, None] + step)[:, None, :]
        value = _tube_patches(grid, (row, column), (a[chunk], b[chunk], r[chunk], z[chunk]))
        there = (value > 0) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        flat = (plane[chunk, None, None] * height + row) * width + column
        np.maximum.at(cover.reshape(-1), flat[there], value[there])
    return cover


def _tube_patches(
    grid: Grid, pixels: tuple[NDArray[np.intp], NDArray[np.intp]], tube: tuple[Array, Array, Array, Array]
) -> Array:
    """Coverage [M, S, S] of M tubes, each on its own patch of S x S pixels."""
    a, b, r, z = (v[:, None, None] for v in tube)
    x, y = grid.points(*pixels)
    along = b - a
    dx, dy, dz = x - a[..., 0], y - a[..., 1], z - a[..., 2]
    dot = dx * along[..., 0] + dy * along[..., 1] + dz * along[..., 2]
    f = np.clip(dot / np.maximum((along**2).sum(axis=-1), np.float32(1e-6)), 0, 1)
    distance = np.sqrt((dx - f * along[..., 0]) ** 2 + (dy - f * along[..., 1]) ** 2 + (dz - f * along[..., 2]) ** 2)
    width = r[..., 0] + f * (r[..., 1] - r[..., 0])
    thin = np.minimum(1, 2 * width / np.float32(grid.pixel_mm))
    return np.asarray(grid.inside(distance - width) * thin)


def smooth_noise(grid: Grid, pitch_mm: float, rng: np.random.Generator) -> Array:
    """Random field of unit variance at its knots, trilinear between knots ``pitch_mm`` apart, float32 [D, H, W].

    The knots lie fixed in the patient's z, so the field is the same tissue whatever slices are cut from it.
    """
    down, across = ((np.arange(n) - (n - 1) / 2) * grid.pixel_mm for n in grid.shape)
    positions = (grid.z.astype(np.float64), down + grid.centre_mm[1], across + grid.centre_mm[0])
    counts = [int((high - low) / pitch_mm) + 2 for low, high in _NOISE_BOX_MM]
    field: Array = rng.standard_normal(counts, dtype=np.float32)
    for axis, ((low, _), position) in enumerate(zip(_NOISE_BOX_MM, positions, strict=True)):
        index = np.clip((position - low) / pitch_mm, 0, counts[axis] - 1.001)
        knot = index.astype(np.intp)
        between = (index - knot).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
        before, after = field.take(knot, axis=axis), field.take(knot + 1, axis=axis)
        field = np.asarray(before + (after - before) * between)
    return field
