"""Jobs of a federation through NVFlare's own client interface: handed in, followed, downloaded, resumed."""

from __future__ import annotations

import io
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.api_spec import (
    AuthorizationError,
    InternalError,
    InvalidJobDefinition,
    NoConnection,
    SessionClosed,
)
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from custom.codec import RESULTS
from custom.config import ExperimentConfig
from custom.job_rules import SIGNATURES
from custom.run_folder import JOBS_FILE, RunFailed, RunFolder, check_receipt, run_folders
from custom.strict import ConfigError, require
from poc.federation import Federation

FINISHED = "FINISHED"
_CONTROLLER_ARGUMENT = "resume_run"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Followed:
    """How a job went.

    Attributes:
        job_id: NVFlare's.
        status: NVFlare's last word, such as ``FINISHED:COMPLETED``.
        refused: what sites said that did not accept the job, by site.
        folder: of the run at the server; None if the job never began.
    """

    job_id: str
    status: str
    refused: Mapping[str, str]
    folder: Path | None


@contextmanager
def session(federation: Federation, user: str | None = None, *, timeout_s: float = 10.0) -> Iterator[Session]:
    """Log in; the lead by default.

    Raises:
        ConfigError: no such user, or no server that answers.
    """
    name = federation.user("lead") if user is None else user
    known = federation.members.users
    require(name in known, argument="user", value=name, remedy=f"give one of {sorted(known)}")
    logging.getLogger("nvflare").setLevel(logging.CRITICAL)
    answers = f"server = {federation.members.server!r}: does not answer"
    try:
        with redirect_stdout(io.StringIO()):  # it says that it connects
            opened = new_secure_session(name, str(federation.kit(name)), timeout=timeout_s, auto_login_max_tries=1)
    except NoConnection as error:
        raise ConfigError(f"{answers}; is it up? fedct poc status") from error
    try:
        yield opened
    except (NoConnection, SessionClosed) as error:
        remedy = "fedct poc status tells when it is back; fedct poc resume JOB carries its run on"
        raise ConfigError(f"{answers} any more; {remedy}") from error
    finally:
        with suppress(Exception):  # there may be no server to say goodbye to
            opened.close()


def last_heard(opened: Session) -> dict[str, float]:
    """When the server last heard of each site that it knows, in seconds since the epoch.

    A site that was killed stays known for ten minutes.
    """
    return {client.name: float(client.last_connect_time or 0) for client in opened.get_system_info().client_info}


def submit(opened: Session, job: Path) -> str:
    """Hand in a job folder, signed by who is logged in; gives NVFlare's id of it.

    Raises:
        ConfigError: a user without the right, or a folder that is no job.
    """
    require(job.is_dir(), argument="job", value=str(job), remedy="no such folder; give a job's, such as jobs/ct_ddpm")
    with tempfile.TemporaryDirectory(prefix="fedct-") as base:
        # NVFlare writes its signatures into the folder that it is given.
        copy = Path(base) / job.resolve().name
        shutil.copytree(job, copy, ignore=shutil.ignore_patterns(*SIGNATURES))
        return _submitted(opened, copy, job)


def _submitted(opened: Session, copy: Path, job: Path) -> str:
    try:
        return str(opened.submit_job(str(copy)))
    except AuthorizationError as error:
        raise ConfigError(f"user = {opened.username!r}: may not submit jobs ({error}); ask a lead") from error
    except (InvalidJobDefinition, InternalError) as error:
        raise ConfigError(f"job = {str(job)!r}: {error}") from error


