"""Shamir's t-of-n sharing (1979, doi:10.1145/359168.359176) of 256-bit secrets over a prime field.

Fewer than t shares say nothing about the secret: for every secret there is one polynomial through them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import lru_cache

from privacy.errors import require, require_count

PRIME = 2**256 + 297  # the least prime above every 256-bit secret
SHARE_BYTES = 33
SECRET_BYTES = 32


def split(secret: bytes, *, threshold: int, parties: int) -> tuple[bytes, ...]:
    """Shares for the parties 1 … n, each the value at its number of a random polynomial with the secret at 0.

    Args:
        secret: 32 bytes.
        threshold: t, how many shares recover it.
        parties: n.

    Raises:
        InvalidPlan: t > n, or another length.
    """
    require(len(secret) == SECRET_BYTES, argument="secret", value=f"{len(secret)} bytes", remedy="give 32 bytes")
    require_count(threshold, argument="threshold")
    require(threshold <= parties, argument="threshold", value=threshold, remedy=f"there are {parties} parties")
    polynomial = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, parties + 1):
        y = 0
        for coefficient in reversed(polynomial):
            y = (y * x + coefficient) % PRIME
        shares.append(y.to_bytes(SHARE_BYTES, "big"))
    return tuple(shares)


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret from t shares by party number (Lagrange at 0).

    More than t are wasted, fewer give another secret: whoever calls this checks the result against what is public.

    Raises:
        InvalidPlan: no share, a number below 1, or a value outside the field or of no 256-bit secret.
    """
    numbers = tuple(sorted(shares))
    require(bool(numbers) and numbers[0] >= 1, argument="shares", value=numbers, remedy="give shares from party 1 on")
    total = 0
    for x, weight in zip(numbers, _lagrange_at_zero(numbers), strict=True):
        y = int.from_bytes(shares[x], "big")
        require(y < PRIME, argument=f"share of party {x}", value="outside the field", remedy="it is no share; drop it")
        total = (total + y * weight) % PRIME
    require(total < 2**256, argument="secret", value="longer than 256 bits", remedy="a share is not what was dealt")
    return total.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=1024)
def _lagrange_at_zero(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """∏ x_j / (x_j - x_i) over j ≠ i, for each i; the same for all secrets of the same survivors."""
    weights = []
    for i in numbers:
        above, below = 1, 1
        for j in numbers:
            if j != i:
                above, below = above * j % PRIME, below * (j - i) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
