from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics

from privacy.audit.errors import Unattackable
from privacy.audit.statistics import (
    Interval,
    OperatingPoint,
    auc,
    clopper_pearson,
    clustered_auc_interval,
    combined_p,
    holm,
    least_trials,
    mann_whitney_p,
    operating_point,
    roc_band,
    roc_curve,
    trimmed_mean_by_patient,
)

SEEDS = st.integers(0, 2**32 - 1)
SCORES_AND_SIDES = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({side for _, side in rows}) == 2
)


def arrays(rows: list[tuple[int, bool]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    return np.array([row[0] for row in rows], dtype=np.float64), np.array([row[1] for row in rows])


def clustered(
    rng: np.random.Generator, members: int, others: int, images: int, shift: float, correlation: float = 0.5
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """Normal scores of unit variance with a patient's images correlated; members are shifted."""
    member = rng.permutation(np.arange(members + others) < members)
    patient = np.repeat(np.arange(len(member)), images)
    of_patient = rng.normal(shift * member, math.sqrt(correlation))
    return of_patient[patient] + rng.normal(0, math.sqrt(1 - correlation), len(patient)), patient, member


@given(SCORES_AND_SIDES)
def test_auc_is_sklearns(rows: list[tuple[int, bool]]) -> None:
    scores, member = arrays(rows)
    assert auc(scores, member) == pytest.approx(metrics.roc_auc_score(member, scores), abs=1e-12)


@pytest.mark.parametrize("images", [1, 4])
def test_bootstrap_is_the_slow_one_with_the_same_draws(images: int) -> None:
    rng = np.random.default_rng(3)
    scores, patient, member = clustered(rng, 30, 40, images, shift=0.5)
    scores = scores.round(1)  # ties
    draws = np.random.default_rng(11)
    ours = draws.multinomial(30, np.full(30, 1 / 30), size=200)
    others = draws.multinomial(40, np.full(40, 1 / 40), size=200)
    areas = []
    for of_ours, of_others in zip(ours, others, strict=True):
        drawn = np.append(np.repeat(np.flatnonzero(member), of_ours), np.repeat(np.flatnonzero(~member), of_others))
        rows = np.concatenate([np.flatnonzero(patient == p) for p in drawn])
        areas.append(metrics.roc_auc_score(member[patient[rows]], scores[rows]))
    found = clustered_auc_interval(scores, patient, member, confidence=0.9, resamples=200, seed=11)
    assert found.estimate == pytest.approx(metrics.roc_auc_score(member[patient], scores), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(areas, [0.05, 0.95])), abs=1e-12)


def test_chunks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, patient, member = clustered(np.random.default_rng(0), 20, 20, 3, shift=0.5)
    whole = clustered_auc_interval(scores, patient, member, resamples=100, seed=1)
    monkeypatch.setattr("privacy.audit.statistics._CHUNK_ENTRIES", 7 * len(scores))
    assert clustered_auc_interval(scores, patient, member, resamples=100, seed=1) == whole


@pytest.mark.parametrize(
    ("members", "others", "images", "area"),
    [(40, 40, 1, 0.5), (40, 60, 5, 0.7), (15, 15, 3, 0.9), (8, 12, 1, 0.97), (50, 50, 2, 0.99)],
)
def test_interval_covers(members: int, others: int, images: int, area: float) -> None:
    shift, rng, covered = math.sqrt(2) * stats.norm.ppf(area), np.random.default_rng(5), 0
    for trial in range(200):
        scores, patient, member = clustered(rng, members, others, images, shift)
        found = clustered_auc_interval(scores, patient, member, resamples=300, seed=trial)
        covered += found.low <= area <= found.high
    assert covered >= 0.91 * 200  # 95 % less 2.6 standard deviations


def test_resampling_images_instead_of_patients_would_not_cover() -> None:
    rng, covered, naive = np.random.default_rng(6), 0, 0
    for trial in range(100):
        scores, patient, member = clustered(rng, 25, 25, 10, shift=0.0, correlation=0.9)
        found = clustered_auc_interval(scores, patient, member, resamples=200, seed=trial)
        of_image = clustered_auc_interval(scores, np.arange(500), member[patient], resamples=200, seed=trial)
        covered += found.low <= 0.5 <= found.high
        naive += of_image.low <= 0.5 <= of_image.high
    assert covered >= 88
    assert naive <= 65


@pytest.mark.parametrize("members", [2, 5, 40])
def test_complete_separation_is_no_certainty(members: int) -> None:
    member = np.arange(members + 50) < members
    bound = clopper_pearson(min(members, 50), min(members, 50)).low
    found = clustered_auc_interval(np.where(member, 1.0, 0.0), np.arange(len(member)), member, seed=0)
    assert (found.estimate, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(bound)
    found = clustered_auc_interval(np.where(member, 0.0, 1.0), np.arange(len(member)), member, seed=0)
    assert (found.estimate, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(1 - bound)


def test_bound_under_complete_separation_holds_for_the_worst_distribution() -> None:
    # A member is below all others with probability 1 - L: then AUC = L, and all are above with probability L^k = 2.5 %.
    rng, members, trials = np.random.default_rng(0), 6, 4000
    area = 0.025 ** (1 / members)
    separated = (rng.random((trials, members)) < area).all(axis=1).mean()
    assert separated == pytest.approx(0.025, abs=0.008)
    member = np.arange(20) < members
    found = clustered_auc_interval(member.astype(np.float64), np.arange(20), member, seed=0)
    assert found.low == pytest.approx(area)


def test_interval_excludes_no_more_than_separation_would() -> None:
    member = np.arange(20) < 10
    scores = np.where(member, 10.0, 0.0) + np.arange(20) / 100
    separated = clustered_auc_interval(scores, np.arange(20), member, seed=0)
    scores[0] = scores[19] - 1e-6  # one pair the wrong way round
    found = clustered_auc_interval(scores, np.arange(20), member, seed=0)
    assert found.estimate == 0.99
    assert found.low <= separated.low


def test_equal_scores_have_an_interval() -> None:
    member = np.arange(40) < 20
    found = clustered_auc_interval(np.zeros(40), np.arange(40), member, seed=0)
    share = 0.025 ** (1 / 20)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.5, share / 2, 1 - share / 2))


@given(SCORES_AND_SIDES.filter(lambda rows: 2 <= sum(side for _, side in rows) <= len(rows) - 2), SEEDS)
@settings(max_examples=50, deadline=None)
def test_interval_is_never_a_point(rows: list[tuple[int, bool]], seed: int) -> None:
    scores, member = arrays(rows)
    found = clustered_auc_interval(scores, np.arange(len(scores)), member, resamples=50, seed=seed)
    assert 0 <= found.low < found.high <= 1


def test_mann_whitney_is_exact_for_few_and_scipys_for_many() -> None:
    scores, member = np.array([5.0, 6.0, 7.0, 1.0, 2.0, 3.0]), np.arange(6) < 3
    assert mann_whitney_p(scores, member) == pytest.approx(1 / math.comb(6, 3))
    assert mann_whitney_p(scores, ~member) == 1.0
    scores, _, member = clustered(np.random.default_rng(0), 30, 50, 1, shift=0.3)
    expected = stats.mannwhitneyu(scores[member], scores[~member], alternative="greater").pvalue
    assert mann_whitney_p(scores, member) == pytest.approx(expected)
    assert mann_whitney_p(np.zeros(6), np.arange(6) < 3) == 1.0


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95]))
def test_clopper_pearson_is_scipys(counts: tuple[int, int], confidence: float) -> None:
    expected = stats.binomtest(*counts).proportion_ci(confidence, method="exact")
    found = clopper_pearson(*counts, confidence=confidence)
    assert found.estimate == counts[0] / counts[1]
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_least_trials() -> None:
    assert least_trials(0.01) == 299
    assert least_trials(0.1) == 29
    for rate in (0.5, 0.1, 0.037, 0.01, 0.001):
        n = least_trials(rate, 0.95)
        assert stats.binomtest(0, n).proportion_ci(0.9, method="exact").high <= rate
        assert stats.binomtest(0, n - 1).proportion_ci(0.9, method="exact").high > rate


