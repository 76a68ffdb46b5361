"""ROC, AUC and ε as marks in a plane, which SVG and PDF each draw in their own way.

Units are those of the chart; y grows downwards. Colour is never the only difference: curves differ in their dashes too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from privacy.audit.evidence import AttackOutcome, ClaimedPrivacy, Evidence, Roc

# ink: axes and text; quiet: grid and chance; first to third: attacks; limit: what is demanded; bad: beyond it.
Tone = Literal["ink", "quiet", "grid", "first", "second", "third", "limit", "bad"]
Dash: TypeAlias = tuple[float, float] | None
Place: TypeAlias = tuple[float, float]

WIDTH = 400.0
CURVES = 3
LOWEST_RATE = 1e-3
_LEFT, _RIGHT, _ROW = 44.0, 22.0, 17.0
_TONES: tuple[tuple[Tone, Dash], ...] = (("first", None), ("second", (7, 3)), ("third", (2, 2.5)))
_CHANCE: tuple[Tone, Dash] = ("quiet", (1, 4))
_LIMIT: tuple[Tone, Dash] = ("limit", (11, 3))


@dataclass(frozen=True, kw_only=True)
class Stroke:
    """A line through points."""

    places: tuple[Place, ...]
    tone: Tone
    width: float = 1.0
    dash: Dash = None


@dataclass(frozen=True, kw_only=True)
class Area:
    """A filled polygon; ``faint`` lets what is behind it show."""

    places: tuple[Place, ...]
    tone: Tone
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Label:
    """Text on its baseline."""

    place: Place
    text: str
    tone: Tone = "ink"
    anchor: Literal["start", "middle", "end"] = "start"
    size: float = 11.5


Mark: TypeAlias = Stroke | Area | Label


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture.

    Attributes:
        name: to link to.
        title: what it shows.
        description: what it shows, for who cannot see it.
        height: in the same units as ``WIDTH``.
        marks: back to front.
    """

    name: str
    title: str
    description: str
    height: float
    marks: tuple[Mark, ...]


def ranked(evidence: Evidence) -> list[AttackOutcome]:
    """Attacks by what the tuning half promised of them: it chose them without looking at what is reported."""
    return sorted(evidence.attacks, key=lambda attack: -attack.outcome.tuning_auc)


def privacy_ceiling(fpr: float, privacy: ClaimedPrivacy) -> float:
    """Highest TPR that (ε, δ)-DP allows at an FPR (Kairouz et al. 2015, arXiv:1311.0776, thm 2.1).

    TPR ≤ e^ε FPR + δ and 1 - FPR ≤ e^ε (1 - TPR) + δ.
    """
    epsilon, delta = min(privacy.epsilon, 700.0), privacy.delta
    return min(1.0, math.exp(epsilon) * fpr + delta, 1 - math.exp(-epsilon) * (1 - delta - fpr))


