from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from privacy import accounting
from privacy.accounting import (
    PRV_EPSILON_ERROR,
    GaussianRelease,
    MechanismEvent,
    SampledGaussian,
    Spent,
    epsilon,
    epsilons,
    event_from_json,
)
from privacy.errors import InvalidPlan, PrivacyError, UnknownEvent

# Ours is an upper bound within 2 × PRV_EPSILON_ERROR of the truth; Google's PLD is one too, on a grid of 1e-4.
ABOVE_PLD, BELOW_PLD = 2 * PRV_EPSILON_ERROR, 1e-3


def steps(q: float, sigma: float, count: int) -> SampledGaussian:
    return SampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=count)


def release(sigma: float) -> GaussianRelease:
    return GaussianRelease(noise_multiplier=sigma)


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


@pytest.mark.parametrize("event", [steps(0.15, 1.33, 25), release(3.0)])
def test_events_survive_json(event: MechanismEvent) -> None:
    assert event_from_json(json.loads(json.dumps(event.to_json()))) == event


def test_reading_events_needs_neither_opacus_nor_torch() -> None:
    code = (
        "import sys, privacy.accounting as a; a.epsilon([], 0.1); sys.exit(bool({'opacus', 'torch'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
