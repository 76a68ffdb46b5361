from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import linprog

from privacy.audit import bounds
from privacy.audit.bounds import (
    EpsilonBound,
    clopper_pearson_epsilon,
    clopper_pearson_epsilon_of_counts,
    correct_guesses,
    fdp_epsilon,
    fdp_epsilon_of_counts,
    gaussian_epsilon,
    guess_grid,
    one_run_epsilon,
    one_run_epsilon_of_counts,
    one_run_p_value,
)
from privacy.audit.errors import Unattackable

CONFIDENCE = 0.95
Scores = NDArray[np.float64]
Coins = NDArray[np.bool_]
Bound = Callable[[Scores, Coins], EpsilonBound]


def one_run(canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE) -> float:
    return one_run_epsilon_of_counts(
        canaries=canaries, guesses=guesses, correct=correct, delta=delta, confidence=confidence
    )


def fdp(
    canaries: int, guesses: int, correct: int, delta: float, trade_off: Any, confidence: float = CONFIDENCE
) -> float:
    return fdp_epsilon_of_counts(
        canaries=canaries, guesses=guesses, correct=correct, delta=delta, confidence=confidence, trade_off=trade_off
    )


def coins(count: int, rng: np.random.Generator) -> Coins:
    return rng.random(count) < 0.5


# ---- published and closed forms


@pytest.mark.parametrize(
    ("counts", "published"),
    [
        ((1000, 100, 75, 1e-4), 0.673),  # arXiv:2305.08846, appendix D
        ((100, 100, 75, 1e-4), 0.699),
        ((100_000, 1510, 1439, 1e-5), 2.675),  # section 7; the paper cuts off the fourth digit
    ],
)
def test_one_run_gives_the_paper_its_numbers(counts: tuple[int, int, int, float], published: float) -> None:
    assert one_run(*counts) == pytest.approx(published, abs=1e-3)
    assert one_run(*counts[:3], delta=0) > one_run(*counts) + 2e-3  # δ has a price that the numbers show


@pytest.mark.parametrize("guesses", [1, 10, 100, 1000])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_all_guesses_right_has_a_closed_form(guesses: int, confidence: float) -> None:
    q = (1 - confidence) ** (1 / guesses)  # q^r = α
    expected = max(0.0, math.log(q / (1 - q)))
    for epsilon in (
        one_run(guesses, guesses, guesses, 0, confidence),
        fdp(guesses, guesses, guesses, 0, "approximate", confidence),
    ):
        assert epsilon == pytest.approx(expected, abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.data(), st.floats(0, 4))
def test_without_delta_the_p_value_is_the_binomial_tail(guesses: int, data: st.DataObject, epsilon: float) -> None:
    correct = data.draw(st.integers(0, guesses))
    canaries = data.draw(st.integers(guesses, 200))
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    tail = math.fsum(math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(correct, guesses + 1))
    found = one_run_p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=0)
    assert found == pytest.approx(tail, rel=1e-9, abs=1e-300)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.data(), st.floats(0, 4), st.floats(0, 0.01))
def test_p_value_equals_the_sum_term_by_term(guesses: int, data: st.DataObject, epsilon: float, delta: float) -> None:
    correct = data.draw(st.integers(0, guesses))
    canaries = data.draw(st.integers(guesses, 200))
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    below = alpha = 0.0
    for i in range(1, correct + 1):
        below += stats.binom.pmf(correct - i, guesses, q)
        alpha = max(alpha, below / i)
    expected = min(1.0, stats.binom.sf(correct - 1, guesses, q) + 2 * canaries * delta * alpha)
    found = one_run_p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.01])
