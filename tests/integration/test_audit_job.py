"""The federated audit in NVFlare's real simulator: what leaves, and that masks change nothing of what is found."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from policies import policy_toml
from simulator import Run, simulate

from custom.audit_config import AuditConfig
from custom.audit_counts import AUDIT_TASKS, audit_shapes
from custom.config import ExperimentConfig
from custom.run_folder import check_receipt, file_sha256
from custom.secure_config import SecureAggregationConfig
from privacy.audit.report.document import load_audit

SITES = ["good-1", "good-2", "good-3"]
DATA = (
    "data = {{ embedded = {{ hospital = {number}, patients = 28, slices = 4, matrix = 64, seed = 1 }} }}\n"
    "limits = {{ held_out_fraction = 0.5 }}\n"
    "audit = {{ min_count = 1, per_site_tables = true }}"
)


@pytest.fixture(scope="module")
def sites() -> dict[str, str]:
    return {name: DATA.format(number=number) for number, name in enumerate(SITES)}


@pytest.fixture(scope="module")
def audited(experiment: ExperimentConfig) -> ExperimentConfig:
    audit = AuditConfig(
        model="trained",
        noise_levels=(0.05, 0.2),
        images_per_patient=2,
        reference_steps=0,
        control_steps=120,
        gradient_levels=(0.1,),
        embedding_steps=20,
        samples=12,
    )
    return replace(experiment, name="audited", audit=audit)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, experiment: ExperimentConfig, sites: dict[str, str]) -> Run:
    run = simulate(tmp_path_factory.mktemp("audit"), replace(experiment, name="trained"), sites, threads=3)
    assert run.returncode == 0, run.output
    return run


@pytest.fixture(scope="module")
def plain(trained: Run, audited: ExperimentConfig, sites: dict[str, str]) -> Run:
    return simulate(trained.base, audited, sites, threads=3, recorded=trained.base / "left")


@pytest.fixture(scope="module")
def masked(plain: Run, audited: ExperimentConfig, sites: dict[str, str]) -> Run:
    """The same by sites that let nothing leave without a mask, one fresh process a task."""
    experiment = replace(
        audited,
        name="audited_masked",
        secure_aggregation=SecureAggregationConfig(stage_timeout_s=60),
    )
    policy = policy_toml(peers=SITES, masks_required=True)
    recorded = plain.base / "left_masked"
    return simulate(plain.base, experiment, sites, threads=3, recorded=recorded, policy=policy)


def left(folder: Path) -> list[dict[str, object]]:
    return [pickle.loads(file.read_bytes()) for file in sorted(folder.iterdir())]  # noqa: S301 - our own


def test_an_audit_leaves_a_report_about_the_trained_model(plain: Run, trained: Run) -> None:
    assert plain.returncode == 0, plain.output
    receipt = check_receipt(plain.folder)
    assert receipt["product"] == "audit.json"
    audit = load_audit(plain.folder / "audit.json")
    evidence = audit.evidence
    assert evidence.scope == "federated"
    assert evidence.model.model_sha256 == file_sha256(trained.folder / "model.safetensors")
    assert [cohort.site for cohort in evidence.cohorts] == SITES
    assert [row.site for row in evidence.sites] == SITES
    assert (evidence.report_members, evidence.report_held_out) == (21, 21)
    assert {control.name for control in evidence.controls} == {"overfitted", "untrained", "shuffled"}
    assert len(evidence.copies) == 2
    assert audit.decision.verdict != "GREEN", "63 patients cannot show that"
    assert "not resolvable" in (plain.folder / "audit.json").read_text()
    for name in ("audit.html", "audit.pdf"):
        assert (plain.folder / name).stat().st_size > 10_000


def test_what_left_the_sites_is_counts_only(plain: Run, audited: ExperimentConfig) -> None:
    messages = left(plain.base / "left")
    assert len(messages) == len(SITES) * len(AUDIT_TASKS)
    allowed = {task: audit_shapes(audited, task) for task in AUDIT_TASKS}
    for message in messages:
        data = message["DXO"]["data"]  # type: ignore[index]
        shapes = next(shapes for shapes in allowed.values() if set(shapes) == set(data))
        for name, array in data.items():
            assert array.dtype == np.int64
            assert array.shape == shapes[name]
            assert array.min() >= 0
    for file in (plain.base / "left").iterdir():
        content = file.read_bytes()
        for site in SITES:
            for cache in (plain.base / "sites" / site / "cache").glob("*/manifest.json"):
                import json

                for patient in json.loads(cache.read_bytes())["patients"]:
                    assert patient["pseudonym"].encode() not in content


def test_masks_change_nothing_of_what_is_found(plain: Run, masked: Run) -> None:
    assert masked.returncode == 0, masked.output
    one, other = (load_audit(run.folder / "audit.json").evidence for run in (plain, masked))
    assert other.attacks == one.attacks
    assert other.blind == one.blind
    assert other.controls == one.controls
    assert [replace(c, p_value=0.0) for c in other.copies] == [replace(c, p_value=0.0) for c in one.copies]
    assert other.sites == ()
    (cohort,) = other.cohorts
    assert cohort.members == sum(c.members for c in one.cohorts)


def test_under_masks_no_count_leaves_a_site(masked: Run) -> None:
    vectors = 0
    for message in left(masked.base / "left_masked"):
        data = message["DXO"]["data"]  # type: ignore[index]
        if "masked" in data:
            vectors += 1
            assert set(data) == {"masked"}
            assert data["masked"].dtype == np.uint32
            high = (data["masked"] >> 24) > 0  # counts of 28 patients are small numbers
            assert high.mean() > 0.95
        else:
            assert set(data) <= {"advert", "boxes", "signed", "revealed"}
    assert vectors == len(SITES) * len(AUDIT_TASKS)


def test_a_site_that_does_not_allow_counts_sends_none(
    trained: Run, audited: ExperimentConfig, sites: dict[str, str]
) -> None:
    experiment = replace(audited, name="refused")
    policy = policy_toml(may_leave=("weight", "train_loss", "held_out_loss", "seconds"))
    run = simulate(trained.base, experiment, sites, threads=3, recorded=trained.base / "refused", policy=policy)
    assert run.receipt["status"] == "failed"
    assert "SITE_POLICY_MAY_LEAVE" in run.receipt["reason"]
    assert not any("DXO" in message for message in left(trained.base / "refused"))
