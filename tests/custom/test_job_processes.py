"""The processes of a job with real processes: killed, ended, started anew; and what a site keeps of a job."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, SystemComponents
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.job_launcher_spec import JobProcessArgs, JobProcessEnv, JobReturnCode
from nvflare.apis.workspace import Workspace
from nvflare.private.event import fire_event
from nvflare.private.fed.client.client_engine import ClientEngine
from nvflare.utils.process_utils import ProcessAdapter, spawn_process

from custom.launchers.job_processes import RUNNING, JobProcess, ServerJobLauncher, SiteJobLauncher

JOB = "3f6f0c9e-0a1b-4c2d-8e3f-123456789abc"
SLEEPS = "import time; time.sleep(60)"
TOLD = (JobProcessEnv.AUTH_TOKEN, JobProcessEnv.TOKEN_SIGNATURE, JobProcessEnv.SSID, "HOME", "PYTHONPATH")
# Writes down how it was started, as JSON, into the folder that it is given as its workspace.
TELLS = (
    f"names = {TOLD!r}"
    + """
import json, os, sys
where = sys.argv[sys.argv.index("-w") + 1]
said = {"argv": sys.argv[1:], "environment": {name: os.environ.get(name) for name in names}}
with open(os.path.join(where, "said.json"), "w") as stream:
    json.dump(said, stream)
"""
)


class Started:
    """Starts processes of one command and keeps them."""

    def __init__(self, code: str = SLEEPS) -> None:
        self.code = code
        self.processes: list[ProcessAdapter] = []

    def __call__(self) -> ProcessAdapter:
        process = spawn_process([sys.executable, "-c", self.code], dict(os.environ))
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """The way a machine without memory does it: not through NVFlare."""
        pid = self.processes[-1].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def until(self, count: int) -> None:
        deadline = time.monotonic() + 10
        while len(self.processes) < count:
            assert time.monotonic() < deadline, f"{len(self.processes)} started, not {count}"
            time.sleep(0.01)

    def end(self) -> None:
        for process in self.processes:
            process.terminate()
            process.wait()


@pytest.fixture
def started() -> Iterator[Started]:
    start = Started()
    yield start
    start.end()


def waiting(job: JobProcess) -> threading.Thread:
    """As NVFlare does: a thread waits for the end of the job."""
    thread = threading.Thread(target=job.wait, daemon=True)
    thread.start()
    return thread


# ---- a job's process


@pytest.mark.parametrize("killed", [JobReturnCode.UNKNOWN, JobReturnCode.EXECUTION_ERROR])
@pytest.mark.parametrize("restarts", [0, 2])
def test_a_killed_process_is_started_anew_that_often_and_then_ends_with_the_code_for_it(
    started: Started, restarts: int, killed: int
) -> None:
    job = JobProcess(started, restarts=restarts, killed=killed)
    thread = waiting(job)
    for number in range(1, restarts + 2):
        started.until(number)
        assert thread.is_alive()
        started.kill()
    thread.join(10)
    assert not thread.is_alive()
    assert len(started.processes) == restarts + 1
    assert job.poll() == killed


def test_a_process_that_runs_is_of_unknown_outcome(started: Started) -> None:
    assert JobProcess(started, restarts=3, killed=JobReturnCode.EXECUTION_ERROR).poll() == JobReturnCode.UNKNOWN


def test_a_process_that_was_terminated_is_not_started_anew(started: Started) -> None:
    job = JobProcess(started, restarts=3, killed=JobReturnCode.UNKNOWN)
    thread = waiting(job)
    job.terminate()
    thread.join(10)
    assert not thread.is_alive()
    assert len(started.processes) == 1
    assert job.poll() == JobReturnCode.UNKNOWN


def test_the_process_that_took_the_place_of_a_killed_one_is_the_one_that_terminate_ends(started: Started) -> None:
    job = JobProcess(started, restarts=3, killed=JobReturnCode.UNKNOWN)
    thread = waiting(job)
    started.kill()
    started.until(2)
    job.terminate()
    thread.join(10)
    assert not thread.is_alive()
    assert len(started.processes) == 2
    assert all(process.poll() == -signal.SIGKILL for process in started.processes)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (0, JobReturnCode.SUCCESS),
        (1, JobReturnCode.EXECUTION_ERROR),
        (9, JobReturnCode.ABORTED),
        (3, JobReturnCode.EXECUTION_ERROR),
        (127, JobReturnCode.EXECUTION_ERROR),
    ],
)
def test_a_process_that_ends_by_itself_is_not_started_anew(started: Started, code: int, told: int) -> None:
    started.code = f"raise SystemExit({code})"
    job = JobProcess(started, restarts=3, killed=JobReturnCode.UNKNOWN)
    job.wait()
    assert job.poll() == told
    assert len(started.processes) == 1


def test_a_process_that_ends_well_after_it_was_killed_once_has_succeeded(started: Started) -> None:
    job = JobProcess(started, restarts=3, killed=JobReturnCode.UNKNOWN)
    started.code = "raise SystemExit(0)"
    thread = waiting(job)
    started.kill()
    thread.join(10)
    assert not thread.is_alive()
    assert job.poll() == JobReturnCode.SUCCESS
    assert len(started.processes) == 2


# ---- launchers


class StandInEngine:
    """Stands in for NVFlare's client engine, which needs a server: notes what it was asked to start."""

    def __init__(self, ssid: str) -> None:
        self.client = SimpleNamespace(ssid=ssid)
        self.started: list[dict[str, Any]] = []
        self.unfinished_asked: list[FLContext] = []
        self.job_runner = SimpleNamespace(update_unfinished_jobs=self.unfinished_asked.append)

    def get_component(self, name: str) -> str:
        assert name == SystemComponents.RESOURCE_MANAGER
        return "the site's resource manager"

    def start_app(self, *arguments: Any, **options: Any) -> str:
        asked = inspect.signature(ClientEngine.start_app).bind(self, *arguments, **options)
        self.started.append({name: value for name, value in asked.arguments.items() if name != "self"})
        return "Start the client app..."


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    root = tmp_path / "a kit with spaces"
    for name in ("startup", "local"):
        (root / name).mkdir(parents=True)
    return Workspace(str(root), site_name="site-1")