def test_gaussian_epsilon_solves_its_equation(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    if epsilon == 0:
        assert delta >= 2 * stats.norm.cdf(mu / 2) - 1
        return
    # δ as an integral: what N(μ, 1) has beyond e^ε N(0, 1), right of where their ratio is e^ε.
    border = epsilon / mu + mu / 2
    x = np.linspace(border, max(border, mu) + 40, 2_000_001)
    beyond = stats.norm.pdf(x, loc=mu) * -np.expm1(epsilon - (mu * x - mu * mu / 2))
    assert np.trapezoid(beyond, x) == pytest.approx(delta, rel=1e-5)


def test_gaussian_epsilon_of_nothing_is_nothing() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == 0
    assert gaussian_epsilon(1e-9, 1e-5) == 0
    assert gaussian_epsilon(0.1, 0.5) == 0


# ---- the f-DP recursion against linear programs


def linear_program(curve_lines: list[tuple[float, float]], m: int, r: int, v: int, alpha: float) -> float:
    """Least mass, where f̄⁻¹ is the largest of the lines (slope, offset)."""
    j = np.arange(r + 1)
    rows, limits = [-(j >= v).astype(float)], [-alpha]
    for i in range(1, v + 1):
        right, wrong = (j >= i) * j / m, (j >= i - 1) * (r - j) / m
        for slope, offset in curve_lines:  # wrong ≥ slope · right + offset
            rows.append(slope * right - wrong)
            limits.append(-offset)
    solved = linprog(np.ones(r + 1), A_ub=np.array(rows), b_ub=limits, bounds=(0, None), method="highs")
    assert solved.status == 0
    return float(solved.fun)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.data(), st.floats(0, 3), st.floats(0, 0.1), st.floats(0.01, 0.4))
def test_recursion_is_the_linear_program_of_approximate_dp(
    guesses: int, data: st.DataObject, epsilon: float, delta: float, alpha: float
) -> None:
    correct, canaries = data.draw(st.integers(0, guesses)), data.draw(st.integers(guesses, 40))
    fewer, more = math.exp(-epsilon), math.exp(epsilon)
    lines = [(fewer, -fewer * delta), (more, 1 - delta - more)]
    expected = linear_program(lines, canaries, guesses, correct, alpha)
    found = bounds._least_mass(bounds._approximate_curve(epsilon, delta), canaries, guesses, correct, alpha)
    assert (found > 1) == (expected > 1) or abs(expected - 1) < 1e-6
    if expected < 1 - 1e-6:
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("m", "r", "v"), [(10, 10, 8), (30, 10, 9), (20, 15, 9), (6, 6, 6)])
def test_recursion_is_the_linear_program_of_gaussian_dp(mu: float, m: int, r: int, v: int) -> None:
    y = np.linspace(-6, 6, 400)  # tangents at Φ(y): f̄⁻¹ = Φ(Φ⁻¹ - μ) is convex
    slopes = np.exp(mu * y - mu * mu / 2)
    lines = list(zip(slopes, stats.norm.cdf(y - mu) - slopes * stats.norm.cdf(y), strict=True))
    alpha = 0.02
    expected = linear_program(lines, m, r, v, alpha)
    found = bounds._least_mass(bounds._gaussian_curve(mu), m, r, v, alpha)
    if expected < 0.999:
        assert found == pytest.approx(expected, rel=2e-3)
    else:
        assert found > 0.999


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 5), st.floats(0, 0.2), st.floats(0, 1))
@example(1.0, 0.0, 0.95)  # beyond the corner of the curve
@example(1.0, 0.1, 0.3)  # below it
def test_approximate_curve_inverts_the_trade_off(epsilon: float, delta: float, x: float) -> None:
    def blown_up(x: float) -> float:
        return min(1.0, math.exp(epsilon) * x + delta, 1 - math.exp(-epsilon) * (1 - delta - x))

    inverse = bounds._approximate_curve(epsilon, delta)
    assert inverse(blown_up(x)) <= x + 1e-9
    assert blown_up(min(1.0, inverse(x))) >= x - 1e-9


# ---- coverage, computed exactly: V right guesses have a known distribution

EPSILON, MU = 1.0, 1.0
DELTA = 0.01


def wrongly_refuted(epsilon_of: Callable[[int], float], probabilities: NDArray[np.float64], truth: float) -> float:
    return float(sum(p for v, p in enumerate(probabilities) if p > 0 and epsilon_of(v) > truth + 1e-7))