def roc_chart(evidence: Evidence) -> Chart | None:
    """ROC of the strongest attacks with both axes logarithmic; None if no attack has a curve."""
    attacks = [attack for attack in ranked(evidence) if any(rate > 0 for rate in attack.roc.fpr)][:CURVES]
    if not attacks:
        return None
    least = max(LOWEST_RATE, min(0.1, 1 / max(1, evidence.report_held_out)))
    top, bottom = 22.0, 322.0

    def place(fpr: float, tpr: float) -> Place:
        right = WIDTH - _RIGHT
        x, y = (1 - math.log(min(max(value, least), 1.0)) / math.log(least) for value in (fpr, tpr))
        return _LEFT + x * (right - _LEFT), bottom + y * (top - bottom)

    marks: list[Mark] = list(_log_axes(least, place))
    marks.append(Label(place=(_LEFT - 34, 12), text="True positive rate: members who are found"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    marks.append(
        Label(
            place=(middle, bottom + 33), text="False positive rate: others who are taken for members", anchor="middle"
        )
    )
    legend: list[tuple[str, Tone, Dash, bool]] = []
    curves = list(zip(attacks, _TONES, strict=False))
    for attack, (tone, _) in reversed(curves):
        marks.append(Area(places=_band(attack.roc, least, place), tone=tone, faint=True))
    marks.append(Stroke(places=(place(least, least), place(1, 1)), tone=_CHANCE[0], width=1.4, dash=_CHANCE[1]))
    for attack, (tone, dash) in reversed(curves):
        points = _within(attack.roc, attack.roc.tpr, least)
        marks.append(Stroke(places=tuple(place(*point) for point in points), tone=tone, width=2, dash=dash))
    legend += [(f"{attack.title} with 95 % band", tone, dash, True) for attack, (tone, dash) in curves]
    legend.append(("Chance", *_CHANCE, False))
    if evidence.privacy is not None:
        grid = [least ** (1 - step / 60) for step in range(61)]
        ceiling = tuple(place(fpr, privacy_ceiling(fpr, evidence.privacy)) for fpr in grid)
        marks.append(Stroke(places=ceiling, tone=_LIMIT[0], width=1.8, dash=_LIMIT[1]))
        said = f"Ceiling if ε = {evidence.privacy.epsilon:.3g}, δ = {evidence.privacy.delta:.3g} holds"
        legend.append((said, *_LIMIT, False))
    marks += _legend(legend, bottom + 56)
    found = "; ".join(f"{a.title}: AUC {a.outcome.patient_auc.estimate:.3f}" for a in attacks)
    return Chart(
        name="chart-roc",
        title="ROC at patient level, both axes logarithmic",
        description=f"Curves of the {len(attacks)} attacks that did best on the tuning half, from a false positive "
        f"rate of {least:.2g} to 1. {found}. A curve on the diagonal is chance; the table of attacks has the figures.",
        height=bottom + 56 + _ROW * len(legend),
        marks=tuple(marks),
    )


def auc_chart(evidence: Evidence, *, cut_off: float) -> Chart | None:
    """AUC of every attack with its interval beside chance and the cut-off; None without attacks."""
    if not evidence.attacks:
        return None
    attacks = ranked(evidence)
    lows = [attack.outcome.patient_auc.low for attack in attacks]
    least = max(0.0, math.floor(10 * min(*lows, 0.45)) / 10)
    row, top = 30.0, 24.0
    bottom = top + row * len(attacks)

    def across(auc: float) -> float:
        return 12 + (auc - least) / (1 - least) * (WIDTH - 24)

    marks: list[Mark] = [
        Label(place=(12, 12), text="AUC at patient level with its 95 % interval"),
        *(
            Stroke(places=((across(tick / 10), top), (across(tick / 10), bottom)), tone="grid")
            for tick in range(round(10 * least), 11)
        ),
        *(
            Label(place=(across(tick / 10), bottom + 14), text=f"{tick / 10:.1f}", anchor="middle")
            for tick in range(round(10 * least), 11)
        ),
        Stroke(places=((across(0.5), top), (across(0.5), bottom)), tone="quiet", width=1.6, dash=(1, 4)),
        Stroke(places=((across(cut_off), top), (across(cut_off), bottom)), tone="limit", width=1.6, dash=(11, 3)),
    ]
    for index, attack in enumerate(attacks):
        y = top + row * index
        auc = attack.outcome.patient_auc
        tone: Tone = "bad" if auc.low > cut_off else "first"
        marks.append(Label(place=(14, y + 12), text=f"{attack.title}: {auc.estimate:.3f}"))
        marks.append(Stroke(places=((across(auc.low), y + 21), (across(auc.high), y + 21)), tone=tone, width=2.4))
        marks.extend(
            Stroke(places=((across(end), y + 17), (across(end), y + 25)), tone=tone, width=1.6)
            for end in (auc.low, auc.high)
        )
        marks.append(Area(places=_diamond(across(auc.estimate), y + 21, 4.5), tone=tone))
    legend: list[tuple[str, Tone, Dash, bool]] = [
        ("Chance", "quiet", (1, 4), False),
        (f"GREEN needs every interval below {cut_off:g}", "limit", (11, 3), False),
    ]
    marks += _legend(legend, bottom + 36)
    above = sum(attack.outcome.patient_auc.high > cut_off for attack in attacks)
    return Chart(
        name="chart-auc",
        title="AUC of every attack",
        description=f"One row for each of {len(attacks)} attacks, best on the tuning half first. The intervals of "
        f"{above} reach beyond the cut-off of {cut_off:g}. The table of attacks has the figures.",
        height=bottom + 36 + _ROW * len(legend),
        marks=tuple(marks),
    )


def epsilon_chart(privacy: ClaimedPrivacy) -> Chart:
    """A number line: what canaries rule out, and what is claimed."""
    rows = sorted(privacy.lower_bounds, key=lambda bound: -bound.epsilon)
    most = 1.15 * max(privacy.epsilon, *(bound.epsilon for bound in rows), 0.1)
    step = _round_step(most / 5)
    row, top = 32.0, 30.0
    bottom = top + row * max(1, len(rows))

    def across(epsilon: float) -> float:
        return 14 + epsilon / most * (WIDTH - 28)

    claim = across(privacy.epsilon)
    anchor: Literal["start", "end"] = "end" if privacy.epsilon > most / 2 else "start"
    marks: list[Mark] = [
        Stroke(places=((14, bottom), (WIDTH - 14, bottom)), tone="ink", width=1.2),
        *(
            Stroke(places=((across(step * tick), bottom), (across(step * tick), bottom + 5)), tone="ink")
            for tick in range(int(most / step) + 1)
        ),
        *(
            Label(place=(across(step * tick), bottom + 18), text=f"{step * tick:g}", anchor="middle")
            for tick in range(int(most / step) + 1)
        ),
    ]
    for index, bound in enumerate(rows):
        y = top + row * index
        tone: Tone = "bad" if bound.epsilon > privacy.epsilon else "first"
        far = across(bound.epsilon)
        marks.append(Label(place=(14, y + 11), text=f"{bound.method}: ε ≥ {bound.epsilon:.2f}"))
        marks.append(Area(places=((14, y + 16), (far, y + 16), (far, y + 25), (14, y + 25)), tone=tone))
    if not rows:
        marks.append(Label(place=(14, top + 20), text="No lower bound was measured.", tone="quiet"))
    shift = -5 if anchor == "end" else 5
    marks.append(Stroke(places=((claim, 6), (claim, bottom)), tone="limit", width=2.2, dash=(11, 3)))
    marks.append(Label(place=(claim + shift, 15), text=f"claimed ε = {privacy.epsilon:.2f}", tone="ink", anchor=anchor))
    legend: list[tuple[str, Tone, Dash, bool]] = [("Claimed", "limit", (11, 3), False)]
    if rows:
        legend.append(("Ruled out by canaries, up to the bar's end", "first", None, True))
    if any(bound.epsilon > privacy.epsilon for bound in rows):
        legend.append(("The same, beyond the claim: the claim does not hold", "bad", None, True))
    marks += _legend(legend, bottom + 40)
    found = "; ".join(f"{bound.method}: at least {bound.epsilon:.2f}" for bound in rows) or "no lower bound"
    return Chart(
        name="chart-epsilon",
        title="ε: claimed, and ruled out",
        description=f"A number line of ε. Claimed: {privacy.epsilon:.2f}. Measured: {found}.",
        height=bottom + 40 + _ROW * len(legend),
        marks=tuple(marks),
    )


def _log_axes(least: float, place: Callable[[float, float], Place]) -> Iterator[Mark]:
    steps = (1, 2, 5) if least > 0.004 else (1,)
    exponents = range(math.floor(math.log10(least)), 1)
    ticks = [s * 10.0**e for e in exponents for s in steps if least <= s * 10.0**e * (1 + 1e-9) and s * 10.0**e <= 1]
    for tick in ticks:
        yield Stroke(places=(place(tick, least), place(tick, 1)), tone="grid")
        yield Stroke(places=(place(least, tick), place(1, tick)), tone="grid")
        text = f"{100 * tick:g}\u00a0%"
        x, bottom = place(tick, least)
        yield Label(place=(x, bottom + 15), text=text, anchor="middle")
        left, y = place(least, tick)
        yield Label(place=(left - 5, y + 4), text=text, anchor="end")
    corners = (place(least, least), place(1, least), place(1, 1), place(least, 1), place(least, least))
    yield Stroke(places=corners, tone="ink")


def _within(roc: Roc, values: tuple[float, ...], least: float) -> list[Place]:
    """(FPR, value) from the lowest FPR that is drawn to 1."""
    points = [(fpr, value) for fpr, value in zip(roc.fpr, values, strict=True) if fpr >= least * (1 - 1e-9)]
    below = [value for fpr, value in zip(roc.fpr, values, strict=True) if fpr < least * (1 - 1e-9)]
    if below and (not points or points[0][0] > least):
        points.insert(0, (least, below[-1]))
    return points


def _band(roc: Roc, least: float, place: Callable[[float, float], Place]) -> tuple[Place, ...]:
    lower, upper = _within(roc, roc.low, least), _within(roc, roc.high, least)
    return tuple(place(*point) for point in (*lower, *reversed(upper)))


def _legend(entries: list[tuple[str, Tone, Dash, bool]], top: float) -> Iterator[Mark]:
    for index, (text, tone, dash, filled) in enumerate(entries):
        y = top + _ROW * index
        if filled:
            corners = ((14.0, y - 5), (48.0, y - 5), (48.0, y + 5), (14.0, y + 5))
            yield Area(places=corners, tone=tone, faint=True)
        yield Stroke(places=((14, y), (48, y)), tone=tone, width=2, dash=dash)
        yield Label(place=(55, y + 4), text=text)


def _diamond(x: float, y: float, radius: float) -> tuple[Place, ...]:
    return ((x - radius, y), (x, y - radius), (x + radius, y), (x, y + radius))


def _round_step(least: float) -> float:
    """The first of 1, 2, 5, 10, … (times a power of ten) that is at least so much."""
    magnitude = 10.0 ** math.floor(math.log10(least))
    return next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= least * (1 - 1e-9))
