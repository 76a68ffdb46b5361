"""From nothing to a federation whose sites are all ready, and what it looks like from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from custom.strict import ConfigError, require
from poc.federation import Federation, prepare_nodes, provision
from poc.jobs import connected_sites, session
from poc.processes import running, start_node

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Node:
    """What is known of a node.

    Attributes:
        name: its name.
        state: ``ready``, ``starting`` (there, and not known to the server) or ``gone``.
        pids: its processes: NVFlare's start script, the node, its jobs.
        memory_bytes: resident, of all of them; shared pages count once for each.
    """

    name: str
    state: str
    pids: tuple[int, ...]
    memory_bytes: int


def up(
    folder: Path, *, project_file: Path, site_file: Path, sites: Sequence[str], timeout_s: float, say: Say
) -> Federation:
    """Provision what is not there, start what is not running, wait until the server knows every site.

    A federation that was provisioned before keeps its certificates as long as its ports are free; its nodes' ``local/``
    is written anew from the site file.

    Raises:
        ConfigError: an input that cannot be meant, a kit that was changed, or a node that is not ready in time.
    """
    folder = folder.resolve()
    there = running(folder)
    try:
        federation = Federation.load(folder)
    except ConfigError:
        require(
            not there, argument="folder", value=str(folder), remedy="processes without a federation; fedct poc down"
        )
        federation = None
    if federation is not None and sites:
        same = tuple(sites) == federation.members.sites
        remedy = f"this folder has {list(federation.members.sites)}; give another --folder"
        require(same, argument="sites", value=list(sites), remedy=remedy)
    if federation is None or (not there and not federation.ports_are_free()):
        say("provisioning")
        federation = provision(folder, project_file=project_file, sites=sites)
    if not there:
        prepare_nodes(federation, site_file)
    for node in federation.nodes:
        if node not in there:
            say(f"starting {node}")
            start_node(folder, node, federation.kit(node), federation.log(node))
    _wait(federation, timeout_s=timeout_s, say=say)
    return federation


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
    try:
        with session(federation, timeout_s=5.0) as opened:
            return {federation.members.server, *connected_sites(opened)} & set(federation.nodes)
    except ConfigError:
        return set()


def nodes(federation: Federation) -> list[Node]:
    """Every node as it is now."""
    there, ready = running(federation.folder), _ready(federation)
    return [_node(name, there.get(name, []), name in ready) for name in federation.nodes]


def _node(name: str, processes: Sequence[psutil.Process], known: bool) -> Node:
    memory, pids = 0, []
    for process in processes:
        with suppress(psutil.Error):  # ended meanwhile
            memory += process.memory_info().rss
            pids.append(process.pid)
    state = "gone" if not pids else "ready" if known else "starting"
    return Node(name=name, state=state, pids=tuple(sorted(pids)), memory_bytes=memory)


def described(federation: Federation) -> list[str]:
    """The nodes and the jobs, a line each."""
    found = nodes(federation)
    lines = [
        f"{node.name:12} {node.state:9} {node.memory_bytes / 2**20:6.0f} MiB  "
        f"{len(node.pids)} process{'' if len(node.pids) == 1 else 'es'}"
        for node in found
    ]
    if found[0].state != "ready":
        return [*lines, "jobs: unknown: the server does not answer"]
    with session(federation) as opened:
        jobs = opened.list_jobs()
    told = [f"{job['job_id']}  {job.get('job_name', job.get('name', '?')):16} {job['status']}" for job in jobs]
    return [*lines, *(told or ["jobs: none"])]


def _tail(file: Path, lines: int = 8) -> str:
    if not file.is_file():
        return "(nothing)"
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
