"""Run a job in NVFlare's real simulator, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies import policy_toml

from custom.config import ExperimentConfig
from custom.he_contexts import make_contexts
from custom.run_folder import newest_run
from custom.simulator_kits import make_kits

REPOSITORY = Path(__file__).resolve().parents[2]
EMBEDDED = "data = {{ embedded = {{ hospital = {number}, patients = 16, slices = 8, matrix = 64, seed = 1 }} }}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a simulator run was."""

    returncode: int
    output: str
    base: Path
    experiment: ExperimentConfig

    @property
    def folder(self) -> Path:
        return newest_run(self.base / "runs", self.experiment.name)

    @property
    def receipt(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.folder / "receipt.json").read_text())
        return values


def real_sites(shared_ct: Path, base: Path) -> dict[str, str]:
    """Three sites with their ``data = …`` line, which share the real patients out among them."""
    sites = {}
    patients = sorted(p for p in shared_ct.iterdir() if p.name.startswith(("STS", "TCGA")))
    for number in range(3):
        folder = base / "scans" / f"site-{number + 1}"
        folder.mkdir(parents=True)
        for patient in patients[number::3]:
            (folder / patient.name).symlink_to(patient)
        sites[f"site-{number + 1}"] = f'data = {{ folder = "{folder}" }}'
    return sites


def write_job(
    base: Path,
    experiment: ExperimentConfig,
    sites: list[str],
    *,
    faulty: Mapping[str, Any] | None = None,
    executor: str = "FaultySite",
    recorded: Path | None = None,
    metered: Path | None = None,
    resume_run: str = "",
) -> Path:
    """The repository's job for such an experiment, with that experiment and other sites.

    ``faulty`` swaps the executor and, unless encrypted, drops the gate; ``recorded`` adds a filter behind all others,
    ``metered`` a component that counts bytes.
    ``executor`` is the class in :mod:`faulty_sites` that ``faulty`` gives arguments to.
    """
    name = "ct_ddpm" if experiment.privacy is None else "ct_ddpm_dp"
    source = REPOSITORY / "jobs" / (name if experiment.secure_aggregation is None else "ct_ddpm_secagg")
    if experiment.encryption is not None:
        source = REPOSITORY / "jobs" / "ct_ddpm_he"
    if experiment.audit is not None:
        source = REPOSITORY / "jobs" / "ct_audit"
    config = base / "job" / "app" / "config"
    config.mkdir(parents=True, exist_ok=True)
    meta = json.loads((source / "meta.json").read_text())
    meta["deploy_map"] = {"app": ["server", *sites]}
    (base / "job" / "meta.json").write_text(json.dumps(meta))
    client = json.loads((source / "app/config/config_fed_client.json").read_text())
    if experiment.privacy is not None and experiment.secure_aggregation is not None:
        for entry in (*client["executors"], *client["task_result_filters"]):
            entry["tasks"].append("release")
    if faulty is not None:
        client["executors"][0]["executor"] = {"path": f"faulty_sites.{executor}", "args": dict(faulty)}
        if experiment.encryption is None:
            client["task_result_filters"] = []
    if recorded is not None:
        recorder = {"path": "faulty_sites.Recorder", "args": {"folder": str(recorded)}}
        for entry in client["task_result_filters"]:
            entry["filters"].append(recorder)
    if metered is not None:
        client["components"].append({"id": "meter", "path": "faulty_sites.WireMeter", "args": {"folder": str(metered)}})
    (config / "config_fed_client.json").write_text(json.dumps(client))
    server = json.loads((source / "app/config/config_fed_server.json").read_text())
    if resume_run:
        server["workflows"][0]["args"]["resume_run"] = resume_run
    (config / "config_fed_server.json").write_text(json.dumps(server))
    (config / "experiment.json").write_text(json.dumps(experiment.to_json()))
    return base / "job"


def simulate(
    base: Path,
    experiment: ExperimentConfig,
    sites: Mapping[str, str] | list[str],
    *,
    threads: int,
    faulty: Mapping[str, Any] | None = None,
    recorded: Path | None = None,
    metered: Path | None = None,
    resume_run: str = "",
    policy: str = "",
    policies: Mapping[str, str] | None = None,
    server: str = "",
    timeout: int = 400,
) -> Run:
    """Run the job.

    Args:
        base: folder that holds workspace, runs and the sites' homes; may be used again.
        experiment: what to run.
        sites: names, or names with their ``data = …`` line; the embedded cohort by default.
        threads: NVFlare's ``-t``.
        faulty: arguments of :class:`faulty_sites.FaultySite`, which then stands in for the executor.
        recorded: folder in which :class:`faulty_sites.Recorder` keeps every reply that leaves a site.
        metered: folder in which :class:`faulty_sites.WireMeter` counts what the sites' processes send.
        resume_run: name of a run to carry on.
        policy: the sites' ``policy = …`` line; one that lets everything pass by default.
        policies: such lines of sites that have one of their own.
        server: further lines of the server's table.
        timeout: seconds.
    """
    if not isinstance(sites, Mapping):
        sites = {name: EMBEDDED.format(number=number) for number, name in enumerate(sites)}
    policy = policy or policy_toml(peers=[] if experiment.secure_aggregation is None else sites)
    if experiment.secure_aggregation is not None:
        make_kits(base / "kits" / "server", {name: base / "kits" / name for name in sites})
    own = dict.fromkeys(sites, policy) | dict(policies or {})
    job = write_job(
        base, experiment, list(sites), faulty=faulty, recorded=recorded, metered=metered, resume_run=resume_run
    )
    site_file = base / "sites.toml"
    tables = [
        f'[sites.{name}]\nhome = "sites/{name}"\nkit = "kits/{name}"\n{own[name]}\n'
        f"hardware = {{ threads = 1 }}\n{data}\n"
        for name, data in sites.items()
    ]
    head = f'[server]\nruns = "runs"\nkit = "kits/server"\nhardware = {{ threads = 1 }}\n{server}\n\n'
    site_file.write_text(head + "\n".join(tables))
    local = base / "workspace" / "local"
    local.mkdir(parents=True, exist_ok=True)
    resources = json.loads((REPOSITORY / "simulator_workspace/local/resources.json").read_text())
    resources["class_allow_list"].append("faulty_sites.")
    (local / "resources.json").write_text(json.dumps(resources))
    if experiment.encryption is not None:
        make_contexts(base / "workspace" / "startup")
    environment = os.environ | {
        "FEDCT_SITE_FILE": str(site_file),
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [Path(sys.executable).parent / "nvflare", "simulator", job, "-w", base / "workspace", "-t", str(threads)],
        cwd=base,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Run(returncode=done.returncode, output=done.stdout, base=base, experiment=experiment)
