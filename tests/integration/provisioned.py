"""A provisioned federation on this machine: a process or more for each node, mutual TLS, NVFlare's own certificates.

NVFlare's proof of concept (POC), headless, in a folder of its own: its command line keeps its state in a home of its
own, and its server listens on a port that was free.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulator import EMBEDDED

from custom.run_folder import newest_run
from custom.site_file import SITE_FILE, SITE_FILE_VARIABLE
from custom.strict import ConfigError

PROJECT, SERVER, ADMIN = "fedct_poc", "server", "admin@nvidia.com"
WORKSPACE = "NVFLARE_POC_WORKSPACE"
CLASSES = ["custom.controllers.", "custom.executors.", "custom.filters.", "faulty_sites."]
ERRORS = ("error_log.txt", "poc_console.log")  # what to show of a node when something went wrong


@dataclass(frozen=True, kw_only=True)
class Federation:
    """One that runs.

    Attributes:
        base: folder of all that belongs to it.
        sites: their names.
    """

    base: Path
    sites: Sequence[str]

    @property
    def runs(self) -> Path:
        """Where the server leaves its runs."""
        return self.base / "runs"

    def node(self, name: str) -> Path:
        """The workspace of the server, a site or the administrator."""
        return self.base / "poc" / PROJECT / "prod_00" / name

    def log(self, name: str) -> str:
        """What a node and its jobs have logged."""
        files = sorted({*self.node(name).glob("log.txt"), *self.node(name).glob("*/log.txt")})
        return "\n".join(file.read_text() for file in files)

    def submit(self, job: Path) -> str:
        """Hand in a job; gives its id."""
        said = nvflare(self.base, "--format", "json", "job", "submit", "-j", str(job))
        answer: dict[str, Any] = json.loads(said)
        return str(answer["data"]["job_id"])

    def receipt(self, experiment: str, *, timeout: int) -> Path:
        """Wait for the receipt of a run, which is the last that it writes; gives the run's folder."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:
                folder = newest_run(self.runs, experiment)
            except ConfigError:  # not begun
                folder = None
            if folder is not None and (folder / "receipt.json").is_file():
                return folder
            time.sleep(0.5)
        raise TimeoutError(f"no receipt of {experiment} in {timeout} s\n{self.errors()}")

    def errors(self) -> str:
        """The ends of what the nodes have to say about errors."""
        files = [file for name in (SERVER, *self.sites) for last in ERRORS for file in self.node(name).rglob(last)]
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in sorted(files))


@contextmanager
def federation(base: Path, policies: Mapping[str, str]) -> Iterator[Federation]:
    """Provision, start, and in any case stop a federation.

    Args:
        base: an empty folder.
        policies: the sites' names with their ``policy = …`` line; site number n has hospital n of the embedded cohort.
    """
    running = Federation(base=base, sites=list(policies))
    (base / "home").mkdir()
    project = base / "project.yml"
    project.write_text(json.dumps(_project(running.sites, _free_port())))  # JSON is YAML
    nvflare(base, "poc", "prepare", "-i", str(project))
    _configure_server(running)
    for number, (name, policy) in enumerate(policies.items()):
        _configure_site(running, name, policy, EMBEDDED.format(number=number))
    try:
        nvflare(base, "poc", "start", "--timeout", "120")
        yield running
    finally:
        try:
            _stop(base)
        finally:
            _kill_rest(base)


def nvflare(base: Path, *arguments: str, timeout: int = 180, check: bool = True) -> str:
    """Run NVFlare's command line on the federation in a folder; gives what it wrote to its output."""
    errors = base / "nvflare.stderr"  # a file: nodes inherit it, and would hold a pipe open
    with errors.open("a+") as stderr, (base / "nvflare.stdout").open("w+") as stdout:
        done = subprocess.run(
            [Path(sys.executable).parent / "nvflare", *arguments],
            cwd=base,
            env=_environment(base),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            timeout=timeout,
            check=False,
        )
        stdout.seek(0)
        output = stdout.read()
    if check and done.returncode:
        raise RuntimeError(f"nvflare {' '.join(arguments)}: {done.returncode}\n{output}\n{errors.read_text()[-3000:]}")
    return output