def arguments(workspace: Workspace, *, ssid: str = "life-1", user: str = "1") -> dict[str, tuple[str, str]]:
    """What NVFlare hands a launcher, with a command of ours in place of its module."""
    return {
        JobProcessArgs.EXE_MODULE: ("-c", TELLS),
        JobProcessArgs.WORKSPACE: ("-w", workspace.root_dir),
        JobProcessArgs.JOB_ID: ("-n", JOB),
        JobProcessArgs.AUTH_TOKEN: ("-t", f"token-{user}"),
        JobProcessArgs.TOKEN_SIGNATURE: ("-ts", f"signature of token-{user}"),
        JobProcessArgs.SSID: ("-d", ssid),
        JobProcessArgs.APP_ROOT: ("-r", "of a server only"),
        JobProcessArgs.TARGET: ("-g", "grpc://local host:8002"),
        JobProcessArgs.OPTIONS: ("--set", "secure_train=true uid=site-1  org=hospital"),
    }


def context(workspace: Workspace, engine: StandInEngine, **changes: str) -> FLContext:
    fl_ctx = FLContextManager(engine=engine, identity_name="site-1", job_id="").new_context()
    fl_ctx.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace, private=True, sticky=False)
    fl_ctx.set_prop(FLContextKey.JOB_PROCESS_ARGS, arguments(workspace, **changes), private=True, sticky=False)
    return fl_ctx


def meta(job_id: str = JOB) -> dict[str, Any]:
    return {JobMetaKey.JOB_ID.value: job_id, "name": "small"}


def launch(launcher: SiteJobLauncher | ServerJobLauncher, workspace: Workspace, fl_ctx: FLContext) -> dict[str, Any]:
    """Start a job and give what its process said of itself."""
    handle = launcher.launch_job(meta(), fl_ctx)
    handle.wait()
    assert handle.poll() == JobReturnCode.SUCCESS
    said: dict[str, Any] = json.loads((Path(workspace.root_dir) / "said.json").read_text())
    return said


def kept(workspace: Workspace) -> Path:
    return Path(workspace.root_dir) / RUNNING / f"{JOB}.json"


def test_a_site_hands_over_whole_arguments_and_no_credentials_among_them(workspace: Workspace) -> None:
    said = launch(SiteJobLauncher(), workspace, context(workspace, StandInEngine("life-1")))
    assert said["argv"] == [
        *("-w", workspace.root_dir),
        *("-n", JOB),
        *("-g", "grpc://local host:8002"),
        *("--set", "secure_train=true", "uid=site-1", "org=hospital"),
    ]
    environment = said["environment"]
    assert environment[JobProcessEnv.AUTH_TOKEN] == "token-1"
    assert environment[JobProcessEnv.TOKEN_SIGNATURE] == "signature of token-1"
    assert environment[JobProcessEnv.SSID] == "life-1"
    assert environment["HOME"] == os.environ.get("HOME")


def test_code_beside_the_job_is_not_put_on_the_path_of_its_process(workspace: Workspace) -> None:
    (Path(workspace.root_dir) / JOB / "app_site-1" / "custom").mkdir(parents=True)
    said = launch(SiteJobLauncher(), workspace, context(workspace, StandInEngine("life-1")))
    assert said["environment"]["PYTHONPATH"] == os.environ.get("PYTHONPATH")


def test_a_server_hands_over_its_own_arguments_and_keeps_nothing(workspace: Workspace) -> None:
    said = launch(ServerJobLauncher(), workspace, context(workspace, StandInEngine("life-1")))
    assert said["argv"] == [
        *("-w", workspace.root_dir),
        *("-r", "of a server only"),
        *("-n", JOB),
        *("--set", "secure_train=true", "uid=site-1", "org=hospital"),
    ]
    assert not kept(workspace).exists()


