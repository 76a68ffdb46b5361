"""The verdict: each rule by itself, and the worst of them."""

from __future__ import annotations

from typing import Any

import pytest
from evidence_example import attack, claimed, clean, control, copies, interval

from privacy.audit.decision import NO_LEAK, DecisionRule, decide
from privacy.audit.evidence import BlindOutcome
from privacy.audit.policy import AuditPolicy
from privacy.errors import InvalidPlan

RULE = DecisionRule()


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
