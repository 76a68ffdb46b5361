"""The status page: one file, no network, no script; on a screen, in the dark, on a phone and on paper.

It shows what a :class:`poc.snapshot.Snapshot` holds and the samples that the server drew. No scan and nothing from a
site's picture folder is in it, but it shows all sites' ledgers side by side: it is for whoever runs them all.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean, median

from custom.run_folder import RoundRecord
from custom.strict import require
from poc.snapshot import (
    Alarm,
    NodeState,
    NodeStatus,
    RunView,
    SampleGrid,
    SiteState,
    Snapshot,
    Standing,
    alarms,
    newest_runs,
)
from privacy.audit.report.blocks import Block, Details, Facts, Paragraph, Table
from privacy.audit.report.charts import WIDTH, Area, Chart, Dash, Label, Mark, Place, Stroke, Tone
from privacy.audit.report.html import ICONS as VERDICT_ICONS
from privacy.audit.report.html import STYLE, block_html, text_html
from privacy.ledger import Account

SHOWN_RUNS = 2  # trainings in full; the table has all of them
SHOWN_GRIDS = 4
SHOWN_ROUNDS = 20
PICTURE_WIDTH = 560  # pixels
MOST_PIXELS = 16_000_000  # of a picture that is opened
MOST_CURVES = 6

# Shapes differ, so that nobody needs the colour.
ICONS: Mapping[NodeStatus, str] = {"ready": "●", "starting": "◌", "gone": "▲", "stopped": "■"}
STANDINGS: Mapping[Standing, str] = {
    "completed": "● completed",
    "failed": "▲ failed",
    "going on": "▶ going on",
    "quiet": "▲ quiet for too long",
    "cut off": "▲ cut off: no receipt",
}
FIGURES = {
    "held_out_loss": "held-out loss",
    "effnet_kid": "EffNet-KID of samples",
    "effnet_kid_baseline": "the same of real training patients",
    "effnet_kid_untrained": "the same of an untrained network",
}
_CURVES: tuple[tuple[Tone, Dash], ...] = (
    ("first", None),
    ("second", (7, 3)),
    ("third", (2, 2.5)),
    ("first", (12, 3)),
    ("second", (1, 3)),
    ("third", (16, 2)),
)
_LEFT, _RIGHT, _ROW = 44.0, 14.0, 17.0

MORE_STYLE = """
.state { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 1.2rem; }
.state p { margin: .1rem 0; }
progress { width: 100%; height: .8rem; accent-color: var(--first); }
.alarm { border: 2px solid var(--tone); border-left-width: .6rem; border-radius: .4rem; padding: .5rem .9rem;
  margin: .6rem 0; }
.alarm strong { color: var(--tone); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 0 1.5rem; }
.grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: .8rem 1.5rem; }
.grids figure { margin: 0; } .grids img { max-width: 100%; height: auto; display: block; }
@media screen and (prefers-color-scheme: dark) { .grids img { filter: brightness(.85); } }
@media print { .charts, .grids { grid-template-columns: 1fr 1fr; } .alarm { break-inside: avoid; }
  progress { print-color-adjust: exact; } }
"""


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """Values by number of rounds."""

    title: str
    points: tuple[tuple[float, float], ...]
    tone: Tone
    dash: Dash = None
    width: float = 2.0


def page(snapshot: Snapshot, *, refresh_s: int | None = None) -> str:
    """The page as HTML.

    Args:
        snapshot: what is known.
        refresh_s: seconds after which a browser reads the file again, for one that is written again and again; None
            for one that is written once.

    Raises:
        ConfigError: a refresh that is not a whole number of at least 1 second.
    """
    whole = refresh_s is None or (type(refresh_s) is int and refresh_s >= 1)
    require(whole, argument="refresh_s", value=refresh_s, remedy="give a whole number of seconds, at least 1, or None")
    found = alarms(snapshot)
    in_full = [
        (f"run-{i}", f"Run {run.name}", _run(snapshot, run, f"run-{i}")) for i, run in enumerate(_shown(snapshot))
    ]
    sections = [*in_full[:1], ("sites", "Sites", _sites(snapshot)), ("privacy", "Privacy spent", _privacy(snapshot))]
    sections += [
        *in_full[1:],
        ("runs", "All runs", _runs(snapshot)),
        ("about", "About this page", _about(snapshot, refresh_s)),
    ]
    links = "".join(f'<li><a href="#{name}">{text_html(title)}</a></li>' for name, title, _ in sections)
    refresh = "" if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s}">\n'
    title = f"Federation {snapshot.name}"
    body = "".join(
        f'<section id="{name}">\n<h2>{text_html(title)}</h2>\n{inner}</section>\n' for name, title, inner in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
{refresh}<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text_html(title)}</title>
<style>{STYLE}{MORE_STYLE}</style>
</head>
<body>
<header>
<h1>{text_html(title)}</h1>
<p class="quiet">Written {_time(snapshot.written_at)}. A server and {_count(len(snapshot.sites), "site")} \
on one machine.</p>
{_headline(snapshot, found)}
{_alarms(found)}{block_html(_summary(snapshot))}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}</main>
</body>
</html>
"""


