"""Evidence in tests: of a model that leaks nothing, at a power that can tell, and its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from privacy.audit.bounds import EpsilonBound
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
from privacy.audit.statistics import Interval, OperatingPoint


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
