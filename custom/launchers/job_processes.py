"""The processes of a job: started with whole arguments and, at a site, started anew when they were killed.

NVFlare's own launchers split a command line at spaces: no job would start in a folder with a space in its name. And a
site's job process that is killed (out of memory, by hand) ends the job for every hospital. Here it is started anew,
asks for its task again and gets it; what a round needs lies on the site's disk. If the whole site was killed, its next
start carries on the jobs that it had, as long as the server has not been restarted meanwhile.

Code that comes with a job is not put on the path of its process: sites deny it, and this is the second lock.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.job_launcher_spec import (
    JobHandleSpec,
    JobLauncherSpec,
    JobProcessArgs,
    JobReturnCode,
    add_launcher,
)
from nvflare.apis.workspace import Workspace
from nvflare.app_common.job_launcher.process_launcher import JOB_RETURN_CODE_MAPPING
from nvflare.utils.job_launcher_utils import get_client_job_args, get_credential_env, get_server_job_args
from nvflare.utils.process_utils import ProcessAdapter, spawn_process

from custom.atomic import write_atomically

RUNNING = "running_jobs"  # folder in a site's workspace
CREDENTIALS = (JobProcessArgs.AUTH_TOKEN, JobProcessArgs.TOKEN_SIGNATURE, JobProcessArgs.SSID)

Arguments = Mapping[str, tuple[str, Any]]


class ServerJobLauncher(JobLauncherSpec):
    """Starts a job's process at the server, once."""

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> JobHandleSpec:
        """Start it; its end is the job's end."""
        arguments = fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS)
        return JobProcess(
            lambda: _spawn(arguments, get_server_job_args()), restarts=0, killed=JobReturnCode.EXECUTION_ERROR
        )

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Offer itself when NVFlare looks for a launcher; say of an earlier life's jobs that they ended."""
        if event_type == EventType.BEFORE_JOB_LAUNCH:
            add_launcher(self, fl_ctx)
        elif event_type == EventType.SYSTEM_START:
            # NVFlare has this and does not call it: the job of a server that was killed would run for ever.
            fl_ctx.get_engine().job_runner.update_unfinished_jobs(fl_ctx)


class SiteJobLauncher(JobLauncherSpec):
    """Starts a job's process at a site, and starts it anew when it was killed.

    Args:
        restarts: how often for one start of the job; then the site is silent and the others go on without it.
    """

    def __init__(self, restarts: int = 3) -> None:
        super().__init__()
        self._restarts = restarts

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> JobHandleSpec:
        """Start it, or carry it on with the credentials by which the server's job knows this site."""
        arguments = dict(fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS))
        workspace: Workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        kept = _kept(workspace, str(job_meta[JobMetaKey.JOB_ID.value]))
        if kept.is_file():
            known = json.loads(kept.read_text(encoding="utf-8"))["credentials"]
            arguments |= {name: (arguments[name][0], known[name]) for name in CREDENTIALS}
        else:
            credentials = {name: arguments[name][1] for name in CREDENTIALS}
            write_atomically(kept, json.dumps({"meta": job_meta, "credentials": credentials}).encode())  # mode 0600
        return JobProcess(
            lambda: _spawn(arguments, get_client_job_args()), restarts=self._restarts, killed=JobReturnCode.UNKNOWN
        )

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Offer itself; carry on the jobs of an earlier life of this site; forget those that ended."""
        if event_type == EventType.BEFORE_JOB_LAUNCH:
            add_launcher(self, fl_ctx)
        elif event_type == EventType.SYSTEM_START:
            self._carry_on(fl_ctx)
        elif event_type == EventType.JOB_COMPLETED:
            workspace: Workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
            _kept(workspace, str(fl_ctx.get_prop(FLContextKey.CURRENT_JOB_ID))).unlink(missing_ok=True)

    def _carry_on(self, fl_ctx: FLContext) -> None:
        workspace: Workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        engine = fl_ctx.get_engine()
        session = engine.client.ssid  # of the server's present life
        for kept in sorted((Path(workspace.root_dir) / RUNNING).glob("*.json")):
            job = json.loads(kept.read_text(encoding="utf-8"))
            if job["credentials"][JobProcessArgs.SSID] != session:
                kept.unlink()  # the server has been restarted, which ended the job
                continue
            self.log_info(fl_ctx, f"carrying on job {kept.stem}")
            said = engine.start_app(
                kept.stem,
                job_meta=job["meta"],
                resource_manager=engine.get_component(SystemComponents.RESOURCE_MANAGER),
            )
            self.log_info(fl_ctx, f"job {kept.stem}: {said}")


class JobProcess(JobHandleSpec):
    """A process that is started anew when it was killed.

    Args:
        start: starts it.
        restarts: how often at most.
        killed: what to say of one that was killed and not started anew. Of a site's process every code but ``UNKNOWN``
            ends the job for all hospitals.
    """

    def __init__(self, start: Callable[[], ProcessAdapter], *, restarts: int, killed: int) -> None:
        self._start = start
        self._killed = killed
        self._left = restarts
        self._asked_to_end = False
        self._lock = threading.Lock()
        self._process = start()

    def terminate(self) -> None:
        """Kill it for good."""
        with self._lock:
            self._asked_to_end = True
            self._process.terminate()

    def poll(self) -> int:
        """How it ended, in NVFlare's codes."""
        code = self._process.poll()
        if code is None:
            return int(JobReturnCode.UNKNOWN)
        if code < 0:
            return int(self._killed)
        return int(JOB_RETURN_CODE_MAPPING.get(code, JobReturnCode.EXECUTION_ERROR))

    def wait(self) -> None:
        """Until it has ended and is not started anew."""
        while True:
            self._process.wait()
            with self._lock:
                killed = (self._process.poll() or 0) < 0
                if self._asked_to_end or not killed or not self._left:
                    return
                self._left -= 1
                self._process = self._start()


def _spawn(arguments: Arguments, names: list[str]) -> ProcessAdapter:
    command = [sys.executable]
    for name in names:
        if name in arguments:
            option, value = arguments[name]
            values = str(value).split() if name == JobProcessArgs.OPTIONS else [str(value)]
            command += [option, *values]
    return spawn_process(command, os.environ | get_credential_env(dict(arguments)))


def _kept(workspace: Workspace, job_id: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,80}", job_id):
        raise ValueError(f"job_id = {job_id!r}: no name of a job; submit it again")
    return Path(workspace.root_dir) / RUNNING / f"{job_id}.json"
