"""Jobs are configuration: every class and argument in them exists, and they carry no code."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from custom.config import EXPERIMENT_FILE, ExperimentConfig

REPOSITORY = Path(__file__).resolve().parents[2]
JOBS = sorted(meta.parent for meta in (REPOSITORY / "jobs").glob("*/meta.json"))
ALLOWED_SUFFIXES = {".json"}

each_job = pytest.mark.parametrize("job", [pytest.param(job, id=job.name) for job in JOBS])


def components(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every (class path, arguments) in a configuration, at any depth."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            yield value["path"], value.get("args", {})
        for inner in value.values():
            yield from components(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from components(inner)


def bind(path: str, arguments: dict[str, Any]) -> type:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert inspect.isclass(found)
    inspect.signature(found).bind(**arguments)
    return found


def test_there_are_jobs() -> None:
    assert "ct_ddpm" in {job.name for job in JOBS}


@each_job
def test_a_job_folder_holds_json_only(job: Path) -> None:
    for file in job.rglob("*"):
        assert file.name != "custom", "an app folder with custom/ makes the job bring its own code"
        assert file.is_dir() or file.suffix in ALLOWED_SUFFIXES, file


@each_job
def test_every_class_and_argument_binds(job: Path) -> None:
    found = [entry for file in job.rglob("config_fed_*.json") for entry in components(json.loads(file.read_text()))]
    assert found
    for path, arguments in found:
        bind(path, arguments)


@each_job
def test_every_class_is_on_the_simulated_sites_allow_list(job: Path) -> None:
    resources = json.loads((REPOSITORY / "simulator_workspace/local/resources.json").read_text())
    for file in job.rglob("config_fed_*.json"):
        for path, _ in components(json.loads(file.read_text())):
            assert path.startswith(tuple(resources["class_allow_list"]))


@each_job
def test_experiment_is_valid_and_named_after_the_job(job: Path) -> None:
    for file in job.rglob(EXPERIMENT_FILE):
        assert ExperimentConfig.load(file).name == job.name
    assert list(job.rglob(EXPERIMENT_FILE))


@each_job
def test_deployed_apps_exist_and_every_reply_passes_the_gate(job: Path) -> None:
    for app in json.loads((job / "meta.json").read_text())["deploy_map"]:
        assert (job / app).is_dir()
    for file in job.rglob("config_fed_client.json"):
        client = json.loads(file.read_text())
        tasks = {task for entry in client["executors"] for task in entry["tasks"]}
        gated = {
            task
            for entry in client["task_result_filters"]
            if entry["filters"][-1]["path"] == "custom.filters.egress_gate.EgressGate"
            for task in entry["tasks"]
        }
        assert tasks == gated, "NVFlare ignores the pattern *: name every task"


def test_the_binding_test_can_fail() -> None:
    with pytest.raises(TypeError):
        bind("custom.controllers.diffusion_fedavg.DiffusionFedAvg", {"resume": ""})
    with pytest.raises(AttributeError):
        bind("custom.controllers.diffusion_fedavg.FedAverage", {})
