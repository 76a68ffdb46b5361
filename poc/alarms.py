"""What is wrong with a federation, as far as it can be seen from outside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from poc.snapshot import Job, RunView, Snapshot, newest_runs


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """What a person should look at.

    Attributes:
        serious: something failed or cannot be relied on; else it is worth a look.
        what: in a few words.
        text: what is known, and what to do.
    """

    serious: bool
    what: str
    text: str


def alarms(snapshot: Snapshot) -> tuple[Alarm, ...]:
    """What is wrong, then what is worth a look. Of an experiment's runs only the newest counts."""
    found = (*_node_alarms(snapshot), *_ledger_alarms(snapshot), *_job_alarms(snapshot), *_run_alarms(snapshot))
    return tuple(sorted(found, key=lambda alarm: not alarm.serious))


def _node_alarms(snapshot: Snapshot) -> Iterator[Alarm]:
    for node in snapshot.nodes:
        if node.status == "gone":
            known = f" ({node.detail})" if node.detail else ""
            text = f"Its process has ended and nobody told it to{known}. See its log, then start it again."
            yield Alarm(serious=True, what=f"{node.name} is gone", text=text)
    if snapshot.server.status == "ready":
        for site in snapshot.sites:
            if site.node.status == "stopped":
                text = "The server runs and this site does not: rounds go on without it, if enough others answer."
                yield Alarm(serious=False, what=f"{site.name} is stopped", text=text)


def _ledger_alarms(snapshot: Snapshot) -> Iterator[Alarm]:
    for site in snapshot.sites:
        if site.ledger.trouble:
            text = f"What was spent on privacy is not known, and nothing private may leave: {site.ledger.trouble}"
            yield Alarm(serious=True, what=f"Ledger of {site.name} cannot be relied on", text=text)
        elif site.ledger.statement is not None and site.ledger.statement.exhausted:
            text = (
                "One more release like the last one would pass the site's total. No further private round runs there."
            )
            yield Alarm(serious=False, what=f"Privacy budget of {site.name} is exhausted", text=text)


def _job_alarms(snapshot: Snapshot) -> Iterator[Alarm]:
    newest: dict[str, Job] = {}
    for job in snapshot.jobs:
        newest.setdefault(job.name, job)
    for job in newest.values():
        if not job.sound:
            text = f"The server says {job.status} of job {job.job_id}. The server's log has the cause."
            yield Alarm(serious=True, what=f"Job {job.name} did not go through", text=text)


def _run_alarms(snapshot: Snapshot) -> Iterator[Alarm]:
    for run in newest_runs(snapshot):
        standing = snapshot.standing(run)
        if standing == "failed":
            yield Alarm(serious=True, what=f"Run {run.name} failed", text=run.reason)
        elif standing == "cut off":
            text = (
                "It has no receipt and nobody works on it any more. With the federation up, resume or repeat the run."
            )
            yield Alarm(serious=True, what=f"Run {run.name} was cut off", text=text)
        elif standing == "quiet":
            text = (
                f"It has no receipt and has written nothing since {run.last_change:%Y-%m-%d %H:%M} UTC, longer than a "
            )
            text += "round may last. See the server's log; resume or repeat the run if it is dead."
            yield Alarm(serious=True, what=f"Run {run.name} is quiet", text=text)
        elif run.reason:
            yield Alarm(serious=False, what=f"Run {run.name} ended early", text=run.reason)
        for problem in run.problems:
            yield Alarm(serious=True, what=f"Run {run.name} cannot be read in full", text=problem)
        yield from _reply_alarms(run)
        if run.audit is not None and run.audit.decision.verdict in ("RED", "INVALID"):
            decision = run.audit.decision
            yield Alarm(serious=True, what=f"Audit {run.name} says {decision.verdict}", text=decision.sentence)


def _reply_alarms(run: RunView) -> Iterator[Alarm]:
    """Sites that were refused or silent: serious in the last round, worth a look in an earlier one."""
    for site in sorted({site for record in run.rounds for site in (*record.refused, *record.silent)}):
        last = max(record.round_number for record in run.rounds if site in (*record.refused, *record.silent))
        record = next(record for record in run.rounds if record.round_number == last)
        count = sum(site in (*record.refused, *record.silent) for record in run.rounds)
        if site in record.refused:
            what, said = "refused", f"refused: {record.refused[site]}"
        else:
            what, said = "silent", "gave no reply in time"
        times = f" It was left out of {count} of {run.rounds_done} rounds." if count > 1 else ""
        yield Alarm(
            serious=last == run.rounds[-1].round_number,
            what=f"{site} was {what} in round {last + 1} of {run.name}",
            text=f"Its reply was {said}.{times}" if what == "refused" else f"It {said}.{times}",
        )
