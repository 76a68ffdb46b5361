from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from ledger_driver import DELTA, KEY, SIGMA, budgets, zcdp

from privacy.accounting import GaussianRelease, MechanismEvent, SampledGaussian, Spent, epsilon
from privacy.errors import InvalidPlan
from privacy.journal import JournalMissing, JournalRefused, JournalTampered
from privacy.ledger import Attempt, BudgetExceeded, Charge, Ledger, ReleaseRefused, Run
from privacy.policy import Budget, Budgets

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("ledger_driver.py")
MEMORY = Path("/dev/shm")  # noqa: S108 - flushing there costs nothing; a killed process loses no file anywhere
RUN = Run(job="job", run_id="run")
EVENT = GaussianRelease(noise_multiplier=SIGMA)
ROUNDS = {f"round-{number:04d}": EVENT for number in range(3)}


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder in memory where there is one."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def ledger(quick: Path) -> Ledger:
    return Ledger(quick / "ledger.sqlite", key=KEY, cost=zcdp)


def digest(text: str = "bytes") -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def send(ledger: Ledger, allowed: Budgets, release: str, run: Run = RUN, event: MechanismEvent = EVENT) -> Charge:
    """One release from begin to charge, with bytes of its own."""
    attempt = ledger.begin(run, release, budgets=allowed)
    return ledger.charge(attempt, event, sha256=digest(str(attempt)), budgets=allowed)


def of(releases: int) -> float:
    return zcdp([EVENT] * releases, DELTA).epsilon


# What a job sees.


def test_a_job_that_would_pass_the_budget_is_refused_before_it_trains(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceeded, match=r"epsilon of job job at delta 0\.001 = .*the site's budget is"):
        ledger.reserve(RUN, ROUNDS, budgets=budgets(2))
    with pytest.raises(ReleaseRefused, match="reserve it first"):
        ledger.begin(RUN, "round-0000", budgets=budgets(2))
    ledger.reserve(RUN, ROUNDS, budgets=budgets(3))


def test_one_that_reaches_the_budget_stops_with_what_it_has(ledger: Ledger) -> None:
    """Three rounds fit and no more: the repetition of one is refused before it trains."""
    allowed = budgets(3)
    ledger.reserve(RUN, ROUNDS, budgets=allowed)
    for release in ROUNDS:
        send(ledger, allowed, release)
    with pytest.raises(BudgetExceeded, match="end the run with the model it has"):
        ledger.begin(RUN, "round-0001", budgets=allowed)
    statement = ledger.statement()
    assert statement.total.spent == of(3)
    assert len(statement.charges) == 3


def test_more_steps_than_planned_are_refused_where_they_do_not_fit(ledger: Ledger) -> None:
    allowed = budgets(3)
    ledger.reserve(RUN, ROUNDS, budgets=allowed)
    attempt = ledger.begin(RUN, "round-0000", budgets=allowed)
    less_noise = GaussianRelease(noise_multiplier=SIGMA / 2)
    with pytest.raises(BudgetExceeded):
        ledger.charge(attempt, less_noise, sha256=digest(), budgets=allowed)
    assert ledger.statement().charges == ()


def test_fewer_steps_than_planned_cost_less(ledger: Ledger) -> None:
    allowed, more_noise = budgets(3), GaussianRelease(noise_multiplier=2 * SIGMA)
    ledger.reserve(RUN, ROUNDS, budgets=allowed)
    send(ledger, allowed, "round-0000", event=more_noise)
    total = ledger.statement().total
    assert total.spent == zcdp([more_noise], DELTA).epsilon
    assert total.committed == zcdp([more_noise, EVENT, EVENT], DELTA).epsilon