def follow(federation: Federation, opened: Session, job_id: str, say: Say, *, poll_s: float = 1.0) -> Followed:
    """Wait for a job's end; say what happens meanwhile."""
    told: set[str] = set()
    rounds: int | None = None
    while True:
        meta = opened.get_job_meta(job_id)
        status, refused = str(meta["status"]), refusals(meta)
        for site, why in refused.items():
            if site not in told:
                say(f"{site}: {why}")
                told.add(site)
        folder = run_of(federation, job_id)
        if folder is not None:
            records = RunFolder(folder).records()
            if rounds is None:  # those of an earlier job on the same run are no news
                rounds = 0 if RunFolder(folder).job_ids() == [job_id] else len(records)
            for record in records[rounds:]:
                say(record.told(RunFolder(folder).experiment().federation.rounds))
            rounds = len(records)
        if status.startswith(FINISHED):
            return Followed(job_id=job_id, status=status, refused=refused, folder=folder)
        time.sleep(poll_s)


def refusals(meta: Mapping[str, Any]) -> dict[str, str]:
    """What sites answered that did not take a job, from NVFlare's description of it."""
    details = (str(line).partition(": ") for line in meta.get("job_deploy_detail") or [])
    return {site: why.removeprefix("NVFLARE_ERROR: ") for site, _, why in details if why and why != "OK"}


def run_of(federation: Federation, job_id: str) -> Path | None:
    """The run folder in which a job works; None as long as it has none."""
    for file in sorted(federation.runs.glob(f"*/*/{JOBS_FILE}"), reverse=True):
        if job_id in RunFolder(file.parent).job_ids():
            return file.parent
    return None


def download(opened: Session, job_id: str, destination: Path) -> Path:
    """Fetch a job's products and hold the receipt against them; gives their folder.

    Raises:
        RunFailed: no receipt of a completed run is among them.
    """
    shutil.rmtree(destination / job_id, ignore_errors=True)
    location = Path(opened.download_job_result(job_id, str(destination)))
    found = sorted(location.rglob(f"{RESULTS}/receipt.json"))
    if len(found) != 1:
        raise RunFailed(f"{location}: no receipt: the job did not complete; fedct poc resume carries it on")
    check_receipt(found[0].parent)
    return found[0].parent


def unfinished_run(federation: Federation, experiment: ExperimentConfig) -> RunFolder:
    """The newest run of an experiment that was not completed; raises ``ConfigError`` if there is none."""
    for folder in reversed(run_folders(federation.runs, experiment.name)):
        if not _completed(folder) and RunFolder(folder).last_round() is not None:
            return RunFolder(folder)
    remedy = "every run is complete, or left no checkpoint; submit the job"
    raise ConfigError(f"job = {experiment.name!r}: nothing to resume: {remedy}")


def _completed(folder: Path) -> bool:
    try:
        check_receipt(folder)
    except RunFailed:
        return False
    return True


@contextmanager
def resuming(job: Path, run_id: str) -> Iterator[Path]:
    """A copy of a job's folder that carries on a run."""
    with tempfile.TemporaryDirectory(prefix="fedct-") as base:
        copy = Path(base) / job.resolve().name
        shutil.copytree(job, copy)
        file = copy / "app" / "config" / "config_fed_server.json"
        server = json.loads(file.read_text(encoding="utf-8"))
        server["workflows"][0].setdefault("args", {})[_CONTROLLER_ARGUMENT] = run_id
        file.write_text(json.dumps(server, indent=2), encoding="utf-8")
        yield copy


def end_running(opened: Session, run: RunFolder, *, timeout_s: float = 90.0) -> list[str]:
    """End the jobs that still work on a run: two on one run would ask the sites for the same rounds.

    Returns:
        Their ids.

    Raises:
        ConfigError: one does not end.
    """
    ended: list[str] = []
    deadline = time.monotonic() + timeout_s
    while True:
        listed = {str(job["job_id"]): str(job["status"]) for job in opened.list_jobs()}
        running = [job_id for job_id in run.job_ids() if not listed.get(job_id, FINISHED).startswith(FINISHED)]
        if not running:
            return ended
        late = time.monotonic() > deadline
        require(not late, argument="jobs", value=running, remedy="they do not end: fedct poc down, up, and again")
        for job_id in set(running) - set(ended):
            opened.abort_job(job_id)
            ended.append(job_id)
        time.sleep(1)
