"""What an audit found: everything from which the verdict follows, and nothing about a single patient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from privacy.audit.bounds import EpsilonBound
from privacy.audit.statistics import Interval, OperatingPoint

# What is released, from least to most: whoever holds one can do all that comes before it.
Access = Literal["samples", "api", "weights", "updates"]


@dataclass(frozen=True, kw_only=True)
class SeedOutcome:
    """One attack under one seed: chosen on the tuning half, measured on the report half.

    Attributes:
        seed: of the split and of the attack's noise.
        setting: chosen on the tuning half, such as ``t=100``.
        sign: 1 if high statistics mean members, -1 if low ones do; chosen on the tuning half.
        trim: share of a patient's images dropped at each end before averaging; chosen on the tuning half.
        tuning_auc: patient level, on the tuning half: optimistic, because the choices were made there.
        patient_auc: on the report half, with a 95 % interval.
        slice_auc: the same over single images, with an interval clustered by patient.
        p_value: one-sided, of the patient-level AUC against 1/2 (Mann-Whitney).
        points: patient level, at the target false positive rates.
        slice_points: the same over single images; their intervals take images for independent, which they are not.
    """

    seed: int
    setting: str
    sign: int
    trim: float
    tuning_auc: float
    patient_auc: Interval
    slice_auc: Interval
    p_value: float
    points: tuple[OperatingPoint, ...]
    slice_points: tuple[OperatingPoint, ...]


@dataclass(frozen=True, kw_only=True)
class Roc:
    """Points of a ROC curve at patient level, with a pointwise 95 % band.

    Attributes:
        fpr: false positive rates, ascending.
        tpr: true positive rate at each.
        low: lower end of the band.
        high: upper end.
    """

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class WorstPatients:
    """How exposed the most exposed members are, in the report half of the reported seed.

    Attributes:
        members: members in the report half.
        above_all_held_out: members who score above every held-out patient.
        flagged_in_every_seed: members who, in every seed in whose report half they are, score above the seed's
            threshold for a false positive rate of 10 %.
        flagged_expected: of them, as many as chance would flag.
        held_out_above_95th: share of held-outs who score at least as high as the member at the 95th percentile:
            5 % of the members are hidden among no more than this share of non-members.
    """

    members: int
    above_all_held_out: int
    flagged_in_every_seed: int
    flagged_expected: float
    held_out_above_95th: float


@dataclass(frozen=True, kw_only=True)
class AttackOutcome:
    """One attack over all seeds.

    Attributes:
        name: short, such as ``pia``.
        title: for people.
        paper: arXiv number.
        access: the least that the attacker must hold.
        statistic: what is computed, in one sentence.
        evaluations_per_image: U-Net evaluations that the attack would need by itself.
        seeds: outcome of each.
        reported: index of the seed whose patient-level AUC is the median: the one whose figures are shown.
        p_value: over the seeds together (twice the median), before the correction.
        adjusted_p: corrected for the number of attacks (Holm).
        roc: of the reported seed.
        worst: its most exposed patients.
    """

    name: str
    title: str
    paper: str
    access: Access
    statistic: str
    evaluations_per_image: float
    seeds: tuple[SeedOutcome, ...]
    reported: int
    p_value: float
    adjusted_p: float
    roc: Roc
    worst: WorstPatients

    @property
    def outcome(self) -> SeedOutcome:
        """Of the reported seed."""
        return self.seeds[self.reported]


@dataclass(frozen=True, kw_only=True)
class ControlOutcome:
    """A model of which the right answer is known.

    Attributes:
        name: ``overfitted``, ``untrained`` or ``shuffled``.
        kind: a positive control must be caught, a negative one must not.
        patient_auc: of the strongest attack on it, chosen as in the audit itself.
        p_value: one-sided, the least of the attacks' after correction.
        level: below it the control counts as caught.
        members: patients on the members' side.
        non_members: patients on the other.
        passed: whether the answer was right.
        explanation: what was done.
    """

    name: str
    kind: Literal["positive", "negative"]
    patient_auc: Interval
    p_value: float
    level: float
    members: int
    non_members: int
    passed: bool
    explanation: str


@dataclass(frozen=True, kw_only=True)
class BlindOutcome:
    """The classifier that never sees the model.

    Attributes:
        patient_auc: how well members are told from held-outs by their images alone.
        p_value: one-sided, by permutation of patients.
        confounded: whether that is better than chance: then nothing here says anything about the model.
        note: what was done, and which shift it would have caught.
    """

    patient_auc: Interval
    p_value: float
    confounded: bool
    note: str


@dataclass(frozen=True, kw_only=True)
class CopyOutcome:
    """Samples against patients, by one measure of likeness.

    Attributes:
        method: ``embedding`` or ``pixels``.
        samples: number of samples.
        copies: over the threshold against any member.
        copies_matched: over the threshold against members, averaged over draws of as many patients as the control has.
        control_matched: over the threshold against held-outs, on the same terms.
        p_value: of the excess, one-sided, by permutation of patients.
        withhold: indices of the samples over the threshold against members.
    """

    method: str
    samples: int
    copies: int
    copies_matched: float
    control_matched: float
    p_value: float
    withhold: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class InversionOutcome:
    """What a server can redraw of one training batch from an update.

    Attributes:
        seen: what the server sees: ``one site's update`` or ``the sum over 3 sites``.
        rdlv: relative data leakage value (arXiv:2202.06924); 0 or less means no more than the prior says.
        ssim: of the best reconstruction.
        cosine: between the update and that of the reconstruction; below 1 the attack itself fell short.
    """

    seen: str
    rdlv: float
    ssim: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class ClaimedPrivacy:
    """What the model's plan claims and what was found against it.

    Attributes:
        epsilon: claimed, for a patient of one site.
        delta: claimed.
        plan_sha256: of the plan.
        ceiling_auc: what no attack on one patient can exceed if the claim holds.
        ceiling_tpr_at_1_percent: the same for the TPR at an FPR of 1 %.
        lower_bounds: found with canaries, whose inclusion was committed before training.
        commitment: hash of the canaries and of their coins; None if there were none.
    """

    epsilon: float
    delta: float
    plan_sha256: str
    ceiling_auc: float
    ceiling_tpr_at_1_percent: float
    lower_bounds: tuple[EpsilonBound, ...]
    commitment: str | None


@dataclass(frozen=True, kw_only=True)
class CohortIdentity:
    """Whose patients were attacked.

    Attributes:
        site: name of the site.
        manifest_sha256: of the cohort's manifest, which lists patients, parts and pixel hashes.
        members: number of patients.
        held_out: number of patients.
        images: number of images of both.
    """

    site: str
    manifest_sha256: str
    members: int
    held_out: int
    images: int


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What was attacked.

    Attributes:
        experiment: name.
        model_sha256: of the model file.
        config_sha256: of its configuration.
        schedule_sha256: of its noise schedule.
        rounds_done: rounds that went into it.
    """

    experiment: str
    model_sha256: str
    config_sha256: str
    schedule_sha256: str
    rounds_done: int


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """The strongest attack at one site, where its policy lets that be known.

    Attributes:
        site: name of the site.
        members: in the report half.
        held_out: in the report half.
        patient_auc: with a 95 % interval; None if too few patients to let their counts leave.
        note: why there is no figure, or empty.
    """

    site: str
    members: int
    held_out: int
    patient_auc: Interval | None
    note: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a part of the audit took.

    Attributes:
        part: such as ``grey box``.
        evaluations_per_image: U-Net evaluations for each image, shared between the attacks where they can be.
        seconds: on this machine.
    """

    part: str
    evaluations_per_image: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The whole.

    Attributes:
        created: date, ISO 8601.
        command: to run it again.
        software: name and version of what computed it.
        scope: ``central``: one machine saw all images; ``federated``: sites sent counts.
        model: what was attacked.
        cohorts: whose patients.
        tuning_members: in the tuning half, and so on.
        tuning_held_out: …
        report_members: …
        report_held_out: …
        blind: the classifier without a model; None if it was not run, which is INVALID.
        attacks: every attack that was run.
        strongest: index of the attack with the highest AUC on the tuning half of its reported seed.
        controls: models of which the answer is known.
        copies: of the samples; empty if none were drawn.
        inversions: of updates; empty if there were none.
        privacy: what the plan claims; None for a model without differential privacy.
        sites: per-site figures.
        costs: of the parts.
        suppressed: in a federated audit, entries of the report half's counts that sites moved to a neighbouring cell or
            left out, because fewer patients than their minimum were in it; 0 in a central one.
    """

    created: str
    command: str
    software: tuple[tuple[str, str], ...]
    scope: Literal["central", "federated"]
    model: ModelIdentity
    cohorts: tuple[CohortIdentity, ...]
    tuning_members: int
    tuning_held_out: int
    report_members: int
    report_held_out: int
    blind: BlindOutcome | None
    attacks: tuple[AttackOutcome, ...]
    strongest: int
    controls: tuple[ControlOutcome, ...]
    copies: tuple[CopyOutcome, ...]
    inversions: tuple[InversionOutcome, ...]
    privacy: ClaimedPrivacy | None
    sites: tuple[SiteRow, ...]
    costs: tuple[Cost, ...]
    suppressed: int = 0
