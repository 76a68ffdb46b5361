"""Samples beside the patients that they resemble: for the site's own copy of the report, and for no other."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from privacy.audit.errors import Unattackable

WARNING = "This copy holds images of patients. It must not leave the site."


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A sample and the training image nearest to it.

    Attributes:
        sample: index of the sample.
        similarity: by the measure of the copy screen.
        sample_image: uint8 [H, W].
        patient_image: uint8 [H, W]; of a volume, one slice.

    Raises:
        Unattackable: images that are not uint8 [H, W].
    """

    sample: int
    similarity: float
    sample_image: NDArray[np.uint8]
    patient_image: NDArray[np.uint8]

    def __post_init__(self) -> None:
        for name in ("sample_image", "patient_image"):
            image = getattr(self, name)
            if image.ndim != 2 or image.dtype != np.uint8 or image.size == 0:
                found = (str(image.dtype), image.shape)
                raise Unattackable(argument=name, value=found, remedy="give uint8 [H, W], of a volume its middle slice")


@dataclass(frozen=True, kw_only=True, eq=False)
class Gallery:
    """The pairs that are shown.

    Attributes:
        pairs: most alike first.
    """

    pairs: tuple[Pair, ...]


def png(image: NDArray[np.uint8]) -> bytes:
    """A grey image, uint8 [H, W], as PNG."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return stream.getvalue()