def halves(seed: int, count: int, shift: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    scores, _, member = clustered(np.random.default_rng(seed), count, count, 1, shift)
    return scores, member


def test_threshold_comes_from_the_tuning_half_and_rates_from_the_report_half() -> None:
    tuning, tuning_member = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), np.array([0, 0, 0, 1, 0, 1, 1], dtype=bool)
    report, member = np.array([1.0] * 30 + [4.2] * 10 + [4.6] * 12), np.arange(52) >= 40
    point = operating_point(tuning, tuning_member, report, member, fpr=0.25)
    assert point.threshold == 2.5  # one of four may be called: between the score of the second, 2, and the next, 3
    assert point.tpr == clopper_pearson(12, 12)
    assert point.fpr == clopper_pearson(10, 40)
    assert (point.members, point.non_members, point.resolvable, point.note) == (12, 40, True, "")
    assert operating_point(tuning, tuning_member, report, member, fpr=0.2).threshold == 4.5


@given(SCORES_AND_SIDES, st.sampled_from([0.01, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.9]))
def test_threshold_is_the_lowest_that_keeps_the_rate(rows: list[tuple[int, bool]], fpr: float) -> None:
    scores, member = arrays(rows)
    threshold = operating_point(scores, member, scores, member, fpr=fpr).threshold
    assert threshold is not None

    def rate(cut: float) -> float:
        return float((scores[~member] >= cut).mean())

    assert rate(threshold) <= fpr + 1e-12
    below = scores[scores < threshold].max()
    assert rate(below) > fpr
    above = scores[scores >= threshold]
    assert threshold == ((below + above.min()) / 2 if len(above) else np.nextafter(below, np.inf))