def test_launchers_offer_themselves_when_nvflare_looks_for_one(workspace: Workspace) -> None:
    for launcher in (SiteJobLauncher(), ServerJobLauncher()):
        fl_ctx = context(workspace, StandInEngine("life-1"))
        fire_event(EventType.BEFORE_JOB_LAUNCH, [launcher], fl_ctx)
        assert fl_ctx.get_prop(FLContextKey.JOB_LAUNCHER) == [launcher]


def test_a_server_that_starts_says_of_the_jobs_of_its_earlier_life_that_they_ended(workspace: Workspace) -> None:
    engine = StandInEngine("life-2")
    fl_ctx = context(workspace, engine)
    fire_event(EventType.JOB_COMPLETED, [ServerJobLauncher()], fl_ctx)
    assert not engine.unfinished_asked
    fire_event(EventType.SYSTEM_START, [ServerJobLauncher()], fl_ctx)
    assert engine.unfinished_asked == [fl_ctx]


def test_a_sites_credentials_are_kept_for_its_eyes_only(workspace: Workspace) -> None:
    launch(SiteJobLauncher(), workspace, context(workspace, StandInEngine("life-1")))
    assert kept(workspace).stat().st_mode & 0o777 == 0o600
    assert json.loads(kept(workspace).read_text()) == {
        "meta": meta(),
        "credentials": {
            JobProcessArgs.AUTH_TOKEN: "token-1",
            JobProcessArgs.TOKEN_SIGNATURE: "signature of token-1",
            JobProcessArgs.SSID: "life-1",
        },
    }


def test_a_site_that_was_restarted_carries_on_with_the_credentials_that_the_servers_job_knows(
    workspace: Workspace,
) -> None:
    launch(SiteJobLauncher(), workspace, context(workspace, StandInEngine("life-1")))
    said = launch(SiteJobLauncher(), workspace, context(workspace, StandInEngine("life-1"), user="2"))
    assert said["environment"][JobProcessEnv.AUTH_TOKEN] == "token-1"
    assert said["environment"][JobProcessEnv.TOKEN_SIGNATURE] == "signature of token-1"


def test_credentials_are_forgotten_when_the_job_is_done_and_no_sooner(workspace: Workspace) -> None:
    launcher = SiteJobLauncher()
    fl_ctx = context(workspace, StandInEngine("life-1"))
    launch(launcher, workspace, fl_ctx)
    fl_ctx.set_prop(FLContextKey.CURRENT_JOB_ID, JOB, private=True, sticky=False)
    for event in (EventType.START_RUN, EventType.END_RUN, EventType.AFTER_JOB_LAUNCH, EventType.SYSTEM_END):
        fire_event(event, [launcher], fl_ctx)
        assert kept(workspace).is_file(), event
    fl_ctx.set_prop(FLContextKey.CURRENT_JOB_ID, "another-job", private=True, sticky=False)
    fire_event(EventType.JOB_COMPLETED, [launcher], fl_ctx)
    assert kept(workspace).is_file()
    fl_ctx.set_prop(FLContextKey.CURRENT_JOB_ID, JOB, private=True, sticky=False)
    fire_event(EventType.JOB_COMPLETED, [launcher], fl_ctx)
    assert not kept(workspace).exists()
    said = launch(launcher, workspace, context(workspace, StandInEngine("life-1"), user="2"))
    assert said["environment"][JobProcessEnv.AUTH_TOKEN] == "token-2"


def test_a_site_that_starts_carries_on_its_jobs_of_the_servers_present_life_only(workspace: Workspace) -> None:
    launch(SiteJobLauncher(), workspace, context(workspace, StandInEngine("life-1")))
    engine = StandInEngine("life-1")
    fire_event(EventType.SYSTEM_START, [SiteJobLauncher()], context(workspace, engine))
    assert engine.started == [
        {"job_id": JOB, "job_meta": meta(), "resource_manager": "the site's resource manager"},
    ]
    assert kept(workspace).is_file()
    later = StandInEngine("life-2")
    fire_event(EventType.SYSTEM_START, [SiteJobLauncher()], context(workspace, later))
    assert later.started == []
    assert not kept(workspace).exists()


def test_a_site_that_had_no_jobs_starts_none(workspace: Workspace) -> None:
    engine = StandInEngine("life-1")
    fire_event(EventType.SYSTEM_START, [SiteJobLauncher()], context(workspace, engine))
    assert engine.started == []


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "", ".", "a.json", "a\nb", "a" * 82])
def test_what_is_no_name_of_a_job_starts_nothing_and_writes_nothing(workspace: Workspace, name: str) -> None:
    launcher, fl_ctx = SiteJobLauncher(), context(workspace, StandInEngine("life-1"))
    with pytest.raises(ValueError, match="job_id = "):
        launcher.launch_job(meta(name), fl_ctx)
    victim = Path(workspace.root_dir) / "x.json"
    victim.write_text("here")
    fl_ctx.set_prop(FLContextKey.CURRENT_JOB_ID, name, private=True, sticky=False)
    with pytest.raises(ValueError, match="job_id = "):
        launcher.handle_event(EventType.JOB_COMPLETED, fl_ctx)
    assert victim.is_file()
    assert not (Path(workspace.root_dir) / RUNNING).exists()
    assert not (Path(workspace.root_dir) / "said.json").exists()
