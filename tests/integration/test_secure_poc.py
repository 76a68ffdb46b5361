"""Secure aggregation in a provisioned federation: NVFlare's certificates, a site that falls, a site's own filter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from policies import policy_toml
from provisioned import SERVER, Running, federation
from safetensors.numpy import load_file
from simulator import simulate, write_job

from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.model_file import load_model
from custom.run_folder import check_receipt
from custom.secure_config import SecureAggregationConfig

SITES = ["site-1", "site-2", "site-3"]
LENIENT = "site-2"  # it knows its peers, and lets jobs without masks pass


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    policies = {name: policy_toml(peers=SITES, masks_required=name != LENIENT) for name in SITES}
    # Without the rules that would refuse the careless job when it arrives: this is about what lies behind them.
    with federation(tmp_path_factory.mktemp("poc"), policies, rules=False) as provisioned:
        yield provisioned


def test_a_site_that_falls_between_its_shares_and_its_vector(
    running: Running, experiment: ExperimentConfig, tmp_path: Path
) -> None:
    """All its processes are killed; the others go on, and the sum is theirs. No advert passes but under a real root."""
    plain = replace(experiment, name="plain", federation=replace(experiment.federation, rounds=2))
    masked = replace(
        plain,
        name="masked",
        federation=replace(plain.federation, round_timeout_s=40),
        secure_aggregation=SecureAggregationConfig(update_bound=0.1, max_weight=20.0, stage_timeout_s=60),
    )
    running.submit(write_job(tmp_path, masked, SITES, faulty={"fell": "site-3"}))
    clear = simulate(tmp_path / "plain", plain, SITES[:2], threads=2)
    folder = running.receipt("masked", timeout=240)
    receipt = check_receipt(folder)
    assert receipt["participants"] == {"0": SITES[:2], "1": SITES[:2]}
    assert receipt["silent"] == {"0": ["site-3"]}
    assert receipt["refused"] == {}
    (session,) = (running.base / "sites" / "site-3" / "secagg").rglob("*.json")
    assert json.loads(session.read_text())["stage"] == "shared"
    one, other = (load_file(run / "model.safetensors") for run in (folder, clear.folder))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5, rtol=0)


def test_a_site_s_scope_stops_what_no_executor_asked_about(
    running: Running, experiment: ExperimentConfig, tmp_path: Path
) -> None:
    """A job without masks, gate and manners: of the site that requires masks an error code leaves, and nothing else."""
    careless = replace(
        experiment, name="careless", federation=replace(experiment.federation, rounds=1, min_responses=1)
    )
    running.submit(write_job(tmp_path, careless, ["site-1", LENIENT], faulty={}, executor="Careless"))
    folder = running.receipt("careless", timeout=120)
    receipt = check_receipt(folder)
    assert receipt["participants"] == {"0": [LENIENT]}
    assert receipt["refused"] == {"0": {"site-1": "answered TASK_RESULT_FILTER_ERROR"}}
    assert "PolicyRefused" in running.log("site-1")
    assert "PolicyRefused" not in running.log(SERVER)
    start = build_network(experiment.network, spatial_dims=2, seed=experiment.seed).state_dict()
    for name, weights in load_model(folder / "model.safetensors").weights.items():
        np.testing.assert_allclose(weights - start[name], 0.02, atol=1e-6, rtol=0)  # of the lenient site alone