def _headline(snapshot: Snapshot, found: tuple[Alarm, ...]) -> str:
    """Is it running, is anything wrong, how far is it?"""
    serious = sum(alarm.serious for alarm in found)
    going = next((run for run in snapshot.runs if snapshot.standing(run) == "going on"), None)
    statuses = [node.status for node in snapshot.nodes]
    if going is not None:
        word = f"Auditing: {going.experiment}" if going.is_audit else f"Training: {going.experiment}"
    elif snapshot.server.status == "gone":
        word = "The server is gone"
    elif snapshot.server.status == "stopped":
        word = "Stopped" if "ready" not in statuses else "The server is stopped"
    elif "starting" in statuses:
        word = "Starting"
    else:
        word = "Ready: no run is going on"
    tone = "RED" if serious else "AMBER" if found else "INVALID" if snapshot.server.status == "stopped" else "GREEN"
    icon = "■" if tone == "INVALID" else VERDICT_ICONS[tone]
    if serious:
        said = f"{_count(serious, 'thing')} {'is' if serious == 1 else 'are'} wrong."
    elif found:
        said = f"Nothing has failed; {_count(len(found), 'thing')} {'is' if len(found) == 1 else 'are'} worth a look."
    else:
        said = "Nothing is wrong as far as this page can see."
    ready = f"{statuses.count('ready')} of {_count(len(statuses), 'node')} ready."
    bar = (
        ""
        if going is None or going.is_audit
        else f"<p>{text_html(_progress_said(snapshot, going))}</p>{_progress(going)}"
    )
    return (
        f'<div class="verdict" id="status" data-status="{tone}" style="--tone: var(--{tone})">'
        f'<p class="word"><span aria-hidden="true">{icon}</span> {text_html(word)}</p>'
        f'<div class="state"><p>{text_html(said)}</p><p>{text_html(ready)}</p></div>{bar}</div>'
    )


def _progress(run: RunView) -> str:
    if run.rounds_asked is None:
        return ""
    done = min(run.rounds_done, run.rounds_asked)
    asked = run.rounds_asked
    return f'<progress max="{asked}" value="{done}" aria-label="Rounds done">{done} of {asked}</progress>'


def _progress_said(snapshot: Snapshot, run: RunView) -> str:
    """Rounds done, and how long the others will take if they are like those before."""
    asked, done = run.rounds_asked, run.rounds_done
    if asked is None:
        return f"{_count(done, 'round')} done; how many were asked for is not known."
    said = f"{done} of {_count(asked, 'round')} done"
    if snapshot.standing(run) == "going on":
        quiet = f"last sign of life {_span(snapshot.quiet(run).total_seconds())} ago"
        if done >= asked:
            return f"{said}; now samples are drawn and the sites evaluate them; {quiet}."
        if run.rounds:
            left = (asked - done) * median(record.seconds for record in run.rounds)
            return f"{said}; about {_span(left)} left for the others, then the evaluation; {quiet}."
        return f"{said}; {quiet}."
    return f"{said}."


def _alarms(found: tuple[Alarm, ...]) -> str:
    return "".join(
        f'<div class="alarm" role="note" data-serious="{str(alarm.serious).lower()}" '
        f'style="--tone: var(--{"RED" if alarm.serious else "AMBER"})"><strong>'
        f'<span aria-hidden="true">{"▲" if alarm.serious else "◆"}</span> {text_html(alarm.what)}.</strong> '
        f"{text_html(alarm.text)}</div>\n"
        for alarm in found
    )


