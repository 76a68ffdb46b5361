"""What a snapshot reads of run folders and ledgers: whole, half written, damaged and not there."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from custom.audit_config import AuditConfig
from custom.config import ExperimentConfig
from custom.pictures import sample_grid
from custom.run_folder import MODEL_FILE, RoundRecord, RunFolder
from custom.site_ledger import open_ledger
from custom.site_state import SiteState
from custom.strict import ConfigError
from poc.alarms import Alarm, alarms
from poc.snapshot import (
    MOST_RUNS,
    QUIET_MARGIN_S,
    Job,
    LedgerView,
    NodeState,
    Snapshot,
    ledger_view,
    newest_runs,
    run_view,
    site_view,
    snapshot,
)
from privacy.accounting import GaussianRelease, epsilon
from privacy.audit.decision import DecisionRule
from privacy.audit.evidence import Evidence
from privacy.audit.report.document import audit_of, write_json
from privacy.ledger import LEDGER_FILE, Run
from privacy.policy import Budget, Budgets

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "privacy" / "audit"))
from evidence_example import attack, clean, interval

SITES = ("site-1", "site-2", "site-3")
RELEASE = GaussianRelease(noise_multiplier=4.0)
BUDGET = Budget(epsilon=4.0, delta=1e-3)
BUDGETS = Budgets(per_job=BUDGET, total=BUDGET)


def record(number: int, **changes: Any) -> RoundRecord:
    """A round in which all sites took part, with a loss that falls."""
    said = {site: {"train_loss": 0.5 / (number + 1), "held_out_loss": 0.8 / (number + 1)} for site in SITES}
    whole = RoundRecord(
        round_number=number, asked=list(SITES), accepted=said, refused={}, silent=[], seconds=30.0 + number
    )
    return replace(whole, **changes)


def left_out(number: int, *, refused: str | None = None, silent: str | None = None) -> RoundRecord:
    whole = record(number)
    accepted = {site: said for site, said in whole.accepted.items() if site not in (refused, silent)}
    return replace(
        whole,
        accepted=accepted,
        refused={} if refused is None else {refused: "its norm is above max_update_norm"},
        silent=[] if silent is None else [silent],
    )


def draw(file: Path, seed: int = 0) -> None:
    images = np.random.default_rng(seed).uniform(-1, 1, (4, 1, 16, 16)).astype(np.float32)
    sample_grid(images, file, title="small", window_hu=(-1000.0, 600.0))


def going_on(runs: Path, experiment: ExperimentConfig, rounds: int = 1) -> RunFolder:
    folder = RunFolder.create(runs, experiment)
    for number in range(rounds):
        folder.record(record(number))
        draw(folder.path / "samples" / f"round_{number + 1:04d}.png", number)
    return folder


def completed(runs: Path, experiment: ExperimentConfig, **how: Any) -> RunFolder:
    folder = going_on(runs, experiment, experiment.federation.rounds)
    (folder.path / MODEL_FILE).write_bytes(b"a model")
    draw(folder.path / "samples.png")
    folder.complete({"mean": {"held_out_loss": 0.25, "effnet_kid": 0.1}, "sites": {}}, **how)
    return folder


def audited(runs: Path, experiment: ExperimentConfig, evidence: Evidence) -> RunFolder:
    folder = RunFolder.create(runs, replace(experiment, name="small_audit", audit=AuditConfig(model=experiment.name)))
    write_json(folder.path / "audit.json", audit_of(evidence, DecisionRule()))
    folder.complete({"verdict": "of no use here"})
    return folder


def spend(home: Path, releases: int = 1, *, planned: int = 2, budgets: Budgets = BUDGETS) -> None:
    ledger = open_ledger(home)
    run = Run(job="small", run_id="r1")
    plan = {f"round-{number:04d}": RELEASE for number in range(planned)}
    ledger.reserve(run, plan, budgets=budgets)
    for release in list(plan)[:releases]:
        ledger.charge(ledger.begin(run, release, budgets=budgets), RELEASE, sha256="0" * 64, budgets=budgets)


def ready(name: str) -> NodeState:
    return NodeState(name=name, status="ready", pid=4321, memory_bytes=600 * 2**20)


def look(folder: Path, **changes: Any) -> Snapshot:
    """A federation's folder, all nodes ready unless it is said otherwise."""
    nodes = {site: ready(site) for site in SITES} | changes.pop("nodes", {})
    homes = {site: folder / "sites" / site for site in SITES}
    given = {"server": ready("server"), "nodes": nodes, "homes": homes, "runs": folder / "runs"}
    return snapshot("demo", **(given | changes))


