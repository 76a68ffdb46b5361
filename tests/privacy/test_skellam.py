from __future__ import annotations

import math
import time
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from privacy import skellam
from privacy.errors import InvalidPlan
from privacy.rng import SecureRandomness, SeededRandomnessForTests
from privacy.skellam import (
    FRACTION_BITS,
    LARGEST,
    NOISE_DISTANCE,
    TABLE_DISTANCE,
    TABLE_VARIANCE,
    dithered,
    sensitivity,
    share_variance,
    skellam_noise,
)

# A correct stream fails a test by chance once in a million runs; seeded streams always give the same answer.
RARE = 1e-6


class Given(SeededRandomnessForTests):
    """Words that the test chooses, one after the other."""

    def __init__(self, *words: int) -> None:
        super().__init__(0)
        self.left = list(words)

    def _words(self, count: int) -> NDArray[np.uint64]:
        taken, self.left = self.left[:count], self.left[count:]
        return np.array(taken, dtype=np.uint64)


def draws(count: int, variance: float, seed: int) -> NDArray[np.int64]:
    return skellam_noise(count, variance=variance, randomness=SeededRandomnessForTests(seed))


def masses(variance: float) -> tuple[int, list[int]]:
    """Radius of the table, and the mass of each number from -radius on, in 2⁻¹⁹²."""
    table = skellam._table(variance)
    edges = [0, *table.thresholds, 1 << skellam._THRESHOLD_BITS]
    return table.radius, [after - before for before, after in pairwise(edges)]


def pmf(k: NDArray[np.int64], variance: float) -> NDArray[np.float64]:
    return np.asarray(stats.skellam.pmf(k, variance / 2, variance / 2))


def far_mass(k: int, variance: float) -> mpmath.mpf:
    """e^-x I_k(x) = (2πx)^-½ Σ_n Π_j≤n ((2j-1)² - 4k²)/(8jx), off by e^-2x at large x (DLMF 10.40.1)."""
    term = total = mpmath.mpf(1)
    for j in range(1, 2000):
        term *= ((2 * j - 1) ** 2 - 4 * k**2) / (8 * j * mpmath.mpf(variance))
        total += term
        if abs(term) < mpmath.mpf(2) ** -300 * abs(total):
            return total / mpmath.sqrt(2 * mpmath.pi * variance)
    raise AssertionError("more terms are needed")


