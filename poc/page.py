"""The status page: one file, no network, no script; on a screen, in the dark, on a phone and on paper.

It shows what a :class:`poc.snapshot.Snapshot` holds and the samples that the server drew. No scan and nothing from a
site's picture folder is in it, but it shows all sites' ledgers side by side: it is for whoever runs them all.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median

from custom.run_folder import RoundRecord
from custom.strict import require
from poc.alarms import Alarm, alarms
from poc.page_charts import epsilon_chart, loss_chart, said_by_sites
from poc.page_words import (
    budget_said,
    capitalised,
    count_said,
    delta_said,
    epsilon_said,
    memory_said,
    span_said,
    time_said,
)
from poc.snapshot import (
    NodeState,
    NodeStatus,
    RunView,
    SampleGrid,
    SiteState,
    Snapshot,
    Standing,
    newest_runs,
)
from privacy.audit.report.blocks import Block, Details, Facts, Paragraph, Table
from privacy.audit.report.html import ICONS as VERDICT_ICONS
from privacy.audit.report.html import STYLE, block_html, text_html
from privacy.ledger import Account

SHOWN_RUNS = 2  # trainings in full; the table has all of them
SHOWN_GRIDS = 4
SHOWN_ROUNDS = 20
PICTURE_WIDTH = 560  # pixels
MOST_PIXELS = 16_000_000  # of a picture that is opened

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
<p class="quiet">Written {time_said(snapshot.written_at)}. A server and {count_said(len(snapshot.sites), "site")} \
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
        said = f"{count_said(serious, 'thing')} {'is' if serious == 1 else 'are'} wrong."
    elif found:
        said = (
            f"Nothing has failed; {count_said(len(found), 'thing')} {'is' if len(found) == 1 else 'are'} worth a look."
        )
    else:
        said = "Nothing is wrong as far as this page can see."
    ready = f"{statuses.count('ready')} of {count_said(len(statuses), 'node')} ready."
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
        return f"{count_said(done, 'round')} done; how many were asked for is not known."
    said = f"{done} of {count_said(asked, 'round')} done"
    if snapshot.standing(run) == "going on":
        quiet = f"last sign of life {span_said(snapshot.quiet(run).total_seconds())} ago"
        if done >= asked:
            return f"{said}; now samples are drawn and the sites evaluate them; {quiet}."
        if run.rounds:
            left = (asked - done) * median(record.seconds for record in run.rounds)
            return f"{said}; about {span_said(left)} left for the others, then the evaluation; {quiet}."
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
        at = f"δ = {delta_said(account.budget.delta)}"
        parts.append(f"at most {budget_said(account)} at {at} ({most})")
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
    memory = "not known" if node.memory_bytes is None else memory_said(node.memory_bytes)
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
    said += count_said(len(run.rounds), "round")
    for what in ("refused", "silent"):
        count = sum(site.name in getattr(record, what) for record in run.rounds)
        said += f", {what} in {count}" if count else ""
    return said


def _run(snapshot: Snapshot, run: RunView, prefix: str) -> str:
    """A training in full."""
    rows = [
        ("State", STANDINGS[snapshot.standing(run)] + (f": {run.reason}" if run.reason else "")),
        ("Progress", _progress_said(snapshot, run)),
        ("Began", f"{time_said(run.started)}, last written {time_said(run.last_change)}"),
        ("What protects it", _protection_said(run)),
    ]
    if run.outcome == "completed":
        rows.append(("Receipt", "holds: the model is the one that it vouches for"))
        rows.append(("Finished model", _figures_said(run)))
    held_out, training = loss_chart(run, prefix, "held_out_loss"), loss_chart(run, prefix, "train_loss")
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
            f"ε ≤ {privacy.target_epsilon:g} at δ = {delta_said(privacy.delta)} planned for the whole run"
            if privacy.target_epsilon is not None
            else f"noise multiplier {privacy.noise_multiplier:g} at δ = {delta_said(privacy.delta)}"
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
    if any("train_loss" in said or "held_out_loss" in said for said in said_by_sites(run)):
        said = "The loss is the mean squared error of what the network predicts, without a unit; lower is better."
        autoencoder = None if run.config is None else run.config.autoencoder
        if autoencoder is not None and autoencoder.rounds:
            first = count_said(autoencoder.rounds, "round")
            said += f" Of the first {first} it is the autoencoder's, of another scale."
        return said
    if any("train_loss" in record.mean or "held_out_loss" in record.mean for record in run.rounds):
        return "Only the mean over the sites is known: each site's own loss is withheld by secure aggregation."
    if run.config is not None and run.config.privacy is not None:
        return "Losses are withheld: under differential privacy nothing leaves a site but its noisy update."
    return "Losses are withheld: the sites let none leave."


def _grids(run: RunView) -> str:
    """The newest grids, newest first, and what the sites released before training."""
    grids = list(reversed(run.grids))[:SHOWN_GRIDS]
    if not grids and run.mean_image is None:
        return block_html(Paragraph("None yet." if run.outcome == "unfinished" else "The run left none."))
    figures = [_figure(grid.file, _grid_said(grid, run)) for grid in grids]
    if run.mean_image is not None:
        figures.append(_figure(run.mean_image, "noisy mean image, released by the sites before training"))
    left = len(run.grids) - len(grids)
    said = "Drawn by the model on the server: nobody's scans."
    said += f" {count_said(left, 'older grid')} in the run's folder." if left else ""
    return f'<div class="grids">{"".join(figures)}</div>\n{block_html(Paragraph(said))}'


def _grid_said(grid: SampleGrid, run: RunView) -> str:
    final = ", final" if run.outcome == "completed" and grid == run.grids[-1] else ""
    return f"after {count_said(grid.rounds_done, 'round')}{final}"


def _figure(file: Path, said: str) -> str:
    uri = _data_uri(file)
    if uri is None:
        unread = f"{said}: {file.name} cannot be read as a picture"
        return f"<figure><figcaption>{text_html(unread)}</figcaption></figure>"
    caption = text_html(capitalised(said))
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
    caption += f" {count_said(older, 'older round')} in the run's folder." if older else ""
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
        span_said(record.seconds),
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
    chart = epsilon_chart(snapshot)
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
    return (
        epsilon_said(account.spent),
        epsilon_said(account.committed),
        f"{budget.epsilon:g} at δ = {delta_said(budget.delta)}",
    )


def _runs(snapshot: Snapshot) -> str:
    parts = []
    if snapshot.runs:
        older = f" {count_said(snapshot.older_runs, 'older run')} not read." if snapshot.older_runs else ""
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
    return run.name, STANDINGS[snapshot.standing(run)], rounds, time_said(run.started), result


def _about(snapshot: Snapshot, refresh_s: int | None) -> str:
    if refresh_s is None:
        written = f"It was written once, {time_said(snapshot.written_at)}, and does not change by itself."
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