def test_the_same_bytes_are_charged_once(ledger: Ledger) -> None:
    allowed = budgets(3)
    ledger.reserve(RUN, ROUNDS, budgets=allowed)
    attempt = ledger.begin(RUN, "round-0000", budgets=allowed)
    first = ledger.charge(attempt, EVENT, sha256=digest("a"), budgets=allowed)
    assert first == ledger.charge(attempt, EVENT, sha256=digest("a"), budgets=allowed)
    assert ledger.statement().charges == (first,)
    with pytest.raises(ReleaseRefused, match="other bytes"):
        ledger.charge(attempt, EVENT, sha256=digest("b"), budgets=allowed)
    with pytest.raises(ReleaseRefused, match="other bytes"):
        ledger.charge(attempt, GaussianRelease(noise_multiplier=9.0), sha256=digest("a"), budgets=allowed)


def test_a_round_that_restarts_is_another_attempt(ledger: Ledger) -> None:
    allowed = budgets(3)
    ledger.reserve(RUN, ROUNDS, budgets=allowed)
    first = ledger.begin(RUN, "round-0000", budgets=allowed)
    ledger.reserve(RUN, ROUNDS, budgets=allowed)  # the process died in the middle and a new one resumes
    second = ledger.begin(RUN, "round-0000", budgets=allowed)
    assert (first.number, second.number) == (1, 2)
    with pytest.raises(ReleaseRefused, match="not the last one begun; drop its result"):
        ledger.charge(first, EVENT, sha256=digest(), budgets=allowed)
    ledger.charge(second, EVENT, sha256=digest(), budgets=allowed)
    assert ledger.statement().total.spent == of(1)  # nothing left in the first attempt, so it cost nothing


def test_a_round_that_is_repeated_is_charged_again(ledger: Ledger) -> None:
    allowed = budgets(4)
    ledger.reserve(RUN, ROUNDS, budgets=allowed)
    charges = [send(ledger, allowed, "round-0000") for _ in range(2)]
    assert [charge.attempt.number for charge in charges] == [1, 2]
    assert ledger.statement().total.spent == of(2)
    assert ledger.statement().total.committed == of(4)


def test_the_newest_charge_of_a_release_is_the_last_attempt_s_that_has_one(ledger: Ledger) -> None:
    allowed = budgets(9)
    with pytest.raises(JournalMissing):
        ledger.newest_charge(RUN, "round-0000")
    ledger.reserve(RUN, ROUNDS, budgets=allowed)
    ledger.begin(RUN, "round-0000", budgets=allowed)
    assert ledger.newest_charge(RUN, "round-0000") is None
    charges = [send(ledger, allowed, "round-0000") for _ in range(2)]
    send(ledger, allowed, "round-0001")
    ledger.begin(RUN, "round-0000", budgets=allowed)  # and not charged
    statement = ledger.statement()
    assert ledger.newest_charge(RUN, "round-0000") == charges[-1]
    for run, release in ((RUN, "round-0002"), (RUN, "no"), (Run(job="job", run_id="other"), "round-0000")):
        assert ledger.newest_charge(run, release) is None
    assert ledger.statement() == statement
    ledger.close(RUN)
    assert ledger.newest_charge(RUN, "round-0000") == charges[-1], "what has left may leave again"


def test_closing_gives_back_what_was_not_used(ledger: Ledger) -> None:
    allowed, other = budgets(4), Run(job="other", run_id="run")
    ledger.reserve(RUN, ROUNDS, budgets=allowed)
    send(ledger, allowed, "round-0000")
    attempt = ledger.begin(RUN, "round-0001", budgets=allowed)
    with pytest.raises(BudgetExceeded, match="all jobs"):
        ledger.reserve(other, ROUNDS, budgets=allowed)
    ledger.close(RUN)
    ledger.close(RUN)
    ledger.reserve(other, ROUNDS, budgets=allowed)
    with pytest.raises(ReleaseRefused, match="or was closed"):  # nor does a job that wakes up overspend
        ledger.charge(attempt, EVENT, sha256=digest(), budgets=allowed)
    with pytest.raises(BudgetExceeded):
        ledger.reserve(RUN, ROUNDS, budgets=allowed)
    assert ledger.statement().open_runs == (other,)
    with pytest.raises(ReleaseRefused, match="unknown; the ledger has job/run, other/run"):
        ledger.close(Run(job="job", run_id="nun"))


