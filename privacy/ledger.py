"""The site's own record of what was released about its patients, and the refusal of what its budget does not cover.

The claim. Two data sets are neighbours if one has a patient, with all scans, whom the other lacks. If every release is
the mechanism that its event says, then everything that ever left the site under charges of this ledger is together
(ε, δ)-differentially private for every patient, against whoever sees all of it (server, other sites, receivers of any
model), with ε the accountant's composition of *all* charged events at the total budget's δ; and that ε is at most the
total budget that was in force when the last of them was charged. One total serves the whole site: who takes part in
which job is not tracked, so every patient is taken to be in all of them.

What the claim rests on: the accountant composes mechanisms whose parameters do not depend on earlier releases. A
reservation fixes a run's parameters before it starts. An author who picks the next job's parameters after looking at
the last job's model is outside of that theorem (with Rényi divergences of one fixed order it would hold:
arXiv:2008.11193). What it leaves out: scans of the same patient at another hospital, which that hospital's ledger
counts.

The order of things. ``reserve`` sets a run's planned releases aside before it trains, so that jobs at the same time
cannot overspend; ``begin`` hands out the number of an attempt at one of them, which is never handed out again;
``charge`` stands before the bytes leave; ``close`` gives back what a run set aside and did not use. A process that died
before its charge begins anew: the next attempt is another release with fresh randomness, charged once if it leaves.
Bytes that were charged may leave again and again: whoever has them learns nothing from a copy. ``newest_charge`` says
which they are.

PrivacyError
├── BudgetExceeded   the site's budget does not cover it
└── ReleaseRefused   out of order
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from privacy.accounting import Accountant, MechanismEvent, Spent, event_from_json
from privacy.errors import InvalidPlan, PrivacyError, require
from privacy.journal import Entry, Journal, Transaction
from privacy.policy import Budget, Budgets

LEDGER_FILE = "ledger.sqlite"

Cost = Callable[[Sequence[MechanismEvent], float], Spent]  # privacy.accounting.epsilon


class BudgetExceeded(PrivacyError):
    """A release that the site's budget does not cover; nothing was written and nothing may leave."""


