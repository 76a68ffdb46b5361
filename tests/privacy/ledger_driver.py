"""Runs a ledger in processes of its own: killed at every step of a job, and beside others.

``python ledger_driver.py kill FOLDER`` kills a job with SIGKILL before the n-th step of the journal, for every n, looks
at what the ledger says, lets the job resume to its end and looks again. A step is a line of a function that touches the
disk, or a statement that SQLite is about to run. ``python ledger_driver.py race FOLDER NAME COUNT`` lets as many runs
as the budget has room for train one release each.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

from privacy import journal
from privacy.accounting import GaussianRelease, MechanismEvent, Spent
from privacy.ledger import BudgetExceeded, Ledger, ReleaseRefused, Run
from privacy.policy import Budget, Budgets

KEY = bytes(range(32))
SIGMA = 4.0
DELTA = 1e-3
PLAN = {f"round-{number:04d}": GaussianRelease(noise_multiplier=SIGMA) for number in range(2)}


def zcdp(events: Sequence[MechanismEvent], delta: float) -> Spent:
    """ε of Gaussian releases by concentrated DP (arXiv:1605.02065, prop. 1.3 and 1.6): in microseconds, and right."""
    rho = sum(1 / (2 * event.noise_multiplier**2) for event in events)
    return Spent(epsilon=rho + 2 * math.sqrt(rho * math.log(1 / delta)), accountant="rdp" if events else "none")


def budgets(releases: int, sigma: float = SIGMA) -> Budgets:
    """Room for exactly so many releases at σ, for a job and for all."""
    epsilon = zcdp([GaussianRelease(noise_multiplier=sigma)] * releases, DELTA).epsilon
    budget = Budget(epsilon=epsilon * (1 + 1e-9), delta=DELTA)
    return Budgets(per_job=budget, total=budget)


def job(ledger: Ledger, run: Run, log: Path, allowed: Budgets) -> None:
    """What an executor does, resumed or not; a line in ``log`` stands for bytes that left the site."""
    left = {line.split()[1] for line in lines(log, "left")}
    ledger.reserve(run, PLAN, budgets=allowed)
    for release, event in PLAN.items():
        if release in left:
            continue
        attempt = ledger.begin(run, release, budgets=allowed)
        say(log, f"begun {release} {attempt.number}")
        digest = hashlib.sha256(os.urandom(32)).hexdigest()
        ledger.charge(attempt, event, sha256=digest, budgets=allowed)
        say(log, f"left {release} {digest}")
    ledger.close(run)


def say(log: Path, line: str) -> None:
    """Append a line; a process that is killed afterwards has said it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def lines(log: Path, word: str) -> list[str]:
    """Lines that begin with a word."""
    text = log.read_text() if log.exists() else ""
    return [line for line in text.splitlines() if line.split()[0] == word]


DISK = {"transaction", "_connect", "_write_anchor", "_locked", "_private"}


def killed_before(step: int, work: Callable[[], None]) -> bool:
    """Do the work in a fork that dies before its n-th step; false if it came to its end."""
    child = os.fork()
    if child == 0:
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)

        def trace(frame: FrameType, what: str, _: Any) -> Any:
            if frame.f_code.co_filename != journal.__file__ or frame.f_code.co_name not in DISK:
                return None
            if what == "line":
                count()
            return trace

        class Traced(sqlite3.Connection):
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **named)
                self.set_trace_callback(lambda _: count())

        connect = sqlite3.connect
        journal.sqlite3.connect = lambda *a, **n: connect(*a, factory=Traced, **n)  # type: ignore[assignment]
        sys.settrace(trace)
        work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the job failed by itself before step {step}")
    return os.WIFSIGNALED(status)


def kill_everywhere(folder: Path) -> dict[str, int]:
    """Kill, look, resume, look; returns how often what was seen."""
    run, allowed = Run(job="job", run_id="run"), budgets(len(PLAN) + 1)
    seen = {"steps": 0, "nothing_yet": 0, "charged_and_not_left": 0, "ahead_of_anchor": 0}
    while True:
        home = folder / "home"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        ledger, log = Ledger(home / "ledger.sqlite", key=KEY, cost=zcdp), home / "log"
        if not killed_before(seen["steps"] + 1, lambda ledger=ledger, log=log: job(ledger, run, log, allowed)):
            return seen
        seen["steps"] += 1
        seen["ahead_of_anchor"] += ahead_of_anchor(home, folder / "copy")
        charged = look(ledger, log)
        seen["nothing_yet"] += charged is None
        seen["charged_and_not_left"] += (charged or 0) > len(lines(log, "left"))

        job(ledger, run, log, allowed)  # the restart
        assert look(ledger, log) in (len(PLAN), len(PLAN) + 1)
        assert {line.split()[1] for line in lines(log, "left")} == set(PLAN)
        begun = lines(log, "begun")
        assert len(begun) == len(set(begun)), "an attempt was handed out twice"
        statement = ledger.statement()
        assert statement.total.spent == statement.total.committed <= allowed.total.epsilon
        assert statement.open_runs == ()


def look(ledger: Ledger, log: Path) -> int | None:
    """Number of charges, every release that left being among them; None before the ledger was made."""
    left = {line.split()[2] for line in lines(log, "left")}
    try:
        charges = ledger.statement().charges
    except (journal.JournalMissing, ReleaseRefused):
        assert not lines(log, "begun")
        return None
    assert left <= {charge.sha256 for charge in charges}, "bytes left without a charge"
    assert len(charges) <= len(left) + 1
    return len(charges)


def ahead_of_anchor(home: Path, copy: Path) -> bool:
    """Whether an entry was committed that the anchor does not know yet; looks at a copy, which SQLite may mend."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home, copy)
    if not (copy / "ledger.sqlite").exists():
        return False
    with closing(sqlite3.connect(copy / "ledger.sqlite")) as connection:
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        rows = connection.execute("SELECT count(*) FROM entries").fetchone()[0] if tables else 0
    return bool(json.loads((copy / "ledger.sqlite.anchor").read_text())["entries"] < rows)


def race(folder: Path, name: str, count: int) -> list[str]:
    """When two are here, start ``count`` runs of one release each, and return what was let out."""
    (folder / f"{name}.ready").touch()
    while len(list(folder.glob("*.ready"))) < 2:
        time.sleep(0.001)
    ledger, allowed, granted = Ledger(folder / "ledger.sqlite", key=KEY, cost=zcdp), budgets(10), []
    for number in range(count):
        run = Run(job=name, run_id=f"{number}")
        event = GaussianRelease(noise_multiplier=SIGMA)
        try:
            ledger.reserve(run, {"only": event}, budgets=allowed)
        except BudgetExceeded:
            continue
        attempt = ledger.begin(run, "only", budgets=allowed)
        digest = hashlib.sha256(str(run).encode()).hexdigest()
        granted.append(ledger.charge(attempt, event, sha256=digest, budgets=allowed).sha256)
    return granted


if __name__ == "__main__":
    mode, where = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(kill_everywhere(where) if mode == "kill" else race(where, sys.argv[3], int(sys.argv[4]))))