@pytest.mark.parametrize("guesses", [20, 100])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("bound", [one_run, lambda *counts: fdp(*counts[:-1], "approximate", counts[-1])])
def test_randomised_response_keeps_the_confidence(guesses: int, confidence: float, bound: Any) -> None:
    q = math.exp(EPSILON) / (1 + math.exp(EPSILON))
    distribution = stats.binom.pmf(np.arange(guesses + 1), guesses, q)
    wrong = wrongly_refuted(lambda v: bound(guesses, guesses, v, 0.0, confidence), distribution, EPSILON)
    assert wrong <= 1 - confidence
    assert wrong > (1 - confidence) / 10  # the binomial bound is exact up to the steps of v


@pytest.mark.parametrize("bound", [one_run, lambda *counts: fdp(*counts, "approximate")])
def test_a_mechanism_that_uses_up_delta_keeps_the_confidence(bound: Any) -> None:
    """With probability δ it tells all coins, and answers by randomised response otherwise: (ε, δ)-DP."""
    m, delta = 60, 0.04
    q = math.exp(EPSILON) / (1 + math.exp(EPSILON))
    distribution = (1 - delta) * stats.binom.pmf(np.arange(m + 1), m, q)
    distribution[m] += delta
    assert wrongly_refuted(lambda v: bound(m, m, v, delta), distribution, EPSILON) <= 1 - CONFIDENCE
    # The same at δ = 0, which is not true of this mechanism, is refuted too often: the test can tell.
    assert wrongly_refuted(lambda v: bound(m, m, v, 0.0), distribution, EPSILON) > 1 - CONFIDENCE


def test_delta_spent_on_single_coins_keeps_the_confidence() -> None:
    m = 100
    q = DELTA + (1 - DELTA) * math.exp(EPSILON) / (1 + math.exp(EPSILON))
    distribution = stats.binom.pmf(np.arange(m + 1), m, q)
    for bound in (one_run, lambda *counts: fdp(*counts, "approximate")):
        assert wrongly_refuted(lambda v, b=bound: b(m, m, v, DELTA), distribution, EPSILON) <= 1 - CONFIDENCE


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_gaussian_mechanism_keeps_the_confidence(mu: float) -> None:
    m, delta = 100, 1e-5
    distribution = stats.binom.pmf(np.arange(m + 1), m, stats.norm.cdf(mu / 2))  # b μ + N(0, 1), cut at μ/2
    truth = gaussian_epsilon(mu, delta)
    assert wrongly_refuted(lambda v: fdp(m, m, v, delta, "gaussian"), distribution, truth) <= 1 - CONFIDENCE
    median = int(stats.binom.median(m, stats.norm.cdf(mu / 2)))
    assert fdp(m, m, median, delta, "gaussian") > 1.4 * one_run(m, m, median, delta) > 0


def test_gaussian_curve_is_no_bound_for_other_mechanisms() -> None:
    """Why the docstring limits it: randomised response keeps ε = 1 and is refuted as a Gaussian of ε = 1."""
    m = 1000
    typical = int(m * math.exp(EPSILON) / (1 + math.exp(EPSILON)))
    assert fdp(m, m, typical, 1e-5, "gaussian") > 1.5 * EPSILON
    assert fdp(m, m, typical, 1e-5, "approximate") < EPSILON
    assert one_run(m, m, typical, 1e-5) < EPSILON


def test_the_whole_curve_shows_more_of_a_gaussian_mechanism() -> None:
    m, mu, delta = 1000, 2.0, 1e-5
    right = int(m * stats.norm.cdf(mu / 2))
    truth = gaussian_epsilon(mu, delta)
    assert 1.5 * one_run(m, m, right, delta) < fdp(m, m, right, delta, "gaussian") < truth


# ---- coverage of the whole path from scores, simulated


def gaussian_scores(mu: float, count: int, rng: np.random.Generator) -> tuple[Scores, Coins]:
    included = coins(count, rng)
    return included * mu + rng.standard_normal(count), included


