"""Charts of the status page: losses by round, and the privacy that each site has spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean

from poc.page_words import budget_said, shortened
from poc.snapshot import RunView, Snapshot
from privacy.audit.report.charts import WIDTH, Area, Chart, Dash, Label, Mark, Place, Stroke, Tone

MOST_CURVES = 6
_CURVES: tuple[tuple[Tone, Dash], ...] = (
    ("first", None),
    ("second", (7, 3)),
    ("third", (2, 2.5)),
    ("first", (12, 3)),
    ("second", (1, 3)),
    ("third", (16, 2)),
)
_LEFT, _RIGHT, _ROW = 44.0, 14.0, 17.0


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """Values by number of rounds."""

    title: str
    points: tuple[tuple[float, float], ...]
    tone: Tone
    dash: Dash = None
    width: float = 2.0


def said_by_sites(run: RunView) -> Iterator[Mapping[str, float]]:
    """What each site reported in each round in which its update went into the model."""
    for record in run.rounds:
        yield from record.accepted.values()


def loss_chart(run: RunView, prefix: str, metric: str) -> Chart | None:
    """A metric by round, a curve a site and one for their mean; None if no round has it."""
    """A loss by rounds, a curve per site and their mean; None if nobody gave it.

    The held-out loss of a round is that of the model that came in, so it stands at the rounds done before; the last
    point is that of the finished model.
    """
    held_out = metric == "held_out_loss"
    shift = 0 if held_out else 1
    by_site: dict[str, list[tuple[float, float]]] = {}
    mean: list[tuple[float, float]] = []
    for record in run.rounds:
        x = record.round_number + shift
        values = {site: said[metric] for site, said in record.accepted.items() if said.get(metric, 0) > 0}
        for site, value in values.items():
            by_site.setdefault(site, []).append((x, value))
        value = record.mean.get(metric, fmean(values.values()) if values else 0.0)
        if value > 0:
            mean.append((x, value))
    if held_out and run.rounds and run.figures.get(metric, 0) > 0:
        mean.append((run.rounds_done, run.figures[metric]))
    if not mean:
        return None
    curves = [
        _Curve(title=site, points=tuple(by_site[site]), tone=tone, dash=dash)
        for site, (tone, dash) in zip(sorted(by_site), _CURVES, strict=False)
        if len(by_site) <= MOST_CURVES
    ]
    curves.append(_Curve(title="mean over sites", points=tuple(mean), tone="ink", dash=(1, 2), width=1.2))
    band = list(by_site.values()) if len(by_site) > MOST_CURVES else []
    title = "Held-out loss of the model after so many rounds" if held_out else "Training loss, mean over each round"
    last = run.rounds_asked or run.rounds_done
    return _chart(
        f"{prefix}-{metric.replace('_', '-')}", title, curves, band, first=shift, last=max(last, run.rounds_done)
    )


def _chart(
    name: str,
    title: str,
    curves: list[_Curve],
    band: list[list[tuple[float, float]]],
    *,
    first: int,
    last: int,
) -> Chart:
    """Curves over whole rounds, the loss on a logarithmic axis; a band from lowest to highest of many sites."""
    values = [value for curve in curves for _, value in curve.points] + [value for line in band for _, value in line]
    low, high, ticks = _log_range(min(values), max(values))
    top, bottom = 14.0, 214.0
    last = max(last, first + 1)

    def place(x: float, value: float) -> Place:
        up = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return _LEFT + (x - first) / (last - first) * (WIDTH - _LEFT - _RIGHT), bottom + up * (top - bottom)

    marks: list[Mark] = []
    for tick in ticks:
        marks.append(Stroke(places=(place(first, tick), place(last, tick)), tone="grid"))
        marks.append(Label(place=(_LEFT - 6, place(first, tick)[1] + 4), text=f"{tick:g}", anchor="end"))
    step = max(1, _round_up((last - first) / 8))
    for tick in range(first, last + 1, step):
        marks.append(Stroke(places=((place(tick, low)[0], bottom), (place(tick, low)[0], bottom + 4)), tone="ink"))
        marks.append(Label(place=(place(tick, low)[0], bottom + 17), text=str(tick), anchor="middle"))
    marks.append(Stroke(places=(place(first, low), place(last, low)), tone="ink"))
    what = "rounds done" if first == 0 else "round"
    marks.append(Label(place=((_LEFT + WIDTH - _RIGHT) / 2, bottom + 33), text=what, anchor="middle"))
    if band:
        marks.append(Area(places=_outline(band, place), tone="first", faint=True))
    for curve in curves:
        marks.append(
            Stroke(
                places=tuple(place(*point) for point in curve.points),
                tone=curve.tone,
                width=curve.width,
                dash=curve.dash,
            )
        )
        if len(curve.points) <= 24 and curve.tone != "ink":
            marks.extend(Area(places=_dot(*place(*point)), tone=curve.tone) for point in curve.points)
        if len(curve.points) == 1 and curve.tone == "ink":
            marks.append(Area(places=_dot(*place(*curve.points[0])), tone="ink"))
    entries = [(curve.title, curve.tone, curve.dash) for curve in curves]
    if band:
        entries.append((f"from the lowest to the highest of {len(band)} sites", "first", None))
    marks += _legend(entries, bottom + 54)
    found = "; ".join(f"{curve.title}: {curve.points[-1][1]:.4f} at {curve.points[-1][0]:g}" for curve in curves)
    return Chart(
        name=name,
        title=f"{title} (logarithmic)",
        description=f"{title}. Last values: {found}. The table of rounds has the figures.",
        height=bottom + 54 + _ROW * len(entries),
        marks=tuple(marks),
    )


def _log_range(least: float, most: float) -> tuple[float, float, list[float]]:
    """Ends of a logarithmic axis and its ticks 1, 2, 5, 10, …; of ends that are close, whatever is round between."""
    steps = [
        s * 10.0**e
        for e in range(math.floor(math.log10(least)) - 1, math.ceil(math.log10(most)) + 2)
        for s in (1, 2, 5)
    ]
    low = max((step for step in steps if step <= least), default=least)
    high = min((step for step in steps if step >= most), default=most)
    if low == high:
        low, high = low / 2, high * 2
    return low, high, [step for step in steps if low <= step <= high]


def _round_up(least: float) -> int:
    """The first of 1, 2, 5, 10, … that is at least so much."""
    return next(round(step * 10.0**e) for e in range(12) for step in (1, 2, 5) if step * 10.0**e >= least)


def _outline(lines: list[list[tuple[float, float]]], place: Callable[[float, float], Place]) -> tuple[Place, ...]:
    values: dict[float, list[float]] = {}
    for x, value in (point for line in lines for point in line):
        values.setdefault(x, []).append(value)
    lower = [place(x, min(values[x])) for x in sorted(values)]
    upper = [place(x, max(values[x])) for x in sorted(values, reverse=True)]
    return (*lower, *upper)


def _dot(x: float, y: float) -> tuple[Place, ...]:
    return ((x - 3, y), (x, y - 3), (x + 3, y), (x, y + 3))


def _legend(entries: list[tuple[str, Tone, Dash]], top: float) -> Iterator[Mark]:
    for index, (text, tone, dash) in enumerate(entries):
        y = top + _ROW * index
        yield Stroke(places=((14, y), (48, y)), tone=tone, width=2, dash=dash)
        yield Label(place=(55, y + 4), text=text if len(text) <= 50 else f"{text[:49]}…")


def epsilon_chart(snapshot: Snapshot) -> Chart | None:
    """A bar per site against its budget; None if no site has an account."""
    accounts = {site.name: site.ledger.statement.total for site in snapshot.sites if site.ledger.statement is not None}
    if not accounts:
        return None
    most = max(account.budget.epsilon for account in accounts.values())
    row, top = 38.0, 6.0

    def across(epsilon: float) -> float:
        return 14 + min(epsilon, most) / most * (WIDTH - 28)

    marks: list[Mark] = []
    for index, site in enumerate(snapshot.sites):
        y = top + row * index
        account = accounts.get(site.name)
        if account is None:
            said = "not known, see above" if site.ledger.trouble else "nothing spent"
            marks.append(
                Label(
                    place=(14, y + 11),
                    text=f"{shortened(site.name)}: {said}",
                    tone="bad" if site.ledger.trouble else "ink",
                )
            )
            continue
        marks.append(Label(place=(14, y + 11), text=f"{shortened(site.name)}: {budget_said(account)}"))
        end, budget = across(account.spent), across(account.budget.epsilon)
        marks.append(Area(places=_bar(14, across(account.committed), y), tone="first", faint=True))
        tone: Tone = "first" if account.spent <= account.budget.epsilon else "bad"
        marks.append(Area(places=_bar(14, end, y), tone=tone))
        marks.append(Stroke(places=(*_bar(14, budget, y), (14, y + 16)), tone="quiet"))
        marks.append(Stroke(places=((budget, y + 13), (budget, y + 31)), tone="limit", width=2.5))
    bottom = top + row * len(snapshot.sites) + 8
    marks += [
        Area(places=((14, bottom - 5), (48, bottom - 5), (48, bottom + 5), (14, bottom + 5)), tone="first"),
        Label(place=(55, bottom + 4), text="spent"),
        Area(
            places=((110, bottom - 5), (144, bottom - 5), (144, bottom + 5), (110, bottom + 5)),
            tone="first",
            faint=True,
        ),
        Label(place=(151, bottom + 4), text="set aside by open runs"),
        Stroke(places=((300, bottom - 7), (300, bottom + 7)), tone="limit", width=2.5),
        Label(place=(308, bottom + 4), text="budget"),
    ]
    found = "; ".join(f"{site}: {budget_said(account)}" for site, account in accounts.items())
    return Chart(
        name="chart-epsilon",
        title="ε spent by each site against its budget",
        description=f"A bar per site. {found}. The table has the figures.",
        height=bottom + 14,
        marks=tuple(marks),
    )


def _bar(left: float, right: float, y: float) -> tuple[Place, ...]:
    return ((left, y + 16), (right, y + 16), (right, y + 28), (left, y + 28))
