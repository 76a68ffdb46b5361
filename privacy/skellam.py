"""Integer noise for sums that secure aggregation adds up (Agarwal, Kairouz and Liu 2021, arXiv:2110.04995).

    clipped sum of a hospital's patients → × scale, dithered to integers → + Skellam share → sum over hospitals mod 2³²

Skellam(μ) is the difference of two Poisson numbers of mean μ/2: P(k) = e^-μ I_k(μ), mean 0, variance μ. Shares add up
to Skellam noise of the sum of their variances, as discrete Gaussians do not. Lengths are in grid units: 1 is one step
of the integers, 1/scale of the values. What a sum costs: :class:`privacy.accounting.SampledSkellam`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from privacy.errors import require, require_count, require_number

if TYPE_CHECKING:  # the accountant reads this module without PyTorch
    from privacy.rng import Randomness

# Variance of one table, a megabyte of thresholds that stay in the cache; a larger variance takes several draws.
TABLE_VARIANCE = 4096.0**2
# Bound on the statistical distance between a table's number and Skellam(μ). The table ends at a K beyond which less
# than 2⁻²²⁴ is left; the recurrence from there is off by 2 K² P(K) < 2⁻¹⁸⁸; rounding 2¹⁸ thresholds down to 2⁻¹⁹²
# moves less than 2⁻¹⁷⁴. So small because the accountant multiplies it with e^ε.
TABLE_DISTANCE = 2.0**-173
# The same for one coordinate of a sum, with up to 2²³ tables' numbers in it (hospitals × draws of each).
NOISE_DISTANCE = 2.0**-150

# A sum is dithered on this finer grid. Rounding to it is counted in the sensitivity, so that the dither is exact.
FRACTION_BITS = 32
# Largest integer of one hospital, before noise: beyond, the sum modulo 2³² would wrap.
LARGEST = 1 << 30

_BLOCK = 1 << 15  # words that stay in the cache
_TAIL_BITS = 224
_LOWER_WORDS = 2  # of a threshold, below its upper 64 bits
_THRESHOLD_BITS = 64 * (1 + _LOWER_WORDS)
_START_BITS = 256  # what the recurrence starts with and rounds to 1: relative errors of 2⁻²⁵⁶


def skellam_noise(count: int, *, variance: float, randomness: Randomness) -> NDArray[np.int64]:
    """Independent Skellam numbers, within TABLE_DISTANCE × ⌈variance / TABLE_VARIANCE⌉ of the law each.

    Inverts the distribution function with 192 random bits. The upper 64 decide unless they equal those of a threshold;
    only then, less than once in 2⁴⁶ numbers, the others are drawn, too.

    Args:
        count: how many.
        variance: μ of each, in grid units².
        randomness: of the noise.

    Raises:
        InvalidPlan: a variance that is not positive and finite, or a negative count.

    Returns:
        int64 [count].
    """
    _require_positive(variance, argument="variance")
    require(count >= 0, argument="count", value=count, remedy="give ≥ 0")
    draws = math.ceil(variance / TABLE_VARIANCE)
    table = _table(variance / draws)
    noise = np.zeros(count, dtype=np.int64)
    for start in range(0, count, _BLOCK):
        block = noise[start : start + _BLOCK]
        for _ in range(draws):
            block += table.draw(len(block), randomness)
    return noise


def share_variance(total: float, *, honest: int) -> float:
    """Variance of each hospital's share, so that any ``honest`` shares together have the total.

    Noise that someone knows protects nobody from them: if at least ``honest`` hospitals neither drop out before their
    integers are in the sum nor tell their share, the sum holds at least Skellam(total) that the others do not know.

    Args:
        total: variance that the accountant counts, in grid units².
        honest: hospitals, at least 1.

    Raises:
        InvalidPlan: a total that is not positive, or no hospitals.
    """
    _require_positive(total, argument="total")
    require_count(honest, argument="honest")
    return total / honest


def dithered(values: NDArray[np.float64], *, scale: float, randomness: Randomness) -> NDArray[np.int64]:
    """⌊scale·values + U⌋ with U uniform in [0, 1), independent of the values and between coordinates. Unbiased.

    U is the same on both of two neighbours, as it does not depend on the data. One patient changes a coordinate from b
    to a; with V the fraction of b + U, which is uniform, too,

        ⌊a + U⌋ - ⌊b + U⌋ = ⌊(a - b) + V⌋,

    randomised rounding of the patient's own a - b. :func:`sensitivity` bounds its norm. On the grid of 2⁻³² that values
    are first rounded to this holds exactly, since U has 32 bits. Numbers beyond ±LARGEST are clamped, which makes no
    difference larger.

    Args:
        values: a hospital's sum of clipped vectors, of any shape.
        scale: integers per unit; with a power of two the product is exact.
        randomness: of the dither.

    Raises:
        InvalidPlan: a scale that is not positive and finite, or values that are not finite.

    Returns:
        int64 of the values' shape.
    """
    _require_positive(scale, argument="scale")
    require(bool(np.isfinite(values).all()), argument="values", value="not finite", remedy="clip each patient first")
    scaled = np.clip(np.asarray(values, dtype=np.float64) * scale, -LARGEST, LARGEST)
    fixed = np.rint(scaled * 2.0**FRACTION_BITS).astype(np.int64)
    dither = (randomness.words(fixed.size) >> np.uint64(64 - FRACTION_BITS)).astype(np.int64)
    return np.asarray((fixed + dither.reshape(fixed.shape)) >> FRACTION_BITS)


def sensitivity(*, clip: float, dimensions: int, beta: float) -> tuple[float, float]:
    """Norms of what one patient adds to a dithered sum, all but with probability β over the dither.

    Theorem (Kairouz, Liu and Steinke 2021, arXiv:2102.06387, prop. 22). Let ‖x‖₂ ≤ c and R_i = ⌊x_i + V_i⌋ with
    independent uniform V_i. With a probability of at least 1 - β

        ‖R‖₂² ≤ c² + d/4 + √(2 ln(1/β)) (c + √d/2).

    Proof. R_i is f or f + 1 with f = ⌊x_i⌋, the latter with probability p = x_i - f, so E R_i² = x_i² + p(1-p) ≤
    x_i² + 1/4. R_i² is in an interval of length |2f + 1| = |2x_i + 1 - 2p| ≤ 2|x_i| + 1; the norm of these lengths is
    L ≤ 2c + √d. Hoeffding: Σ R_i² exceeds its mean by L √(ln(1/β)/2) or more with probability at most β. ∎
    Always ‖R‖₂ ≤ c + √d, as |R_i - x_i| < 1; and ‖R‖₁ ≤ ‖R‖₂², as R_i are integers.

    Here c is ``clip`` and √d 2⁻³² for the grid under the dither.

    Args:
        clip: C, L2 bound per patient in grid units, scale included.
        dimensions: d.
        beta: β in (0, 1); belongs to δ.

    Raises:
        InvalidPlan: an impossible value.

    Returns:
        Bounds on the L1 and the L2 norm, in grid units.
    """
    _require_positive(clip, argument="clip")
    require_count(dimensions, argument="dimensions")
    require_number(beta, argument="beta")
    require(0 < beta < 1, argument="beta", value=beta, remedy="give a probability in (0, 1)")
    root = math.sqrt(dimensions)
    c = clip + root * 2.0**-FRACTION_BITS
    likely = math.sqrt(c**2 + dimensions / 4 + math.sqrt(2 * math.log(1 / beta)) * (c + root / 2))
    l2 = min(likely, c + root)
    return min(root * l2, l2**2), l2


class _Table(NamedTuple):
    """Number i - radius where exactly i thresholds are at most a uniform 192-bit integer."""

    radius: int
    thresholds: tuple[int, ...]
    upper: NDArray[np.uint64]  # their upper 64 bits

    def draw(self, count: int, randomness: Randomness) -> NDArray[np.int64]:
        words = randomness.words(count)
        index = np.searchsorted(self.upper, words, side="right")
        for place in np.flatnonzero(self.upper[index - 1] == words):
            value = int(words[place])
            for word in randomness.words(_LOWER_WORDS):
                value = (value << 64) + int(word)
            index[place] = bisect_right(self.thresholds, value)
        return index - self.radius


@lru_cache(maxsize=8)
def _table(variance: float) -> _Table:
    """I_(k-1) = (2k/μ) I_k + I_(k+1), downwards from the tail: all terms are positive, so that no digits are lost.

    Divided by their sum, as Σ_k I_k(μ) = e^μ (Miller's algorithm).
    """
    # Bernstein: P(|X| ≥ t) ≤ 2 exp(-t²/(2μ + 2t/3)), at most 2⁻²²⁴ at this t.
    nats = (_TAIL_BITS + 1) * math.log(2)
    radius = math.ceil(nats / 3 + math.sqrt((nats / 3) ** 2 + 2 * nats * variance))
    mu = Fraction(variance)
    weights = [0, 1 << _START_BITS]
    for k in range(radius, 0, -1):
        weights.append(2 * k * mu.denominator * weights[-1] // mu.numerator + weights[-2])
    right = weights[:0:-1]  # I_0 … I_radius, up to one factor
    sums = list(accumulate(right[:0:-1] + right))
    total = sums.pop()
    thresholds = tuple((partial << _THRESHOLD_BITS) // total for partial in sums)
    upper = np.array([threshold >> (64 * _LOWER_WORDS) for threshold in thresholds], dtype=np.uint64)
    return _Table(radius=radius, thresholds=thresholds, upper=upper)


def _require_positive(value: float, *, argument: str) -> None:
    require_number(value, argument=argument)
    require(value > 0, argument=argument, value=value, remedy="give a positive number")
