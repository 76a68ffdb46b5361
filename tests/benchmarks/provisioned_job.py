"""A job in a provisioned federation beside the same in NVFlare's simulator: seconds a round, memory of the processes.

    python tests/benchmarks/provisioned_job.py OUT [--job jobs/ct_ddpm]

The simulator runs with a thread for each site, as the federation has a process for each. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from custom.run_folder import RunFolder, check_receipt, newest_run
from poc.processes import NODE, running

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ROLES = {
    "server_train": "server",
    "runner_process": "server's job",
    "client_train": "site",
    "worker_process": "site's job",
}


class Memory(threading.Thread):
    """The largest proportional set size (PSS: shared pages count in parts) of each kind of process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.peak, self.ended = folder, dict.fromkeys(ROLES.values(), 0), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(2):
            for some in running(self.folder).values():
                for process in some:
                    self._look(process)

    def _look(self, process: psutil.Process) -> None:
        try:
            command = " ".join(process.cmdline())
            role = next((role for module, role in ROLES.items() if f".{module} " in command), None)
            if role is not None:
                self.peak[role] = max(self.peak[role], process.memory_full_info().pss)
        except psutil.Error:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to work in; must not exist")
    parser.add_argument("--job", type=Path, default=REPOSITORY / "jobs" / "ct_ddpm")
    options = parser.parse_args()
    out, job = options.out.resolve(), options.job.resolve()
    out.mkdir(parents=True)
    os.environ.pop(NODE, None)
    began = time.monotonic()
    call([BIN / "fedct", "poc", "up"], out)
    ready = time.monotonic() - began
    memory = Memory(out / "federation")
    memory.start()
    try:
        call([BIN / "fedct", "poc", "submit", job], out)
        call([BIN / "fedct", "poc", "status", "--html", "status.html"], out)
    finally:
        memory.ended.set()
        call([BIN / "fedct", "poc", "down"], out)
    # The hospitals of the simulator have the same data and, like the others, one thread each.
    site_file = (REPOSITORY / "simulator_workspace" / "local" / "fedct.toml").read_text()
    site_file = site_file.replace("\ndata = ", "\nhardware = { threads = 1 }\ndata = ")
    (out / "sites.toml").write_text(site_file.replace("[server]", "[server]\nhardware = { threads = 1 }", 1))
    local = out / "workspace" / "local"
    local.mkdir(parents=True)
    (local / "resources.json").write_bytes((REPOSITORY / "simulator_workspace/local/resources.json").read_bytes())
    os.environ["FEDCT_SITE_FILE"] = str(out / "sites.toml")
    call([BIN / "nvflare", "simulator", "-t", "3", "-w", out / "workspace", job], out)
    provisioned, simulated = seconds(out / "federation" / "runs", job.name), seconds(out / "runs", job.name)
    # The first round reads the scans.
    ratio = statistics.median(provisioned[1:]) / statistics.median(simulated[1:])
    result = {
        "seconds_until_ready": round(ready, 1),
        "seconds_by_round": {"provisioned": provisioned, "simulator": simulated},
        "ratio_of_medians_after_the_first": round(ratio, 3),
        "peak_memory_mib": {role: round(size / 2**20) for role, size in memory.peak.items()},
    }
    print(json.dumps(result))


def call(command: list[str | Path], folder: Path) -> None:
    """Run it, shown."""
    print("$", *command, flush=True)
    subprocess.run(command, cwd=folder, check=True)


def seconds(runs: Path, experiment: str) -> list[float]:
    """Of each round of a completed run."""
    folder = newest_run(runs, experiment)
    check_receipt(folder)
    return [round(record.seconds, 1) for record in RunFolder(folder).records()]


if __name__ == "__main__":
    main()
