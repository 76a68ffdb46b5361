"""What is known of a federation that runs on one machine, at one moment.

It is read from what the nodes leave on disk: the server's run folders and each site's ledger. Nothing is written: where
there is no ledger none is made, nor a secret. What cannot be read is said, and never taken for nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from jsonschema import Draft202012Validator

from custom.config import EXPERIMENT_FILE, ExperimentConfig
from custom.run_folder import AUDIT_FILE, MODEL_FILE, RUN_ID, RoundRecord, RunFailed, RunFolder, check_receipt
from custom.strict import ConfigError, require
from medical_data.errors import MedicalDataError
from privacy.errors import PrivacyError
from privacy.ledger import LEDGER_FILE, Statement

if TYPE_CHECKING:
    from privacy.audit.report.document import Audit

NodeStatus = Literal["ready", "starting", "gone", "stopped"]
Outcome = Literal["completed", "failed", "unfinished"]
Standing = Literal["completed", "failed", "going on", "quiet", "cut off"]

# What a job's state is called in NVFlare (RunStatus) as long as nothing is wrong with it.
SOUND_JOBS = frozenset({"SUBMITTED", "APPROVED", "DISPATCHED", "RUNNING", "FINISHED:COMPLETED"})
# Beside the wait for the sites: the server draws samples, which may take minutes for a large network.
QUIET_MARGIN_S = 900.0
MOST_RUNS = 20  # that are read; older ones are counted

_GRID = re.compile(r"round_(\d{1,9})\.png")
_FIGURES = {"type": "object", "additionalProperties": {"type": "number"}}
_NAMES = {"type": "array", "items": {"type": "string"}}
_ROUND = {
    "type": "object",
    "properties": {
        "round_number": {"type": "integer", "minimum": 0},
        "asked": _NAMES,
        "accepted": {"type": "object", "additionalProperties": _FIGURES},
        "refused": {"type": "object", "additionalProperties": {"type": "string"}},
        "silent": _NAMES,
        "seconds": {"type": "number", "minimum": 0},
        "mean": _FIGURES,
    },
    "required": ["round_number", "asked", "accepted", "refused", "silent", "seconds"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """The server's or a site's process, as whoever started it sees it.

    Attributes:
        name: of the node in the federation.
        status: ``ready`` takes part; ``starting`` does not yet; ``gone`` has ended and nobody told it to; ``stopped``
            was told to, or was never started.
        pid: of its process; None where there is none or it is not known.
        memory_bytes: resident memory of its processes together; None if it is not known.
        detail: what else is known, such as an exit code.

    Raises:
        ConfigError: another status, or a number that cannot be.
    """

    name: str
    status: NodeStatus
    pid: int | None = None
    memory_bytes: int | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        known = get_args(NodeStatus)
        require(self.status in known, argument="status", value=self.status, remedy=f"give one of {list(known)}")
        for argument, value, least in (("pid", self.pid, 1), ("memory_bytes", self.memory_bytes, 0)):
            remedy = f"give an integer of at least {least}, or None"
            require(
                value is None or (type(value) is int and value >= least), argument=argument, value=value, remedy=remedy
            )


@dataclass(frozen=True, kw_only=True)
class LedgerView:
    """A site's ledger, read. Without statement and without trouble nothing was ever released under it.

    Attributes:
        statement: of the verified ledger.
        trouble: why there is no statement although there should be one: then what was spent is not known.

    Raises:
        ConfigError: a statement that is in trouble.
    """

    statement: Statement | None = None
    trouble: str = ""

    def __post_init__(self) -> None:
        remedy = "a ledger that is in trouble states nothing: give one of the two"
        require(not (self.statement and self.trouble), argument="trouble", value=self.trouble, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class SiteState:
    """One hospital.

    Attributes:
        node: its process.
        ledger: what was spent on its patients' privacy.
    """

    node: NodeState
    ledger: LedgerView

    @property
    def name(self) -> str:
        """Of the site in the federation."""
        return self.node.name


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as the server lists it: one that was refused before it began has no run.

    Attributes:
        job_id: the server's name of it.
        name: of the job folder.
        status: in NVFlare's words (RunStatus), such as ``RUNNING`` or ``FINISHED:ABORTED``.
        submitted: when, as the server says it; empty if it is not known.
    """

    job_id: str
    name: str
    status: str
    submitted: str = ""

    @property
    def sound(self) -> bool:
        """Nothing is wrong with it so far; a status that is not known is not sound."""
        return self.status in SOUND_JOBS

    @property
    def over(self) -> bool:
        """Nothing more will come of it."""
        return self.status.startswith("FINISHED")


@dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """Samples of the model after so many rounds.

    Attributes:
        rounds_done: of the model that drew them.
        file: a PNG.
    """

    rounds_done: int
    file: Path


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run as its folder tells it.

    Attributes:
        experiment: name of the experiment.
        run_id: of the run.
        started: when, UTC.
        last_change: when something was last written to its folder, UTC.
        outcome: by its receipt; ``unfinished`` if there is none. ``completed`` only if the model, or the audit, is the
            one that the receipt vouches for.
        reason: why it failed, or why a completed one ended early; else empty.
        config: its configuration; None if it cannot be read.
        rounds: those that are done, in order; of one that was repeated, the last.
        grids: samples by rounds done, the final ones last.
        mean_image: the noisy mean image that the sites released before training; None if they did not.
        figures: of the finished model, mean over the sites; what the sites withhold is not there.
        job_ids: the server's names of the jobs that worked on it, in order; empty if it did not say.
        product_sha256: of the model or the audit; None if it is not finished.
        audit: the report of an audit whose verdict follows from what stands in it; None of a training.
        problems: what could not be read.
    """

    experiment: str
    run_id: str
    started: datetime
    last_change: datetime
    outcome: Outcome
    reason: str = ""
    config: ExperimentConfig | None = None
    rounds: tuple[RoundRecord, ...] = ()
    grids: tuple[SampleGrid, ...] = ()
    mean_image: Path | None = None
    figures: Mapping[str, float]
    job_ids: tuple[str, ...] = ()
    product_sha256: str | None = None
    audit: Audit | None = None
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``<experiment>/<run id>``."""
        return f"{self.experiment}/{self.run_id}"

    @property
    def is_audit(self) -> bool:
        """It attacks a model and trains none."""
        return self.config is not None and self.config.audit is not None

    @property
    def rounds_done(self) -> int:
        """Of a training."""
        return self.rounds[-1].round_number + 1 if self.rounds else 0

    @property
    def rounds_asked(self) -> int | None:
        """Of a training; None if the configuration cannot be read."""
        return None if self.config is None else self.config.federation.rounds


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A federation at one moment.

    Attributes:
        name: of the federation.
        written_at: the moment, UTC.
        server: the server's process.
        sites: in the order of their names.
        jobs: as the server lists them, newest first; empty if nobody asked it.
        runs: newest first, at most ``MOST_RUNS``.
        older_runs: number of those that were not read.
    """

    name: str
    written_at: datetime
    server: NodeState
    sites: tuple[SiteState, ...]
    jobs: tuple[Job, ...] = ()
    runs: tuple[RunView, ...] = ()
    older_runs: int = 0

    @property
    def nodes(self) -> tuple[NodeState, ...]:
        """The server's, then the sites'."""
        return (self.server, *(site.node for site in self.sites))

    @property
    def last_audit(self) -> RunView | None:
        """The newest audit that was completed."""
        return next((run for run in self.runs if run.audit is not None and run.outcome == "completed"), None)

    def standing(self, run: RunView) -> Standing:
        """How a run stands: one without a receipt goes on, is quiet for longer than a round may last, or was cut off.

        It was cut off if the server is gone or stopped, or says that the last job on it is over. A quiet one may
        still go on: nobody can tell from its folder.
        """
        if run.outcome != "unfinished":
            return run.outcome
        over = any(job.job_id == run.job_ids[-1] and job.over for job in self.jobs) if run.job_ids else False
        if over or self.server.status in ("gone", "stopped"):
            return "cut off"
        patience = QUIET_MARGIN_S + (run.config.federation.round_timeout_s if run.config is not None else 0.0)
        return "quiet" if self.quiet(run) > timedelta(seconds=patience) else "going on"

    def quiet(self, run: RunView) -> timedelta:
        """For how long a run has written nothing."""
        return max(self.written_at - run.last_change, timedelta(0))


def snapshot(
    name: str,
    *,
    server: NodeState,
    nodes: Mapping[str, NodeState],
    homes: Mapping[str, Path],
    runs: Path,
    jobs: Collection[Job] = (),
    written_at: datetime | None = None,
) -> Snapshot:
    """Look at everything once.

    Args:
        name: of the federation.
        server: the server's process.
        nodes: each site's process, by the site's name.
        homes: each site's own folder, which holds its ledger.
        runs: the server's folder of runs; there need not be one yet.
        jobs: as the server lists them, newest first.
        written_at: the moment, with a time zone; now by default.

    Raises:
        ConfigError: a site without a process or without a home, or a time without a time zone.
    """
    remedy = f"give one for each of {sorted(homes)}, as homes does"
    require(set(nodes) == set(homes), argument="nodes", value=sorted(nodes), remedy=remedy)
    for site, node in nodes.items():
        require(node.name == site, argument=f"nodes[{site!r}].name", value=node.name, remedy=f"give {site!r}")
    now = datetime.now(timezone.utc) if written_at is None else written_at
    require(now.tzinfo is not None, argument="written_at", value=str(now), remedy="give a time with its zone")
    folders = _run_folders(runs)
    return Snapshot(
        name=name,
        written_at=now.astimezone(timezone.utc),
        server=server,
        sites=tuple(site_view(node=nodes[site], home=homes[site]) for site in sorted(homes)),
        jobs=tuple(jobs),
        runs=tuple(run_view(folder) for folder in folders[:MOST_RUNS]),
        older_runs=len(folders[MOST_RUNS:]),
    )


def site_view(*, node: NodeState, home: Path) -> SiteState:
    """A site and its ledger.

    Args:
        node: its process.
        home: its own folder.
    """
    return SiteState(node=node, ledger=ledger_view(home))


def ledger_view(home: Path) -> LedgerView:
    """The ledger in a site's home, verified as ``fedct ledger`` does; none is made, nor a secret.

    It is held for as long as its ε is computed, seconds after a new charge: a site that charges waits.
    """
    from custom.site_state import PRIVATE_STATE

    database, anchor = home / LEDGER_FILE, home / f"{LEDGER_FILE}.anchor"
    try:
        there = database.exists(), anchor.exists()
        if not any(there):
            if any((home / PRIVATE_STATE).rglob("*.safetensors")):
                return LedgerView(
                    trouble=f"gone, but {PRIVATE_STATE} shows that jobs have run: restore it from a backup"
                )
            return LedgerView()
        if not all(there):
            missing = database if there[1] else anchor
            return LedgerView(trouble=f"{missing.name} is not there: look with fedct ledger, restore it from a backup")
        if not (home / "secret").is_file():
            return LedgerView(trouble="the site's secret is gone, so that nothing can be verified: restore it")
        return _statement(home)
    except (PrivacyError, MedicalDataError, OSError, ValueError) as error:
        return LedgerView(trouble=_said(error))


def _statement(home: Path) -> LedgerView:
    from custom.site_ledger import open_ledger  # brings PyTorch
    from privacy.ledger import ReleaseRefused

    try:
        return LedgerView(statement=open_ledger(home).statement())
    except ReleaseRefused:  # a verified ledger in which nothing was ever set aside
        return LedgerView()


def run_view(folder: Path) -> RunView:
    """A run, from the folder that it leaves on the server.

    Args:
        folder: ``runs/<experiment>/<run id>``.

    Raises:
        ConfigError: a folder that is not named like a run.
    """
    remedy = "give the folder of a run, such as runs/ct_ddpm/20260131-104500-0af3"
    require(RUN_ID.fullmatch(folder.name) is not None, argument="folder", value=folder.name, remedy=remedy)
    problems: list[str] = []
    config = _config(folder, problems)
    outcome, reason, sha256 = _outcome(folder)
    rounds = _rounds(folder, problems, finished=outcome != "unfinished")
    started = _started(folder.name)
    audit = None
    if outcome == "completed" and (folder / AUDIT_FILE).is_file():
        audit = _audit(folder / AUDIT_FILE, problems)
    mean_image = folder / "mean_image.png"
    return RunView(
        experiment=folder.parent.name,
        run_id=folder.name,
        started=started,
        last_change=_last_change(folder, started),
        outcome=outcome,
        reason=reason,
        config=config,
        rounds=rounds,
        grids=_grids(folder, rounds[-1].round_number + 1 if rounds else 0),
        mean_image=mean_image if mean_image.is_file() else None,
        figures=_figures(folder, problems),
        job_ids=tuple(RunFolder(folder).job_ids()),
        product_sha256=sha256,
        audit=audit,
        problems=tuple(problems),
    )


def newest_runs(snapshot: Snapshot) -> tuple[RunView, ...]:
    """The newest run of each experiment, newest first."""
    newest: dict[str, RunView] = {}
    for run in snapshot.runs:
        newest.setdefault(run.experiment, run)
    return tuple(newest.values())


def _run_folders(runs: Path) -> list[Path]:
    """Folders of runs, newest first."""
    found = [folder for folder in runs.glob("*/*") if RUN_ID.fullmatch(folder.name) and folder.is_dir()]
    return sorted(found, key=lambda folder: (folder.name, folder.parent.name), reverse=True)


def _started(run_id: str) -> datetime:
    try:
        return datetime.strptime(run_id[:15], "%Y%m%d-%H%M%S").replace(tzinfo=timezone.utc)
    except ValueError as error:
        raise ConfigError(f"folder = {run_id!r}: give the folder of a run, whose name begins with its time") from error


def _last_change(folder: Path, started: datetime) -> datetime:
    """When anything in a folder was last written, never before the run began."""
    times = [_written(file) for file in (folder, *folder.rglob("*"))]
    return datetime.fromtimestamp(max(started.timestamp(), *times), timezone.utc)


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # an old checkpoint, dropped just now
        return 0.0


def _config(folder: Path, problems: list[str]) -> ExperimentConfig | None:
    try:
        return ExperimentConfig.load(folder / EXPERIMENT_FILE)
    except (OSError, ValueError) as error:
        problems.append(f"{EXPERIMENT_FILE}: {_said(error)}")
        return None


def _outcome(folder: Path) -> tuple[Outcome, str, str | None]:
    """What the receipt says, why, and the hash of what it vouches for; any receipt that does not hold is a failure."""
    file = folder / "receipt.json"
    try:
        stamp = tuple(
            (status.st_mtime_ns, status.st_size)
            for status in (path.stat() for path in (file, folder / MODEL_FILE, folder / AUDIT_FILE) if path.is_file())
        )
        if not file.exists():
            return "unfinished", "", None
        text = file.read_bytes()
        receipt = _json(text)
        if not isinstance(receipt, dict):
            return "failed", "the receipt is no JSON object; repeat the run", None
        reason = _broken(folder, stamp, text)
    except (OSError, ValueError) as error:
        return "failed", f"the receipt cannot be read: {_said(error)}", None
    if reason is not None:
        return "failed", reason, None
    early = receipt.get("reason")
    return "completed", "" if early is None else str(early), str(receipt.get("product_sha256"))


@lru_cache(maxsize=4 * MOST_RUNS)
def _broken(folder: Path, stamp: tuple[tuple[int, int], ...], text: bytes) -> str | None:
    """Why a receipt does not hold, or None. A model that is as old and as large as before is not hashed again."""
    try:
        check_receipt(folder)
    except RunFailed as error:
        return str(error).removeprefix(f"{folder}: ").removeprefix("failed: ")
    return None


def _rounds(folder: Path, problems: list[str], *, finished: bool) -> tuple[RoundRecord, ...]:
    """The lines of ``rounds.jsonl``. The last one may be half written while the run goes on."""
    name = "rounds.jsonl"
    try:
        content = (folder / name).read_bytes()
    except FileNotFoundError:
        return ()
    except OSError as error:
        problems.append(f"{name}: {_said(error)}")
        return ()
    *lines, rest = content.split(b"\n")
    if rest and finished:
        lines.append(rest)
    validator, by_round = Draft202012Validator(_ROUND), dict[int, RoundRecord]()
    for number, line in enumerate(lines, start=1):
        try:
            values = _json(line)
        except ValueError:
            values = None
        if not validator.is_valid(values):
            problems.append(f"line {number} of {name} is not that of a round")
            continue
        record = RoundRecord(**{**values, "round_number": int(values["round_number"])})
        by_round[record.round_number] = record
    return tuple(by_round[number] for number in sorted(by_round))


def _grids(folder: Path, rounds_done: int) -> tuple[SampleGrid, ...]:
    found = {
        int(match.group(1)): file
        for file in folder.glob("samples/round_*.png")
        if (match := _GRID.fullmatch(file.name)) is not None
    }
    if (folder / "samples.png").is_file():
        found[rounds_done] = folder / "samples.png"
    return tuple(SampleGrid(rounds_done=rounds, file=found[rounds]) for rounds in sorted(found))


def _figures(folder: Path, problems: list[str]) -> dict[str, float]:
    name = "metrics.json"
    try:
        metrics = _json((folder / name).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{name}: {_said(error)}")
        return {}
    mean = metrics.get("mean", {}) if isinstance(metrics, dict) else None  # an audit leaves its verdict instead
    if not Draft202012Validator(_FIGURES).is_valid(mean):
        problems.append(f"{name} does not hold the figures of a model")
        return {}
    return {str(figure): float(value) for figure, value in (mean or {}).items()}


def _audit(file: Path, problems: list[str]) -> Audit | None:
    from privacy.audit.report.document import load_audit

    try:
        return load_audit(file)
    except PrivacyError as error:
        problems.append(_said(error))
        return None


def _json(text: bytes) -> Any:
    """Parsed; a ValueError also for numbers that are not finite."""

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError("a number that is not finite")
        return value

    return json.loads(text, parse_float=finite, parse_constant=finite)


def _said(error: Exception) -> str:
    """An error in words, without the paths of this machine that the operating system adds."""
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error.strerror or 'cannot be read'}"
    return str(error) or type(error).__name__
