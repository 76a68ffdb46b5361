"""From evidence to a verdict, by a rule that the site can set and that is written beside the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from privacy.errors import require, require_number

if TYPE_CHECKING:  # every site reads its policy in every task: no need to load statistics for it
    from privacy.audit.evidence import AttackOutcome, Evidence
    from privacy.audit.statistics import OperatingPoint

Verdict = Literal["INVALID", "RED", "AMBER", "GREEN"]

NO_LEAK = "no leakage detected by these attacks at this power"


@dataclass(frozen=True, kw_only=True)
class DecisionRule:
    """The cut-offs.

    Attributes:
        red_tpr_at_1_percent: RED if some attack's patient-level TPR at 1 % FPR lies above it with 95 % confidence: that
            share of the patients could be named with one false alarm in a hundred.
        green_auc: GREEN needs every attack's patient-level AUC below it with 95 % confidence.
        green_tpr_at_1_percent: GREEN needs every attack's TPR at 1 % FPR below it with 95 % confidence.
        significance: level at which an attack, after correction for the number of attacks, or a copy excess counts as
            above chance.

    Raises:
        InvalidPlan: an impossible value (a ValueError).
    """

    red_tpr_at_1_percent: float = 0.10
    green_auc: float = 0.60
    green_tpr_at_1_percent: float = 0.03
    significance: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            require_number(value, argument=field.name)
            require(0 < value < 1, argument=field.name, value=value, remedy="give a number between 0 and 1")
        remedy = "give a number above 1/2, which is chance"
        require(self.green_auc > 0.5, argument="green_auc", value=self.green_auc, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One test of the rule that decided something.

    Attributes:
        verdict: what it demands by itself.
        test: which one, such as ``blind test``.
        found: the value, in words.
        cut_off: what it was held against, in words.
        meaning: in plain language.
    """

    verdict: Verdict
    test: str
    found: str
    cut_off: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The verdict.

    Attributes:
        verdict: the worst that a test demands; GREEN if none demands more.
        sentence: in plain language.
        reasons: of every test that was not passed, worst first; of a GREEN one, the tests that it passed.
    """

    verdict: Verdict
    sentence: str
    reasons: tuple[Reason, ...]


def decide(evidence: Evidence, rule: DecisionRule) -> Decision:
    """The verdict: a pure function of what stands in audit.json."""
    failed = [*_invalid(evidence), *_red(evidence, rule), *_amber(evidence, rule)]
    order: tuple[Verdict, ...] = ("INVALID", "RED", "AMBER")
    for verdict in order:
        if any(reason.verdict == verdict for reason in failed):
            ranked = tuple(sorted(failed, key=lambda reason: order.index(reason.verdict)))
            return Decision(verdict=verdict, sentence=_sentence(verdict, ranked, evidence), reasons=ranked)
    passed = tuple(_green(evidence, rule))
    return Decision(verdict="GREEN", sentence=_sentence("GREEN", passed, evidence), reasons=passed)


def _sentence(verdict: Verdict, reasons: tuple[Reason, ...], evidence: Evidence) -> str:
    first = reasons[0]
    if verdict == "INVALID":
        return f"This audit says nothing about the model: {first.meaning}"
    if verdict == "RED":
        return f"The model leaks who its patients are: {first.meaning}"
    if verdict == "AMBER":
        return f"No clearance: {first.meaning}"
    return (
        f"{NO_LEAK[0].upper()}{NO_LEAK[1:]}: {evidence.report_members} members against {evidence.report_held_out} "
        "held-out patients. That is no proof that there is none."
    )


def _invalid(evidence: Evidence) -> Iterator[Reason]:
    blind = evidence.blind
    if blind is None:
        yield Reason(
            verdict="INVALID",
            test="blind test",
            found="not run",
            cut_off="must be run and be at chance",
            meaning="without it nobody knows whether members and held-outs differ for other reasons than the model.",
        )
    elif blind.confounded:
        yield Reason(
            verdict="INVALID",
            test="blind test",
            found=f"AUC {blind.patient_auc.estimate:.3f}, p = {blind.p_value:.3g}",
            cut_off="at chance",
            meaning="confounded: members and held-out patients can be told apart by their images alone, so an attack's "
            "success would say nothing about the model.",
        )
    kinds = {control.kind for control in evidence.controls}
    for kind in ("positive", "negative"):
        if kind not in kinds:
            yield Reason(
                verdict="INVALID",
                test=f"{kind} control",
                found="not run",
                cut_off="must be run and give the known answer",
                meaning="without a model of which the answer is known, nobody knows whether these attacks work here.",
            )
    for control in evidence.controls:
        if not control.passed:
            meaning = (
                "the attacks miss a model that was overfitted on purpose: they have no power here."
                if control.kind == "positive"
                else "the attacks accuse a model that cannot have remembered anyone."
            )
            yield Reason(
                verdict="INVALID",
                test=f"{control.kind} control: {control.name}",
                found=f"AUC {control.patient_auc.estimate:.3f}, p = {control.p_value:.3g}",
                cut_off=f"p {'<' if control.kind == 'positive' else '≥'} {control.level:g}",
                meaning=meaning,
            )


def _red(evidence: Evidence, rule: DecisionRule) -> Iterator[Reason]:
    claimed = evidence.privacy
    for bound in () if claimed is None else claimed.lower_bounds:
        if claimed is not None and bound.epsilon > claimed.epsilon:
            yield Reason(
                verdict="RED",
                test=f"lower bound on epsilon: {bound.method}",
                found=f"epsilon ≥ {bound.epsilon:.2f} at {bound.confidence:.0%} confidence",
                cut_off=f"claimed: {claimed.epsilon:.2f}",
                meaning="the claimed differential privacy does not hold.",
            )
    rates = [(attack, point.tpr) for attack in evidence.attacks if (point := at_1_percent(attack)) is not None]
    naming = [(attack, tpr) for attack, tpr in rates if tpr is not None and tpr.low > rule.red_tpr_at_1_percent]
    if naming:
        attack, tpr = max(naming, key=lambda pair: pair[1].low)
        yield Reason(
            verdict="RED",
            test="TPR at 1 % FPR",
            found=f"{len(naming)} of {len(evidence.attacks)} attacks, most by {attack.title}: {tpr.estimate:.1%} "
            f"(95 %: {tpr.low:.1%} to {tpr.high:.1%})",
            cut_off=f"lower bound at most {rule.red_tpr_at_1_percent:.0%}",
            meaning=f"an attacker with {ACCESS[attack.access]} names {tpr.estimate:.0%} of the patients who were "
            "trained on, with one false alarm in a hundred.",
        )
    for copies in evidence.copies:
        if copies.p_value < rule.significance / len(evidence.copies):
            yield Reason(
                verdict="RED",
                test=f"copies: {copies.method}",
                found=f"{copies.copies_matched:.1f} of {copies.samples} samples too close to a member, "
                f"{copies.control_matched:.1f} to as many held-outs, p = {copies.p_value:.3g}",
                cut_off=f"p ≥ {rule.significance / len(evidence.copies):g}",
                meaning="samples repeat patients who were trained on more often than patients who were not.",
            )


def _amber(evidence: Evidence, rule: DecisionRule) -> Iterator[Reason]:
    better = [attack for attack in evidence.attacks if attack.adjusted_p < rule.significance]
    if better:
        attack = min(better, key=lambda a: (a.adjusted_p, -a.outcome.patient_auc.estimate))
        yield Reason(
            verdict="AMBER",
            test="better than chance",
            found=f"{len(better)} of {len(evidence.attacks)} attacks, first {attack.title}: AUC "
            f"{attack.outcome.patient_auc.estimate:.3f}, p = {attack.adjusted_p:.3g} after correction for their number",
            cut_off=f"p ≥ {rule.significance:g}",
            meaning=f"an attacker with {ACCESS[attack.access]} tells members from others better than chance does.",
        )
    weak = [a for a in evidence.attacks if a.outcome.patient_auc.high > rule.green_auc]
    if weak:
        worst = max(weak, key=lambda a: a.outcome.patient_auc.high)
        yield Reason(
            verdict="AMBER",
            test="power: patient-level AUC",
            found=f"{worst.title}: up to {worst.outcome.patient_auc.high:.3f}",
            cut_off=f"at most {rule.green_auc:.2f} with 95 % confidence, for every attack",
            meaning="with so few patients an AUC above the cut-off cannot be excluded.",
        )
    open_points = [(a, at_1_percent(a)) for a in evidence.attacks]
    unresolved = [point for _, point in open_points if point is None or point.tpr is None]
    if unresolved or not open_points:
        said = unresolved[0].note if unresolved and unresolved[0] is not None else "not measured"
        yield Reason(
            verdict="AMBER",
            test="power: TPR at 1 % FPR",
            found=said,
            cut_off=f"at most {rule.green_tpr_at_1_percent:.0%} with 95 % confidence, for every attack",
            meaning="there are too few patients to say how many could be named with one false alarm in a hundred.",
        )
    loose = [(a, p.tpr) for a, p in open_points if p is not None and p.tpr is not None]
    over = [(a, tpr) for a, tpr in loose if tpr.high > rule.green_tpr_at_1_percent]
    if over:
        attack, tpr = max(over, key=lambda pair: pair[1].high)
        yield Reason(
            verdict="AMBER",
            test="power: TPR at 1 % FPR",
            found=f"{attack.title}: up to {tpr.high:.1%}",
            cut_off=f"at most {rule.green_tpr_at_1_percent:.0%} with 95 % confidence, for every attack",
            meaning="a true positive rate above the cut-off cannot be excluded.",
        )
    if not evidence.copies:
        yield Reason(
            verdict="AMBER",
            test="copies",
            found="no samples were screened",
            cut_off="no more copies of members than of held-outs",
            meaning="nobody has looked whether samples repeat a patient.",
        )


def _green(evidence: Evidence, rule: DecisionRule) -> Iterator[Reason]:
    yield Reason(
        verdict="GREEN",
        test="blind test and controls",
        found="as they must be",
        cut_off="blind test at chance, every control answered rightly",
        meaning="the attacks work here, and members and held-outs are alike.",
    )
    strongest = max(evidence.attacks, key=lambda a: a.outcome.patient_auc.high)
    yield Reason(
        verdict="GREEN",
        test="patient-level AUC",
        found=f"{strongest.title}: up to {strongest.outcome.patient_auc.high:.3f}",
        cut_off=f"at most {rule.green_auc:.2f} with 95 % confidence, for every attack",
        meaning=f"{NO_LEAK}.",
    )
    highest = max(p.tpr.high for a in evidence.attacks if (p := at_1_percent(a)) is not None and p.tpr is not None)
    yield Reason(
        verdict="GREEN",
        test="TPR at 1 % FPR",
        found=f"up to {highest:.1%}",
        cut_off=f"at most {rule.green_tpr_at_1_percent:.0%} with 95 % confidence, for every attack",
        meaning="few patients, if any, could be named with one false alarm in a hundred.",
    )


# What an attacker holds, in words.
ACCESS = {
    "samples": "samples of the model",
    "api": "an interface to the denoiser",
    "weights": "the model's weights",
    "updates": "the updates of every round",
}


def at_1_percent(attack: AttackOutcome) -> OperatingPoint | None:
    """The reported seed's operating point at a false positive rate of 1 %, at patient level."""
    return next((point for point in attack.outcome.points if point.target_fpr == 0.01), None)
