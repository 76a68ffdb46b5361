from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize, special, stats

from privacy import accounting
from privacy.accounting import (
    PRV_EPSILON_ERROR,
    GaussianRelease,
    MechanismEvent,
    SampledGaussian,
    SampledSkellam,
    Spent,
    epsilon,
    epsilons,
    event_from_json,
)
from privacy.errors import InvalidPlan, PrivacyError, UnknownEvent
from privacy.skellam import sensitivity

# Ours is an upper bound within 2 × PRV_EPSILON_ERROR of the truth; Google's PLD is one too, on a grid of 1e-4.
ABOVE_PLD, BELOW_PLD = 2 * PRV_EPSILON_ERROR, 1e-3


def steps(q: float, sigma: float, count: int) -> SampledGaussian:
    return SampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=count)


def release(sigma: float) -> GaussianRelease:
    return GaussianRelease(noise_multiplier=sigma)


def skellam(q: float, variance: float, clip: float, dimensions: int, count: int) -> SampledSkellam:
    return SampledSkellam(sampling_rate=q, noise_variance=variance, clip=clip, dimensions=dimensions, steps=count)


SKELLAM_JSON = {
    "mechanism": "sampled_skellam",
    "sampling_rate": 0.1,
    "noise_variance": 9.0,
    "clip": 3.0,
    "dimensions": 5,
    "steps": 1,
}