def _summary(snapshot: Snapshot) -> Facts:
    newest = next(iter(newest_runs(snapshot)), None)
    run = "none yet" if newest is None else f"{newest.name}: {STANDINGS[snapshot.standing(newest)]}"
    return Facts(
        rows=(
            ("Server", _node_said(snapshot.server)),
            ("Sites", _sites_said(snapshot)),
            ("Newest run", run),
            ("Privacy spent", _spent_said(snapshot)),
            ("Last audit", _audit_said(snapshot)),
        )
    )


def _sites_said(snapshot: Snapshot) -> str:
    by_status: dict[NodeStatus, list[str]] = {}
    for site in snapshot.sites:
        by_status.setdefault(site.node.status, []).append(site.name)
    said = (f"{ICONS[status]} {', '.join(names)} {status}" for status, names in by_status.items())
    return "; ".join(said) or "none"


def _spent_said(snapshot: Snapshot) -> str:
    """The site that has spent the most, and those of which it is not known."""
    parts = []
    accounts = {site.name: site.ledger.statement.total for site in snapshot.sites if site.ledger.statement is not None}
    if accounts:
        most = max(accounts, key=lambda site: accounts[site].spent)
        account = accounts[most]
        at = f"δ = {_delta(account.budget.delta)}"
        parts.append(f"at most {_of_budget(account)} at {at} ({most})")
    unknown = [site.name for site in snapshot.sites if site.ledger.trouble]
    if unknown:
        parts.append(f"not known of {', '.join(unknown)}")
    unspent = len(snapshot.sites) - len(accounts) - len(unknown)
    if unspent:
        parts.append(f"nothing at {'all' if unspent == len(snapshot.sites) else 'the other'} sites")
    return "; ".join(parts) or "no sites"


def _audit_said(snapshot: Snapshot) -> str:
    """The last verdict, of which model, and whether a newer one waits for its own."""
    run = snapshot.last_audit
    if run is None or run.audit is None:
        return "none: no model was audited here"
    model = run.audit.evidence.model
    audited = next((other for other in snapshot.runs if other.product_sha256 == model.model_sha256), None)
    which = model.experiment if audited is None else audited.name
    verdict = run.audit.decision.verdict
    said = f"{VERDICT_ICONS[verdict]} {verdict} for the model of {which}. {run.audit.decision.sentence}"
    newest = next((other for other in snapshot.runs if other.outcome == "completed" and not other.is_audit), None)
    if newest is not None and newest.product_sha256 != model.model_sha256:
        said += f" The newest model, of {newest.name}, was not the one audited."
    return said


def _sites(snapshot: Snapshot) -> str:
    table = Table(
        caption="Processes on this machine, and each site in the newest training run.",
        columns=("Node", "State", "Process", "Memory", "Newest training"),
        rows=(
            _node_row(snapshot.server, "leads it"),
            *(_node_row(site.node, _part_said(site, snapshot)) for site in snapshot.sites),
        ),
        widths=(16, 22, 16, 16, 30),
    )
    return block_html(table)


def _node_row(node: NodeState, part: str) -> tuple[str, ...]:
    pid = "none" if node.status in ("gone", "stopped") else "not known"
    memory = "not known" if node.memory_bytes is None else _memory(node.memory_bytes)
    return (
        node.name,
        _node_said(node),
        pid if node.pid is None else str(node.pid),
        "none" if node.memory_bytes is None and pid == "none" else memory,
        part,
    )


def _node_said(node: NodeState) -> str:
    return f"{ICONS[node.status]} {node.status}{f' ({node.detail})' if node.detail else ''}"


def _part_said(site: SiteState, snapshot: Snapshot) -> str:
    """What a site did in the newest training."""
    run = next((run for run in snapshot.runs if not run.is_audit), None)
    if run is None:
        return "no training yet"
    if not run.rounds:
        return "no round is done yet"
    said = f"accepted in {sum(site.name in record.accepted for record in run.rounds)} of "
    said += _count(len(run.rounds), "round")
    for what in ("refused", "silent"):
        count = sum(site.name in getattr(record, what) for record in run.rounds)
        said += f", {what} in {count}" if count else ""
    return said


