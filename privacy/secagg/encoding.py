"""Numbers as integers of a ring, such that the sum over all sites cannot overflow.

A site's values are clipped to a public bound, weighted, and rounded to whole numbers of at most (2^(b-1) - 1)/n in
absolute value, for b bits and n sites: the sum of n of them lies within ±(2^(b-1) - 1), whatever they are, and is read
back from two's complement. The weight is one more coordinate: w x and w are summed under the same masks, and the
mean is Σ w x / Σ w.

Numbers of 4 or 8 bits (:class:`QuantisedEncoding`) go into the smallest ring that holds their sum, without a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from privacy.errors import require, require_count, require_number
from privacy.secagg.errors import EncodingRefused

# At 16 bits a site has 65534/n levels: beyond ten sites too few for a model update.
MOST_PARTIES_AT_16_BITS = 10
_BLOCK = 1 << 16  # numbers that stay in the cache
# Bound, scale and product are float32: together they may come out larger by less than this share.
_FLOAT32_ROOM = 2.0**-21

RingBits = Literal[8, 16, 32]
Vector = NDArray[Any]  # uint8, uint16 or uint32


@dataclass(frozen=True, kw_only=True)
class Block:
    """A named part of the vector.

    Attributes:
        name: of the array.
        shape: of the array.
        bound: public; values beyond ±bound are clipped to it.
    """

    name: str
    shape: tuple[int, ...]
    bound: float

    def __post_init__(self) -> None:
        require_number(self.bound, argument=f"{self.name}.bound")
        require(self.bound > 0, argument=f"{self.name}.bound", value=self.bound, remedy="give a positive bound")

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The declared schema of a session's vector; the weight is its last coordinate.

    Attributes:
        blocks: in order.
        parties: n of the roster, which bounds every sum.
        max_weight: public bound on a site's weight; a larger one is clipped to it.
        ring_bits: b, 16 or 32.

    Raises:
        InvalidPlan: an impossible value, or more than ten parties at 16 bits.
    """

    blocks: tuple[Block, ...]
    parties: int
    max_weight: float = 1.0
    ring_bits: RingBits = 32

    def __post_init__(self) -> None:
        require_count(self.parties, argument="parties")
        require_number(self.max_weight, argument="max_weight")
        require(self.max_weight > 0, argument="max_weight", value=self.max_weight, remedy="give a positive bound")
        remedy = "give 16 or 32: 8 hold whole numbers of few bits only (QuantisedEncoding)"
        require(self.ring_bits in (16, 32), argument="ring_bits", value=self.ring_bits, remedy=remedy)
        remedy = f"give 32 for more than {MOST_PARTIES_AT_16_BITS} parties"
        fits = self.ring_bits == 32 or self.parties <= MOST_PARTIES_AT_16_BITS
        require(fits, argument="ring_bits", value=self.ring_bits, remedy=remedy)
        _require_names_once(self.blocks)

    @property
    def size(self) -> int:
        """Coordinates of the vector, with the weight."""
        return sum(block.size for block in self.blocks) + 1

    @property
    def levels(self) -> int:
        """q: what a site's bound becomes, so far below (2^(b-1) - 1)/n that rounding cannot pass that."""
        most = int(2 ** (self.ring_bits - 1) - 1) / self.parties
        return math.floor(most * (1 - _FLOAT32_ROOM))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Unsigned integers of the ring."""
        return np.dtype(f"uint{self.ring_bits}")

    def error_bound(self, bound: float, *, total_weight: float, parties: int) -> float:
        """Bound on |decoded mean - true mean of the clipped values| of a block with the given bound.

        Each site's w x and w are off by half a level, and float32 adds 2⁻²¹ of the value; the quotient of the sums is
        then off by at most twice n (½ bound max_weight / q) / Σ w, and the relative part.
        """
        rounding = parties * 0.5 * bound * self.max_weight / self.levels
        return 2 * rounding / total_weight + _FLOAT32_ROOM * bound

    def encode(self, values: Mapping[str, NDArray[Any]], *, weight: float, onto: Vector | None = None) -> Vector:
        """One site's vector, [size].

        Args:
            values: an array of real numbers under each block's name.
            weight: positive; the values are multiplied by it.
            onto: a vector of the ring, [size], such as a sum of masks, to which the encoded one is added in place: one
                pass over memory instead of two, and no second vector. After a refusal it is of no use.

        Raises:
            EncodingRefused: NaN or infinity, missing, extra or misshapen arrays, a weight that is not positive, or a
                vector of another size or ring.
        """
        if type(weight) is not float or not math.isfinite(weight) or weight <= 0:
            raise EncodingRefused(argument="weight", value=type(weight).__name__, remedy="give a positive float")
        share = min(weight / self.max_weight, 1.0)
        arrays = _declared(values, self.blocks)
        vector = np.zeros(self.size, self.dtype) if onto is None else onto
        if vector.dtype != self.dtype or vector.shape != (self.size,):
            raise EncodingRefused(
                argument="onto", value=(vector.dtype, vector.shape), remedy="give the session's masks"
            )
        for place, part in self._levels(arrays, share):
            np.add(vector[place], part, out=vector[place])
        vector[-1:] += np.array([round(share * self.levels)], self.dtype)
        return vector

    def decode(self, total: Vector) -> tuple[dict[str, NDArray[np.float64]], float]:
        """The weighted mean of each block, and the total weight.

        Args:
            total: the unmasked sum, [size].

        Raises:
            EncodingRefused: another vector than the schema's, or a total weight that is not positive.
        """
        if total.dtype != self.dtype or total.shape != (self.size,):
            raise EncodingRefused(argument="total", value=(total.dtype, total.shape), remedy="give the session's sum")
        signed = total.view(f"int{self.ring_bits}")
        weight = int(signed[-1]) / self.levels * self.max_weight
        if weight <= 0:
            raise EncodingRefused(
                argument="total weight", value=weight, remedy="a masked input was not one; start anew"
            )
        means = {
            block.name: (signed[place] * (block.bound * self.max_weight / self.levels / weight)).reshape(block.shape)
            for block, place in _places(self.blocks)
        }
        return means, weight

    def _levels(self, arrays: Sequence[NDArray[Any]], share: float) -> Iterator[tuple[slice, Vector]]:
        """Clipped, weighted, rounded; in blocks that stay in the cache, each good until the next."""
        reals, whole = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, f"int{self.ring_bits}")
        for array, (block, place) in zip(arrays, _places(self.blocks), strict=True):
            bound, scale = np.float32(block.bound), np.float32(share * self.levels / block.bound)
            for start in range(0, block.size, _BLOCK):
                part = array[start : start + _BLOCK].astype(np.float32, copy=False)
                room, result = reals[: part.size], whole[: part.size]
                least, most = part.min(), part.max()  # NaN if one of them is
                if not -bound <= least <= most <= bound:
                    if not (np.isfinite(least) and np.isfinite(most)):
                        raise _not_finite(block)
                    part = np.clip(part, -bound, bound, out=room)
                np.multiply(part, scale, out=room)
                np.rint(room, out=room)
                np.copyto(result, room, casting="unsafe")
                first = place.start + start
                yield slice(first, first + part.size), result.view(self.dtype)


@dataclass(frozen=True, kw_only=True)
class IntegerEncoding:
    """Integers that are summed as they are, such as rounded sums that carry noise; a 1 for each site comes last.

    The ring has 32 bits. Whoever makes the integers keeps their sum within it: what lies beyond ±2³¹ wraps.

    Attributes:
        shapes: name and shape of each part, in order.
        unit: value of 1.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    unit: float

    @property
    def size(self) -> int:
        """Coordinates of the vector, with the count of sites."""
        return sum(math.prod(shape) for _, shape in self.shapes) + 1

    def encode(self, integers: NDArray[np.int64]) -> Vector:
        """One site's vector, [size].

        Raises:
            EncodingRefused: not int64, or another number of them.
        """
        if integers.dtype != np.int64 or integers.shape != (self.size - 1,):
            found = (integers.dtype, integers.shape)
            raise EncodingRefused(argument="integers", value=found, remedy=f"give int64 [{self.size - 1}]")
        return np.append(integers, 1).astype(np.uint32)

    def decode(self, total: Vector) -> tuple[dict[str, NDArray[np.float64]], float]:
        """The mean over the sites of each part, and how many they are.

        Raises:
            EncodingRefused: another vector, or a count that is not positive.
        """
        if total.dtype != np.uint32 or total.shape != (self.size,):
            raise EncodingRefused(argument="total", value=(total.dtype, total.shape), remedy="give the session's sum")
        signed = total.view(np.int32)
        sites = int(signed[-1])
        if sites <= 0:
            raise EncodingRefused(argument="sites", value=sites, remedy="a masked vector was not one; start anew")
        means, start = {}, 0
        for name, shape in self.shapes:
            stop = start + math.prod(shape)
            means[name] = (signed[start:stop].astype(np.float64) * (self.unit / sites)).reshape(shape)
            start = stop
        return means, float(sites)