def pld_epsilon(events: list[MechanismEvent], delta: float) -> float:
    dp = pytest.importorskip("dp_accounting", reason="Google's dp-accounting is not installed")
    accountant = dp.pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in events:
        gaussian = dp.GaussianDpEvent(event.noise_multiplier)
        if isinstance(event, SampledGaussian):
            accountant.compose(dp.PoissonSampledDpEvent(event.sampling_rate, gaussian), event.steps)
        else:
            accountant.compose(gaussian)
    return float(accountant.get_epsilon(delta))


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Balle and Wang 2018, arXiv:1805.06530, thm 8: exact for one Gaussian."""

    def excess(eps: float) -> float:
        a, b = 1 / (2 * sigma), eps * sigma
        return float(stats.norm.cdf(a - b) - math.exp(eps) * stats.norm.cdf(-a - b)) - delta

    return float(optimize.brentq(excess, 0, 200)) if excess(0) > 0 else 0.0


GRID: list[tuple[list[MechanismEvent], float]] = [
    ([steps(0.15, 1.33, 250)], 1e-3),
    ([steps(0.2, 2.27, 500)], 1e-3),
    ([steps(0.5, 2.0, 100)], 1e-3),
    ([steps(0.9, 3.0, 60)], 1e-3),
    ([steps(0.01, 0.8, 1000)], 1e-5),
    ([steps(0.02, 5.0, 200)], 1e-4),
    ([steps(0.1, 0.5, 3)], 1e-3),
    ([steps(1.0, 4.0, 20)], 1e-3),
    ([release(3.0)], 1e-3),
    ([release(3.0), steps(0.15, 1.5, 200)], 1e-3),
    ([release(2.0), steps(0.15, 1.5, 100), steps(0.3, 2.0, 50), release(5.0)], 1e-3),
    ([steps(0.15, 1.33, 250)], 0.05),  # the membership ceiling reads the curve here
    ([steps(0.15, 1.33, 250)], 0.4),
    ([steps(0.5, 2.0, 100)], 0.8),
]


@pytest.mark.parametrize(("events", "delta"), GRID)
def test_prv_is_googles_pld(events: list[MechanismEvent], delta: float) -> None:
    spent = epsilon(events, delta)
    assert spent.accountant == "prv"
    reference = pld_epsilon(events, delta)
    assert reference - BELOW_PLD <= spent.epsilon <= reference + ABOVE_PLD


@pytest.mark.parametrize(("events", "delta"), GRID[:1] + GRID[8:11])
def test_rdp_is_a_looser_bound(events: list[MechanismEvent], delta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "PRV_MOST_POINTS", 0)
    accounting._epsilons.cache_clear()
    try:
        spent = epsilon(events, delta)
    finally:
        accounting._epsilons.cache_clear()
    assert spent.accountant == "rdp"
    reference = pld_epsilon(events, delta)
    assert reference <= spent.epsilon <= 1.3 * reference


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("delta", [1e-6, 1e-3, 0.2])
def test_one_release_costs_what_the_gaussian_mechanism_costs(sigma: float, delta: float) -> None:
    exact = gaussian_epsilon(sigma, delta)
    assert exact <= epsilon([release(sigma)], delta).epsilon + 1e-9 <= exact + ABOVE_PLD


@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ([steps(0.5, 0.05, 10)], 1e-3),  # tiny noise
        ([steps(0.2, 0.01, 100_000)], 1e-3),
        ([release(0.001)], 1e-3),
        ([steps(0.2, 1.0, 50_000)], 1e-4),  # a domain too large
        ([steps(0.2, 2.0, 100)], 1e-12),  # δ below the arithmetic
    ],
)
def test_where_prv_fails_rdp_answers_and_says_so(events: list[MechanismEvent], delta: float) -> None:
    spent = epsilon(events, delta)
    assert spent.accountant == "rdp"
    assert 0 < spent.epsilon < math.inf


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-3) == Spent(epsilon=0.0, accountant="none")
    assert epsilons([[], [steps(0.2, 2.0, 5)]], [1e-3])[0] == [Spent(epsilon=0.0, accountant="none")]


@settings(max_examples=10, deadline=None)
@given(
    q=st.floats(0.01, 1.0),
    sigma=st.floats(0.5, 8.0),
    count=st.integers(1, 300),
    more=st.integers(1, 50),
)
def test_epsilon_rises_with_steps_and_falls_with_noise_and_delta(q: float, sigma: float, count: int, more: int) -> None:
    rounding = 1e-5  # of the discretised loss
    base = epsilon([steps(q, sigma, count)], 1e-3).epsilon
    assert epsilon([steps(q, sigma, count + more)], 1e-3).epsilon >= base - rounding
    assert epsilon([steps(q, sigma, count), release(5.0)], 1e-3).epsilon >= base - rounding
    assert epsilon([steps(q, 1.1 * sigma, count)], 1e-3).epsilon <= base + rounding
    assert epsilon([steps(q, sigma, count)], 1e-2).epsilon <= base + rounding


def test_every_step_counts_once() -> None:
    values = [epsilon([steps(0.15, 1.33, count)], 1e-3).epsilon for count in (248, 249, 250, 251)]
    assert values == sorted(values)
    assert len(set(values)) == 4
    together = epsilon([steps(0.15, 1.33, 250)], 1e-3)
    assert epsilon([steps(0.15, 1.33, 100), steps(0.15, 1.33, 1), steps(0.15, 1.33, 149)], 1e-3) == together
    mixed = [release(3.0), steps(0.15, 1.33, 10), steps(0.3, 2.0, 5)]
    assert epsilon(mixed, 1e-3) == epsilon(mixed[::-1], 1e-3)


def test_jobs_compose_to_less_than_the_sum() -> None:
    one = epsilon([steps(0.2, 2.0, 100)], 1e-3).epsilon
    both = epsilon([steps(0.2, 2.0, 100), steps(0.1, 1.5, 100)], 1e-3).epsilon
    other = epsilon([steps(0.1, 1.5, 100)], 1e-3).epsilon
    assert max(one, other) < both < one + other


def test_several_at_once_equal_one_by_one() -> None:
    histories = [[release(3.0), steps(0.15, 1.33, 25 * (r + 1))] for r in range(4)]
    table = epsilons(histories, [1e-4, 1e-2])
    for history, row in zip(histories, table, strict=True):
        for delta, spent in zip((1e-4, 1e-2), row, strict=True):
            # the shared grid is finer than each one's own
            assert spent.epsilon == pytest.approx(epsilon(history, delta).epsilon, abs=2e-3)


def test_opacus_gdp_accountant_is_below_the_truth_and_never_used() -> None:
    from opacus.accountants.gdp import GaussianAccountant

    event = steps(0.01, 0.6, 100)
    with pytest.warns(UserWarning, match="can underestimate"):
        gdp = GaussianAccountant()
    gdp.history = [(event.noise_multiplier, event.sampling_rate, event.steps)]
    reference = pld_epsilon([event], 1e-5)
    assert float(gdp.get_epsilon(1e-5)) < 0.5 * reference
    assert epsilon([event], 1e-5).epsilon >= reference - BELOW_PLD


class Laplace:
    noise_multiplier = 1.0


class Renamed(SampledGaussian):
    """A subclass may mean another mechanism."""


@pytest.mark.parametrize(
    "event",
    [Laplace(), None, (1.0, 0.1, 10), Renamed(sampling_rate=0.1, noise_multiplier=1.0, steps=1)],
)
def test_unknown_events_raise(event: object) -> None:
    with pytest.raises(UnknownEvent):
        epsilon([steps(0.2, 2.0, 5), event], 1e-3)  # type: ignore[list-item]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"mechanism": "laplace", "noise_multiplier": 1.0},
        {"mechanism": "gaussian_release"},
        {"mechanism": "gaussian_release", "noise_multiplier": 1.0, "sensitivity": 0.5},
        {"mechanism": "sampled_gaussian", "sampling_rate": 0.1, "noise_multiplier": 1.0},
        {"mechanism": "sampled_skellam", "sampling_rate": 0.1, "noise_variance": 9.0, "clip": 3.0, "steps": 1},
        {**SKELLAM_JSON, "scale": 1.0},
        {**SKELLAM_JSON, "noise_multiplier": 1.0},
    ],
)
def test_unknown_json_raises(values: dict[str, object]) -> None:
    with pytest.raises(UnknownEvent):
        event_from_json(values)


@pytest.mark.parametrize(
    ("q", "sigma", "count"),
    [
        (0.0, 1.0, 1),
        (1.1, 1.0, 1),
        (float("nan"), 1.0, 1),
        ("0.1", 1.0, 1),
        (0.1, 0.0, 1),
        (0.1, -1.0, 1),
        (0.1, float("inf"), 1),
        (0.1, 1.0, 0),
        (0.1, 1.0, 2.0),
        (0.1, 1.0, True),
    ],
)
def test_impossible_events_raise(q: float, sigma: float, count: int) -> None:
    with pytest.raises(InvalidPlan):
        steps(q, sigma, count)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-3, float("nan")])
def test_impossible_delta_raises(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        epsilon([release(1.0)], delta)


@pytest.mark.parametrize("event", [steps(0.15, 1.33, 25), release(3.0), skellam(0.25, 2.0**24, 4096.0, 700_000, 10)])
def test_events_survive_json(event: MechanismEvent) -> None:
    assert event_from_json(json.loads(json.dumps(event.to_json()))) == event


def pair(shift: int, variance: float, *, reach: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log masses of Skellam noise with and without a patient of this length in one coordinate, over ±reach."""
    ratio = np.zeros(2 * reach + 2)
    for k in range(2 * reach, 0, -1):  # I_k / I_(k-1), arithmetic of its own
        ratio[k] = 1 / (2 * k / variance + ratio[k + 1])
    log = np.concatenate([[0.0], np.cumsum(np.log(ratio[1 : 2 * reach + 1]))])
    log -= math.log(1 + 2 * math.fsum(np.exp(log[1:])))
    k = np.arange(-reach, reach + 1)
    return log[np.abs(k - shift)], log[np.abs(k)]