def test_threshold_between_neighbouring_floats_separates_them() -> None:
    low = 1.0
    high = np.nextafter(low, 2.0)
    scores, member = np.array([low, high]), np.array([False, True])
    assert operating_point(scores, member, scores, member, fpr=0.1).threshold == high


def test_few_held_outs_resolve_nothing() -> None:
    tuning, report = halves(0, 300, 1.0), halves(1, 298, 1.0)
    point = operating_point(*tuning, *report, fpr=0.01)
    assert point.note == "not resolvable with n=298: needs 299 held-out patients in the report half"
    assert (point.resolvable, point.tpr) == (False, None)
    assert operating_point(*tuning, *halves(1, 299, 1.0), fpr=0.01).resolvable
    assert not operating_point(*tuning, *halves(1, 28, 1.0), fpr=0.1).resolvable
    assert operating_point(*tuning, *halves(1, 29, 1.0), fpr=0.1).resolvable


def test_threshold_that_does_not_transfer_resolves_nothing() -> None:
    tuning, (scores, member) = halves(0, 300, 1.0), halves(1, 300, 1.0)
    point = operating_point(*tuning, scores + 1.0, member, fpr=0.1)
    assert (point.resolvable, point.tpr) == (False, None)
    assert point.fpr is not None
    assert point.fpr.low > 0.1
    assert "did not transfer" in point.note


def test_operating_point_is_calibrated() -> None:
    points = [operating_point(*halves(s, 400, 1.0), *halves(s + 1000, 400, 1.0), fpr=0.1) for s in range(60)]
    tpr = stats.norm.sf(stats.norm.isf(0.1) - 1.0)
    known = [point for point in points if point.tpr and point.fpr]
    assert len(known) >= 50
    assert np.mean([point.fpr.estimate for point in points if point.fpr]) == pytest.approx(0.1, abs=0.01)
    assert np.mean([point.tpr.estimate for point in known if point.tpr]) == pytest.approx(tpr, abs=0.03)