@dataclass(frozen=True, kw_only=True)
class QuantisedEncoding:
    """Numbers of few bits that are summed as they are; a 1 for each site comes last, and all sites weigh the same.

    A site's values are clipped to ±bound, divided by the step bound/levels and rounded to the nearest whole number: one
    of ±levels = ±(2^(bits-1) - 1), so that the sum of n sites lies within ±n levels, whatever they are. What clipping
    and rounding lose, the site adds to its next update (error feedback, arXiv:1901.09847; quantised updates of a
    federated diffusion model, arXiv:2407.14730).

    Attributes:
        blocks: in order.
        bits: of a site's number.
        parties: n of the roster, which bounds every sum.
        ring_bits: of the ring; the vector has so many bits a coordinate.

    Raises:
        InvalidPlan: an impossible value, or a ring that does not hold the sum: 8 bits hold 18 parties at 4 bits, 16
            hold 258 at 8 bits.
    """

    blocks: tuple[Block, ...]
    bits: Literal[4, 8]
    parties: int
    ring_bits: RingBits

    def __post_init__(self) -> None:
        require_count(self.parties, argument="parties")
        require(self.bits in (4, 8), argument="bits", value=self.bits, remedy="give 4 or 8")
        require(self.ring_bits in (8, 16, 32), argument="ring_bits", value=self.ring_bits, remedy="give 8, 16 or 32")
        held = int(2 ** (self.ring_bits - 1) - 1) // self.levels
        remedy = f"give a larger ring: with numbers of {self.bits} bits this one holds the sum of {held} parties"
        require(self.parties <= held, argument="ring_bits", value=self.ring_bits, remedy=remedy)
        _require_names_once(self.blocks)

    @property
    def size(self) -> int:
        """Coordinates of the vector, with the count of sites."""
        return sum(block.size for block in self.blocks) + 1

    @property
    def levels(self) -> int:
        """What a block's bound becomes."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Unsigned integers of the ring."""
        return np.dtype(f"uint{self.ring_bits}")

    def integers(self, values: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """One site's whole numbers, [size - 1], within ±levels.

        Args:
            values: an array of real numbers under each block's name.

        Raises:
            EncodingRefused: NaN or infinity, or missing, extra or misshapen arrays.
        """
        whole = np.empty(self.size - 1, np.int64)
        for array, (block, place) in zip(_declared(values, self.blocks), _places(self.blocks), strict=True):
            if not np.isfinite(array).all():
                raise _not_finite(block)
            clipped = np.clip(array.astype(np.float64), -block.bound, block.bound)
            whole[place] = np.rint(clipped / block.bound * self.levels)
        return whole

    def values(self, integers: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """What a site's whole numbers, [size - 1], stand for, under each block's name: what it has sent.

        Raises:
            EncodingRefused: as :meth:`encode`.
        """
        self._require_whole(integers)
        return {
            block.name: (integers[place] * (block.bound / self.levels)).astype(np.float32).reshape(block.shape)
            for block, place in _places(self.blocks)
        }

    def encode(self, integers: NDArray[np.int64]) -> Vector:
        """One site's vector, [size].

        Raises:
            EncodingRefused: not int64, another number of them, or one beyond ±levels.
        """
        self._require_whole(integers)
        vector = np.ones(self.size, self.dtype)
        vector[:-1] = integers  # modulo the ring
        return vector

    def decode(self, total: Vector) -> tuple[dict[str, NDArray[np.float64]], float]:
        """The mean over the sites of each block, and how many sites they are.

        Args:
            total: the unmasked sum, [size].

        Raises:
            EncodingRefused: another vector than the schema's, a count that is not positive or beyond the parties, or
                numbers that so many sites cannot have made.
        """
        if total.dtype != self.dtype or total.shape != (self.size,):
            raise EncodingRefused(argument="total", value=(total.dtype, total.shape), remedy="give the session's sum")
        signed = total.view(f"int{self.ring_bits}")
        sites = int(signed[-1])
        most = sites * self.levels
        # In a ring of 8 bits, what was no sum of vectors would pass as a count of 1 to 18 once in 14 times.
        if not 0 < sites <= self.parties or int(signed.min()) < -most or int(signed.max()) > most:
            raise EncodingRefused(argument="sites", value=sites, remedy="a masked vector was not one; start anew")
        means = {
            block.name: (signed[place] * (block.bound / self.levels / sites)).reshape(block.shape)
            for block, place in _places(self.blocks)
        }
        return means, float(sites)

    def _require_whole(self, integers: NDArray[np.int64]) -> None:
        if integers.dtype != np.int64 or integers.shape != (self.size - 1,):
            found = (integers.dtype, integers.shape)
            raise EncodingRefused(argument="integers", value=found, remedy=f"give int64 [{self.size - 1}]")
        if int(integers.min(initial=0)) < -self.levels or int(integers.max(initial=0)) > self.levels:
            remedy = f"give numbers within ±{self.levels}: others would overflow the sum"
            raise EncodingRefused(argument="integers", value="too large", remedy=remedy)


def _require_names_once(blocks: Sequence[Block]) -> None:
    names = [block.name for block in blocks]
    require(len(set(names)) == len(names), argument="blocks", value=names, remedy="give each name once")


def _places(blocks: Sequence[Block]) -> Iterator[tuple[Block, slice]]:
    start = 0
    for block in blocks:
        yield block, slice(start, start + block.size)
        start += block.size


def _declared(values: Mapping[str, NDArray[Any]], blocks: Sequence[Block]) -> list[NDArray[Any]]:
    """The blocks' arrays, flat, in order; or refuse others than declared."""
    wanted = {block.name for block in blocks}
    if set(values) != wanted:
        differ = sorted(set(values) ^ wanted)
        raise EncodingRefused(argument="values", value=differ[:3], remedy="give exactly the declared blocks")
    arrays = []
    for block in blocks:
        array = np.asarray(values[block.name])
        if array.shape != block.shape:
            raise EncodingRefused(argument=block.name, value=array.shape, remedy=f"the schema says {block.shape}")
        arrays.append(array.reshape(-1))
    return arrays


def _not_finite(block: Block) -> EncodingRefused:
    return EncodingRefused(argument=block.name, value="NaN or infinity", remedy="training diverged; drop it")