def renyi(p: NDArray[np.float64], q: NDArray[np.float64], alpha: int) -> float:
    return float(special.logsumexp(alpha * p - (alpha - 1) * q) / (alpha - 1))


def sampled(q: float, p: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.logaddexp(math.log(q) + p, math.log1p(-q) + other) if q < 1 else p


def exact_delta(q: float, shift: int, variance: float, eps: float) -> float:
    """Least δ at ε of one step, in one coordinate, from the definition and in both directions."""
    with_patient, without = pair(shift, variance, reach=shift + round(12 * math.sqrt(variance)) + 40)
    mixed = sampled(q, with_patient, without)
    return max(
        math.fsum(np.maximum(np.exp(one) - math.exp(eps) * np.exp(other), 0.0))
        for one, other in ((mixed, without), (without, mixed))
    )


def skellam_divergences(q: float, variance: float, clip: float, dimensions: int = 1) -> dict[int, float]:
    values = accounting._skellam_divergences(accounting._Skellam(q, variance, clip, dimensions), 1e-6)
    return dict(zip(accounting.RDP_ORDERS, values, strict=True))


@pytest.mark.parametrize(
    ("shift", "variance", "tight"),
    [(1, 0.5, False), (1, 4.0, False), (3, 9.0, False), (10, 25.0, False), (2000, 4.0e6, True), (1000, 1.6e7, True)],
)
def test_skellam_divergences_are_at_least_the_exact_ones(shift: int, variance: float, tight: bool) -> None:
    ours = skellam_divergences(1.0, variance, float(shift))
    for alpha in (2, 3, 4, 8, 16):
        reach = round(1.5 * alpha * shift + 20 * math.sqrt(variance)) + 40
        exact = renyi(*pair(shift, variance, reach=reach), alpha)
        assert exact <= ours[alpha]
        assert ours[alpha] <= 1.1 * exact or not tight


@pytest.mark.parametrize("variance", [10.0, 1e4])
def test_skellam_divergences_are_the_theorems(variance: float) -> None:
    """Exact divergences do not tell whether the theorem's last term is there: it seems to be slack."""
    l1, l2 = sensitivity(clip=5.0, dimensions=7, beta=1e-6)
    for alpha, ours in skellam_divergences(1.0, variance, 5.0, 7).items():
        last = min(((2 * alpha - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
        assert ours == pytest.approx(alpha * l2**2 / (2 * variance) + last, rel=1e-12)


def test_the_dithers_of_all_steps_share_one_part_of_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    betas: dict[float, float] = {}

    def spy(mechanism: accounting._Skellam, beta: float) -> tuple[float, ...]:
        betas[mechanism.clip] = beta
        return (0.01,) * len(accounting.RDP_ORDERS)

    monkeypatch.setattr(accounting, "_skellam_divergences", spy)
    history = accounting._merged([skellam(0.1, 9.0, 1.0, 5, 3), release(3.0), skellam(0.1, 9.0, 2.0, 5, 4)])
    accounting._rdp(history, 1e-3)
    assert 3 * betas[1.0] + 4 * betas[2.0] == pytest.approx(accounting.DITHER_DELTA_SHARE * 1e-3)
    assert accounting.DITHER_DELTA_SHARE + accounting.NOISE_DELTA_SHARE <= 0.05


def test_skellam_divergences_hold_in_two_coordinates() -> None:
    for vector in ((3, 4), (0, 5), (-4, 3)):
        for alpha in (2, 5, 16):
            exact = sum(renyi(*pair(abs(x), 30.0, reach=400), alpha) for x in vector)
            assert exact <= skellam_divergences(1.0, 30.0, 5.0, 2)[alpha]
    assert renyi(*pair(5, 30.0, reach=400), 2) > 0.5 * skellam_divergences(1.0, 30.0, 5.0, 2)[2]


@pytest.mark.parametrize("q", [0.01, 0.25, 0.9])
@pytest.mark.parametrize(
    ("shift", "variance", "tight"), [(1, 1.0, False), (3, 9.0, False), (5, 100.0, False), (2000, 4.0e6, True)]
)
def test_sampled_skellam_divergences_hold_in_both_directions(
    q: float, shift: int, variance: float, tight: bool
) -> None:
    ours = skellam_divergences(q, variance, float(shift))
    for alpha in (2, 3, 4, 8, 16):
        reach = round(1.5 * alpha * shift + 20 * math.sqrt(variance)) + 40
        with_patient, without = pair(shift, variance, reach=reach)
        mixed = sampled(q, with_patient, without)
        exact = renyi(mixed, without, alpha)
        assert exact <= ours[alpha]
        assert ours[alpha] <= 1.1 * exact or not tight
        assert renyi(without, mixed, alpha) <= exact


@settings(max_examples=40, deadline=None)
@given(
    q=st.floats(1e-3, 0.999),
    shift=st.integers(1, 30),
    variance=st.floats(0.3, 500.0),
    alpha=st.integers(2, 40),
)
def test_the_direction_that_is_counted_is_the_larger(q: float, shift: int, variance: float, alpha: int) -> None:
    """Which spares the factor 3 that mechanisms without this symmetry need."""
    with_patient, without = pair(shift, variance, reach=2 * alpha * shift + round(20 * math.sqrt(variance)) + 60)
    mixed = sampled(q, with_patient, without)
    assert renyi(without, mixed, alpha) <= renyi(mixed, without, alpha) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize(
    ("q", "shift", "variance"), [(1.0, 3, 40.0), (1.0, 50, 2500.0), (0.25, 50, 2500.0), (0.25, 4, 9.0), (0.6, 1, 1.0)]
)
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_one_skellam_step_keeps_its_exact_delta(q: float, shift: int, variance: float, delta: float) -> None:
    spent = epsilon([skellam(q, variance, float(shift), 1, 1)], delta)
    assert spent.accountant == "rdp"
    assert exact_delta(q, shift, variance, spent.epsilon) <= delta


@pytest.mark.parametrize(("q", "shift", "ratio"), [(1.0, 400, 2.0), (1.0, 400, 1.0), (0.5, 400, 1.0)])
def test_counting_more_noise_than_runs_is_seen(q: float, shift: int, ratio: float) -> None:
    runs, delta = (ratio * shift) ** 2, 1e-3
    counted = epsilon([skellam(q, runs, float(shift), 1, 1)], delta).epsilon
    wrong = epsilon([skellam(q, 1.5**2 * runs, float(shift), 1, 1)], delta).epsilon
    assert exact_delta(q, shift, runs, counted) <= delta
    assert exact_delta(q, shift, runs, wrong) > delta


@pytest.mark.parametrize(
    ("q", "sigma", "count"), [(1.0, 4.0, 1), (1.0, 4.0, 20), (0.25, 1.0, 50), (0.1, 1.0, 200), (0.25, 4.0, 200)]
)
def test_on_a_fine_grid_skellam_costs_what_the_gaussian_costs(q: float, sigma: float, count: int) -> None:
    clip, delta = 2.0**24, 1e-3
    ours = epsilon([skellam(q, (sigma * clip) ** 2, clip, 3, count)], delta)
    gaussian = accounting._merged([steps(q, sigma, count)])
    shares = accounting.DITHER_DELTA_SHARE + accounting.NOISE_DELTA_SHARE
    assert ours.epsilon == pytest.approx(accounting._rdp(gaussian, (1 - shares) * delta), rel=1e-4)
    assert ours.epsilon > accounting._rdp(gaussian, delta)
    prv = epsilon([steps(q, sigma, count)], delta)
    assert prv.accountant == "prv"
    assert prv.epsilon <= ours.epsilon <= 1.3 * prv.epsilon


def test_a_coarse_grid_costs_more() -> None:
    dimensions = 700_000
    grids = [epsilon([skellam(0.25, (2 * c) ** 2, c, dimensions, 50)], 1e-3).epsilon for c in (256.0, 1024.0, 4096.0)]
    gaussian = epsilon([steps(0.25, 2.0, 50)], 1e-3).epsilon
    assert grids[0] > 1.5 * grids[1] > 1.5 * grids[2] > 1.5 * gaussian / 1.2
    assert grids[2] < 1.2 * gaussian


@settings(max_examples=30, deadline=None)
@given(
    q=st.floats(0.01, 1.0),
    sigma=st.floats(0.8, 8.0),
    clip=st.floats(1000.0, 1e6),
    dimensions=st.integers(1, 10**6),
    count=st.integers(1, 50),
)
def test_skellam_epsilon_rises_with_all_but_noise(
    q: float, sigma: float, clip: float, dimensions: int, count: int
) -> None:
    delta, variance = 1e-3, (sigma * clip) ** 2

    def cost(*, q: float = q, v: float = variance, c: float = clip, d: int = dimensions, n: int = count) -> float:
        try:
            return epsilon([skellam(q, v, c, d, n)], delta).epsilon
        except InvalidPlan:  # so much that the distance of the sampled noise no longer leaves a bound
            return math.inf

    base = cost()
    assume(math.isfinite(base))
    least = base * (1 - 1e-9)
    assert cost(q=min(1.0, 1.1 * q)) >= least
    assert cost(n=count + 1) >= least
    assert cost(c=1.1 * clip) >= least
    assert cost(d=dimensions + 1000) >= least
    assert cost(v=1.1 * variance) <= base * (1 + 1e-9)
    assert epsilon([skellam(q, variance, clip, dimensions, count)], 2 * delta).epsilon <= base * (1 + 1e-9)


def test_skellam_composes_with_gaussians_by_rdp() -> None:
    sums, others = skellam(0.25, 8192.0**2, 4096.0, 10_000, 40), [release(3.0), steps(0.15, 1.5, 100)]
    one, other = epsilon([sums], 1e-3).epsilon, epsilon(others, 1e-3).epsilon
    both = epsilon([*others, sums], 1e-3)
    assert both.accountant == "rdp"
    assert max(one, other) < both.epsilon < one + other
    assert epsilon([sums, *others[::-1]], 1e-3) == both
    parts = [skellam(0.25, 8192.0**2, 4096.0, 10_000, n) for n in (30, 10)]
    assert epsilon([parts[0], *others, parts[1]], 1e-3) == both
    assert epsilons([[], others, [*others, sums]], [1e-3])[0] == [Spent(epsilon=0.0, accountant="none")]
    assert [row[0].accountant for row in epsilons([others, [*others, sums]], [1e-3])] == ["rdp", "rdp"]
    assert epsilon(others, 1e-3).accountant == "prv"


def test_skellam_without_a_finite_cost_is_refused() -> None:
    for event, delta in ((skellam(1.0, 1.0, 100.0, 1000, 100), 1e-3), (skellam(0.2, 1e8, 1e4, 1000, 1), 1e-60)):
        with pytest.raises(InvalidPlan, match="finite cost"):
            epsilon([event], delta)


def test_noise_multiplier_of_skellam_is_noise_over_clip() -> None:
    assert skellam(0.25, 2.0**26, 4096.0, 700_000, 1).noise_multiplier == 2.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.1),
        ("noise_variance", 0.0),
        ("noise_variance", float("inf")),
        ("clip", -1.0),
        ("clip", "1"),
        ("dimensions", 0),
        ("dimensions", 3.0),
        ("steps", 0),
        ("steps", True),
    ],
)
def test_impossible_skellam_events_raise(name: str, value: object) -> None:
    with pytest.raises(InvalidPlan, match=name):
        event_from_json({**SKELLAM_JSON, name: value})


def test_a_subclass_of_skellam_is_unknown() -> None:
    class Other(SampledSkellam):
        pass

    event = Other(sampling_rate=1.0, noise_variance=9.0, clip=1.0, dimensions=1, steps=1)
    with pytest.raises(UnknownEvent, match="Other"):
        epsilon([event], 1e-3)


def test_reading_events_needs_neither_opacus_nor_torch() -> None:
    code = (
        "import sys, privacy.accounting as a; a.epsilon([], 0.1); sys.exit(bool({'opacus', 'torch'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
