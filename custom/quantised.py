"""Updates of few bits: what stands on the wire for float32 tensors, and how a site makes good what rounding loses.

Each tensor v becomes the whole numbers round(v / s) with one scale s = max|v| / levels, levels = 2^(bits-1) - 1
(arXiv:2407.14730). What is lost is added to the site's next update, so that over the rounds nothing is (error feedback,
arXiv:1901.09847, algorithm 2). For secure aggregation see :class:`privacy.secagg.encoding.QuantisedEncoding`: there
all sites need one public scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from custom.diffusion.networks import Shapes
from custom.egress import EgressRefused

NUMBERS = "numbers"  # uint8 [⌈size · bits / 8⌉]
SCALES = "scales"  # float32 [tensors], in the sorted order of names

Bits = Literal[4, 8]


def quantised(arrays: Mapping[str, NDArray[np.float32]], *, bits: Bits) -> dict[str, NDArray[Any]]:
    """What is sent for the tensors: all their numbers as one array of bytes, :data:`NUMBERS`, and their :data:`SCALES`.

    Tensors follow each other in the sorted order of names, whole numbers are in two's complement; at 4 bits the first
    of two stands in a byte's low half, and a zero fills up the last byte. One array: each costs half a kilobyte.

    Raises:
        EgressRefused: NaN or infinity.
    """
    names, levels = sorted(arrays), _levels(bits)
    scales, parts = np.zeros(len(names), np.float32), []
    for index, name in enumerate(names):
        array = arrays[name].reshape(-1)
        if not np.isfinite(array).all():
            raise EgressRefused(f"tensor {name!r}: holds NaN or infinity")
        scales[index] = _scale(float(np.abs(array).max(initial=0)), levels)
        whole = np.zeros(array.size, np.int8)
        if scales[index] > 0:
            # Clipped, because the scale was rounded down: by much if it is near float32's least number.
            whole[:] = np.clip(np.rint(array / scales[index]), -levels, levels)
        parts.append(whole)
    return {NUMBERS: _packed(np.concatenate(parts), bits), SCALES: scales}


def dequantised(wire: Mapping[str, Any], *, shapes: Shapes, bits: Bits) -> dict[str, NDArray[np.float32]]:
    """What :func:`quantised` stands for, in the order of ``shapes``; all of it is finite.

    Raises:
        EgressRefused: anything that :func:`quantised` cannot have made of tensors with these shapes.
    """
    if set(wire) != {NUMBERS, SCALES}:
        extra = len(set(wire) - {NUMBERS, SCALES})
        raise EgressRefused(f"update of {bits} bits: must be {NUMBERS!r} and {SCALES!r}; {extra} entries beside them")
    scales = wire[SCALES]
    if type(scales) is not np.ndarray or scales.dtype != np.float32 or scales.shape != (len(shapes),):
        raise EgressRefused(f"scales: must be a float32 array of shape ({len(shapes)},)")
    highest = scales.astype(np.float64) * _levels(bits)
    if not ((highest >= 0) & (highest <= np.finfo(np.float32).max)).all():  # NaN is neither
        raise EgressRefused("scales: must be finite, not negative, and such that no value overflows")
    names = sorted(shapes)
    sizes = [math.prod(shapes[name]) for name in names]
    whole = _unpacked(wire[NUMBERS], size=sum(sizes), bits=bits)
    found: dict[str, NDArray[np.float32]] = {}
    for name, scale, part in zip(names, scales, np.split(whole, np.cumsum(sizes)[:-1]), strict=True):
        if scale == 0 and part.any():
            raise EgressRefused(f"tensor {name!r}: numbers under a scale of zero")
        found[name] = np.multiply(part, scale, dtype=np.float32).reshape(shapes[name])
    return {name: found[name] for name in shapes}


def packed_bytes(shapes: Shapes, *, bits: Bits) -> int:
    """Bytes of the numbers of tensors with these shapes."""
    return (sum(math.prod(shape) for shape in shapes.values()) * bits + 7) // 8


def fed_back(
    difference: Mapping[str, NDArray[np.float32]], residual: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """What a site wants to send: this round's difference and what earlier rounds lost of the same tensors.

    Args:
        difference: of this round.
        residual: what :func:`lost` said, by name; a missing one is zero, and one that this round does not send waits.

    Raises:
        ValueError: a residual of another shape.
    """
    wanted = dict(difference)
    for name in wanted.keys() & residual.keys():
        if residual[name].shape != wanted[name].shape:
            raise ValueError(
                f"residual of {name!r} has shape {residual[name].shape}, its tensor {wanted[name].shape}: "
                "it is another model's; drop it"
            )
        wanted[name] = np.asarray(wanted[name] + residual[name])
    return wanted


def lost(
    wanted: Mapping[str, NDArray[np.float32]], sent: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """The new residuals of the tensors that were sent: what :func:`fed_back` gave without what went out."""
    return {name: np.asarray(wanted[name] - sent[name]) for name in sent}


def _levels(bits: Bits) -> int:
    return int(2 ** (bits - 1) - 1)


def _scale(largest: float, levels: int) -> np.float32:
    """The step in float32, rounded down: its multiples do not pass the largest value."""
    scale = np.float32(largest / levels)
    return np.nextafter(scale, np.float32(0)) if float(scale) * levels > largest else scale


def _packed(whole: NDArray[np.int8], bits: Bits) -> NDArray[np.uint8]:
    codes = whole.view(np.uint8)
    if bits == 8:
        return codes
    halves = np.append(codes & 0x0F, np.zeros(codes.size % 2, np.uint8))
    pairs: NDArray[np.uint8] = halves[0::2] | halves[1::2] << 4
    return pairs


def _unpacked(codes: Any, *, size: int, bits: Bits) -> NDArray[np.int8]:
    wanted = (size * bits + 7) // 8
    if type(codes) is not np.ndarray or codes.dtype != np.uint8 or codes.shape != (wanted,):
        raise EgressRefused(f"numbers: must be a uint8 array of shape ({wanted},)")
    whole = codes.view(np.int8)
    if bits == 4:
        # Each half in the upper half of a byte, and down again with its sign.
        halves = np.stack([codes << 4, codes], axis=-1).reshape(-1).view(np.int8) >> 4
        if halves[size:].any():
            raise EgressRefused("numbers: the half byte after the last one must be zero")
        whole = halves[:size]
    if (whole == -_levels(bits) - 1).any():
        raise EgressRefused(f"numbers: hold {-_levels(bits) - 1}, which no rounding makes")
    return whole
