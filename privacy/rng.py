"""Randomness that a guarantee may rest on: AES-256 in counter mode, keyed by the operating system.

PyTorch's and NumPy's generators are predictable from their output; whoever predicts the noise subtracts it. Here the
stream of a fresh 256-bit key is turned into normal numbers and into Poisson samples of patients. A stream lives in one
process and cannot be seeded, saved, copied or inherited: a repeated round always draws new noise.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from typing import NoReturn, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from privacy.errors import RandomnessReused, require, require_number

_KEY_BYTES = 32
_ZEROS = memoryview(bytes(1 << 18))  # AES in blocks that stay in the cache
_NORMAL_BLOCK = 1 << 15  # likewise for the transform: 1.1 M normals in about 10 ms on one core

# Noised sums lie on a grid of the noise's σ times this, see `with_gaussian_noise`.
GRID_EXPONENT = -30


class Randomness(Protocol):
    """Where noise and samples come from."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Independent standard normal numbers, float64 on the CPU, of the shape."""

    def poisson_sample(self, population: int, rate: float) -> NDArray[np.int64]:
        """Indices below ``population``, ascending, each included independently with probability ``rate``."""

    def words(self, count: int) -> NDArray[np.uint64]:
        """Independent uniform 64-bit words."""


class _AesStream:
    """The transforms, over the key stream of AES-256-CTR."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def _words(self, count: int) -> NDArray[np.uint64]:
        words = np.empty(count, dtype=np.uint64)
        target = words.view(np.uint8).data
        for start in range(0, len(target), len(_ZEROS)):
            block = target[start : start + len(_ZEROS)]
            self._cipher.update_into(_ZEROS[: len(block)], block)
        return words

    def words(self, count: int) -> NDArray[np.uint64]:
        """Independent uniform 64-bit words."""
        return self._words(count)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Independent standard normal numbers, float64 on the CPU, of the shape.

        Box and Muller 1958 with a 63-bit radius and a 53-bit angle: |z| reaches 9.4, and the mass beyond
        that is 5e-21 a number.
        """
        count = math.prod(shape)
        out = torch.empty(count, dtype=torch.float64)
        for start in range(0, count, _NORMAL_BLOCK):
            stop = min(start + _NORMAL_BLOCK, count)
            half = (stop - start + 1) // 2
            words = torch.from_numpy(self._words(2 * half).view(np.int64))
            u = ((words[:half] >> 1) & (2**63 - 1)).double().add_(0.5).mul_(2.0**-63)  # (0, 1]
            radius = u.log_().mul_(-2).sqrt_()
            angle = (words[half:] >> 11).double().mul_(2 * math.pi * 2.0**-53)
            out[start:stop] = torch.cat([radius * angle.cos(), radius * angle.sin()])[: stop - start]
        return out.reshape(tuple(shape))

    def poisson_sample(self, population: int, rate: float) -> NDArray[np.int64]:
        """Indices below ``population``, ascending, each included independently with probability ``rate``.

        Exact to 2⁻⁶⁴, and never above the rate.
        """
        require_number(rate, argument="rate")
        require(0 <= rate <= 1, argument="rate", value=rate, remedy="give a probability")
        require(population >= 0, argument="population", value=population, remedy="give ≥ 0")
        if rate == 1:
            return np.arange(population)
        threshold = np.uint64(math.floor(rate * 2.0**64))  # exact: a power of two only moves the exponent
        return np.flatnonzero(self._words(population) < threshold)


class SecureRandomness(_AesStream):
    """A stream with a key from ``os.urandom``. It takes no seed, and a child process that inherits it re-keys.

    Raises:
        RandomnessReused: on copying or pickling.
    """

    def __init__(self) -> None:
        super().__init__(os.urandom(_KEY_BYTES))
        self._process = os.getpid()

    def _words(self, count: int) -> NDArray[np.uint64]:
        if os.getpid() != self._process:
            SecureRandomness.__init__(self)
        return super()._words(count)

    def __reduce__(self) -> NoReturn:
        raise RandomnessReused(
            argument="SecureRandomness", value="copied or pickled", remedy="make a new one: a copy repeats the noise"
        )


class SeededRandomnessForTests(_AesStream):
    """The same transforms from a known key: repeatable, and therefore no protection at all. For tests only."""

    def __init__(self, seed: int) -> None:
        super().__init__(hashlib.sha256(f"tests only\0{seed}".encode()).digest())


def with_gaussian_noise(total: Tensor, *, std: float, randomness: Randomness) -> Tensor:
    """The Gaussian mechanism on a sum: total + N(0, std²), float64 on the CPU, of the total's shape.

    The digits of a floating-point Gaussian depend on what it was added to (Mironov 2012, doi:10.1145/2382196.2382264;
    Holohan and Braghin 2021, arXiv:2107.10138). Here total and noise are each rounded to one fixed grid, a power
    of two near 2⁻³⁰ std, and added as integers below 2⁵³, exactly: what comes out is round(total) + round(noise), which
    is rounding applied after the ideal mechanism on round(total). Rounding d coordinates adds at most 2⁻³⁰ std √d
    to the sensitivity: 1e-6 std for a million coordinates.

    Raises:
        InvalidPlan: std is not positive and finite.
    """
    require_number(std, argument="std")
    require(std > 0, argument="std", value=std, remedy="give a positive standard deviation")
    grid = 2.0 ** (math.floor(math.log2(std)) + GRID_EXPONENT)
    noise = randomness.normal(total.shape).mul_(std / grid).round_()
    return total.detach().to("cpu", torch.float64).div(grid).round_().add_(noise).mul_(grid)