def test_a_site_that_lowers_its_budget_is_heard_at_once(ledger: Ledger) -> None:
    ledger.reserve(RUN, ROUNDS, budgets=budgets(3))
    attempt = ledger.begin(RUN, "round-0000", budgets=budgets(3))
    with pytest.raises(BudgetExceeded):
        ledger.charge(attempt, EVENT, sha256=digest(), budgets=budgets(2))
    with pytest.raises(BudgetExceeded):
        ledger.reserve(RUN, ROUNDS, budgets=budgets(2))


def test_the_ceiling_of_a_job_holds_over_its_runs(ledger: Ledger) -> None:
    allowed = Budgets(per_job=budgets(4).total, total=budgets(9).total)
    ledger.reserve(RUN, ROUNDS, budgets=allowed)
    with pytest.raises(BudgetExceeded, match="epsilon of job job"):
        ledger.reserve(Run(job="job", run_id="again"), ROUNDS, budgets=allowed)
    ledger.reserve(Run(job="other", run_id="again"), ROUNDS, budgets=allowed)


def test_each_ceiling_is_held_at_its_own_delta(ledger: Ledger) -> None:
    def ceiling(releases: int, delta: float) -> Budget:
        return Budget(epsilon=zcdp([EVENT] * releases, delta).epsilon * (1 + 1e-9), delta=delta)

    allowed = Budgets(per_job=ceiling(2, 1e-3), total=ceiling(4, 1e-2))
    for job in ("a", "b"):
        with pytest.raises(BudgetExceeded, match=f"job {job} at delta 0.001"):
            ledger.reserve(Run(job=job, run_id="run"), ROUNDS, budgets=allowed)
        ledger.reserve(Run(job=job, run_id="run"), {"0": EVENT, "1": EVENT}, budgets=allowed)
    with pytest.raises(BudgetExceeded, match=r"all jobs at delta 0\.01"):
        ledger.reserve(Run(job="c", run_id="run"), {"0": EVENT}, budgets=allowed)


def test_what_is_out_of_order_is_refused(ledger: Ledger) -> None:
    allowed = budgets(9)
    with pytest.raises(JournalMissing):
        ledger.begin(RUN, "round-0000", budgets=allowed)
    with pytest.raises(InvalidPlan, match="releases nothing"):
        ledger.reserve(RUN, {}, budgets=allowed)
    ledger.reserve(RUN, ROUNDS, budgets=allowed)
    with pytest.raises(ReleaseRefused, match="another plan is set aside"):
        ledger.reserve(RUN, {**ROUNDS, "one more": EVENT}, budgets=allowed)
    with pytest.raises(ReleaseRefused, match="one more"):
        ledger.begin(RUN, "one more", budgets=allowed)
    for made_up in (Attempt(run=RUN, release="round-0000", number=1), Attempt(run=RUN, release="no", number=1)):
        with pytest.raises(ReleaseRefused):
            ledger.charge(made_up, EVENT, sha256=digest(), budgets=allowed)
    with pytest.raises(InvalidPlan, match="64 hexadecimal"):
        ledger.charge(Attempt(run=RUN, release="round-0000", number=1), EVENT, sha256="ab", budgets=allowed)
    for name in ("", "../x", "a b", "x" * 100):
        with pytest.raises(InvalidPlan, match="letters"):
            Run(job=name, run_id="run")


def test_an_accountant_without_an_answer_lets_nothing_pass(quick: Path) -> None:
    for nothing in (float("nan"), float("inf")):
        ledger = Ledger(quick / "l", key=KEY, cost=lambda *_, e=nothing: Spent(epsilon=e, accountant="rdp"))
        with pytest.raises(BudgetExceeded):
            ledger.reserve(RUN, ROUNDS, budgets=budgets(9))