def response_scores(epsilon: float, count: int, rng: np.random.Generator) -> tuple[Scores, Coins]:
    """Randomised response, with ties broken by the mechanism itself."""
    included = coins(count, rng)
    truthful = rng.random(count) < math.exp(epsilon) / (1 + math.exp(epsilon))
    return (included == truthful) + rng.random(count) / 2, included


GRID = guess_grid(60)
PATHS: dict[str, tuple[Bound, Callable[[np.random.Generator], tuple[Scores, Coins]], float]] = {
    "one run, randomised response": (
        lambda s, c: one_run_epsilon(s, c, delta=0.0, confidence=0.9, guesses=GRID),
        lambda rng: response_scores(EPSILON, 60, rng),
        EPSILON,
    ),
    "one run, Gaussian": (
        lambda s, c: one_run_epsilon(s, c, delta=DELTA, confidence=0.9, guesses=GRID),
        lambda rng: gaussian_scores(MU, 60, rng),
        gaussian_epsilon(MU, DELTA),
    ),
    "f-DP, Gaussian": (
        lambda s, c: fdp_epsilon(s, c, delta=DELTA, confidence=0.9, guesses=GRID, trade_off="gaussian"),
        lambda rng: gaussian_scores(MU, 60, rng),
        gaussian_epsilon(MU, DELTA),
    ),
    "f-DP, randomised response": (
        lambda s, c: fdp_epsilon(s, c, delta=0.0, confidence=0.9, guesses=GRID, trade_off="approximate"),
        lambda rng: response_scores(EPSILON, 60, rng),
        EPSILON,
    ),
    "Clopper-Pearson, randomised response": (
        lambda s, c: clopper_pearson_epsilon(s, c, delta=0.0, confidence=0.9, rng=np.random.default_rng(0)),
        lambda rng: response_scores(EPSILON, 60, rng),
        EPSILON,
    ),
    "Clopper-Pearson, nothing learnt": (
        lambda s, c: clopper_pearson_epsilon(s, c, delta=0.0, confidence=0.9, rng=np.random.default_rng(0)),
        lambda rng: gaussian_scores(0.0, 60, rng),
        0.0,
    ),
    "one run, nothing learnt": (
        lambda s, c: one_run_epsilon(s, c, delta=0.0, confidence=0.9, guesses=GRID),
        lambda rng: gaussian_scores(0.0, 60, rng),
        0.0,
    ),
}


@pytest.mark.parametrize("path", PATHS)
def test_simulated_audits_keep_the_confidence(path: str) -> None:
    bound, mechanism, truth = PATHS[path]
    rng = np.random.default_rng(11)
    audits = 400
    wrong = sum(bound(*mechanism(rng)).epsilon > truth for _ in range(audits))
    assert wrong <= stats.binom.ppf(1 - 1e-6, audits, 0.1)


# ---- power


def every_bound(scores: Scores, included: Coins, delta: float = 1e-5) -> list[EpsilonBound]:
    settings: dict[str, Any] = {"delta": delta, "confidence": CONFIDENCE}
    grid = guess_grid(len(scores))
    return [
        one_run_epsilon(scores, included, guesses=grid, **settings),
        fdp_epsilon(scores, included, guesses=grid, trade_off="approximate", **settings),
        fdp_epsilon(scores, included, guesses=grid, trade_off="gaussian", **settings),
        clopper_pearson_epsilon(scores, included, rng=np.random.default_rng(0), **settings),
    ]


@pytest.mark.parametrize(("canaries", "least"), [(100, 2.5), (1000, 4.5)])
def test_no_privacy_is_found_out(canaries: int, least: float) -> None:
    rng = np.random.default_rng(2)
    included = coins(canaries, rng)
    scores = included + 0.1 * rng.random(canaries)
    for bound in every_bound(scores, included)[:3]:
        assert bound.epsilon > least, bound.method
    assert every_bound(scores, included)[3].epsilon > least - 0.7  # only half of the canaries are counted


