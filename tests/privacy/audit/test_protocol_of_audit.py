"""From scores to outcomes: nothing of the report half decides anything, and the controls answer as they must."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from privacy.audit.errors import Unattackable
from privacy.audit.evidence import AttackOutcome
from privacy.audit.population import Population
from privacy.audit.protocol import (
    Scored,
    assess,
    by_patient,
    choose,
    control,
    shuffled,
    site_rows,
    worst_patients,
)
from privacy.audit.statistics import auc

SEEDS = (0, 1, 2)
IMAGES = 3


def population(members: int, held_out: int, sites: int = 1) -> Population:
    patients = members + held_out
    rng = np.random.default_rng(0)
    return Population(
        images=rng.uniform(-1, 1, (patients * IMAGES, 1, 4, 4)).astype(np.float32),
        patient=np.repeat(np.arange(patients), IMAGES),
        member=np.arange(patients) < members,
        site=np.arange(patients) % sites,
        sites=tuple(f"site-{index}" for index in range(sites)),
        keys=tuple(f"p{patient}" for patient in range(patients)),
    )


def scored(scores: NDArray[np.float64], name: str = "loss", settings: tuple[str, ...] = ("t=10",)) -> Scored:
    return Scored(
        name=name,
        title=name,
        paper="arXiv:0000.00000",
        access="api",
        statistic="…",
        evaluations_per_image=1.0,
        settings=settings,
        scores=scores,
    )


def noise(of: Population, settings: int = 1, *, shift: float = 0.0, seed: int = 0) -> NDArray[np.float64]:
    """Standard normal for each patient and a little for each image; members lie ``shift`` lower."""
    rng = np.random.default_rng(seed)
    patients = rng.normal(size=(len(SEEDS), len(of.keys), settings)) - shift * of.member[:, None]
    return patients[:, of.patient] + 0.1 * rng.normal(size=(len(SEEDS), len(of.patient), settings))


def test_a_leak_is_found_whichever_sign_it_has() -> None:
    of = population(80, 80)
    for sign in (1, -1):
        (outcome,), _ = assess([scored(sign * noise(of, shift=2.0))], of, SEEDS)
        assert outcome.outcome.sign == -sign
        assert outcome.outcome.patient_auc.low > 0.8
        assert outcome.adjusted_p < 1e-6


def test_the_report_half_decides_nothing() -> None:
    """What is chosen stays the same whatever the report half looks like."""
    of = population(30, 30)
    tuning = of.tuning_half(0)
    scores = noise(of, settings=4)[0]
    changed = scores.copy()
    rows = ~tuning[of.patient]
    changed[rows] = np.random.default_rng(9).normal(size=(int(rows.sum()), 4)) - 50 * of.member[of.patient[rows], None]
    assert choose(scores, of, tuning) == choose(changed, of, tuning)


def test_choosing_among_many_settings_does_not_lift_the_reported_auc() -> None:
    """The best of 40 noises looks good on the tuning half, and is chance on the report half."""
    of = population(30, 30)
    tuned, reported, p_values = [], [], []
    for seed in range(12):
        (outcome,), _ = assess(
            [scored(noise(of, settings=40, seed=seed), settings=tuple(map(str, range(40))))], of, SEEDS
        )
        tuned += [one.tuning_auc for one in outcome.seeds]
        reported += [one.patient_auc.estimate for one in outcome.seeds]
        p_values.append(outcome.p_value)
    assert np.mean(tuned) > 0.65
    assert abs(np.mean(reported) - 0.5) < 4 * 0.075 / np.sqrt(len(reported) / len(SEEDS))
    assert sum(p <= 0.05 for p in p_values) <= 3


def test_patient_level_shows_what_slice_level_hides() -> None:
    """Members lie a little lower in every image, and images scatter: the patients' means tell them apart."""
    of = replace(population(60, 60))
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(len(SEEDS), len(of.patient), 1)) - 0.8 * of.member[of.patient][:, None]
    (outcome,), _ = assess([scored(scores)], of, SEEDS)
    assert outcome.outcome.patient_auc.estimate > outcome.outcome.slice_auc.estimate + 0.05


def test_the_reported_seed_is_the_median_and_the_strongest_is_found_on_tuning_data() -> None:
    of = population(40, 40)
    attacks, strongest = assess([scored(noise(of), "weak"), scored(noise(of, shift=2.0), "strong")], of, SEEDS)
    assert attacks[strongest].name == "strong"
    for attack in attacks:
        areas = [one.patient_auc.estimate for one in attack.seeds]
        assert attack.outcome.patient_auc.estimate == np.median(areas)


def test_p_values_are_corrected_for_the_number_of_attacks() -> None:
    of = population(40, 40)
    alone, _ = assess([scored(noise(of, shift=0.7))], of, SEEDS)
    others = [scored(noise(of, seed=seed), f"noise {seed}") for seed in range(1, 10)]
    together, _ = assess([scored(noise(of, shift=0.7)), *others], of, SEEDS)
    assert together[0].p_value == alone[0].p_value
    assert together[0].adjusted_p > 5 * alone[0].adjusted_p


