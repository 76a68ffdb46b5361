"""The processes of a federation on this machine: started, found, stopped.

Each carries the federation's folder in its environment, and so do its children: what is stopped is what was started
here, whatever became of the process that started it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from custom.site_file import SITE_FILE_VARIABLE
from custom.strict import ConfigError

MARK, NODE = "FEDCT_POC", "FEDCT_POC_NODE"
PACS = "pacs"  # how the name of a hospital's Orthanc begins; it is no node of the federation
# NVFlare's start script leaves these behind when it is killed, and a number in them may be another process by now.
LEFT_BEHIND = ("daemon_pid.fl", "pid.fl", "shutdown.fl", "restart.fl")
GRACE_S = 10.0


def start_node(folder: Path, name: str, kit: Path, log: Path) -> None:
    """Start a node with its kit's own script, which starts it again when it ends.

    Args:
        folder: of the federation.
        name: of the node.
        kit: its workspace.
        log: file for its console.
    """
    for left in LEFT_BEHIND:
        (kit / left).unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        subprocess.run(  # noqa: S603
            # In the background of a shell that ends at once: it outlives this process and is no child of it.
            ["/bin/sh", "-c", '"$@" &', "sh", "/usr/bin/env", "bash", str(kit / "startup" / "sub_start.sh")],
            cwd=kit,
            env=environment(folder, name),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=True,
        )


def environment(folder: Path, name: str) -> dict[str, str]:
    """What a node finds in its environment: this Python first, no site file of somebody else, quiet tracebacks."""
    inherited = {key: value for key, value in os.environ.items() if key not in (SITE_FILE_VARIABLE, "NVFL_WORKSPACE")}
    own = {MARK: str(folder), NODE: name, "NVFLARE_SECURE_LOGGING": "1"}
    return inherited | own | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def running(folder: Path) -> dict[str, list[psutil.Process]]:
    """All processes of a federation, by node."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # ended meanwhile, or another user's
            values: Mapping[str, str] = process.environ()
            if values.get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.setdefault(values.get(NODE, "?"), []).append(process)
    return found


def stop(folder: Path, nodes: Iterable[str] | None = None) -> int:
    """End the processes of a federation, or of some of its nodes; those that do not end when asked are killed.

    Returns:
        How many there were.

    Raises:
        ConfigError: some are still there.
    """
    ended: set[int] = set()
    wanted = None if nodes is None else set(nodes)
    deadline = time.monotonic() + GRACE_S
    while True:
        left = [one for node, some in running(folder).items() if wanted is None or node in wanted for one in some]
        if not left:
            return len(ended)
        late = time.monotonic() - deadline
        if late > GRACE_S:
            raise ConfigError(f"processes = {[one.pid for one in left]}: they do not end; end them by hand")
        # The scripts that would start a node again go first.
        for one in sorted(left, key=_is_script, reverse=True):
            with suppress(psutil.Error):
                if late > 0 or _is_script(one):
                    one.kill()
                elif one.pid not in ended:
                    one.terminate()
                ended.add(one.pid)
        time.sleep(0.2)


def _is_script(process: psutil.Process) -> bool:
    try:
        return bool(process.name() == "bash")
    except psutil.Error:  # ended meanwhile
        return False