# What the numbers are.


def test_jobs_on_the_same_patients_are_composed_and_not_added(quick: Path) -> None:
    """The total is the accountant's word on all events of all jobs, at the total's own δ."""
    ledger = Ledger(quick / "ledger.sqlite", key=KEY, cost=epsilon)
    allowed = Budgets(per_job=Budget(epsilon=4, delta=1e-3), total=Budget(epsilon=6, delta=2e-3))
    first = SampledGaussian(sampling_rate=0.15, noise_multiplier=1.4, steps=40)
    second = SampledGaussian(sampling_rate=0.1, noise_multiplier=1.1, steps=30)
    for job, event in (("first", first), ("second", second)):
        run = Run(job=job, run_id="run")
        ledger.reserve(run, {"0": event, "1": event}, budgets=allowed)
        send(ledger, allowed, "0", run, event)
        send(ledger, allowed, "1", run, event)
        ledger.close(run)
    statement = ledger.statement()
    spent = {job: account.spent for job, account in statement.jobs.items()}
    assert spent == {"first": epsilon([first] * 2, 1e-3).epsilon, "second": epsilon([second] * 2, 1e-3).epsilon}
    assert statement.total.spent == epsilon([first, first, second, second], 2e-3).epsilon
    assert max(spent.values()) < statement.total.spent < 0.8 * sum(spent.values())
    assert statement.total.left == 6 - statement.total.spent
    assert statement.total.accountant == "prv"


def test_exhausted_means_that_one_more_does_not_fit(ledger: Ledger) -> None:
    ledger.reserve(RUN, ROUNDS, budgets=budgets(4))
    assert not ledger.statement().exhausted  # nothing was released yet
    for release in ROUNDS:
        send(ledger, budgets(4), release)
    assert not ledger.statement().exhausted
    send(ledger, budgets(4), "round-0000")
    assert ledger.statement().exhausted


class Interleaving(RuleBasedStateMachine):
    """Jobs, restarts, repetitions and operators in any order, against bookkeeping of our own."""

    attempts = Bundle("attempts")
    runs = st.builds(Run, job=st.sampled_from(["a", "b"]), run_id=st.sampled_from(["0", "1"]))
    events = st.builds(GaussianRelease, noise_multiplier=st.sampled_from([2.0, 4.0, 7.0]))
    releases = st.sampled_from(["x", "y"])

    @initialize(per_job=st.integers(1, 4), total=st.integers(4, 6))
    def start(self, per_job: int, total: int) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.budgets = Budgets(per_job=budgets(per_job).total, total=budgets(total).total)
        self.sent: dict[tuple[Run, str, int], tuple[str, GaussianRelease]] = {}
        self.numbers: set[tuple[Run, str, int]] = set()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder / "ledger.sqlite", key=KEY, cost=zcdp)

    @rule(run=runs, planned=st.dictionaries(releases, events, min_size=1))
    def reserve(self, run: Run, planned: dict[str, GaussianRelease]) -> None:
        try:
            self.ledger.reserve(run, planned, budgets=self.budgets)
        except (BudgetExceeded, ReleaseRefused):
            return

    @rule(target=attempts, run=runs, release=releases)
    def begin(self, run: Run, release: str) -> Any:
        try:
            attempt = self.ledger.begin(run, release, budgets=self.budgets)
        except (BudgetExceeded, ReleaseRefused, JournalMissing):
            return multiple()  # no attempt
        key = (run, release, attempt.number)
        assert key not in self.numbers, "handed out twice"
        self.numbers.add(key)
        return attempt

    @rule(attempt=attempts, event=events, text=st.sampled_from(["0", "1"]))
    def charge(self, attempt: Attempt, event: GaussianRelease, text: str) -> None:
        key, wanted = (attempt.run, attempt.release, attempt.number), (digest(text), event)
        try:
            self.ledger.charge(attempt, event, sha256=digest(text), budgets=self.budgets)
        except (BudgetExceeded, ReleaseRefused):
            return
        assert self.sent.setdefault(key, wanted) == wanted, "two releases for one charge"

    @rule(run=runs)
    def close(self, run: Run) -> None:
        try:
            self.ledger.close(run)
        except (ReleaseRefused, JournalMissing):
            return

    @invariant()
    def what_left_is_within_the_budget(self) -> None:
        if not hasattr(self, "folder") or not (self.folder / "ledger.sqlite").exists():
            return
        total = zcdp([event for _, event in self.sent.values()], DELTA).epsilon
        assert total <= self.budgets.total.epsilon
        for job in ("a", "b"):
            events = [event for (run, _, _), (_, event) in self.sent.items() if run.job == job]
            assert zcdp(events, DELTA).epsilon <= self.budgets.per_job.epsilon
        try:
            statement = self.ledger.statement()
        except ReleaseRefused:  # made, and nothing was let in yet
            assert not self.numbers
            return
        assert statement.total.spent == pytest.approx(total)
        assert statement.total.spent <= statement.total.committed + 1e-12
        assert statement.total.committed <= self.budgets.total.epsilon
        assert len(statement.charges) == len(self.sent)