def test_combined_p_is_twice_the_median() -> None:
    assert combined_p([0.01, 0.04, 0.9]) == pytest.approx(0.08)
    assert combined_p([0.01, 0.03]) == pytest.approx(0.04)
    assert combined_p([0.6, 0.7, 0.8]) == 1.0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_combined_p_is_valid_under_the_worst_dependence(count: int) -> None:
    # Rüger's extreme case: half of the p-values are small together, so often that each is uniform.
    rng, level, trials, half = np.random.default_rng(0), 0.2, 4000, (count + 1) // 2
    rejected = 0
    for _ in range(trials):
        p = rng.uniform(level / 2, 1, count)
        if rng.random() < count / half * level / 2:
            p[rng.permutation(count)[:half]] = rng.uniform(0, level / 2, half)
        rejected += combined_p(p.tolist()) <= level
    assert rejected / trials <= level + 3 * math.sqrt(level * (1 - level) / trials)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_as_the_step_down_procedure_does(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected, rest = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
        while rest and p_values[rest[0]] * len(rest) <= level:
            rejected.add(rest.pop(0))
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected
    assert max(adjusted) <= 1


@given(SCORES_AND_SIDES)
def test_roc_curve_is_the_best_threshold_of_sklearns(rows: list[tuple[int, bool]]) -> None:
    scores, member = arrays(rows)
    grid = np.array([0.0, 0.01, 0.1, 1 / 3, 0.5, 0.99, 1.0])
    fpr, tpr, _ = metrics.roc_curve(member, scores, drop_intermediate=False)
    expected = [tpr[fpr <= rate + 1e-12].max() for rate in grid]
    assert roc_curve(scores, member, grid) == pytest.approx(np.array(expected))


def test_roc_band_is_the_slow_one_with_the_same_draws() -> None:
    scores, _, member = clustered(np.random.default_rng(1), 40, 30, 1, shift=0.8)
    scores, grid = scores.round(1), np.array([0.0, 0.05, 0.2, 0.6])
    draws = np.random.default_rng(4)
    ours = draws.multinomial(40, np.full(40, 1 / 40), size=100)
    others = draws.multinomial(30, np.full(30, 1 / 30), size=100)
    curves = []
    for of_ours, of_others in zip(ours, others, strict=True):
        drawn = np.append(np.repeat(np.flatnonzero(member), of_ours), np.repeat(np.flatnonzero(~member), of_others))
        fpr, tpr, _ = metrics.roc_curve(member[drawn], scores[drawn], drop_intermediate=False)
        curves.append([tpr[fpr <= rate + 1e-12].max() for rate in grid])
    rate, low, high = roc_band(scores, member, grid, resamples=100, seed=4)
    fixed = [clopper_pearson(round(r * 40), 40) for r in rate]
    slow_low, slow_high = np.quantile(curves, [0.025, 0.975], axis=0)
    assert rate == pytest.approx(roc_curve(scores, member, grid))
    assert low == pytest.approx(np.minimum(slow_low, [f.low for f in fixed]))
    assert high == pytest.approx(np.maximum(slow_high, [f.high for f in fixed]))


def test_roc_band_covers() -> None:
    grid, covered, rng = np.array([0.1, 0.3, 0.6]), np.zeros(3), np.random.default_rng(2)
    truth = stats.norm.sf(stats.norm.isf(grid) - 1.0)
    for trial in range(150):
        scores, _, member = clustered(rng, 50, 50, 1, shift=1.0)
        _, low, high = roc_band(scores, member, grid, resamples=200, seed=trial)
        covered += (low <= truth) & (truth <= high)
    assert (covered >= 0.9 * 150).all()


def test_roc_band_of_complete_separation_is_no_certainty() -> None:
    member = np.arange(40) < 20
    rate, low, high = roc_band(member.astype(np.float64), member, np.array([0.0, 0.5]), resamples=50, seed=0)
    assert rate.tolist() == high.tolist() == [1.0, 1.0]
    assert low == pytest.approx(clopper_pearson(20, 20).low)


@given(
    st.lists(st.lists(st.floats(-9, 9), min_size=1, max_size=12), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.45, 0.4999999999]),
    SEEDS,
)
def test_trimmed_mean_is_scipys(images: list[list[float]], trim: float, seed: int) -> None:
    scores = np.concatenate([np.array(of_patient) for of_patient in images])
    patient = np.repeat(np.arange(len(images)), [len(of_patient) for of_patient in images])
    mixed = np.random.default_rng(seed).permutation(len(scores))
    found = trimmed_mean_by_patient(scores[mixed], patient[mixed], len(images), trim)
    expected = [stats.trim_mean(of_patient, trim) for of_patient in images]
    assert found == pytest.approx(np.array(expected), abs=1e-9)