def test_twenty_patients_are_not_resolvable() -> None:
    of = population(10, 10)
    (outcome,), _ = assess([scored(noise(of, shift=5.0))], of, SEEDS)
    for point in (*outcome.outcome.points, *outcome.outcome.slice_points):
        assert not point.resolvable
        assert point.tpr is None
        assert "not resolvable with n=" in point.note


def test_enough_patients_are_resolvable_at_one_percent() -> None:
    of = population(40, 640)
    (outcome,), _ = assess([scored(noise(of, shift=12.0))], of, SEEDS)
    at_1_percent = outcome.outcome.points[1]
    assert at_1_percent.target_fpr == 0.01
    assert at_1_percent.tpr is not None
    assert at_1_percent.tpr.low > 0.8


def test_worst_patients_are_counted_by_hand() -> None:
    of = population(4, 4)
    scores = np.array([9.0, 5.0, 3.0, 0.0, 4.0, 1.0, 2.0, 0.5])
    report = np.array([True] * 8)
    found = worst_patients([scores] * 2, of.member, [~report] * 2, _points(threshold=4.5), reported=0)
    assert (found.members, found.above_all_held_out) == (4, 2)
    assert found.flagged_in_every_seed == 2
    assert found.flagged_expected == pytest.approx(4 * 0.25**2)
    assert found.held_out_above_95th == 0.0


def _points(threshold: float) -> list[object]:
    from privacy.audit.statistics import Interval, OperatingPoint

    rate = Interval(estimate=0.25, low=0.0, high=0.8)
    point = OperatingPoint(
        target_fpr=0.1, resolvable=True, threshold=threshold, tpr=rate, fpr=rate, members=4, non_members=4, note=""
    )
    return [point, point]


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_controls_pass_on_the_right_answer_only(positive: bool, shift: float) -> None:
    of = population(20, 20)
    found = control([scored(noise(of, shift=shift))], of, SEEDS, name="untrained", positive=positive, explanation="…")
    assert found.passed == (positive == (shift > 0))
    assert found.kind == ("positive" if positive else "negative")


def test_a_positive_control_can_be_caught_with_few_patients() -> None:
    """Seven against eight: half of them could never be significant."""
    of = population(7, 8)
    found = control(
        [scored(noise(of, shift=9.0)), scored(noise(of, shift=9.0, seed=1), "sima"), scored(noise(of, seed=2), "pia")],
        of,
        SEEDS,
        name="overfitted",
        positive=True,
        explanation="…",
    )
    assert found.passed
    assert found.patient_auc.estimate == 1.0


def test_shuffled_labels_are_at_chance_even_for_a_perfect_leak() -> None:
    of = population(40, 40, sites=2)
    mixed = shuffled(of, seed=0)
    for site in range(2):
        assert mixed.member[of.site == site].sum() == of.member[of.site == site].sum()
    assert not np.array_equal(mixed.member, of.member)
    found = control([scored(noise(of, shift=9.0))], mixed, SEEDS, name="shuffled", positive=False, explanation="…")
    assert found.passed


def test_a_site_shows_its_own_figure_only_if_it_may() -> None:
    of = population(40, 40, sites=2)
    attack = scored(noise(of, shift=3.0))
    (outcome,), _ = assess([attack], of, SEEDS)
    first, second = site_rows(attack, outcome, of, shown=["site-0"])
    assert first.patient_auc is not None
    report = ~of.tuning_half(outcome.outcome.seed) & (of.site == 0)
    values = outcome.outcome.sign * by_patient(attack.scores[outcome.reported][:, 0], of, outcome.outcome.trim)
    assert first.patient_auc.estimate == auc(values[report], of.member[report])
    assert second.patient_auc is None
    assert "policy" in second.note


@pytest.mark.parametrize("seeds", [(0, 1), (0, 0, 1), ()])
def test_fewer_than_three_seeds_are_refused(seeds: tuple[int, ...]) -> None:
    of = population(6, 6)
    with pytest.raises(Unattackable, match="seeds"):
        assess([scored(noise(of))], of, seeds)


def test_scores_that_do_not_fit_are_refused() -> None:
    of = population(6, 6)
    with pytest.raises(Unattackable, match="scores of loss"):
        assess([scored(noise(of)[:, :-1])], of, SEEDS)
    with pytest.raises(Unattackable, match="scores of loss"):
        scored(np.full((3, 36, 1), np.nan))
    with pytest.raises(Unattackable, match="attacks"):
        assess([], of, SEEDS)


def test_outcomes_do_not_depend_on_the_run() -> None:
    of = population(20, 20)

    def once() -> tuple[AttackOutcome, ...]:
        return assess([scored(noise(of, shift=1.0))], of, SEEDS)[0]

    assert once() == once()
