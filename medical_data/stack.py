"""From slice positions to one regular stack: order, distance, and the refusals of what is not one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medical_data.errors import (
    DuplicateSlices,
    GantryTilt,
    ImpossibleGeometry,
    MissingSlices,
    MixedOrientations,
    UnevenSpacing,
)
from medical_data.volume import DIRECTION_TOLERANCE

# Direction cosines of one series are written by one machine; the last digits vary with the export (1e-3 ≈
# 0.06°).
ORIENTATION_TOLERANCE = 1e-3
# Two slices nearer than this are one position: positions are written with at least two decimals.
DUPLICATE_MM = 0.01
# How far a slice centre may lie off the regular grid, in slice distances. Positions rounded to 0.1 mm need
# 0.07 at 0.7 mm; one missing slice gives at least 0.5.
SPACING_TOLERANCE = 0.1
# How far the line of slice positions may lean from the slice normal: 0.5° shears a 300 mm chest by 2.6 mm.
GANTRY_TILT_TOLERANCE_DEG = 0.5
# How far a slice may lie beside the line of the others, in pixels.
LATERAL_TOLERANCE_PIXELS = 0.5
# Voxel edges that a clinical or preclinical CT can have.
SPACING_LIMITS_MM = (0.01, 25.0)


def refuse_spacing(attribute: str, spacing_mm: NDArray[np.float64] | float) -> None:
    """Refuse voxel edges in mm that no scanner has.

    Raises:
        ImpossibleGeometry: not within ``SPACING_LIMITS_MM``.
    """
    low, high = SPACING_LIMITS_MM
    values = np.atleast_1d(np.asarray(spacing_mm, dtype=float))
    if not ((values >= low) & (values <= high)).all():
        raise ImpossibleGeometry(
            attribute=attribute,
            value="\\".join(f"{v:.6g}" for v in values),
            remedy=f"give mm between {low} and {high}",
        )


def refuse_tilt(attribute: str, degrees: float) -> None:
    """Refuse a tilt beyond ``GANTRY_TILT_TOLERANCE_DEG`` (docs/adr/0001-gantry-tilt-is-refused.md).

    Raises:
        GantryTilt: the tilt, either way, is beyond it.
    """
    if not abs(degrees) <= GANTRY_TILT_TOLERANCE_DEG:
        raise GantryTilt(
            attribute=attribute,
            value=f"{degrees:.2f} degrees",
            remedy=f"resample the series upright (tilt at most {GANTRY_TILT_TOLERANCE_DEG} degrees)",
        )


def slice_axes(orientations: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit vectors along which D, H and W of a stack of parallel slices grow.

    Args:
        orientations: ImageOrientationPatient (0020,0037) of each slice [N, 6], LPS.

    Returns:
        [3, 3]: slice normal (row × column, PS3.3 C.7.6.2.1.1), direction of growing rows, of growing columns.

    Raises:
        ImpossibleGeometry: not two orthogonal unit vectors.
        MixedOrientations: slices are not parallel within ``ORIENTATION_TOLERANCE``.
    """
    along_columns, along_rows = orientations[0, :3], orientations[0, 3:]
    gram = np.array([along_columns @ along_columns, along_rows @ along_rows, 1 + along_columns @ along_rows])
    if not np.abs(gram - 1).max() <= DIRECTION_TOLERANCE:
        raise ImpossibleGeometry(
            attribute="ImageOrientationPatient",
            value="\\".join(f"{v:.4g}" for v in orientations[0]),
            remedy="give two orthogonal unit vectors",
        )
    if not np.abs(orientations - orientations[0]).max() <= ORIENTATION_TOLERANCE:
        raise MixedOrientations(
            attribute="ImageOrientationPatient",
            value=f"{len(np.unique(orientations.round(3), axis=0))} different",
            remedy="split the series by orientation",
        )
    normal = np.cross(along_columns, along_rows)
    return np.stack([normal / np.linalg.norm(normal), along_rows, along_columns])


def order_slices(
    positions_mm: NDArray[np.float64], axes: NDArray[np.float64], pixel_mm: float
) -> tuple[NDArray[np.intp], float]:
    """Order of slices along their normal and the distance between them.

    Args:
        positions_mm: ImagePositionPatient (0020,0032) of each slice [N, 3], LPS, N >= 2.
        axes: what :func:`slice_axes` gave.
        pixel_mm: smaller edge of a pixel.

    Returns:
        Indices into ``positions_mm`` [N] with growing distance along the normal, and the slice distance in
        mm.

    Raises:
        DuplicateSlices: two slices within ``DUPLICATE_MM``.
        GantryTilt: the stack leans from the normal beyond ``GANTRY_TILT_TOLERANCE_DEG``.
        MissingSlices: distances are whole multiples of the smallest one, and some are larger than it.
        UnevenSpacing: a slice lies off the regular grid by more than ``SPACING_TOLERANCE`` of the distance.
        ImpossibleGeometry: a slice lies beside the stack, or the distance is none that a scanner has.
    """
    along = positions_mm @ axes[0]
    order = np.argsort(along, kind="stable")
    along, positions_mm = along[order], positions_mm[order]
    gaps = np.diff(along)
    smallest = float(gaps.min())
    if smallest < DUPLICATE_MM:
        raise DuplicateSlices(
            attribute="ImagePositionPatient",
            value=f"{np.count_nonzero(gaps < DUPLICATE_MM)} of {len(along)} slices where another is",
            remedy="keep one phase, reconstruction or copy in a series",
        )

    lean = positions_mm[-1] - positions_mm[0]
    lateral = lean - axes[0] * (along[-1] - along[0])
    refuse_tilt("ImagePositionPatient", float(np.degrees(np.arctan2(np.linalg.norm(lateral), along[-1] - along[0]))))

    step = (along[-1] - along[0]) / (len(along) - 1)
    grid = along[0] + step * np.arange(len(along))
    if np.abs(along - grid).max() > SPACING_TOLERANCE * step:
        multiples = gaps / smallest
        missing = int((np.rint(multiples) - 1).sum())
        if missing and np.abs(multiples - np.rint(multiples)).max() <= SPACING_TOLERANCE:
            raise MissingSlices(
                attribute="ImagePositionPatient",
                value=f"{missing} missing among {len(along)} slices every {smallest:.3f} mm",
                remedy="export the complete series again",
            )
        raise UnevenSpacing(
            attribute="ImagePositionPatient",
            value=f"slice distances from {smallest:.3f} to {gaps.max():.3f} mm",
            remedy=f"give one regular spacing per series (within {SPACING_TOLERANCE:.0%} of the distance)",
        )

    beside = positions_mm - positions_mm[0] - np.outer((along - along[0]) / (along[-1] - along[0]), lean)
    if np.linalg.norm(beside, axis=1).max() > LATERAL_TOLERANCE_PIXELS * pixel_mm + SPACING_TOLERANCE * step:
        raise ImpossibleGeometry(
            attribute="ImagePositionPatient",
            value=f"a slice {np.linalg.norm(beside, axis=1).max():.2f} mm beside the stack",
            remedy="split the series where the table or the field of view moved",
        )
    refuse_spacing("ImagePositionPatient (slice distance)", float(step))
    return order, float(step)
