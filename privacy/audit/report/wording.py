"""Numbers and verdicts in words."""

from __future__ import annotations

import math
import unicodedata

from privacy.audit.decision import Verdict
from privacy.audit.evidence import Access, AttackOutcome
from privacy.audit.statistics import Interval, OperatingPoint

LADDER: tuple[Access, ...] = ("samples", "api", "weights", "updates")

HEADLINE: dict[Verdict, str] = {
    "INVALID": "INVALID: this audit says nothing about the model",
    "RED": "RED: a leak was found",
    "AMBER": "AMBER: no clearance",
    "GREEN": "GREEN: no leakage detected by these attacks at this power",
}

MEANING: dict[Verdict, str] = {
    "INVALID": "A check that every audit must pass has failed or was left out. The figures below are shown so "
    "that the "
    "fault can be found; they must not be read as findings about the model, neither good nor bad. Repair what the "
    "reasons name and audit again.",
    "RED": "At least one test went beyond a cut-off that the site had set in advance. On the strength of this audit "
    "the model should not be released.",
    "AMBER": "No test went beyond a red cut-off, and yet the model is not cleared: an attack does better than "
    "chance, "
    "or too little was measured to exclude that one would. The reasons say which.",
    "GREEN": "Every check of the audit itself was passed, and every attack stayed below the site's cut-offs. A "
    "stronger "
    "attack, or more patients, may still find what these did not.",
}


def percent(rate: float) -> str:
    """Such as ``4.2 %``; as many digits as a small rate needs."""
    if 0 < rate < 0.001:
        return f"{100 * rate:.2g}\u00a0%"
    return f"{100 * rate:.1f}\u00a0%"


def target(rate: float) -> str:
    """A rate that was aimed at, such as ``1 %``."""
    return f"{100 * rate:g}\u00a0%"


def p_value(p: float) -> str:
    """Three digits."""
    return "<\u00a00.001" if p < 0.001 else f"{p:.3f}"


def p_said(p: float) -> str:
    """The same in running text, such as ``p = 0.470``."""
    return f"p {p_value(p)}" if p < 0.001 else f"p = {p_value(p)}"


def area(interval: Interval) -> str:
    """An AUC with its interval."""
    return f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def rate(interval: Interval) -> str:
    """A rate with its interval."""
    return f"{percent(interval.estimate)} ({percent(interval.low)} to {percent(interval.high)})"


def count(number: float) -> str:
    """A mean of counts, without a fraction that says nothing."""
    return f"{number:.0f}" if number == round(number) else f"{number:.1f}"


def point_at(points: tuple[OperatingPoint, ...], fpr: float) -> OperatingPoint | None:
    """The operating point at a false positive rate, or None."""
    return next((point for point in points if math.isclose(point.target_fpr, fpr)), None)


def true_positives(points: tuple[OperatingPoint, ...], fpr: float) -> str:
    """The true positive rate at a false positive rate, or why there is none."""
    point = point_at(points, fpr)
    if point is None:
        return "not measured"
    return point.note if point.tpr is None else rate(point.tpr)


def reach(attack: AttackOutcome) -> str:
    """What an attack achieves, for people who have never seen an AUC."""
    outcome = attack.outcome
    auc = outcome.patient_auc
    pairs = (
        f"shown a patient who was trained on and one who was not, it picks the right one in "
        f"{percent(auc.estimate)} of "
        f"all cases (95\u00a0%: {percent(auc.low)} to {percent(auc.high)}), where guessing has 50\u00a0%"
    )
    point = point_at(outcome.points, 0.01)
    if point is None or point.tpr is None:
        few = "how many it names with one false alarm in a hundred cannot be told"
        return f"{attack.title}: {pairs}; {few}{f' ({point.note})' if point is not None else ''}."
    return f"{attack.title}: {pairs}; with one false alarm in a hundred it names {rate(point.tpr)} of the patients."


def strongest(attacks: tuple[AttackOutcome, ...], access: Access) -> AttackOutcome | None:
    """Of the attacks that someone with this access can run, the one that did best on the tuning half."""
    within = [attack for attack in attacks if LADDER.index(attack.access) <= LADDER.index(access)]
    return max(within, key=lambda attack: attack.outcome.tuning_auc, default=None)


def printable(text: str) -> str:
    """Without control characters, which could hide or turn what is written; U+FFFD in their place."""
    hidden = {"Cc", "Cf", "Cs"}
    return "".join(
        "\ufffd" if character != "\n" and unicodedata.category(character) in hidden else character for character in text
    )