def _run(snapshot: Snapshot, run: RunView, prefix: str) -> str:
    """A training in full."""
    rows = [
        ("State", STANDINGS[snapshot.standing(run)] + (f": {run.reason}" if run.reason else "")),
        ("Progress", _progress_said(snapshot, run)),
        ("Began", f"{_time(run.started)}, last written {_time(run.last_change)}"),
        ("What protects it", _protection_said(run)),
    ]
    if run.outcome == "completed":
        rows.append(("Receipt", "holds: the model is the one that it vouches for"))
        rows.append(("Finished model", _figures_said(run)))
    held_out, training = _loss_chart(run, prefix, "held_out_loss"), _loss_chart(run, prefix, "train_loss")
    charts = "".join(block_html(chart) for chart in (held_out, training) if chart is not None)
    parts = [block_html(Facts(rows=tuple(rows)))]
    if charts:
        parts.append(f'<h3>Loss</h3>\n<div class="charts">{charts}</div>\n')
    parts.append(block_html(Paragraph(_losses_said(run))))
    parts.append(f"<h3>Samples</h3>\n{_grids(run)}")
    parts.append(block_html(_rounds(run)))
    return "".join(parts)


def _protection_said(run: RunView) -> str:
    config = run.config
    if config is None:
        return "not known: its configuration cannot be read"
    parts = []
    if config.privacy is not None:
        privacy = config.privacy
        target = (
            f"ε ≤ {privacy.target_epsilon:g} at δ = {_delta(privacy.delta)} planned for the whole run"
            if privacy.target_epsilon is not None
            else f"noise multiplier {privacy.noise_multiplier:g} at δ = {_delta(privacy.delta)}"
        )
        parts.append(f"differential privacy for patients, {target}")
    if config.secure_aggregation is not None:
        parts.append("secure aggregation: the server learns sums only")
    if config.encryption is not None:
        parts.append("homomorphic encryption: the server adds what it cannot read")
    return "; ".join(parts) or "neither differential privacy nor masks: the server sees each site's update"


def _figures_said(run: RunView) -> str:
    """What the sites found of the finished model."""
    names = [name for name in FIGURES if name in run.figures] + [name for name in run.figures if name not in FIGURES]
    figures = [f"{FIGURES.get(name, name)} {run.figures[name]:.4f}" for name in names]
    if not figures:
        return "its figures are withheld: each site keeps its own"
    return f"mean over the sites that answered: {', '.join(figures)}"


def _losses_said(run: RunView) -> str:
    """Which losses are not there, and why."""
    if not run.rounds:
        return "Losses are not known yet: no round is done."
    if any("train_loss" in said or "held_out_loss" in said for said in _said_by_sites(run)):
        return "The loss is the mean squared error of what the network predicts, without a unit; lower is better."
    if any("train_loss" in record.mean or "held_out_loss" in record.mean for record in run.rounds):
        return "Only the mean over the sites is known: each site's own loss is withheld by secure aggregation."
    if run.config is not None and run.config.privacy is not None:
        return "Losses are withheld: under differential privacy nothing leaves a site but its noisy update."
    return "Losses are withheld: the sites let none leave."


def _said_by_sites(run: RunView) -> Iterator[Mapping[str, float]]:
    for record in run.rounds:
        yield from record.accepted.values()


def _loss_chart(run: RunView, prefix: str, metric: str) -> Chart | None:
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


def _grids(run: RunView) -> str:
    """The newest grids, newest first, and what the sites released before training."""
    grids = list(reversed(run.grids))[:SHOWN_GRIDS]
    if not grids and run.mean_image is None:
        pictures = run.config is None or run.config.preprocess.spatial_dims == 2
        said = "None yet." if run.outcome == "unfinished" else "The run left none."
        return block_html(Paragraph(said if pictures else "Volumes are not shown here."))
    figures = [_figure(grid.file, _grid_said(grid, run)) for grid in grids]
    if run.mean_image is not None:
        figures.append(_figure(run.mean_image, "noisy mean image, released by the sites before training"))
    left = len(run.grids) - len(grids)
    said = "Drawn by the model on the server: nobody's scans."
    said += f" {_count(left, 'older grid')} in the run's folder." if left else ""
    return f'<div class="grids">{"".join(figures)}</div>\n{block_html(Paragraph(said))}'


def _grid_said(grid: SampleGrid, run: RunView) -> str:
    final = ", final" if run.outcome == "completed" and grid == run.grids[-1] else ""
    return f"after {_count(grid.rounds_done, 'round')}{final}"


