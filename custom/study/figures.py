"""A study's figures and its tables in Markdown, from its rows alone.

Colours are of Okabe and Ito's palette, which colour-blind people can tell apart; nothing is said by colour only.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from custom.atomic import write_atomically
from custom.study.config import BASE, StudyConfig, Suite
from custom.study.runner import Row, Summary, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLACK, BLUE, ORANGE, GREY = "#000000", "#0072B2", "#D55E00", "#8C8C8C"
LINES = (BLACK, BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DOTS_PER_INCH = 150
FONT_SIZE = 10
BANDS = 4
TICKS = 4  # at most so many intervals on a horizontal axis, whose numbers are long
LOG_FROM = 10  # ratio of the largest to the smallest value from which an axis is logarithmic
MEGABYTE = 1e6


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is shown.

    Attributes:
        label: with its unit and which way is better.
        digits: after the point.
        unit: of the label, in the metric's own; what is shown is divided by it.
        reference: metric whose mean over the table is drawn as a line, or None.
        chance: value of a coin, drawn as a line, or None.
    """

    label: str
    digits: int
    unit: float = 1.0
    reference: str | None = None
    chance: float | None = None


METRICS: Mapping[str, Metric] = {
    "test_loss": Metric(label="test loss ↓", digits=4),
    "site_loss": Metric(label="sites' held-out loss ↓", digits=4),
    "personal_loss": Metric(label="personal models' loss ↓", digits=4),
    "local_loss": Metric(label="local models' loss ↓", digits=4),
    "effnet_kid": Metric(label="EffNet-KID ↓", digits=4, reference="effnet_kid_real"),
    "recall": Metric(label="recall ↑", digits=3),
    "ms_ssim": Metric(label="MS-SSIM ↓", digits=3),
    "accuracy_generated": Metric(label="accuracy from generated ↑", digits=3, reference="accuracy_real"),
    "membership_auc": Metric(label="membership AUC ↓", digits=3, chance=0.5),
    "personal_membership_auc": Metric(label="personal membership AUC ↓", digits=3, chance=0.5),
    "trigger_rate": Metric(label="trigger rate ↓", digits=3),
    "bytes_up": Metric(label="MB sent up per site ↓", digits=2, unit=MEGABYTE),
}
# Side by side in a table's figure, where the table has them; the Markdown tables show all of the above.
PANELS = ("test_loss", "personal_loss", "effnet_kid", "membership_auc", "trigger_rate", "bytes_up")

Found = Mapping[tuple[str, str], Summary]  # by case and metric


def draw_figures(config: StudyConfig, rows: Sequence[Row], out: Path) -> list[Path]:
    """Write ``figures/<suite>/<table>.png``, ``frontier.png`` and ``bands.png``; what has no data yet is left out.

    Returns:
        The files.
    """
    files = []
    for suite in config.suites:
        found = _found(rows, suite)
        figures = {table: _table_figure(found, suite.tables[table]) for table in suite.tables}
        figures |= {"frontier": _frontier(found, suite), "bands": _bands(found, suite)}
        for name, figure in figures.items():
            if figure is not None:
                file = out / "figures" / suite.name / f"{name}.png"
                _write(figure, file)
                files.append(file)
    return files


