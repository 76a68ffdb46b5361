from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import InvalidPlan
from privacy.plan import AdaptiveClipping, DPConfig, DPPlan, calibrate
from privacy.policy import Budget, Budgets, PolicyRefused, PrivacyPolicy
from privacy.secagg.rules import Floor

BUDGETS = Budgets(per_job=Budget(epsilon=4.0, delta=1e-3), total=Budget(epsilon=8.0, delta=2e-3))
POLICY = PrivacyPolicy(
    required=True,
    budgets=BUDGETS,
    min_patients=50,
    max_rounds=10,
    min_noise_multiplier=0.9,
    max_clip_norm=1.0,
    may_leave=("train_loss", "seconds"),
)
CONFIG = DPConfig(delta=1e-3, clip_norm=1.0, sampling_rate=0.1, steps_per_round=5, rounds=10, noise_multiplier=1.5)
PATIENTS = 200


def plan(**changes: Any) -> DPPlan:
    return calibrate(replace(CONFIG, **changes), patients=PATIENTS)


def check(policy: PrivacyPolicy = POLICY, **asked: Any) -> None:
    policy.check(**{"plan": plan(), "patients": PATIENTS, "rounds": 10, "leaves": ["seconds"], **asked})


def test_a_job_at_the_limits_passes() -> None:
    check()
    check(patients=50, leaves=["train_loss", "seconds"])
    check(replace(POLICY, required=False), plan=None)


ADAPTIVE = AdaptiveClipping(
    target_quantile=0.5, learning_rate=0.2, min_norm=0.1, max_norm=1.1, count_noise_multiplier=10.0
)


@pytest.mark.parametrize(
    ("rule", "asked", "message"),
    [
        ("min_patients", {"patients": 49}, r"49: .*at least 50: add patients"),
        ("max_rounds", {"rounds": 11}, r"11: .*at most 10"),
        ("max_rounds", {"plan": plan(rounds=11)}, r"11: .*at most 10"),
        ("may_leave", {"leaves": ["seconds", "held_out_loss"]}, r"held_out_loss.*only \['seconds', 'train_loss'\]"),
        ("required", {"plan": None}, r"no differential privacy.*required"),
        ("budgets.per_job.epsilon", {"plan": plan(noise_multiplier=0.95, sampling_rate=0.3)}, r"at most 4: ask for"),
        ("budgets.per_job.delta", {"plan": plan(delta=2e-3)}, r"0\.002: .*at most 0\.001: lower"),
        ("budgets.total.delta", {"patients": 500}, r"500 patients.*0\.002.*1 / patients"),
        ("min_noise_multiplier", {"plan": plan(noise_multiplier=0.8)}, r"0\.8: .*at least 0\.9"),
        ("min_noise_multiplier", {"plan": plan(release_noise_multiplier=0.8)}, r"0\.8: .*at least 0\.9"),
        ("max_clip_norm", {"plan": plan(clip_norm=1.01)}, r"1\.01: .*at most 1"),
        ("max_clip_norm", {"plan": plan(adaptive_clipping=ADAPTIVE)}, r"1\.1: .*at most 1"),
    ],
)
def test_less_privacy_is_refused_by_rule_value_limit_and_remedy(rule: str, asked: dict[str, Any], message: str) -> None:
    policy = POLICY if rule != "min_noise_multiplier" else replace(POLICY, budgets=HUGE)
    with pytest.raises(PolicyRefused, match=message) as refused:
        check(policy, **asked)
    assert refused.value.rule == rule
    assert str(refused.value).startswith(f"{rule} = ")


HUGE = Budgets(per_job=Budget(epsilon=1e6, delta=1e-3), total=Budget(epsilon=1e6, delta=2e-3))


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(PolicyRefused, match="min_patients"):
        check(patients=float("nan"))
    with pytest.raises(PolicyRefused, match="max_rounds"):
        check(rounds=float("nan"))