MEMBER = np.array([True, True, False, False])
SCORES = np.array([1.0, 2.0, 3.0, 4.0])
PATIENT = np.arange(4)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: auc(np.array([1.0, np.nan]), np.array([True, False])), "scores"),
        (lambda: auc(SCORES[:3], MEMBER), "scores, member"),
        (lambda: auc(SCORES, MEMBER.astype(np.int64)), "scores, member"),
        (lambda: auc(SCORES, np.ones(4, dtype=bool)), "member"),
        (lambda: mann_whitney_p(np.array([1.0, np.inf]), np.array([True, False])), "scores"),
        (lambda: clustered_auc_interval(SCORES, PATIENT, np.append(MEMBER, True), seed=0), "patient"),
        (lambda: clustered_auc_interval(SCORES, PATIENT[:3], MEMBER, seed=0), "scores, patient"),
        (lambda: clustered_auc_interval(SCORES, PATIENT, MEMBER, seed=0, confidence=1.0), "confidence"),
        (lambda: clustered_auc_interval(SCORES, PATIENT, MEMBER, seed=0, resamples=0), "resamples"),
        (lambda: clustered_auc_interval(SCORES, PATIENT, np.arange(4) < 1, seed=0), "members"),
        (lambda: clustered_auc_interval(SCORES, PATIENT, np.arange(4) < 3, seed=0), "non-members"),
        (lambda: clopper_pearson(3, 2), "successes, trials"),
        (lambda: clopper_pearson(0, 0), "successes, trials"),
        (lambda: least_trials(0.0), "rate"),
        (lambda: least_trials(0.1, 1.0), "confidence"),
        (lambda: operating_point(SCORES, MEMBER, SCORES, MEMBER, fpr=1.0), "fpr"),
        (lambda: operating_point(SCORES, MEMBER, SCORES, ~(MEMBER | True), fpr=0.1), "member"),
        (lambda: combined_p([]), "p_values"),
        (lambda: combined_p([0.1, math.nan]), "p_values"),
        (lambda: holm([1.5]), "p_values"),
        (lambda: roc_curve(SCORES, MEMBER, np.array([1.1])), "grid"),
        (lambda: roc_band(SCORES, MEMBER, np.array([0.1]), confidence=0.0, seed=0), "confidence"),
        (lambda: roc_band(SCORES, np.arange(4) < 1, np.array([0.1]), seed=0), "members"),
        (lambda: trimmed_mean_by_patient(SCORES, PATIENT, 5, 0.0), "patient"),
        (lambda: trimmed_mean_by_patient(SCORES, PATIENT - 1, 4, 0.0), "patient"),
        (lambda: trimmed_mean_by_patient(SCORES, PATIENT, 4, 0.5), "trim"),
        (lambda: trimmed_mean_by_patient(np.array([np.nan]), np.array([0]), 1, 0.0), "scores"),
        (lambda: Interval(estimate=0.5, low=0.6, high=0.7), "estimate, low, high"),
        (lambda: Interval(estimate=0.5, low=math.nan, high=0.7), "estimate, low, high"),
    ],
)
def test_refusals_name_the_argument(call: Any, argument: str) -> None:
    with pytest.raises(Unattackable) as refusal:
        call()
    assert refusal.value.argument == argument


def test_operating_points_that_contradict_themselves_are_refused() -> None:
    some = clopper_pearson(1, 30)
    point = OperatingPoint(
        target_fpr=0.1, resolvable=True, threshold=1.0, tpr=some, fpr=some, members=30, non_members=30, note=""
    )
    for changes in (
        {"tpr": None},
        {"threshold": None},
        {"note": "why"},
        {"resolvable": False, "note": "why"},
        {"resolvable": False, "tpr": None},
        {"members": -1},
        {"target_fpr": 0.0},
    ):
        with pytest.raises(Unattackable):
            dataclasses.replace(point, **changes)  # type: ignore[arg-type]