def markdown_table(rows: Sequence[Row], suite: Suite, table: str, metrics: Iterable[str]) -> str:
    """A table in Markdown: mean ± half of the 95 % interval over the seeds.

    Args:
        rows: of the study.
        suite: of the table.
        table: its name.
        metrics: names of the columns; one that no case has is left out.
    """
    found, cases = _found(rows, suite), suite.tables[table]
    shown = [name for name in metrics if any((case, name) in found for case in cases)]
    head = ["case", "seeds", *(_metric(name).label for name in shown)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for case in cases:
        seeds = max((each.n for (name, _), each in found.items() if name == case), default=0)
        lines.append([case, str(seeds), *(_cell(found.get((case, name)), name) for name in shown)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_tables(config: StudyConfig, rows: Sequence[Row], file: Path) -> None:
    """Write every table of the study as Markdown, under a heading each."""
    parts = [f"# {config.name}\n\nMean ± half of the 95 % interval over the seeds.\n"]
    parts += [
        f"## {suite.name}: {table}\n\n{markdown_table(rows, suite, table, METRICS)}"
        for suite in config.suites
        for table in suite.tables
    ]
    write_atomically(file, "\n".join(parts).encode())


def _found(rows: Sequence[Row], suite: Suite) -> dict[tuple[str, str], Summary]:
    return {(each.case, each.metric): each for each in summarize([row for row in rows if row.suite == suite.name])}


def _metric(name: str) -> Metric:
    return METRICS.get(name) or Metric(label=name.replace("_", " "), digits=4)


def _cell(summary: Summary | None, name: str) -> str:
    if summary is None:
        return ""
    if not math.isfinite(summary.mean):
        return "not finite"
    metric = _metric(name)
    middle, half = summary.mean / metric.unit, _half(summary) / metric.unit
    return f"{middle:.{metric.digits}f}" + (f" ± {half:.{metric.digits}f}" if half > 0 else "")


def _half(summary: Summary) -> float:
    """Half of the interval; 0 without one."""
    return 0.0 if summary.low is None or summary.high is None else (summary.high - summary.low) / 2


def _finite(found: Found, cases: Iterable[str], metric: str) -> list[tuple[str, Summary]]:
    """The cases with a finite mean of the metric."""
    each = ((case, found.get((case, metric))) for case in cases)
    return [(case, summary) for case, summary in each if summary is not None and math.isfinite(summary.mean)]


def _table_figure(found: Found, cases: Sequence[str]) -> Figure | None:
    """Dots with error bars, a row for each case, a panel for each metric that one of them has."""
    panels = [name for name in PANELS if _finite(found, cases, name)]
    if not panels:
        return None
    label_width = 0.075 * max(len(case) for case in cases)
    figure = _figure(label_width + 2.4 * len(panels), 1.1 + 0.32 * len(cases))
    row = {case: number for number, case in enumerate(cases)}
    for axes, name in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        metric, shown = _metric(name), _finite(found, cases, name)
        for case, summary in shown:
            axes.errorbar(
                summary.mean / metric.unit,
                row[case],
                xerr=_half(summary) / metric.unit,
                fmt="D" if case == BASE else "o",
                color=BLACK if case == BASE else BLUE,
                markersize=5,
                elinewidth=1.4,
                capsize=2.5,
            )
        for value, label in _lines(found, cases, metric):
            axes.axvline(value, color=ORANGE, linewidth=1.2, linestyle="--", label=label, zorder=0)
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=FONT_SIZE - 1)
        axes.set_xlabel(metric.label)
        axes.set_yticks(range(len(cases)), cases)
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        _scale(axes, "x", [summary.mean for _, summary in shown])
    return figure


def _lines(found: Found, cases: Sequence[str], metric: Metric) -> list[tuple[float, str]]:
    """What a metric is compared with: values and what they are."""
    lines = [] if metric.chance is None else [(metric.chance, "chance")]
    if metric.reference is not None:
        means = [summary.mean for _, summary in _finite(found, cases, metric.reference)]
        if means:
            lines.append((sum(means) / len(means) / metric.unit, "real images"))
    return lines


def _frontier(found: Found, suite: Suite) -> Figure | None:
    """Test loss against bytes sent up, of all federated cases; a line joins those that none beats in both.

    Losses of another schedule or prediction are of other things, so those cases are left out.
    """
    comparable = suite.case(BASE).experiment.schedule
    cases = [case for case in suite.cases if case.experiment.schedule == comparable]
    federated = [case.name for case in cases if case.kind == "federated"]
    loss = dict(_finite(found, federated, "test_loss"))
    sent = {case: each.mean / MEGABYTE for case, each in _finite(found, loss, "bytes_up")}
    if not sent:
        return None
    ranked = sorted(sent, key=lambda case: loss[case].mean)
    figure = _figure(8.5, max(4.5, 1.2 + 0.22 * len(ranked)))
    axes = figure.subplots()
    best = [case for case in sent if not any(_beats(other, case, loss, sent) for other in sent)]
    best.sort(key=lambda case: sent[case])
    x, y = [sent[case] for case in best], [loss[case].mean for case in best]
    axes.plot(x, y, color=GREY, linewidth=1.2, zorder=0, label="none has less of both")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    for case in ranked:
        axes.errorbar(
            sent[case],
            loss[case].mean,
            yerr=_half(loss[case]),
            fmt="D" if case == BASE else "o",
            color=BLACK if case == BASE else BLUE,
            markersize=5,
            elinewidth=1,
            capsize=2,
        )
    axes.set_xlabel("MB sent up per site, whole run ↓")
    axes.set_ylabel("test loss ↓")
    axes.margins(0.06)
    _scale(axes, "x", list(sent.values()))
    _label_beside(axes, [(case, sent[case], loss[case].mean) for case in ranked])
    return figure


def _beats(one: str, other: str, loss: Mapping[str, Summary], sent: Mapping[str, float]) -> bool:
    """Whether one is no worse in both and better in one."""
    a, b = (sent[one], loss[one].mean), (sent[other], loss[other].mean)
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def _label_beside(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Labels right of the axes, none over another, each with a line to its point; points by ascending y."""
    low, high = axes.get_ylim()
    gap = 1 / max(len(points), 12)
    places: list[float] = []
    for _, _, y in points:
        wanted = (y - low) / (high - low)
        places.append(max(wanted, places[-1] + gap) if places else wanted)
    ceiling = 1.0
    for number in reversed(range(len(places))):
        places[number] = min(places[number], ceiling)
        ceiling = places[number] - gap
    for (label, x, y), place in zip(points, places, strict=True):
        axes.annotate(
            label,
            (x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=FONT_SIZE - 1,
            arrowprops={
                "arrowstyle": "-",
                "color": GREY,
                "linewidth": 0.5,
                "alpha": 0.7,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def _bands(found: Found, suite: Suite) -> Figure | None:
    """Loss by quarter of the timesteps: of the base, then of what is not federated, then of other cases."""
    others = [case for case in suite.cases if case.name != BASE]
    others.sort(key=lambda case: case.kind == "federated")
    names = [f"test_loss_band_{number}" for number in range(1, BANDS + 1)]
    lines: dict[str, list[Summary]] = {}
    for case in (BASE, *(case.name for case in others)):
        summaries = [found.get((case, name)) for name in names]
        whole = [each for each in summaries if each is not None and math.isfinite(each.mean)]
        if len(whole) == BANDS and len(lines) < len(LINES):
            lines[case] = whole
    if not lines:
        return None
    figure = _figure(7.5, 4.2)
    axes = figure.subplots()
    for number, (case, line) in enumerate(lines.items()):
        shift = 0.05 * (number - (len(lines) - 1) / 2)
        axes.errorbar(
            [band + shift for band in range(1, BANDS + 1)],
            [each.mean for each in line],
            yerr=[_half(each) for each in line],
            color=LINES[number],
            marker=MARKERS[number],
            markersize=5,
            linewidth=1.2,
            capsize=2,
            label=case,
        )
    axes.set_xticks(range(1, BANDS + 1), ["1\nleast noise", "2", "3", "4\nmost noise"])
    axes.set_xlabel("quarter of the timesteps")
    axes.set_ylabel("test loss ↓")
    _scale(axes, "y", [each.mean for line in lines.values() for each in line])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _figure(width: float, height: float) -> Figure:
    """A canvas of so many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis where values differ by more than a factor of ten; and no frame above and right."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if min(values) > 0 and max(values) > LOG_FROM * min(values):
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    elif which == "x":
        axis.set_major_locator(MaxNLocator(TICKS))
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Figure, file: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DOTS_PER_INCH)
    write_atomically(file, content.getvalue())