def test_totals_never_pass_the_budget_in_any_order() -> None:
    run_state_machine_as_test(Interleaving, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))


# What may happen to it.


def driver(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(DRIVER), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def test_killed_at_every_step_the_totals_are_right_and_the_job_resumes(quick: Path) -> None:
    with driver("kill", quick) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    seen = json.loads(out)
    assert seen["steps"] > 200
    assert min(seen.values()) > 20  # the moments that matter were among them


def test_two_processes_at_once_do_not_overspend(quick: Path) -> None:
    with driver("race", quick, "left", 9) as one, driver("race", quick, "right", 9) as two:
        granted = [json.loads(process.communicate(timeout=120)[0]) for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0)
    together = {*granted[0], *granted[1]}
    assert len(together) == len(granted[0]) + len(granted[1]) == 10  # what there is room for, and all of it
    statement = Ledger(quick / "ledger.sqlite", key=KEY, cost=zcdp).statement()
    assert {charge.sha256 for charge in statement.charges} == together
    assert statement.total.spent <= budgets(10).total.epsilon


def test_a_ledger_that_is_not_what_was_written_lets_nothing_pass(ledger: Ledger, quick: Path) -> None:
    """Each call refuses; the ways of tampering are the journal's tests."""
    allowed = budgets(9)
    ledger.reserve(RUN, ROUNDS, budgets=allowed)
    attempt = ledger.begin(RUN, "round-0000", budgets=allowed)
    ledger.charge(attempt, EVENT, sha256=digest(), budgets=allowed)
    calls = [
        lambda: ledger.reserve(RUN, ROUNDS, budgets=allowed),
        lambda: ledger.begin(RUN, "round-0001", budgets=allowed),
        lambda: ledger.charge(attempt, EVENT, sha256=digest(), budgets=allowed),
        lambda: ledger.close(RUN),
        lambda: ledger.newest_charge(RUN, "round-0000"),
        lambda: ledger.statement(),
    ]
    database = quick / "ledger.sqlite"
    kept = database.read_bytes()
    for change, error in (
        (lambda: database.unlink(), JournalMissing),
        (lambda: database.write_bytes(kept.replace(b"round-0000", b"round-0009")), JournalTampered),
        (lambda: (quick / "ledger.sqlite.anchor").unlink(), JournalTampered),
    ):
        change()
        for call in calls:
            with pytest.raises(JournalRefused) as refused:
                call()
            assert type(refused.value) is error