def _figure(file: Path, said: str) -> str:
    uri = _data_uri(file)
    if uri is None:
        unread = f"{said}: {file.name} cannot be read as a picture"
        return f"<figure><figcaption>{text_html(unread)}</figcaption></figure>"
    caption = text_html(_capital(said))
    return f'<figure><img alt="{text_html(said)}" src="{uri}"><figcaption>{caption}</figcaption></figure>'


def _data_uri(file: Path) -> str | None:
    """A picture, no wider than ``PICTURE_WIDTH``, as grey JPEG; None if it is none or too large."""
    from PIL import Image

    stream = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            with Image.open(file, formats=("PNG",)) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    return None
                grey = picture.convert("L")
        grey.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH), Image.Resampling.LANCZOS)
        grey.save(stream, format="JPEG", quality=82, optimize=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow says of broken files
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _rounds(run: RunView) -> Block:
    rows = [_round_row(record) for record in reversed(run.rounds[-SHOWN_ROUNDS:])]
    older = len(run.rounds) - len(rows)
    caption = "Newest first; losses are means over the sites, held-out before the round."
    caption += f" {_count(older, 'older round')} in the run's folder." if older else ""
    table = Table(
        caption=caption,
        columns=("Round", "Accepted", "Left out", "Train loss", "Held-out loss", "Time"),
        rows=tuple(rows),
        widths=(10, 14, 34, 14, 14, 14),
    )
    return Details(f"Rounds ({len(run.rounds)})", (table,)) if rows else Paragraph("No round is done yet.")


def _round_row(record: RoundRecord) -> tuple[str, ...]:
    left = [f"{site} refused: {reason}" for site, reason in sorted(record.refused.items())]
    left += [f"{site} silent" for site in record.silent]
    return (
        str(record.round_number + 1),
        f"{len(record.accepted)} of {len(record.asked)}",
        "; ".join(left) or "nobody",
        _mean_said(record, "train_loss"),
        _mean_said(record, "held_out_loss"),
        _span(record.seconds),
    )


def _mean_said(record: RoundRecord, metric: str) -> str:
    values = [said[metric] for said in record.accepted.values() if metric in said]
    if metric in record.mean:
        return f"{record.mean[metric]:.4f}"
    return f"{fmean(values):.4f}" if values else "withheld"


def _privacy(snapshot: Snapshot) -> str:
    """Every site's account, and each job's."""
    rows, jobs = [], []
    for site in snapshot.sites:
        statement = site.ledger.statement
        if statement is None:
            said = "not known" if site.ledger.trouble else "0"
            why = site.ledger.trouble or "nothing was ever set aside: there is no entry"
            rows.append((site.name, said, said, "in the site file", said, why))
            jobs += [(f"{site.name}: any job", said, said, "in the site file")] if site.ledger.trouble else []
            continue
        total = statement.total
        state = "exhausted" if statement.exhausted else "verified"
        if statement.open_runs:
            state += f"; set aside for {', '.join(str(run) for run in statement.open_runs)}"
        rows.append((site.name, *_account_row(total), str(len(statement.charges)), state))
        jobs += [(f"{site.name}: {job}", *_account_row(account)) for job, account in statement.jobs.items()]
    table = Table(
        caption="ε of patient-level differential privacy, all releases of a site composed; it has no unit.",
        columns=("Site", "Spent", "With what is set aside", "Budget", "Releases", "Ledger"),
        rows=tuple(rows),
        widths=(14, 12, 16, 18, 12, 28),
    )
    parts = []
    chart = _epsilon_chart(snapshot)
    if chart is not None:
        parts.append(block_html(chart))
    parts.append(block_html(table))
    if jobs:
        of_jobs = Table(
            caption="Composition is not a sum: the total is less than the sum of the jobs.",
            columns=("Site: job", "Spent", "With what is set aside", "Budget"),
            rows=tuple(jobs),
            widths=(40, 18, 20, 22),
        )
        parts.append(block_html(Details("By job", (of_jobs,))))
    return "".join(parts)


def _account_row(account: Account) -> tuple[str, str, str]:
    budget = account.budget
    return _epsilon(account.spent), _epsilon(account.committed), f"{budget.epsilon:g} at δ = {_delta(budget.delta)}"


def _epsilon_chart(snapshot: Snapshot) -> Chart | None:
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
                    text=f"{_short(site.name)}: {said}",
                    tone="bad" if site.ledger.trouble else "ink",
                )
            )
            continue
        marks.append(Label(place=(14, y + 11), text=f"{_short(site.name)}: {_of_budget(account)}"))
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
    found = "; ".join(f"{site}: {_of_budget(account)}" for site, account in accounts.items())
    return Chart(
        name="chart-epsilon",
        title="ε spent by each site against its budget",
        description=f"A bar per site. {found}. The table has the figures.",
        height=bottom + 14,
        marks=tuple(marks),
    )