def test_scores_without_information_show_nothing() -> None:
    included = np.arange(100) % 2 == 0
    for bound in every_bound(np.zeros(100), included):
        assert bound.epsilon == 0, bound.method


def test_scores_the_wrong_way_round_show_nothing() -> None:
    rng = np.random.default_rng(2)
    included = coins(100, rng)
    for bound in every_bound(-(included + 0.1 * rng.random(100)), included):
        assert bound.epsilon == 0, bound.method


@pytest.mark.parametrize(("k_plus", "k_minus"), [(0, 40), (40, 0)])
def test_one_side_alone_is_enough(k_plus: int, k_minus: int) -> None:
    included = np.arange(100) < 50
    scores = included.astype(np.float64)
    bound = one_run_epsilon(scores, included, delta=0.0, confidence=CONFIDENCE, guesses=[(k_plus, k_minus)])
    assert bound.epsilon == pytest.approx(one_run(100, 40, 40, 0.0))


def test_both_directions_of_the_rates_count() -> None:
    # No member is missed: 1 - TPR is small while FPR is large; and no non-member is called: the other way round.
    def rates(true_positives: int, false_positives: int) -> float:
        return clopper_pearson_epsilon_of_counts(
            true_positives=true_positives,
            members=100,
            false_positives=false_positives,
            non_members=100,
            delta=0.0,
            confidence=CONFIDENCE,
        )

    limit = 0.025 ** (1 / 100)  # 0 of 100: rate at most 1 - limit
    low = stats.beta.ppf(0.025, 50, 51)  # 50 of 100
    expected = math.log(low / (1 - limit))
    assert rates(50, 0) == pytest.approx(expected)
    assert rates(100, 50) == pytest.approx(expected)
    assert rates(0, 100) == 0


@pytest.mark.parametrize("counts", [(80, 5), (95, 20)])  # either direction is the better one
def test_delta_comes_off_the_rates(counts: tuple[int, int]) -> None:
    true_positives, false_positives = counts
    delta = 0.05
    tpr = stats.beta.ppf(0.025, true_positives, 101 - true_positives)
    fpr = stats.beta.ppf(0.975, false_positives + 1, 100 - false_positives)
    expected = max(math.log((tpr - delta) / fpr), math.log((1 - fpr - delta) / (1 - tpr)))
    found = clopper_pearson_epsilon_of_counts(
        true_positives=true_positives,
        members=100,
        false_positives=false_positives,
        non_members=100,
        delta=delta,
        confidence=CONFIDENCE,
    )
    assert found == pytest.approx(expected, rel=1e-9)
    assert found > 0


# ---- guesses


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6), st.data())
def test_ties_never_help(canaries: list[tuple[int, bool]], data: st.DataObject) -> None:
    scores = np.array([score for score, _ in canaries], dtype=np.float64)
    included = np.array([coin for _, coin in canaries])
    k_plus = data.draw(st.integers(0, len(scores)))
    k_minus = data.draw(st.integers(0 if k_plus else 1, max(0 if k_plus else 1, len(scores) - k_plus)))

    def right(order: tuple[int, ...]) -> int:
        return sum(included[i] for i in order[:k_plus]) + sum(
            not included[i] for i in order[len(order) - k_minus :] if k_minus
        )

    orders = [o for o in permutations(range(len(scores))) if all(np.diff(scores[list(o)]) <= 0)]
    assert correct_guesses(scores, included, (k_plus, k_minus)) == min(map(right, orders))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 40))
def test_the_order_of_the_canaries_does_not_matter(seed: int, canaries: int) -> None:
    rng = np.random.default_rng(seed)
    scores, included = rng.integers(0, 4, canaries).astype(np.float64), coins(canaries, rng)
    order = rng.permutation(canaries)
    for grid in (guess_grid(canaries), ((1, 1),)):
        settings: dict[str, Any] = {"delta": 1e-5, "confidence": CONFIDENCE, "guesses": grid}
        assert one_run_epsilon(scores, included, **settings) == one_run_epsilon(
            scores[order], included[order], **settings
        )


