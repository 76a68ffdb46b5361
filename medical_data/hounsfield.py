"""What is a Hounsfield unit and what is not: padding becomes air, impossible values are refused."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medical_data.errors import ImpossibleHU

# Air by the definition of the scale (Hounsfield 1973): -1000 HU; water is 0.
AIR_HU = -1000.0
# Lower end of the scale that scanners store (12 bit with an intercept of -1024). Below it lies only what was
# never measured: pixels outside the field of view, which GE writes as -2000 before and -3024 after the
# rescale.
LOWEST_HU = -1024.0
# No 16-bit file can hold a lower padding value; what lies below is no padding but an error.
LOWEST_PADDING_HU = -65536.0
# Upper end of a signed 16-bit scale. Metal on an extended scale reaches about 30 700 HU (12 bit × 10).
HIGHEST_HU = 32767.0
# Lung, fat and air lie below, water and soft tissue (with contrast medium) between the two. Every scan of a
# patient holds some of both; numbers that hold none of one are masks, normalised grey values or values
# without rescale.
FAT_HU = -30.0
SOFT_TISSUE_HU = 300.0
LEAST_FRACTION = 1e-3


def padding_to_air(hu: NDArray[np.float32], padding: NDArray[np.bool_] | None = None) -> int:
    """Set what was never measured to air, in place.

    Args:
        hu: Hounsfield units of any shape; changed in place.
        padding: same shape, true where the file says that a pixel is padding (PixelPaddingValue (0028,0120)).

    Returns:
        How many voxels were set.
    """
    unmeasured = (hu < LOWEST_HU) & (hu >= LOWEST_PADDING_HU)
    if padding is not None:
        unmeasured |= padding
    hu[unmeasured] = AIR_HU
    return int(np.count_nonzero(unmeasured))


def refuse_impossible(hu: NDArray[np.float32], *, replaced: int, attribute: str) -> None:
    """Refuse numbers that are not Hounsfield units of a patient.

    Args:
        hu: Hounsfield units of any shape, after :func:`padding_to_air`.
        replaced: how many of these voxels were set to air there and therefore say nothing.
        attribute: where the numbers come from, for the message.

    Raises:
        ImpossibleHU: voxels that are not finite, not between ``LOWEST_HU`` and ``HIGHEST_HU``, or fewer than
            ``LEAST_FRACTION`` of them below ``FAT_HU`` or in the range of soft tissue.
    """
    if not np.isfinite(hu).all():
        raise ImpossibleHU(
            attribute=attribute, value="non-finite voxels", remedy="export the series again from its source"
        )
    lowest, highest = float(hu.min()), float(hu.max())
    if lowest < LOWEST_HU:
        raise ImpossibleHU(
            attribute=attribute,
            value=f"down to {lowest:.0f} HU",
            remedy="nothing absorbs less than nothing: export the series again",
        )
    if highest > HIGHEST_HU:
        raise ImpossibleHU(
            attribute=attribute,
            value=f"up to {highest:.0f} HU",
            remedy=f"above {HIGHEST_HU:.0f} HU the rescale or the sign is wrong: export the series again",
        )
    measured = hu.size - replaced
    dark = int(np.count_nonzero(hu < FAT_HU)) - replaced
    tissue = int(np.count_nonzero((hu >= FAT_HU) & (hu <= SOFT_TISSUE_HU)))
    for count, what in (
        (dark, f"below {FAT_HU:.0f} HU"),
        (tissue, f"{FAT_HU:.0f} to {SOFT_TISSUE_HU:.0f} HU"),
    ):
        if measured == 0 or count < LEAST_FRACTION * measured:
            raise ImpossibleHU(
                attribute=attribute,
                value=f"{count} of {measured} voxels {what}",
                remedy="every patient has both: give Hounsfield units, neither blanked nor normalised",
            )
