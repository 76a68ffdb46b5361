"""Jobs are configuration: every class and argument in them exists, and they carry no code."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from custom import tasks
from custom.audit_counts import AUDIT_TASKS
from custom.config import EXPERIMENT_FILE, ExperimentConfig
from poc.kits import CLASSES

REPOSITORY = Path(__file__).resolve().parents[2]
JOBS = sorted(meta.parent for meta in (REPOSITORY / "jobs").glob("*/meta.json"))
ALLOWED_SUFFIXES = {".json"}

GATE = "custom.filters.egress_gate.EgressGate"
ENCRYPTING = [  # gate on the plain update, then nothing but its ciphertext
    GATE,
    "custom.filters.encryption.PackUpdate",
    "nvflare.app_opt.he.model_encryptor.HEModelEncryptor",
    "custom.filters.encryption.CiphertextGate",
]

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


def test_simulated_and_provisioned_sites_allow_the_same_classes() -> None:
    resources = json.loads((REPOSITORY / "simulator_workspace/local/resources.json").read_text())
    assert resources["class_allow_list"] == list(CLASSES)


@each_job
def test_experiment_is_valid_and_named_after_the_job(job: Path) -> None:
    for file in job.rglob(EXPERIMENT_FILE):
        assert ExperimentConfig.load(file).name == job.name
    assert list(job.rglob(EXPERIMENT_FILE))


@each_job
def test_deployed_apps_exist_and_every_reply_passes_the_gate(job: Path) -> None:
    for app in json.loads((job / "meta.json").read_text())["deploy_map"]:
        assert (job / app).is_dir()
    encrypted = ExperimentConfig.of_job(job).encryption is not None
    for file in job.rglob("config_fed_client.json"):
        client = json.loads(file.read_text())
        tasks = {task for entry in client["executors"] for task in entry["tasks"]}
        behind = {
            task: [item["path"] for item in entry["filters"]]
            for entry in client["task_result_filters"]
            for task in entry["tasks"]
        }
        assert tasks == set(behind), "NVFlare ignores the pattern *: name every task"
        for task, filters in behind.items():
            assert filters == (ENCRYPTING if encrypted and task in ("train", "release") else [GATE]), task


def test_encrypted_jobs_open_sums_through_nvflares_decryptor() -> None:
    client = json.loads((REPOSITORY / "jobs/ct_ddpm_he/app/config/config_fed_client.json").read_text())
    (entry,) = client["task_data_filters"]
    assert entry["tasks"] == ["decrypt"]
    assert [item["path"] for item in entry["filters"]] == ["nvflare.app_opt.he.model_decryptor.HEModelDecryptor"]


def test_encrypted_job_is_the_main_job_but_for_its_encryption() -> None:
    plain, encrypted = (ExperimentConfig.of_job(REPOSITORY / "jobs" / name) for name in ("ct_ddpm", "ct_ddpm_he"))
    assert replace(encrypted, name=plain.name, encryption=None) == plain


def test_audit_job_attacks_what_the_main_job_trains() -> None:
    """Network, images and schedule are the model's; sites would score another one otherwise."""
    plain, audit = (ExperimentConfig.of_job(REPOSITORY / "jobs" / name) for name in ("ct_ddpm", "ct_audit"))
    assert audit.audit is not None
    assert audit.audit.model == plain.name
    assert replace(audit, name=plain.name, audit=None) == plain


def test_audit_job_names_every_task_of_an_audit() -> None:
    client = json.loads((REPOSITORY / "jobs/ct_audit/app/config/config_fed_client.json").read_text())
    (entry,) = client["executors"]
    assert set(entry["tasks"]) == {*AUDIT_TASKS, tasks.SECAGG}


def test_masked_job_is_the_main_job_but_for_its_masks() -> None:
    plain, masked = (ExperimentConfig.of_job(REPOSITORY / "jobs" / name) for name in ("ct_ddpm", "ct_ddpm_secagg"))
    assert masked.secure_aggregation is not None
    assert replace(masked, name=plain.name, secure_aggregation=None) == plain


def test_the_binding_test_can_fail() -> None:
    with pytest.raises(TypeError):
        bind("custom.controllers.diffusion_fedavg.DiffusionFedAvg", {"resume": ""})
    with pytest.raises(AttributeError):
        bind("custom.controllers.diffusion_fedavg.FedAverage", {})