def fit(numbers: NDArray[np.int64], variance: float) -> float:
    """p-value of a chi-square test that they are Skellam(variance), in about 40 cells, the outer ones open."""
    std = math.sqrt(variance)
    width, edge = max(1, round(std / 6)), round(3.5 * std)
    k = np.arange(-round(8 * std) - 8, round(8 * std) + 9)
    lowest = -edge // width

    def cells(values: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.minimum(np.maximum(values, -edge), edge) // width - lowest

    expected = np.bincount(cells(k), weights=pmf(k, variance))
    observed = np.bincount(cells(numbers), minlength=len(expected))
    return float(stats.chisquare(observed, expected / expected.sum() * len(numbers)).pvalue)


def spread(numbers: NDArray[np.int64], variance: float) -> float:
    """p-value of a test that their variance is this one; 3 + 1/variance is Skellam's kurtosis."""
    error = math.sqrt((2 + 1 / variance) / len(numbers)) * variance
    return float(2 * stats.norm.sf(abs(np.mean(numbers.astype(float) ** 2) - variance) / error))


@pytest.mark.parametrize("variance", [0.01, 0.7, 25.0, 300.0])
def test_table_is_skellam_to_its_stated_distance(variance: float) -> None:
    radius, mass = masses(variance)
    assert len(mass) == 2 * radius + 1
    with mpmath.workprec(320):
        scale = mpmath.exp(-mpmath.mpf(variance))
        exact = [mpmath.besseli(k, variance) * scale for k in range(radius + 1)]
        unit = mpmath.mpf(2) ** -skellam._THRESHOLD_BITS
        beyond = 1 - exact[0] - 2 * sum(exact[1:])
        distance = (sum(abs(m * unit - exact[abs(i - radius)]) for i, m in enumerate(mass)) + beyond) / 2
        assert beyond < mpmath.mpf(2) ** -skellam._TAIL_BITS
        assert distance < TABLE_DISTANCE


@pytest.mark.parametrize("variance", [1.0e6, TABLE_VARIANCE / 2, TABLE_VARIANCE])
def test_large_table_is_skellam_at_chosen_places(variance: float) -> None:
    radius, mass = masses(variance)
    std = math.sqrt(variance)
    with mpmath.workprec(900):  # the sum alternates
        unit = mpmath.mpf(2) ** -skellam._THRESHOLD_BITS
        for k in (0, 1, round(std), round(4 * std), round(10 * std), round(15 * std)):
            exact = far_mass(k, variance)
            for place in (radius - k, radius + k):
                assert abs(mass[place] * unit - exact) <= unit  # the thresholds on either side are rounded down
    # Each threshold moves by less than one unit, which bounds the distance of all of them together.
    assert len(mass) * 2.0**-skellam._THRESHOLD_BITS < TABLE_DISTANCE / 2
    assert (1 << 23) * TABLE_DISTANCE <= NOISE_DISTANCE


@pytest.mark.parametrize("variance", [0.5, 9.0, 1.0e6])
def test_noise_is_skellam(variance: float) -> None:
    numbers = skellam_noise(200_000, variance=variance, randomness=SecureRandomness())
    assert numbers.dtype == np.int64
    assert fit(numbers, variance) > RARE
    assert spread(numbers, variance) > RARE
    assert abs(numbers.mean()) < 5 * math.sqrt(variance / numbers.size)


@pytest.mark.parametrize("variance", [9.0, 1.0e6])
@pytest.mark.parametrize("factor", [2 / 3, 1.5])
def test_the_tests_of_noise_reject_another_noise(variance: float, factor: float) -> None:
    numbers = draws(200_000, variance * factor**2, 1)
    assert spread(numbers, variance) < RARE
    assert fit(numbers, variance) < RARE


def test_the_test_of_shape_rejects_a_rounded_gaussian() -> None:
    """Of the same variance; at a standard deviation of 1 the shapes differ by half a unit of kurtosis."""
    normal = SeededRandomnessForTests(1).normal((400_000,)).numpy()
    assert fit(draws(400_000, 1.0, 1), 1.0) > RARE
    assert fit(np.rint(normal * math.sqrt(1 - 1 / 12)).astype(np.int64), 1.0) < RARE


def test_kurtosis_is_that_of_skellam() -> None:
    numbers = draws(2_000_000, 1.0, 2).astype(float)
    assert np.mean(numbers**4) == pytest.approx(4.0, abs=0.1)  # 3μ² + μ, where a Gaussian has 3


def test_numbers_are_independent() -> None:
    numbers = draws(200_000, 100.0, 3)
    for lag in (1, 2, 1 << 15):  # neighbours, and blocks
        assert stats.pearsonr(numbers[:-lag], numbers[lag:]).pvalue > RARE
        assert stats.pearsonr(numbers[:-lag] ** 2, numbers[lag:] ** 2).pvalue > RARE
    assert not np.array_equal(draws(64, 100.0, 3), draws(64, 100.0, 4))


def test_shares_of_honest_hospitals_add_up_to_the_total() -> None:
    total, hospitals = 50.0, 3
    share = share_variance(total, honest=hospitals)
    three = sum(draws(200_000, share, seed) for seed in range(hospitals))
    assert isinstance(three, np.ndarray)
    assert fit(three, total) > RARE
    two = draws(200_000, share, 0) + draws(200_000, share, 1)
    assert fit(two, 2 / 3 * total) > RARE
    assert fit(two, total) < RARE  # one missing share is seen


def test_a_variance_above_the_table_takes_several_draws() -> None:
    variance = 2.5 * TABLE_VARIANCE
    numbers = draws(100_000, variance, 5)
    assert spread(numbers, variance) > RARE
    assert spread(numbers, TABLE_VARIANCE) < RARE
    assert stats.kstest(numbers, "norm", (0, math.sqrt(variance))).pvalue > RARE


def test_lower_words_decide_where_the_upper_equal_a_threshold() -> None:
    table = skellam._table(9.0)
    center = table.radius
    low = (1 << (64 * skellam._LOWER_WORDS)) - 1
    for i in (center - 4, center, center + 1):
        threshold = table.thresholds[i]
        upper, lower = threshold >> (64 * skellam._LOWER_WORDS), threshold & low
        assert 0 < lower < low
        for value, number in ((lower - 1, i), (lower, i + 1), (0, i), (low, i + 1)):
            stream = Given(upper, value >> 64, value & (2**64 - 1))
            assert table.draw(1, stream).tolist() == [number - table.radius]
            assert stream.left == []
        for word, number in ((upper - 1, i), (upper + 1, i + 1)):
            stream = Given(word, 7)
            assert table.draw(1, stream).tolist() == [number - table.radius]
            assert stream.left == [7]


def test_the_ends_of_the_words_are_the_tails() -> None:
    table = skellam._table(9.0)
    last = 2**64 - 1
    radius, mass = masses(9.0)
    first = next(i for i, m in enumerate(mass) if m)  # 2⁻¹⁹² and less is rounded away
    assert table.draw(1, Given(0, 0, 0)).tolist() == [first - radius]
    assert table.draw(1, Given(last, last, last)).tolist() == [radius]
    assert table.draw(1, Given(1 << 63)).tolist() == [0]
    assert 10 * math.sqrt(9.0) < radius - first < radius


@pytest.mark.parametrize("count", [0, 1, (1 << 15) + 1])
def test_noise_has_the_count(count: int) -> None:
    assert skellam_noise(count, variance=4.0, randomness=SecureRandomness()).shape == (count,)


@pytest.mark.parametrize("variance", [0.0, -1.0, float("nan"), float("inf"), True])
def test_no_noise_is_refused(variance: float) -> None:
    with pytest.raises(InvalidPlan, match="variance"):
        skellam_noise(2, variance=variance, randomness=SecureRandomness())
    with pytest.raises(InvalidPlan, match="total"):
        share_variance(variance, honest=2)


@pytest.mark.parametrize("honest", [0, -1, 1.5])
def test_shares_of_nobody_are_refused(honest: int) -> None:
    with pytest.raises(InvalidPlan, match="honest"):
        share_variance(1.0, honest=honest)
    with pytest.raises(InvalidPlan, match="count"):
        skellam_noise(-1, variance=1.0, randomness=SecureRandomness())


def test_noise_is_drawn_fast() -> None:
    """The network of the main job has 0.7 M parameters; the noise of a step must not be felt beside a second of it."""
    stream = SecureRandomness()
    skellam_noise(1, variance=1.0e6, randomness=stream)  # makes the table
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        skellam_noise(1_000_000, variance=1.0e6, randomness=stream)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.6


@pytest.mark.parametrize("value", [0.0, 0.1, -0.1, 2.75, -7.5, 1e-9, 3.0])
def test_dither_is_unbiased_and_goes_to_the_nearest_two(value: float) -> None:
    count = 100_000
    numbers = dithered(np.full(count, value), scale=4.0, randomness=SecureRandomness())
    below = math.floor(4 * value)
    assert set(numbers.tolist()) <= {below, below + 1}
    up = 4 * value - below
    assert stats.binomtest(int((numbers - below).sum()), count, up).pvalue > RARE


def test_dither_is_exact_on_its_grid() -> None:
    unit = 2.0**-FRACTION_BITS
    for fraction in (1, 2**31, 2**32 - 1):
        for word, up in ((2**32 - fraction - 1, 0), (2**32 - fraction, 1)):
            stream = Given(*[(word << 32) + 12345] * 2)
            numbers = dithered(np.array([5 + fraction * unit, -5 + fraction * unit]), scale=1.0, randomness=stream)
            assert numbers.tolist() == [5 + up, -5 + up]


def test_dither_is_independent_between_coordinates() -> None:
    numbers = dithered(np.full((2, 100_000), 0.5), scale=1.0, randomness=SecureRandomness())
    assert numbers.shape == (2, 100_000)
    assert stats.pearsonr(numbers[0], numbers[1]).pvalue > RARE
    assert stats.pearsonr(numbers[0, 1:], numbers[0, :-1]).pvalue > RARE


@settings(max_examples=50, deadline=None)
@given(
    norm=st.floats(1e-3, 300.0),
    shape=st.sampled_from(["spread", "one", "half", "random", "negative"]),
    dimensions=st.integers(1, 400),
    seed=st.integers(0, 2**32),
)
def test_a_patient_stays_within_the_sensitivity(norm: float, shape: str, dimensions: int, seed: int) -> None:
    """Whatever the others' sum is, and with one dither on both neighbours."""
    random = np.random.default_rng(seed)
    patient = {
        "spread": np.ones(dimensions),
        "one": np.eye(1, dimensions)[0],
        "half": np.where(np.arange(dimensions) % 2, 1.0, 0.0) + np.eye(1, dimensions)[0],
        "random": random.normal(size=dimensions) + 1e-9,
        "negative": -random.random(dimensions) - 1e-9,
    }[shape]
    patient *= norm / np.linalg.norm(patient)
    others = 100 * random.normal(size=dimensions)
    scale = 4.0
    l1, l2 = sensitivity(clip=scale * norm * (1 + 1e-9), dimensions=dimensions, beta=1e-9)
    for trial in range(3):
        with_patient, without = (
            dithered(total, scale=scale, randomness=SeededRandomnessForTests(seed + trial))
            for total in (others + patient, others)
        )
        difference = (with_patient - without).astype(float)
        assert np.abs(difference - scale * patient).max() <= 1 + 1e-6
        assert np.linalg.norm(difference) <= l2
        assert np.abs(difference).sum() <= l1 * (1 + 1e-12)


def test_sensitivity_is_exceeded_no_oftener_than_beta_and_not_far_from_it() -> None:
    dimensions, clip, trials = 400, 10.0, 20_000
    patient = np.full(dimensions, clip / math.sqrt(dimensions))  # 1/2 each: the roundest of all
    numbers = dithered(np.tile(patient, (trials, 1)), scale=1.0, randomness=SeededRandomnessForTests(7))
    norms = np.linalg.norm(numbers, axis=1)
    for beta in (0.5, 0.1, 0.01):
        _, l2 = sensitivity(clip=clip, dimensions=dimensions, beta=beta)
        assert (norms > l2).mean() <= beta
    _, l2 = sensitivity(clip=clip, dimensions=dimensions, beta=0.01)
    assert l2 < 1.15 * norms.max()
    assert (norms > clip).mean() > 0.99  # the clip norm itself would not be a bound


def test_sensitivity_at_the_main_job_is_near_the_clip_norm() -> None:
    clip, dimensions, beta = 4096.0, 700_000, 1e-7
    l1, l2 = sensitivity(clip=clip, dimensions=dimensions, beta=beta)
    squared = clip**2 + dimensions / 4 + math.sqrt(2 * math.log(1 / beta)) * (clip + math.sqrt(dimensions) / 2)
    assert l2 == pytest.approx(math.sqrt(squared), rel=1e-9)
    assert clip < l2 < 1.01 * clip
    assert l1 == pytest.approx(math.sqrt(dimensions) * l2)
    small = sensitivity(clip=1.0, dimensions=dimensions, beta=beta)
    assert small[0] == pytest.approx(small[1] ** 2)  # integers
    assert sensitivity(clip=5.0, dimensions=1, beta=1e-300)[1] == pytest.approx(6.0)  # never more


@settings(max_examples=50, deadline=None)
@given(clip=st.floats(0.1, 1e6), dimensions=st.integers(1, 10**7), beta=st.floats(1e-12, 0.4))
def test_sensitivity_rises_with_clip_dimensions_and_certainty(clip: float, dimensions: int, beta: float) -> None:
    base = sensitivity(clip=clip, dimensions=dimensions, beta=beta)
    assert base[1] > clip
    assert base[0] <= min(math.sqrt(dimensions) * base[1], base[1] ** 2) * (1 + 1e-12)
    for larger in (
        sensitivity(clip=1.1 * clip, dimensions=dimensions, beta=beta),
        sensitivity(clip=clip, dimensions=dimensions + 5, beta=beta),
        sensitivity(clip=clip, dimensions=dimensions, beta=beta / 2),
    ):
        assert larger[0] >= base[0]
        assert larger[1] >= base[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("clip", 0.0), ("clip", float("nan")), ("dimensions", 0), ("dimensions", 2.5), ("beta", 0.0), ("beta", 1.0)],
)
def test_impossible_sensitivities_are_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidPlan, match=name):
        sensitivity(**{"clip": 1.0, "dimensions": 3, "beta": 0.1, name: value})  # type: ignore[arg-type]


def test_huge_sums_are_clamped_and_broken_ones_refused() -> None:
    numbers = dithered(np.array([1e300, -1e300]), scale=1.0, randomness=SecureRandomness())
    assert numbers.tolist() == [LARGEST, -LARGEST]
    for value in (float("nan"), float("inf")):
        with pytest.raises(InvalidPlan, match="values"):
            dithered(np.array([0.0, value]), scale=1.0, randomness=SecureRandomness())
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidPlan, match="scale"):
            dithered(np.zeros(1), scale=scale, randomness=SecureRandomness())