def whats(found: tuple[Alarm, ...]) -> str:
    return "\n".join(f"{alarm.serious} {alarm.what}: {alarm.text}" for alarm in found)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# ---- runs


def test_a_completed_run(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = completed(tmp_path, experiment)
    run = run_view(folder.path)
    assert (run.experiment, run.run_id, run.outcome, run.reason) == ("small", folder.run_id, "completed", "")
    assert run.rounds == (record(0), record(1))
    assert (run.rounds_done, run.rounds_asked, run.is_audit) == (2, 2, False)
    assert run.figures == {"held_out_loss": 0.25, "effnet_kid": 0.1}
    assert [grid.rounds_done for grid in run.grids] == [1, 2]
    assert run.grids[-1].file.name == "samples.png"  # in place of the last round's
    assert run.config == experiment
    assert run.problems == ()
    assert run.started <= run.last_change <= datetime.now(timezone.utc) + timedelta(seconds=1)


def test_a_run_that_goes_on_and_is_writing_a_line(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = going_on(tmp_path, experiment)
    with (folder.path / "rounds.jsonl").open("a") as stream:
        stream.write('{"round_number": 1, "asked": ["site-1", "si')
    run = run_view(folder.path)
    assert (run.outcome, run.rounds_done, run.problems) == ("unfinished", 1, ())
    assert run.product_sha256 is None


def test_a_run_that_has_just_begun(tmp_path: Path, experiment: ExperimentConfig) -> None:
    run = run_view(RunFolder.create(tmp_path, experiment).path)
    assert (run.outcome, run.rounds, run.grids, run.figures, run.problems) == ("unfinished", (), (), {}, ())


def test_of_a_repeated_round_the_last_counts(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = going_on(tmp_path, experiment, 2)
    again = record(1, seconds=99.0)
    folder.record(again)
    assert run_view(folder.path).rounds == (record(0), again)


def test_why_a_run_failed_and_why_one_ended_early(tmp_path: Path, experiment: ExperimentConfig) -> None:
    failed = going_on(tmp_path, experiment)
    failed.fail("RoundVoid: train in round 2: 1 acceptable updates")
    assert run_view(failed.path).outcome == "failed"
    assert run_view(failed.path).reason == "RoundVoid: train in round 2: 1 acceptable updates"
    early = run_view(completed(tmp_path, experiment, ended_early="a budget is spent").path)
    assert (early.outcome, early.reason) == ("completed", "a budget is spent")


@pytest.mark.parametrize("receipt", [b"{", b"[]", b"\xff\xfe", b'{"status": NaN}', b'{"status": "complete"}', b""])
def test_a_receipt_that_does_not_hold_is_a_failure(
    receipt: bytes, tmp_path: Path, experiment: ExperimentConfig
) -> None:
    folder = completed(tmp_path, experiment)
    (folder.path / "receipt.json").write_bytes(receipt)
    run = run_view(folder.path)
    assert run.outcome == "failed"
    assert run.reason


def test_another_model_than_the_receipt_s_is_a_failure_also_if_it_was_right_before(
    tmp_path: Path, experiment: ExperimentConfig
) -> None:
    folder = completed(tmp_path, experiment)
    assert run_view(folder.path).outcome == "completed"
    (folder.path / MODEL_FILE).write_bytes(b"another one")
    run = run_view(folder.path)
    assert run.outcome == "failed"
    assert "not the one of the receipt" in run.reason
    (folder.path / MODEL_FILE).unlink()
    assert run_view(folder.path).outcome == "failed"


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "1",
        '{"round_number": 1}',
        json.dumps({**vars(record(1)), "accepted": {"site-1": {"train_loss": "low"}}}),
        json.dumps({**vars(record(1)), "silent": "site-1"}),
        json.dumps({**vars(record(1)), "round_number": -1}),
        json.dumps({**vars(record(1)), "seconds": float("nan")}),
        json.dumps(vars(record(1))).replace("31.0", "1e999"),
        json.dumps({**vars(record(1)), "more": 1}),
    ],
)
def test_a_line_that_is_no_round_is_said_and_the_others_count(
    line: str, tmp_path: Path, experiment: ExperimentConfig
) -> None:
    folder = going_on(tmp_path, experiment)
    with (folder.path / "rounds.jsonl").open("a") as stream:
        stream.write(line + "\n" + json.dumps(vars(record(2))) + "\n")
    run = run_view(folder.path)
    assert [done.round_number for done in run.rounds] == [0, 2]
    assert run.problems == ("line 2 of rounds.jsonl is not that of a round",)


def test_half_a_line_in_a_finished_run_is_said(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = completed(tmp_path, experiment)
    with (folder.path / "rounds.jsonl").open("a") as stream:
        stream.write('{"round_number": 2')
    assert run_view(folder.path).problems == ("line 3 of rounds.jsonl is not that of a round",)


def test_configuration_and_figures_that_cannot_be_read_are_said(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = completed(tmp_path, experiment)
    (folder.path / "experiment.json").write_text('{"name": "small"}')
    (folder.path / "metrics.json").write_text('{"mean": {"held_out_loss": "low"}}')
    run = run_view(folder.path)
    assert run.config is None
    assert run.rounds_asked is None
    assert run.figures == {}
    assert [problem.split()[0] for problem in run.problems] == ["experiment.json:", "metrics.json"]


def test_an_audit(tmp_path: Path, experiment: ExperimentConfig) -> None:
    run = run_view(audited(tmp_path, experiment, clean()).path)
    assert run.is_audit
    assert run.audit is not None
    assert run.audit.decision.verdict == "GREEN"
    assert run.problems == ()


def test_a_verdict_that_does_not_follow_is_not_shown(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = audited(tmp_path, experiment, clean(attacks=(attack(interval(0.9, 0.8, 1.0)),)))
    file = folder.path / "audit.json"
    document = json.loads(file.read_text())
    assert document["decision"]["verdict"] != "GREEN"
    document["decision"]["verdict"] = "GREEN"
    file.write_text(json.dumps(document))
    assert run_view(folder.path).outcome == "failed"  # it is not the receipt's
    folder.complete({"verdict": "GREEN"})
    run = run_view(folder.path)
    assert run.audit is None
    assert "does not follow" in run.problems[0]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for name in ("tensorboard", "20261325-993010-77aa"):
        with pytest.raises(ConfigError, match="give the folder of a run"):
            run_view(tmp_path / name)


# ---- ledgers


def test_what_was_spent_and_set_aside(tmp_path: Path) -> None:
    spend(tmp_path)
    view = ledger_view(tmp_path)
    assert view.trouble == ""
    assert view.statement is not None
    assert view.statement.total.spent == epsilon([RELEASE], 1e-3).epsilon
    assert view.statement.total.committed == epsilon([RELEASE, RELEASE], 1e-3).epsilon
    assert view.statement.total.budget == BUDGET
    assert len(view.statement.charges) == 1


@pytest.mark.parametrize("made", ["nothing", "home", "secret"])
def test_without_a_ledger_nothing_was_spent_and_nothing_is_made(made: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    if made != "nothing":
        home.mkdir()
    if made == "secret":
        open_ledger(home)
    before = everything_in(tmp_path)
    assert ledger_view(home) == LedgerView()
    assert everything_in(tmp_path) == before
    assert home.exists() == (made != "nothing")


def test_looking_writes_nothing_into_a_ledger(tmp_path: Path) -> None:
    spend(tmp_path)
    before = everything_in(tmp_path)
    ledger_view(tmp_path)
    assert everything_in(tmp_path) == before


def test_a_ledger_in_which_nothing_was_set_aside_has_spent_nothing(tmp_path: Path) -> None:
    less = Budget(epsilon=1e-3, delta=1e-3)
    with pytest.raises(Exception, match="budget"):
        spend(tmp_path, budgets=Budgets(per_job=less, total=less))
    assert (tmp_path / LEDGER_FILE).exists()
    assert ledger_view(tmp_path) == LedgerView()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("changed", "was changed"),
        ("no database", "is not there"),
        ("no anchor", "is not there"),
        ("no secret", "secret is gone"),
        ("another secret", "secret is another"),
        ("open secret", "chmod 600"),
        ("no ledger", "shows that jobs have run"),
    ],
)
def test_a_damaged_ledger_is_said_and_never_zero(damage: str, words: str, tmp_path: Path) -> None:
    spend(tmp_path)
    SiteState.of_run(tmp_path, "small", "r1", private=True).save(0, {"w": torch.zeros(1)})
    database, anchor, secret = (tmp_path / name for name in (LEDGER_FILE, f"{LEDGER_FILE}.anchor", "secret"))
    if damage == "changed":
        database.write_bytes(database.read_bytes().replace(b'"noise_multiplier":4.0', b'"noise_multiplier":9.0'))
    elif damage == "another secret":
        secret.write_bytes(b"x" * 32)
    elif damage == "open secret":
        secret.chmod(0o644)
    else:
        gone = {
            "no database": [database],
            "no anchor": [anchor],
            "no secret": [secret],
            "no ledger": [*tmp_path.glob(f"{LEDGER_FILE}*"), secret],
        }[damage]
        for file in gone:
            file.unlink()
    before = everything_in(tmp_path)
    view = ledger_view(tmp_path)
    assert view.statement is None
    assert words in view.trouble
    assert everything_in(tmp_path) == before


def test_a_ledger_in_trouble_states_nothing(tmp_path: Path) -> None:
    spend(tmp_path)
    view = site_view(node=ready("site-1"), home=tmp_path).ledger
    with pytest.raises(ConfigError, match="states nothing"):
        replace(view, trouble="it burns")


# ---- nodes and the whole


@pytest.mark.parametrize("values", [{"status": "fine"}, {"pid": 0}, {"pid": True}, {"memory_bytes": -1}])
def test_a_state_that_cannot_be_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        NodeState(**{"name": "site-1", "status": "ready", **values})


def test_every_site_needs_its_process_and_its_home(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nodes"):
        look(tmp_path, nodes={"site-4": ready("site-4")})
    with pytest.raises(ConfigError, match="name"):
        look(tmp_path, nodes={"site-1": ready("site-2")})
    with pytest.raises(ConfigError, match="zone"):
        look(tmp_path, written_at=datetime(2026, 1, 1))


def test_an_empty_federation(tmp_path: Path) -> None:
    seen = look(tmp_path)
    assert [node.name for node in seen.nodes] == ["server", *SITES]
    assert (seen.runs, seen.older_runs, seen.last_audit, alarms(seen)) == ((), 0, None, ())
    assert everything_in(tmp_path) == {}


def test_runs_are_read_newest_first_and_the_oldest_are_counted(tmp_path: Path, experiment: ExperimentConfig) -> None:
    made = RunFolder.create(tmp_path / "runs", experiment).path
    for index in range(MOST_RUNS + 2):
        folder = made.parent / f"20250101-0000{index:02d}-0000"
        folder.mkdir()
        (folder / "experiment.json").write_bytes((made / "experiment.json").read_bytes())
    (made.parent / "notes").mkdir()
    seen = look(tmp_path)
    assert seen.runs[0].run_id == made.name
    assert [run.run_id for run in seen.runs] == sorted((run.run_id for run in seen.runs), reverse=True)
    assert (len(seen.runs), seen.older_runs) == (MOST_RUNS, 3)
    assert [run.run_id for run in newest_runs(seen)] == [made.name]


def test_how_a_run_without_receipt_stands(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = going_on(tmp_path / "runs", experiment)
    seen = look(tmp_path)
    (run,) = seen.runs
    assert seen.standing(run) == "going on"
    assert alarms(seen) == ()
    for status in ("gone", "stopped"):
        off = look(tmp_path, server=NodeState(name="server", status=status))
        assert off.standing(run) == "cut off"
        assert "was cut off" in whats(alarms(off))
    patience = experiment.federation.round_timeout_s + QUIET_MARGIN_S
    for seconds, standing in ((patience - 60, "going on"), (patience + 60, "quiet")):
        later = look(tmp_path, written_at=run.last_change + timedelta(seconds=seconds))
        assert later.standing(run) == standing
    assert "is quiet" in whats(alarms(later))
    folder.note_job("job-1")
    for status, standing in (("RUNNING", "going on"), ("FINISHED:ABORTED", "cut off")):
        told = look(tmp_path, jobs=[Job(job_id="job-1", name="small", status=status)])
        assert told.standing(told.runs[0]) == standing


def test_a_clock_that_runs_behind_makes_no_run_quiet(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = going_on(tmp_path / "runs", experiment).path
    os.utime(folder / "rounds.jsonl", (4e9, 4e9))
    seen = look(tmp_path)
    assert seen.quiet(seen.runs[0]) == timedelta(0)


# ---- alarms


def test_a_site_that_is_gone_is_serious_and_one_that_is_stopped_worth_a_look(tmp_path: Path) -> None:
    gone = NodeState(name="site-2", status="gone", detail="exit code -9")
    stopped = NodeState(name="site-1", status="stopped")
    found = alarms(look(tmp_path, nodes={"site-1": stopped, "site-2": gone}))
    assert [(alarm.serious, alarm.what) for alarm in found] == [(True, "site-2 is gone"), (False, "site-1 is stopped")]
    assert "exit code -9" in found[0].text
    all_off = {site: NodeState(name=site, status="stopped") for site in SITES}
    assert alarms(look(tmp_path, server=NodeState(name="server", status="stopped"), nodes=all_off)) == ()


def test_ledgers_in_trouble_and_exhausted(tmp_path: Path) -> None:
    total = Budget(epsilon=epsilon([RELEASE], 1e-3).epsilon + 0.01, delta=1e-3)
    spend(tmp_path / "sites" / "site-1", planned=1, budgets=Budgets(per_job=total, total=total))
    spend(tmp_path / "sites" / "site-2")
    (tmp_path / "sites" / "site-2" / f"{LEDGER_FILE}.anchor").unlink()
    found = whats(alarms(look(tmp_path)))
    assert "True Ledger of site-2 cannot be relied on" in found
    assert "False Privacy budget of site-1 is exhausted" in found


def test_who_was_left_out_is_serious_in_the_last_round_only(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = going_on(tmp_path / "runs", experiment)
    folder.record(left_out(1, refused="site-2", silent="site-3"))
    found = whats(alarms(look(tmp_path)))
    assert "True site-2 was refused in round 2" in found
    assert "its norm is above" in found
    assert "True site-3 was silent in round 2" in found
    folder.record(left_out(2, silent="site-3"))
    found = whats(alarms(look(tmp_path)))
    assert "False site-2 was refused in round 2" in found
    assert "True site-3 was silent in round 3" in found
    assert "2 of 3 rounds" in found


def test_only_the_newest_run_of_an_experiment_counts(tmp_path: Path, experiment: ExperimentConfig) -> None:
    old = going_on(tmp_path / "runs", experiment)
    old.fail("RoundVoid: nobody")
    assert "True Run small/" in whats(alarms(look(tmp_path)))
    (old.path.parent / "20250101-000000-0000").mkdir()
    old.path.rename(old.path.parent / "20250101-000000-0000")
    completed(tmp_path / "runs", experiment)
    assert alarms(look(tmp_path)) == ()


def test_jobs_that_did_not_go_through(tmp_path: Path) -> None:
    def job(status: str, job_id: str = "1") -> Job:
        return Job(job_id=job_id, name="small", status=status)

    for status in ("SUBMITTED", "RUNNING", "FINISHED:COMPLETED"):
        assert alarms(look(tmp_path, jobs=[job(status)])) == ()
    for status in ("FINISHED:EXECUTION_EXCEPTION", "FINISHED:ABORTED", "something new"):
        assert f"says {status}" in whats(alarms(look(tmp_path, jobs=[job(status)])))
    assert alarms(look(tmp_path, jobs=[job("RUNNING", "2"), job("FINISHED:ABORTED")])) == ()


def test_an_audit_that_found_a_leak(tmp_path: Path, experiment: ExperimentConfig) -> None:
    leak = attack(interval(0.9, 0.8, 1.0), interval(0.5, 0.4, 0.6), 1e-9)
    audited(tmp_path / "runs", experiment, clean(attacks=(leak,)))
    seen = look(tmp_path)
    assert seen.last_audit is not None
    assert "says RED" in whats(alarms(seen))
