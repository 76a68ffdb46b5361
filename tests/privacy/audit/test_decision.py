"""The verdict: each rule by itself, and the worst of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from privacy.audit.bounds import EpsilonBound
from privacy.audit.decision import NO_LEAK, DecisionRule, decide
from privacy.audit.evidence import (
    AttackOutcome,
    BlindOutcome,
    ClaimedPrivacy,
    ControlOutcome,
    CopyOutcome,
    Evidence,
    ModelIdentity,
    Roc,
    SeedOutcome,
    WorstPatients,
)
from privacy.audit.policy import AuditPolicy
from privacy.audit.statistics import Interval, OperatingPoint
from privacy.errors import InvalidPlan

RULE = DecisionRule()


def interval(estimate: float, low: float, high: float) -> Interval:
    return Interval(estimate=estimate, low=low, high=high)


def point(tpr: Interval | None, fpr: float = 0.01, note: str = "") -> OperatingPoint:
    return OperatingPoint(
        target_fpr=fpr,
        resolvable=tpr is not None,
        threshold=1.0,
        tpr=tpr,
        fpr=interval(fpr, 0.0, 2 * fpr),
        members=500,
        non_members=500,
        note=note if tpr is not None else note or "not resolvable with n=20: needs 299 held-out patients",
    )


def attack(
    auc: Interval | None = None, tpr: Interval | None = None, p_value: float = 0.5, *, resolvable: bool = True
) -> AttackOutcome:
    tpr = (tpr or interval(0.01, 0.002, 0.025)) if resolvable else None
    seed = SeedOutcome(
        seed=0,
        setting="t=100",
        sign=-1,
        trim=0.1,
        tuning_auc=0.55,
        patient_auc=auc or interval(0.51, 0.46, 0.56),
        slice_auc=interval(0.5, 0.45, 0.55),
        p_value=p_value,
        points=(point(interval(0.1, 0.05, 0.15), 0.1), point(tpr)),
        slice_points=(),
    )
    return AttackOutcome(
        name="pia",
        title="PIA",
        paper="arXiv:2305.18355",
        access="api",
        statistic="…",
        evaluations_per_image=6.0,
        seeds=(seed,) * 3,
        reported=1,
        p_value=p_value,
        adjusted_p=p_value,
        roc=Roc(fpr=(1.0,), tpr=(1.0,), low=(1.0,), high=(1.0,)),
        worst=WorstPatients(
            members=500,
            above_all_held_out=1,
            flagged_in_every_seed=1,
            flagged_expected=1.0,
            held_out_above_95th=0.05,
        ),
    )


def control(name: str, positive: bool, passed: bool = True) -> ControlOutcome:
    return ControlOutcome(
        name=name,
        kind="positive" if positive else "negative",
        patient_auc=interval(0.9, 0.8, 1.0),
        p_value=0.001 if positive == passed else 0.5,
        level=0.05,
        members=20,
        non_members=20,
        passed=passed,
        explanation="…",
    )


def copies(p_value: float = 0.5) -> CopyOutcome:
    return CopyOutcome(
        method="embedding",
        samples=96,
        copies=4,
        copies_matched=4.0,
        control_matched=4.0,
        p_value=p_value,
        withhold=(1, 2, 3, 4),
    )


def clean(**changes: Any) -> Evidence:
    """Evidence of a model that leaks nothing, at a power that can tell."""
    evidence = Evidence(
        created="2026-01-01",
        command="fedct audit …",
        software=(("fedct", "0"),),
        scope="central",
        model=ModelIdentity(
            experiment="e", model_sha256="0" * 64, config_sha256="0" * 64, schedule_sha256="0" * 64, rounds_done=4
        ),
        cohorts=(),
        tuning_members=500,
        tuning_held_out=500,
        report_members=500,
        report_held_out=500,
        blind=BlindOutcome(patient_auc=interval(0.5, 0.45, 0.55), p_value=0.5, confounded=False, note="…"),
        attacks=(attack(),),
        strongest=0,
        controls=(control("overfitted", True), control("untrained", False)),
        copies=(copies(),),
        inversions=(),
        privacy=None,
        sites=(),
        costs=(),
    )
    return replace(evidence, **changes)


def claimed(epsilon_found: float) -> ClaimedPrivacy:
    bound = EpsilonBound(
        method="one run", epsilon=epsilon_found, delta=1e-3, confidence=0.95, members=50, non_members=50, detail=""
    )
    return ClaimedPrivacy(
        epsilon=8.0,
        delta=1e-3,
        plan_sha256="0" * 64,
        ceiling_auc=0.99,
        ceiling_tpr_at_1_percent=0.9,
        lower_bounds=(bound,),
        commitment="0" * 64,
    )


def test_green_needs_everything_and_promises_nothing() -> None:
    decision = decide(clean(), RULE)
    assert decision.verdict == "GREEN"
    assert NO_LEAK in decision.sentence.lower()
    assert "no proof" in decision.sentence
    assert "anonym" not in str(decision).lower()
    assert all(reason.verdict == "GREEN" for reason in decision.reasons)


@pytest.mark.parametrize(
    ("changes", "verdict", "test"),
    [
        ({"blind": None}, "INVALID", "blind test"),
        (
            {"blind": BlindOutcome(patient_auc=interval(0.9, 0.8, 1.0), p_value=0.001, confounded=True, note="…")},
            "INVALID",
            "blind test",
        ),
        ({"controls": ()}, "INVALID", "positive control"),
        ({"controls": (control("overfitted", True),)}, "INVALID", "negative control"),
        (
            {"controls": (control("overfitted", True, passed=False), control("untrained", False))},
            "INVALID",
            "positive control: overfitted",
        ),
        (
            {"controls": (control("overfitted", True), control("untrained", False, passed=False))},
            "INVALID",
            "negative control: untrained",
        ),
        ({"privacy": claimed(8.01)}, "RED", "lower bound on epsilon: one run"),
        ({"attacks": (attack(tpr=interval(0.15, 0.101, 0.2)),)}, "RED", "TPR at 1 % FPR"),
        ({"copies": (copies(p_value=0.01),)}, "RED", "copies: embedding"),
        ({"attacks": (attack(p_value=0.01),)}, "AMBER", "better than chance"),
        ({"attacks": (attack(auc=interval(0.52, 0.43, 0.61)),)}, "AMBER", "power: patient-level AUC"),
        ({"attacks": (attack(resolvable=False),)}, "AMBER", "power: TPR at 1 % FPR"),
        ({"attacks": (attack(tpr=interval(0.02, 0.01, 0.04)),)}, "AMBER", "power: TPR at 1 % FPR"),
        ({"copies": ()}, "AMBER", "copies"),
        ({"privacy": claimed(7.99)}, "GREEN", "blind test and controls"),
    ],
)
def test_each_rule_decides_by_itself(changes: dict[str, Any], verdict: str, test: str) -> None:
    decision = decide(clean(**changes), RULE)
    assert decision.verdict == verdict
    assert decision.reasons[0].test == test
    assert decision.reasons[0].meaning.rstrip(".") in decision.sentence or verdict == "GREEN"


def test_the_worst_comes_first_and_the_others_are_told_too() -> None:
    leaky = attack(auc=interval(0.9, 0.8, 1.0), tpr=interval(0.5, 0.4, 0.6), p_value=1e-9)
    decision = decide(clean(attacks=(leaky,), controls=()), RULE)
    verdicts = [reason.verdict for reason in decision.reasons]
    assert verdicts == sorted(verdicts, key=["INVALID", "RED", "AMBER"].index)
    assert set(verdicts) == {"INVALID", "RED", "AMBER"}


def test_one_attack_of_many_is_enough() -> None:
    attacks = (attack(), attack(tpr=interval(0.5, 0.4, 0.6)), attack())
    assert decide(clean(attacks=attacks), RULE).verdict == "RED"


def test_copies_are_corrected_for_the_number_of_screens() -> None:
    assert decide(clean(copies=(copies(0.03), copies(0.9))), RULE).verdict == "GREEN"
    assert decide(clean(copies=(copies(0.02), copies(0.9))), RULE).verdict == "RED"


def test_a_site_may_be_stricter() -> None:
    strict = DecisionRule(green_auc=0.55)
    assert decide(clean(), RULE).verdict == "GREEN"
    assert decide(clean(), strict).verdict == "AMBER"


@pytest.mark.parametrize(
    "values", [{"green_auc": 0.5}, {"red_tpr_at_1_percent": 0.0}, {"significance": 1.0}, {"green_auc": float("nan")}]
)
def test_impossible_cut_offs_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(InvalidPlan, match=next(iter(values))):
        DecisionRule(**values)


def test_no_site_can_accept_an_invalid_audit() -> None:
    with pytest.raises(InvalidPlan, match="accept"):
        AuditPolicy(accept=("INVALID",))
    with pytest.raises(InvalidPlan, match="min_count"):
        AuditPolicy(min_count=0)