def test_the_best_of_several_guesses_pays_for_the_choice() -> None:
    rng = np.random.default_rng(0)
    scores, included = gaussian_scores(3.0, 200, rng)
    grid = [(20, 20), (60, 60), (10, 0)]
    found = one_run_epsilon(scores, included, delta=1e-5, confidence=0.97, guesses=grid)
    alone = [one_run_epsilon(scores, included, delta=1e-5, confidence=0.99, guesses=[pair]) for pair in grid]
    assert found.epsilon == max(bound.epsilon for bound in alone) > 0
    assert found.confidence == 0.97
    assert "the best of 3" in found.detail
    assert found.members + found.non_members == 200


@pytest.mark.parametrize("canaries", [2, 3, 10, 100, 12_345])
def test_grid_fits_and_repeats_nothing(canaries: int) -> None:
    grid = guess_grid(canaries)
    assert len(set(grid)) == len(grid) <= len(bounds.GUESS_SHARES)
    for k_plus, k_minus in grid:
        assert k_plus >= 1
        assert k_plus + k_minus <= canaries


def test_one_half_chooses_and_the_other_is_counted() -> None:
    scores, included = gaussian_scores(2.0, 101, np.random.default_rng(0))
    drawn = np.random.default_rng(5)
    halves = [drawn.permutation(np.flatnonzero(included == kind)) for kind in (True, False)]
    choosing, counted = ([half[part(len(half))] for half in halves] for part in (first_half, second_half))

    def at(threshold: float, canaries: list[NDArray[np.intp]]) -> float:
        inside, outside = (scores[indices] for indices in canaries)
        return clopper_pearson_epsilon_of_counts(
            true_positives=int((inside >= threshold).sum()),
            members=len(inside),
            false_positives=int((outside >= threshold).sum()),
            non_members=len(outside),
            delta=0.0,
            confidence=CONFIDENCE,
        )

    best = max(np.unique(scores[np.concatenate(choosing)]), key=lambda threshold: at(threshold, choosing))
    found = clopper_pearson_epsilon(scores, included, delta=0.0, confidence=CONFIDENCE, rng=np.random.default_rng(5))
    assert found.epsilon == at(best, counted) > 0
    assert (found.members, found.non_members) == (len(counted[0]), len(counted[1]))
    assert not set(np.concatenate(choosing)) & set(np.concatenate(counted))


def test_a_perfect_half_that_chooses_shows_nothing_by_itself() -> None:
    included = coins(101, np.random.default_rng(0))
    drawn = np.random.default_rng(5)
    halves = [drawn.permutation(np.flatnonzero(included == kind)) for kind in (True, False)]
    scores = np.where(included, 10.0, -10.0)
    scores[np.concatenate([half[second_half(len(half))] for half in halves])] = 0.0
    found = clopper_pearson_epsilon(scores, included, delta=0.0, confidence=CONFIDENCE, rng=np.random.default_rng(5))
    assert found.epsilon == 0


def first_half(count: int) -> slice:
    return slice(None, count // 2)


def second_half(count: int) -> slice:
    return slice(count // 2, None)


# ---- monotone, and refusals


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 80), st.data(), st.floats(1e-6, 1e-3))
def test_more_right_guesses_less_confidence_and_less_delta_show_no_less(
    guesses: int, data: st.DataObject, delta: float
) -> None:
    correct = data.draw(st.integers(0, guesses - 1))
    for bound in (one_run, lambda *c: fdp(*c[:4], "approximate", *c[4:]), lambda *c: fdp(*c[:4], "gaussian", *c[4:])):
        here = bound(2 * guesses, guesses, correct, delta)
        assert bound(2 * guesses, guesses, correct + 1, delta) >= here - 1e-7
        assert bound(2 * guesses, guesses, correct, delta, 0.9) >= here - 1e-7
        assert bound(2 * guesses, guesses, correct, delta / 2) >= here - 1e-7
        if 2 * correct <= guesses:
            assert here == 0


