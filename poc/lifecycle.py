"""From nothing to a federation whose sites are all ready, and what it looks like from outside."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from custom.strict import ConfigError, require
from poc.alarms import alarms
from poc.federation import PROJECT, PROJECT_FILE, Federation, keeps, prepare_nodes, provision, read_project
from poc.jobs import last_heard, session
from poc.processes import PACS, running, start_node
from poc.snapshot import Job, NodeState, Snapshot, snapshot

QUIET_S = 45.0  # a site tells the server every ten seconds that it is there

Say = Callable[[str], None]


def up(
    folder: Path,
    *,
    project_file: Path | None,
    site_file: Path | None,
    sites: Sequence[str],
    timeout_s: float,
    say: Say,
) -> Federation:
    """Provision what is not there, start what is not running, wait until the server knows every site.

    A federation that was provisioned before keeps its certificates as long as its ports are free, its project, and its
    hospitals' tables unless others are given.

    Args:
        folder: of the federation.
        project_file: NVFlare's project file; None: that of the federation, or fedct's own for a new one.
        site_file: as of :func:`poc.federation.prepare_nodes`.
        sites: names of hospitals that take the place of the project file's.
        timeout_s: how long to wait.
        say: is told what happens.

    Raises:
        ConfigError: an input that cannot be meant, a kit that was changed, or a node that is not ready in time.
    """
    folder = folder.resolve()
    there = running(folder)
    there = {node: some for node, some in there.items() if not node.startswith(PACS)}
    try:
        federation = Federation.load(folder)
    except ConfigError:
        require(
            not there, argument="folder", value=str(folder), remedy="processes without a federation; fedct poc down"
        )
        federation = None
    if federation is None:
        say("provisioning")
        federation = provision(folder, project_file=project_file or PROJECT_FILE, sites=sites)
    elif project_file is not None or sites:
        same = read_project(project_file or PROJECT_FILE, sites) == read_project(folder / PROJECT)
        remedy = f"{folder} has a federation of another project; give another --folder"
        require(same, argument="project", value=str(project_file or list(sites)), remedy=remedy)
    if there:
        remedy = "it is read when nothing runs: fedct poc down, then up"
        same = site_file is None or keeps(federation, site_file)
        require(same, argument="site file", value=str(site_file), remedy=remedy)
    else:
        if not federation.ports_are_free():
            say("provisioning for other ports")
            federation = provision(folder, project_file=folder / PROJECT)
        prepare_nodes(federation, site_file)
    start(federation, timeout_s=timeout_s, say=say)
    return federation


def start(federation: Federation, *, timeout_s: float, say: Say) -> None:
    """Start the nodes that are not running and wait until the server knows every site; raises as :func:`up`."""
    there = running(federation.folder)
    for node in federation.nodes:
        if node not in there:
            say(f"starting {node}")
            start_node(federation.folder, node, federation.kit(node), federation.log(node))
    _wait(federation, timeout_s=timeout_s, say=say)


def _wait(federation: Federation, *, timeout_s: float, say: Say) -> None:
    deadline = time.monotonic() + timeout_s
    ready: set[str] = set()
    missing = set(federation.nodes)
    while missing and time.monotonic() < deadline:
        time.sleep(1)
        found = _ready(federation)
        for node in sorted(found - ready):
            say(f"{node} is ready")
        ready = found
        missing = set(federation.nodes) - ready
    if missing:
        ends = "\n".join(f"== {federation.log(node)}\n{_tail(federation.log(node))}" for node in sorted(missing))
        raise ConfigError(
            f"timeout = {timeout_s:g}: not ready: {', '.join(sorted(missing))}; the others are; fedct poc down "
            f"stops all; what they said last:\n{ends}"
        )


def _ready(federation: Federation) -> set[str]:
    there = running(federation.folder)
    began = {node: main.create_time() for node in federation.nodes if (main := _main(there.get(node, []))) is not None}
    try:
        with session(federation, timeout_s=5.0) as opened:
            heard = last_heard(opened)
    except ConfigError:
        return set()
    fresh = {site for site, at in heard.items() if at > max(began.get(site, math.inf), time.time() - QUIET_S)}
    return {federation.members.server, *fresh} & set(began)


def seen(federation: Federation) -> Snapshot:
    """Everything as it is now."""
    there, ready = running(federation.folder), _ready(federation)
    up_at_all = any(there.get(node) for node in federation.nodes)
    states = {
        name: _state(name, there.get(name, []), known=name in ready, stopped=not up_at_all) for name in federation.nodes
    }
    server = states.pop(federation.members.server)
    listed: list[Job] = []
    if server.status == "ready":
        with session(federation) as opened:
            listed = [_job(meta) for meta in opened.list_jobs(reverse=True)]
    homes = {site: federation.home(site) for site in federation.members.sites}
    return snapshot(
        federation.members.project, server=server, nodes=states, homes=homes, runs=federation.runs, jobs=listed
    )


def _main(processes: Sequence[psutil.Process]) -> psutil.Process | None:
    """The node's own process among those of its start script and its jobs."""
    for process in processes:
        with suppress(psutil.Error):  # ended meanwhile
            if any(argument.endswith(("server_train", "client_train")) for argument in process.cmdline()):
                return process
    return None


def _state(name: str, processes: Sequence[psutil.Process], *, known: bool, stopped: bool) -> NodeState:
    memory, main = 0, _main(processes)
    for process in processes:
        with suppress(psutil.Error):
            memory += process.memory_info().rss
    if main is None:
        return NodeState(name=name, status="stopped" if stopped else "gone")
    count = len(processes)
    return NodeState(
        name=name,
        status="ready" if known else "starting",
        pid=main.pid,
        memory_bytes=memory,
        detail=f"{count} process{'' if count == 1 else 'es'}",
    )


def _job(meta: Mapping[str, Any]) -> Job:
    name = str(meta.get("job_name", meta.get("name", "?")))
    return Job(
        job_id=str(meta["job_id"]), name=name, status=str(meta["status"]), submitted=str(meta.get("submit_time", ""))
    )


def described(what: Snapshot) -> list[str]:
    """The nodes, the jobs and what is wrong, a line each."""
    lines = []
    for node in what.nodes:
        memory = "" if node.memory_bytes is None else f"{node.memory_bytes / 2**20:6.0f} MiB"
        lines.append(f"{node.name:12} {node.status:9} {memory:10}  {node.detail}".rstrip())
    lines += [f"{job.job_id}  {job.name:16} {job.status}" for job in what.jobs]
    return [*lines, *(f"{alarm.what}: {alarm.text}" for alarm in alarms(what))]


def _tail(file: Path, lines: int = 8) -> str:
    if not file.is_file():
        return "(nothing)"
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
