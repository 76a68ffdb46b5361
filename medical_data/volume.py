"""One CT volume in Hounsfield units with its place in the patient."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from medical_data.errors import ImpossibleGeometry, ImpossibleHU

Vector = tuple[float, float, float]

# Orthonormality of three unit vectors that were written as decimal strings of 16 characters (DICOM VR DS).
DIRECTION_TOLERANCE = 1e-3

# Component of LPS along which the canonical axes D, H, W grow: Superior (z), Posterior (y), Left (x).
_CANONICAL_COMPONENT = (2, 1, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """A CT volume; one that was built is valid.

    Axis order is [D, H, W]. After :meth:`canonical` the index grows towards the patient's Superior (D),
    Posterior (H) and Left (W), which is how an axial CT is displayed by radiological convention.

    Attributes:
        hu: Hounsfield units, float32 [D, H, W], finite, C-contiguous and read-only.
        spacing_mm: distance between voxel centres along (D, H, W) in mm.
        origin_mm: patient coordinates (DICOM LPS, mm) of the centre of voxel [0, 0, 0];
            ImagePositionPatient (0020,0032) of the first slice.
        direction: unit vectors in LPS along which the index of D, H and W grows, one row an axis.

    Raises:
        ImpossibleHU: not a finite float32 array of three non-empty axes.
        ImpossibleGeometry: spacing not positive, origin not finite, or directions not orthonormal.
    """

    hu: NDArray[np.float32]
    spacing_mm: Vector
    origin_mm: Vector = (0.0, 0.0, 0.0)
    direction: tuple[Vector, Vector, Vector] = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))

    def __post_init__(self) -> None:
        if self.hu.dtype != np.float32 or self.hu.ndim != 3 or self.hu.size == 0:
            raise ImpossibleHU(
                attribute="hu",
                value=f"{self.hu.dtype} {self.hu.shape}",
                remedy="give a non-empty float32 array [D, H, W]",
            )
        if not np.isfinite(self.hu).all():
            raise ImpossibleHU(attribute="hu", value="non-finite voxels", remedy="check the rescale and the pixel data")
        if len(self.spacing_mm) != 3 or not all(np.isfinite(s) and s > 0 for s in self.spacing_mm):
            raise ImpossibleGeometry(attribute="spacing_mm", value=self.spacing_mm, remedy="give three positive mm")
        if len(self.origin_mm) != 3 or not np.isfinite(self.origin_mm).all():
            raise ImpossibleGeometry(attribute="origin_mm", value=self.origin_mm, remedy="give three finite mm in LPS")
        rows = np.asarray(self.direction, dtype=float)
        # `<=` under `not`: NaN compares false and is refused.
        if rows.shape != (3, 3) or not np.abs(rows @ rows.T - np.eye(3)).max() <= DIRECTION_TOLERANCE:
            raise ImpossibleGeometry(
                attribute="direction", value=self.direction, remedy="give orthonormal unit vectors"
            )
        frozen = np.ascontiguousarray(self.hu)
        frozen.flags.writeable = False
        object.__setattr__(self, "hu", frozen)

    def canonical(self) -> Volume:
        """The same voxels with axes permuted and flipped so that indices grow to Superior, Posterior, Left.

        An oblique scan keeps its obliqueness: each axis takes the patient direction it is nearest to, all
            three
        at once (the permutation with the largest sum of |cosines|). No voxel is interpolated.
        """
        rows = np.asarray(self.direction, dtype=float)
        # Ties (45° between axes) go to the permutation that comes first, i.e. to the order as it is.
        order = max(
            permutations(range(3)),
            key=lambda axes: sum(abs(rows[a, c]) for a, c in zip(axes, _CANONICAL_COMPONENT, strict=True)).round(9),
        )
        hu = self.hu.transpose(order)
        rows = rows[list(order)]
        spacing = np.asarray(self.spacing_mm, dtype=float)[list(order)]
        origin = np.asarray(self.origin_mm, dtype=float)
        backwards = [axis for axis in range(3) if rows[axis, _CANONICAL_COMPONENT[axis]] < 0]
        for axis in backwards:
            origin = origin + (hu.shape[axis] - 1) * spacing[axis] * rows[axis]
            rows[axis] = -rows[axis]
        depth, height, width = rows
        return Volume(
            hu=np.flip(hu, axis=tuple(backwards)),
            spacing_mm=_vector(spacing),
            origin_mm=_vector(origin),
            direction=(_vector(depth), _vector(height), _vector(width)),
        )


def _vector(values: NDArray[np.float64]) -> Vector:
    x, y, z = (float(v) + 0.0 for v in values)  # + 0.0 turns -0.0 into 0.0
    return x, y, z