SCORES, INCLUDED = np.arange(10.0), np.arange(10) >= 5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scores": np.arange(10)}, "scores"),
        ({"scores": list(range(10))}, "scores"),
        ({"scores": SCORES[:, None]}, "scores"),
        ({"scores": np.where(SCORES == 3, np.nan, SCORES)}, "1 not finite"),
        ({"scores": np.where(SCORES >= 3, np.inf, SCORES)}, "7 not finite"),
        ({"included": INCLUDED.astype(int)}, "included"),
        ({"included": INCLUDED[:9]}, "scores, included"),
        ({"scores": SCORES[:0], "included": INCLUDED[:0]}, "scores, included"),
        ({"delta": -0.1}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": math.nan}, "delta"),
        ({"confidence": 0.05}, "confidence"),
        ({"confidence": 1.0}, "confidence"),
        ({"confidence": math.nan}, "confidence"),
    ],
)
def test_what_cannot_be_audited_is_refused(changes: dict[str, Any], named: str) -> None:
    values: dict[str, Any] = {
        "scores": SCORES,
        "included": INCLUDED,
        "delta": 1e-5,
        "confidence": CONFIDENCE,
        **changes,
    }
    for bound, rest in (
        (one_run_epsilon, {"guesses": [(1, 1)]}),
        (fdp_epsilon, {"guesses": [(1, 1)], "trade_off": "gaussian"}),
        (clopper_pearson_epsilon, {"rng": np.random.default_rng(0)}),
    ):
        with pytest.raises(Unattackable, match=named):
            bound(**values, **rest)


@pytest.mark.parametrize("guesses", [[], [(0, 0)], [(11, 0)], [(6, 5)], [(-1, 3)], [(1.0, 1)], [(True, 1)]])
def test_impossible_guesses_are_refused(guesses: Any) -> None:
    with pytest.raises(Unattackable, match=r"guesses|k₊|k₋"):
        one_run_epsilon(SCORES, INCLUDED, delta=0.0, confidence=CONFIDENCE, guesses=guesses)


@pytest.mark.parametrize(
    "counts", [(0, 0, 0), (10, 0, 0), (10, 11, 5), (10, 5, 6), (10, 5, -1), (10, 5.0, 3), (10, 5, True)]
)
def test_impossible_counts_are_refused(counts: Any) -> None:
    for bound in (one_run, lambda *c: fdp(*c, "approximate")):
        with pytest.raises(Unattackable):
            bound(*counts, 0.0)


@pytest.mark.parametrize("counts", [(11, 10, 0, 10), (5, 10, 11, 10), (0, 0, 5, 10), (5, 10, 0, 0), (-1, 10, 0, 10)])
def test_impossible_rates_are_refused(counts: tuple[int, int, int, int]) -> None:
    names = ("true_positives", "members", "false_positives", "non_members")
    with pytest.raises(Unattackable):
        clopper_pearson_epsilon_of_counts(**dict(zip(names, counts, strict=True)), delta=0.0, confidence=CONFIDENCE)


def test_other_refusals() -> None:
    with pytest.raises(Unattackable, match="δ > 0"):
        fdp(10, 10, 8, 0.0, "gaussian")
    with pytest.raises(Unattackable, match="trade_off"):
        fdp(10, 10, 8, 1e-5, "laplace")
    with pytest.raises(Unattackable, match="canaries"):
        guess_grid(1)
    with pytest.raises(Unattackable, match="at least 2 of each kind"):
        clopper_pearson_epsilon(
            SCORES, np.arange(10) == 3, delta=0.0, confidence=CONFIDENCE, rng=np.random.default_rng(0)
        )
    for epsilon in (-1.0, math.inf, math.nan):
        with pytest.raises(Unattackable, match="epsilon"):
            one_run_p_value(canaries=10, guesses=10, correct=8, epsilon=epsilon, delta=0.0)
    for mu, delta in ((-1.0, 0.1), (math.inf, 0.1), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(Unattackable):
            gaussian_epsilon(mu, delta)


def test_a_bound_is_frozen() -> None:
    bound = every_bound(SCORES, INCLUDED)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        bound.epsilon = 0.0  # type: ignore[misc]
