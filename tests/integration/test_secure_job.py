"""Secure aggregation in NVFlare's real simulator: what leaves, what the server learns, and who may be missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policies import policy_toml
from simulator import Run, simulate

from custom.config import ExperimentConfig
from custom.run_folder import check_receipt
from custom.secure_config import SecureAggregationConfig

SITES = ["good-1", "good-2", "good-3"]


@pytest.fixture(scope="module")
def federation(experiment: ExperimentConfig) -> ExperimentConfig:
    return replace(
        experiment,
        name="masked",
        federation=replace(experiment.federation, min_responses=2),
        secure_aggregation=SecureAggregationConfig(update_bound=1.0, max_weight=20.0, stage_timeout_s=60),
    )


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory, federation: ExperimentConfig) -> Run:
    base = tmp_path_factory.mktemp("masked")
    policy = policy_toml(peers=SITES, masks_required=True)
    return simulate(base, federation, SITES, threads=1, recorded=base / "left", policy=policy)


def test_it_completes(completed: Run) -> None:
    assert completed.returncode == 0, completed.output
    receipt = check_receipt(completed.folder)
    assert receipt["participants"] == {"0": SITES, "1": SITES}