def _stop(base: Path) -> None:
    """Let NVFlare stop its nodes. It gives up where a job ends between its look and its order to abort it."""
    try:
        nvflare(base, "poc", "stop")
    except RuntimeError:
        time.sleep(1)
        nvflare(base, "poc", "stop", check=False)


def _environment(base: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != SITE_FILE_VARIABLE}
    return inherited | {
        "HOME": str(base / "home"),
        WORKSPACE: str(base / "poc"),
        "PYTHONPATH": str(Path(__file__).parent),
        "NVFLARE_SECURE_LOGGING": "1",
        "OMP_NUM_THREADS": "1",
    }


def _project(sites: Sequence[str], port: int) -> dict[str, Any]:
    """What NVFlare's provisioning is to make; as its own example, but for names and ports."""
    provisioning = "nvflare.lighter.impl"
    return {
        "api_version": 3,
        "name": PROJECT,
        "description": "a federation for one test",
        "participants": [
            {"name": SERVER, "type": "server", "org": "nvidia", "fed_learn_port": port, "admin_port": port},
            *({"name": name, "type": "client", "org": "nvidia"} for name in sites),
            {"name": ADMIN, "type": "admin", "org": "nvidia", "role": "project_admin"},
        ],
        "builders": [
            {"path": f"{provisioning}.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
            {"path": f"{provisioning}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
            {"path": f"{provisioning}.cert.CertBuilder"},
            {"path": f"{provisioning}.signature.SignatureBuilder"},
        ],
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _configure_server(running: Federation) -> None:
    _resources(running.node(SERVER) / "local", {"class_allow_list": CLASSES})
    text = f'[server]\nruns = "{running.runs}"\nhardware = {{ threads = 1 }}\n'
    (running.node(SERVER) / "local" / SITE_FILE).write_text(text)


def _configure_site(running: Federation, name: str, policy: str, data: str) -> None:
    """The site's own decisions: which classes may come, what it trains on, and what every reply of it must pass."""
    local = running.node(name) / "local"
    _resources(local, {"class_allow_list": CLASSES, "allow_log_streaming": False})
    home = running.base / "sites" / name
    table = f'[sites.{name}]\nhome = "{home}"\n{policy}\nhardware = {{ threads = 1 }}\n{data}\n'
    (local / SITE_FILE).write_text(table)
    # A scope's filters are for every task: unlike a job's, they stand in no entry with "tasks".
    scope = {"name": "masks", "task_result_filters": [{"path": "custom.filters.masks_required.MasksRequired"}]}
    (local / "privacy.json").write_text(json.dumps({"scopes": [scope], "default_scope": "masks"}))


def _resources(local: Path, changes: Mapping[str, Any]) -> None:
    """The node's ``resources.json`` with changes.

    ``poc prepare`` writes the server's, with a store of jobs of its own; the default's is one for all federations of a
    machine. Sites have only a default.
    """
    file = local / "resources.json"
    resources = json.loads((file if file.is_file() else local / "resources.json.default").read_text())
    assert resources["format_version"] == 2
    file.write_text(json.dumps(resources | dict(changes), indent=2))


def _kill_rest(base: Path) -> None:
    """End what is left of this federation, which is known by the workspace in its environment."""
    mark = f"{WORKSPACE}={base / 'poc'}".encode()
    for _ in range(20):  # a node's watchdog may be starting it again
        left = [pid for pid in _processes() if pid != os.getpid() and mark in _read_environment(pid).split(b"\0")]
        if not left:
            return
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
    raise RuntimeError(f"processes of {base} are still there: {left}")


def _processes() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]


def _read_environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # ended meanwhile, or another user's
        return b""