class ReleaseRefused(PrivacyError):
    """A release out of order: not planned, not begun, overtaken by a later attempt, or other bytes than charged."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Whose releases they are.

    Attributes:
        job: name of the job; its ceiling holds over all its runs.
        run_id: of this run; a run that resumes keeps it.

    Raises:
        InvalidPlan: a name that is not of letters, digits, ``_`` and ``-`` (a ValueError).
    """

    job: str
    run_id: str

    def __post_init__(self) -> None:
        for argument, value in (("job", self.job), ("run_id", self.run_id)):
            plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,80}", value) is not None
            require(plain, argument=argument, value=value, remedy="give letters, digits, '_' and '-' only")

    def __str__(self) -> str:
        return f"{self.job}/{self.run_id}"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Leave to train for one release; its number is never handed out again, so randomness that depends on it is new.

    Attributes:
        run: whose.
        release: name of the planned release, such as ``round-0003``.
        number: from 1 for each release of a run.
    """

    run: Run
    release: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Charge:
    """Leave to send.

    Attributes:
        attempt: what it was charged for.
        event: what happened.
        sha256: of the bytes that may leave, hexadecimal.
        at: when, ISO 8601, UTC.
    """

    attempt: Attempt
    event: MechanismEvent
    sha256: str
    at: str


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a job, or the site, has spent.

    Attributes:
        spent: ε of all that was charged.
        committed: ε of that and all that open runs have set aside.
        accountant: which one bounds ``committed``.
        budget: the ceiling in force at the ledger's last decision.
    """

    spent: float
    committed: float
    accountant: Accountant
    budget: Budget

    @property
    def left(self) -> float:
        """The ceiling less what was spent. Composition is not a sum: what fits is for ``reserve`` to say."""
        return max(0.0, self.budget.epsilon - self.spent)


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The ledger, read.

    Attributes:
        total: the site's account.
        jobs: account of each job, by name.
        open_runs: runs with releases set aside.
        charges: everything that was charged, oldest first.
        exhausted: one more release like the last one does not fit into the total; false if there was none.
    """

    total: Account
    jobs: Mapping[str, Account]
    open_runs: tuple[Run, ...]
    charges: tuple[Charge, ...]
    exhausted: bool


class Ledger:
    """A site's ledger; every call reads and verifies it anew, so that any number of processes may use it.

    Each method raises :class:`privacy.journal.JournalRefused` if the files are not as they were left: then nothing may
    be released.

    Args:
        path: ``<home>/ledger.sqlite`` of the site, made by the first reservation.
        key: the site's secret.
        cost: the accountant, :func:`privacy.accounting.epsilon`.
    """

    def __init__(self, path: Path, *, key: bytes, cost: Cost) -> None:
        self._journal = Journal(path, key=key)
        self._cost = cost

    def reserve(self, run: Run, planned: Mapping[str, MechanismEvent], *, budgets: Budgets) -> None:
        """Set a run's releases aside before it trains; again, with the same plan, each time it resumes.

        Args:
            run: whose.
            planned: what each release will be, by its name.
            budgets: the site's ceilings.

        Raises:
            BudgetExceeded: with them the job or the site would pass its ceiling.
            ReleaseRefused: the run has set another plan aside.
            InvalidPlan: an empty plan.
        """
        plan = dict(planned)
        if not plan:
            raise InvalidPlan(argument="planned", value=plan, remedy="a run that releases nothing needs no ledger")
        with self._open(create=True) as (transaction, state):
            aside = state.run(run).planned
            if aside == plan:
                self._check(state, run, budgets)
            elif aside:
                raise ReleaseRefused(argument="planned", value=str(run), remedy="another plan is set aside; close it")
            else:
                values = {release: event.to_json() for release, event in plan.items()}
                self._write(transaction, state, run, {"kind": "reserve", "planned": values}, budgets)

    def begin(self, run: Run, release: str, *, budgets: Budgets) -> Attempt:
        """Before training for a release: a new attempt at it, which overtakes any earlier one that was not charged.

        Raises:
            BudgetExceeded: it was charged before and the ceiling does not cover it once more, or the site has lowered
                the ceiling: end the run with the model it has.
            ReleaseRefused: not planned.
        """
        with self._open() as (transaction, state):
            _refuse_unplanned(state, run, release)
            number = state.run(run).attempts.get(release, 0) + 1
            self._write(transaction, state, run, {"kind": "begin", "release": release, "number": number}, budgets)
            return Attempt(run=run, release=release, number=number)

    def charge(self, attempt: Attempt, event: MechanismEvent, *, sha256: str, budgets: Budgets) -> Charge:
        """Before the bytes leave: charge them. The same bytes of the same attempt are charged once.

        Args:
            attempt: from :meth:`begin`.
            event: what ran, which may be less than was planned.
            sha256: of the bytes that are to leave, hexadecimal.
            budgets: the site's ceilings.

        Raises:
            BudgetExceeded: the bytes must not leave: end the run with the model it has.
            ReleaseRefused: not begun, overtaken by a later attempt, or charged for other bytes.
            InvalidPlan: no SHA-256.
        """
        digest = re.fullmatch(r"[0-9a-f]{64}", sha256) is not None
        require(digest, argument="sha256", value=sha256, remedy="give 64 hexadecimal digits")
        run, release, number = attempt.run, attempt.release, attempt.number
        name = f"{number} at {release} of {run}"
        with self._open() as (transaction, state):
            charged = state.run(run).charges.get(release, {}).get(number)
            if charged is not None:
                if (charged.sha256, charged.event) != (sha256, event):
                    raise ReleaseRefused(
                        argument="attempt", value=name, remedy="charged for other bytes; begin a new one"
                    )
                return charged
            _refuse_unplanned(state, run, release)
            if number != state.run(run).attempts.get(release):
                raise ReleaseRefused(argument="attempt", value=name, remedy="not the last one begun; drop its result")
            entry = {"kind": "charge", "release": release, "number": number, "event": event.to_json(), "sha256": sha256}
            self._write(transaction, state, run, entry, budgets)
            return state.charges[-1]

    def newest_charge(self, run: Run, release: str) -> Charge | None:
        """The charge of a release's newest attempt that has one; None if nothing of it was ever charged.

        Bytes of that SHA-256 may leave again, and cost nothing. Nothing is written.
        """
        with self._open() as (_, state):
            charges = state.run(run).charges.get(release, {})
            return charges[max(charges)] if charges else None

    def close(self, run: Run) -> None:
        """Give back what a run set aside and did not use; what it spent stays spent. Again: nothing happens.

        Raises:
            ReleaseRefused: no such run.
        """
        with self._open() as (transaction, state):
            if run not in state.runs:
                known = ", ".join(str(known) for known in state.runs)
                raise ReleaseRefused(
                    argument="run", value=str(run), remedy=f"unknown; the ledger has {known or 'none'}"
                )
            if state.run(run).planned:
                transaction.append({"kind": "close", "run": asdict(run)})

    def statement(self) -> Statement:
        """What was spent, by whom, and what is left.

        Raises:
            ReleaseRefused: nothing was ever set aside.
        """
        with self._open() as (_, state):
            budgets = state.budgets
            if budgets is None:
                raise ReleaseRefused(argument="entries", value=0, remedy="no job has set anything aside yet; start one")
            total, last = budgets.total, [charge.event for charge in state.charges[-1:]]
            one_more = self._epsilon([*state.committed(), *last], total).epsilon
            return Statement(
                total=self._account(state, None, total),
                jobs={job: self._account(state, job, budgets.per_job) for job in sorted({r.job for r in state.runs})},
                open_runs=tuple(run for run, of_run in state.runs.items() if of_run.planned),
                charges=tuple(state.charges),
                exhausted=bool(last) and not one_more <= total.epsilon,
            )

    @contextmanager
    def _open(self, *, create: bool = False) -> Iterator[tuple[Transaction, _State]]:
        with self._journal.transaction(create=create) as transaction:
            yield transaction, _State(transaction.entries)

    def _write(
        self, transaction: Transaction, state: _State, run: Run, entry: Mapping[str, Any], budgets: Budgets
    ) -> None:
        """Add an entry to the state and have it written, unless an account would then pass its ceiling."""
        state.apply(transaction.append({**entry, "run": asdict(run), "budgets": asdict(budgets)}))
        self._check(state, run, budgets)

    def _check(self, state: _State, run: Run, budgets: Budgets) -> None:
        for whose, job, budget in ((f"job {run.job}", run.job, budgets.per_job), ("all jobs", None, budgets.total)):
            epsilon = self._epsilon(state.committed(job), budget).epsilon
            if not epsilon <= budget.epsilon:  # a NaN is refused, too
                raise BudgetExceeded(
                    argument=f"epsilon of {whose} at delta {budget.delta:g}",
                    value=round(epsilon, 4),
                    remedy=f"the site's budget is {budget.epsilon:g}: end the run with the model it has, close runs "
                    "that were abandoned (fedct ledger --close), or ask for a smaller epsilon",
                )

    def _account(self, state: _State, job: str | None, budget: Budget) -> Account:
        committed = self._epsilon(state.committed(job), budget)
        return Account(
            spent=self._epsilon(state.charged(job), budget).epsilon,
            committed=committed.epsilon,
            accountant=committed.accountant,
            budget=budget,
        )

    def _epsilon(self, events: Sequence[MechanismEvent], budget: Budget) -> Spent:
        return self._cost(events, budget.delta)


@dataclass
class _RunState:
    """One run, folded; ``planned`` is empty when the run is closed."""

    planned: dict[str, MechanismEvent] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    charges: dict[str, dict[int, Charge]] = field(default_factory=dict)

    def charged(self) -> Iterator[MechanismEvent]:
        for by_number in self.charges.values():
            yield from (charge.event for charge in by_number.values())

    def committed(self) -> Iterator[MechanismEvent]:
        """What was charged, and of the plan what was not charged yet or was begun again since."""
        yield from self.charged()
        for release, event in self.planned.items():
            if self.attempts.get(release, 0) not in self.charges.get(release, {}):
                yield event


class _State:
    """The entries, folded."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.runs: dict[Run, _RunState] = {}
        self.charges: list[Charge] = []
        self.budgets: Budgets | None = None
        for entry in entries:
            self.apply(entry)

    def run(self, run: Run) -> _RunState:
        """State of one run, empty if the ledger does not know it."""
        return self.runs.get(run, _RunState())

    def apply(self, entry: Entry) -> None:
        run = Run(**entry["run"])
        of_run = self.runs.setdefault(run, _RunState())
        if "budgets" in entry:
            self.budgets = Budgets(**{name: Budget(**values) for name, values in entry["budgets"].items()})
        if entry["kind"] == "reserve":
            of_run.planned = {release: event_from_json(values) for release, values in entry["planned"].items()}
        elif entry["kind"] == "begin":
            of_run.attempts[entry["release"]] = entry["number"]
        elif entry["kind"] == "charge":
            attempt = Attempt(run=run, release=entry["release"], number=entry["number"])
            event = event_from_json(entry["event"])
            charge = Charge(attempt=attempt, event=event, sha256=entry["sha256"], at=entry["at"])
            of_run.charges.setdefault(attempt.release, {})[attempt.number] = charge
            self.charges.append(charge)
        elif entry["kind"] == "close":
            of_run.planned = {}
        else:
            remedy = "unknown; read this ledger with the version of fedct that wrote it"
            raise InvalidPlan(argument="kind", value=entry["kind"], remedy=remedy)

    def charged(self, job: str | None = None) -> list[MechanismEvent]:
        """Events that were charged to a job, or to all."""
        return [event for run, of_run in self.runs.items() if job in (None, run.job) for event in of_run.charged()]

    def committed(self, job: str | None = None) -> list[MechanismEvent]:
        """Events that were charged to a job, or to all, or set aside by its open runs."""
        return [event for run, of_run in self.runs.items() if job in (None, run.job) for event in of_run.committed()]


def _refuse_unplanned(state: _State, run: Run, release: str) -> None:
    if release not in state.run(run).planned:
        remedy = f"{run} has not set it aside, or was closed; reserve it first"
        raise ReleaseRefused(argument="release", value=release, remedy=remedy)