def _bar(left: float, right: float, y: float) -> tuple[Place, ...]:
    return ((left, y + 16), (right, y + 16), (right, y + 28), (left, y + 28))


def _runs(snapshot: Snapshot) -> str:
    parts = []
    if snapshot.runs:
        older = f" {_count(snapshot.older_runs, 'older run')} not read." if snapshot.older_runs else ""
        table = Table(
            caption=f"From the server's run folders, newest first.{older}",
            columns=("Run", "State", "Rounds", "Began", "Result"),
            rows=tuple(_run_row(snapshot, run) for run in snapshot.runs),
            widths=(30, 18, 10, 18, 24),
        )
        parts.append(block_html(table))
    else:
        parts.append(block_html(Paragraph("No run yet.")))
    if snapshot.jobs:
        table = Table(
            caption="Jobs as the server lists them.",
            columns=("Job", "State", "Submitted", "Id"),
            rows=tuple(
                (job.name, f"{'●' if job.sound else '▲'} {job.status}", job.submitted or "not known", job.job_id)
                for job in snapshot.jobs
            ),
            widths=(25, 25, 25, 25),
        )
        parts.append(block_html(table))
    return "".join(parts)


def _run_row(snapshot: Snapshot, run: RunView) -> tuple[str, ...]:
    result: str
    if run.audit is not None:
        result = run.audit.decision.verdict
    elif "held_out_loss" in run.figures:
        result = f"held-out loss {run.figures['held_out_loss']:.4f}"
    elif run.outcome == "completed":
        result = "a model; figures withheld" if not run.is_audit else "cannot be read"
    else:
        result = run.reason or "none yet"
    asked = "?" if run.rounds_asked is None else str(run.rounds_asked)
    rounds = "an audit" if run.is_audit else f"{run.rounds_done} of {asked}"
    return run.name, STANDINGS[snapshot.standing(run)], rounds, _time(run.started), result


def _about(snapshot: Snapshot, refresh_s: int | None) -> str:
    if refresh_s is None:
        written = f"It was written once, {_time(snapshot.written_at)}, and does not change by itself."
    else:
        written = (
            f"The browser reads it again every {refresh_s} s. If the time at its top stands still, nobody writes it "
            "any more and what it shows is old."
        )
    said = (
        f"{written} It holds no scan of a patient. It shows the ledgers of all sites, which no site shows another: it "
        "is for one machine whose user runs them all. What a site withholds from the server is withheld here."
    )
    return block_html(Paragraph(said))


def _shown(snapshot: Snapshot) -> tuple[RunView, ...]:
    """Trainings in full: those that go on, then the newest of each experiment."""
    trainings = [run for run in snapshot.runs if not run.is_audit]
    going = [run for run in trainings if snapshot.standing(run) == "going on"]
    newest = [run for run in newest_runs(snapshot) if not run.is_audit and run not in going]
    return (*going, *newest)[:SHOWN_RUNS]


def _of_budget(account: Account) -> str:
    return f"ε = {_epsilon(account.spent)} of {account.budget.epsilon:g}"


def _epsilon(epsilon: float) -> str:
    """Two digits, rounded up: what was spent is not less than what is written."""
    if not math.isfinite(epsilon):
        return "without bound"
    return f"{math.ceil(100 * epsilon) / 100:.2f}"


def _delta(delta: float) -> str:
    return f"{delta:.0e}".replace("e-0", "e-") if delta < 0.01 else f"{delta:g}"


def _memory(size: int) -> str:
    return f"{size / 2**30:.1f}\u00a0GiB" if size >= 2**30 else f"{size / 2**20:.0f}\u00a0MiB"


def _span(seconds: float) -> str:
    """A time to two digits or so."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole}\u00a0s"
    if whole < 7200:
        return f"{round(whole / 60)}\u00a0min"
    days, hours = divmod(round(whole / 3600), 24)
    return f"{days}\u00a0d {hours}\u00a0h" if days else f"{hours}\u00a0h"


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