@settings(deadline=None, max_examples=60)
@given(
    sigma=st.floats(0.5, 3),
    more_noise=st.floats(1, 3),
    rounds=st.integers(2, 14),
    fewer=st.integers(0, 13),
    clip=st.floats(0.1, 2),
    leaves=st.sets(st.sampled_from(["train_loss", "seconds", "held_out_loss"])),
    fewer_leave=st.sets(st.sampled_from(["train_loss", "seconds"])),
    without=st.booleans(),
)
def test_more_privacy_never_turns_a_yes_into_a_no(
    sigma: float,
    more_noise: float,
    rounds: int,
    fewer: int,
    clip: float,
    leaves: set[str],
    fewer_leave: set[str],
    without: bool,
) -> None:
    policy = replace(POLICY, required=not without)
    asked = None if without else plan(noise_multiplier=sigma, rounds=rounds, clip_norm=clip)
    stricter_rounds = max(1, rounds - fewer)
    stricter = plan(noise_multiplier=sigma * more_noise, rounds=stricter_rounds, clip_norm=clip / 2)
    try:
        check(policy, plan=asked, rounds=rounds, leaves=leaves)
    except PolicyRefused:
        return
    assert asked is None or (asked.epsilon <= 4 and sigma >= 0.9 and clip <= 1 and rounds <= 10)
    if asked is not None:
        check(policy, plan=stricter, rounds=stricter_rounds, leaves=leaves & fewer_leave)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Budget(epsilon=0.0, delta=1e-3), "epsilon"),
        (lambda: Budget(epsilon=float("inf"), delta=1e-3), "epsilon"),
        (lambda: Budget(epsilon=1.0, delta=0.0), "delta"),
        (lambda: Budget(epsilon=1.0, delta=1.0), "delta"),
        (lambda: Budgets(per_job=BUDGETS.total, total=BUDGETS.per_job), r"per_job\.epsilon = 8\.0: lower it.*is 4"),
        (lambda: Budgets(per_job=Budget(epsilon=4.0, delta=3e-3), total=BUDGETS.total), r"per_job\.delta"),
        (lambda: replace(POLICY, min_patients=0), "min_patients"),
        (lambda: replace(POLICY, max_rounds=0), "max_rounds"),
        (lambda: replace(POLICY, min_noise_multiplier=-0.1), "min_noise_multiplier"),
        (lambda: replace(POLICY, min_noise_multiplier=float("nan")), "min_noise_multiplier"),
        (lambda: replace(POLICY, max_clip_norm=0.0), "max_clip_norm"),
        (lambda: replace(POLICY, may_leave="train_loss"), "may_leave"),
        (lambda: replace(POLICY, may_leave=("",)), "may_leave"),
    ],
)
def test_an_impossible_policy_cannot_be_made(wrong: Any, message: str) -> None:
    with pytest.raises(InvalidPlan, match=message):
        wrong()


def test_an_audit_passes_by_its_own_rules_and_no_others() -> None:
    """Nothing is trained: a site that requires differential privacy of a training may let counts of an audit leave."""
    budgets = Budgets(per_job=Budget(epsilon=1.0, delta=1e-3), total=Budget(epsilon=1.0, delta=1e-3))
    strict = PrivacyPolicy(required=True, budgets=budgets, min_patients=10, may_leave=("audit_counts",))
    strict.check_audit(patients=10, leaves=["audit_counts"])
    with pytest.raises(PolicyRefused, match="min_patients"):
        strict.check_audit(patients=9, leaves=["audit_counts"])
    silent = PrivacyPolicy(required=False, budgets=budgets)
    with pytest.raises(PolicyRefused, match="may_leave"):
        silent.check_audit(patients=10, leaves=["audit_counts"])
    masks = Floor(peers=("a", "b", "c"), required=True)
    masked = PrivacyPolicy(required=False, budgets=budgets, may_leave=("audit_counts",), secure_aggregation=masks)
    with pytest.raises(PolicyRefused, match=r"secure_aggregation\.required"):
        masked.check_audit(patients=10, leaves=["audit_counts"])
