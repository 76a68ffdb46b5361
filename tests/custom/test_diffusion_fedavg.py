from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from custom.client_sampling import drawn_sites
from custom.codec import TaskHeader, read_task, task_model
from custom.config import ExperimentConfig
from custom.controllers.diffusion_fedavg import DiffusionFedAvg, resumed
from custom.controllers.secure_fedavg import SecureFedAvg
from custom.diffusion.networks import build_network
from custom.executors.diffusion_trainer import _check_agreement
from custom.model_file import ModelFile
from custom.run_folder import RunFolder
from custom.secure_config import SecureAggregationConfig
from custom.server_step import moved
from custom.site_file import ServerConfig
from custom.strict import ConfigError


@pytest.fixture
def model(experiment: ExperimentConfig) -> ModelFile:
    weights = dict(build_network(experiment.network, spatial_dims=2, seed=1).state_dict())
    return ModelFile(experiment=experiment, rounds_done=0, weights=weights, ema=weights)


def test_sites_are_drawn_by_seed_and_round_whatever_their_order(experiment: ExperimentConfig) -> None:
    sites = [f"s{i}" for i in range(10)]
    assert drawn_sites(sites[::-1], experiment, 0) == sites
    some = replace(experiment, federation=replace(experiment.federation, clients_per_round=3))
    draws = [drawn_sites(sites, some, number) for number in range(200)]
    assert draws == [drawn_sites(sites[::-1], some, number) for number in range(200)]
    assert all(len(set(draw)) == 3 for draw in draws)
    counts = [sum(site in draw for draw in draws) for site in sites]
    assert min(counts) > 30  # 60 expected of each
    assert draws != [drawn_sites(sites, replace(some, seed=99), number) for number in range(200)]


def test_server_average_starts_at_the_first_trained_model(experiment: ExperimentConfig, model: ModelFile) -> None:
    slow = replace(experiment, federation=replace(experiment.federation, server_ema=0.75))
    model = replace(model, experiment=slow)
    ones = {name: np.ones(tensor.shape, np.float32) for name, tensor in model.weights.items()}
    first = moved(model, ones)
    second = moved(first, ones)
    for name, start in model.weights.items():
        torch.testing.assert_close(first.ema[name], start + 1)
        torch.testing.assert_close(second.weights[name], start + 2)
        torch.testing.assert_close(second.ema[name], start + 1.25)
    assert second.rounds_done == 2


def test_only_a_run_of_this_experiment_is_carried_on(
    experiment: ExperimentConfig, model: ModelFile, tmp_path: Path
) -> None:
    folder = RunFolder.create(tmp_path, experiment)
    with pytest.raises(ConfigError, match="no checkpoint"):
        resumed(tmp_path, folder.run_id, experiment)
    folder.save_round(replace(model, rounds_done=1))
    assert resumed(tmp_path, folder.run_id, experiment).path == folder.path
    with pytest.raises(ConfigError, match="another experiment"):
        resumed(tmp_path, folder.run_id, replace(experiment, seed=99))
    for path in ("../small/" + folder.run_id, str(folder.path), ""):
        with pytest.raises(ConfigError, match="resume_run"):
            resumed(tmp_path, path, experiment)


def test_a_site_refuses_another_configuration_or_schedule(experiment: ExperimentConfig) -> None:
    from custom.diffusion.schedule import build_schedule

    right = TaskHeader(
        run_id="r",
        round_number=0,
        config_sha256=experiment.sha256,
        schedule_sha256=build_schedule(experiment.schedule).sha256,
    )
    _check_agreement(right, experiment)
    with pytest.raises(ConfigError, match="config_sha256"):
        _check_agreement(replace(right, config_sha256="0" * 64), experiment)
    with pytest.raises(ConfigError, match="schedule_sha256"):
        _check_agreement(replace(right, schedule_sha256="0" * 64), experiment)


def test_a_controller_refuses_an_experiment_that_is_another_one_s(experiment: ExperimentConfig, tmp_path: Path) -> None:
    masked = replace(experiment, secure_aggregation=SecureAggregationConfig())
    server = ServerConfig(runs=tmp_path, kit=tmp_path)
    with pytest.raises(ConfigError, match="SecureFedAvg"):
        DiffusionFedAvg()._check(masked, server)
    with pytest.raises(ConfigError, match="DiffusionFedAvg"):
        SecureFedAvg()._check(experiment, server)
    with pytest.raises(ConfigError, match=r"rootCA\.pem.*simulator-keys"):
        SecureFedAvg()._check(masked, server)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"update_bound": 0.0}, "update_bound"),
        ({"max_weight": -1.0}, "max_weight"),
        ({"stage_timeout_s": 0}, "stage_timeout_s"),
        ({"min_survivors": 1}, "min_survivors"),
        ({"min_survivors": 2, "colluding_sites": 1}, "min_survivors"),
        ({"colluding_sites": -1}, "colluding_sites"),
        ({"ring_bits": 64}, "ring_bits"),
        ({"treshold": 2}, "treshold"),
    ],
)
def test_secure_aggregation_that_cannot_be_meant_is_refused_by_name(
    experiment: ExperimentConfig, changes: dict[str, object], named: str
) -> None:
    values = experiment.to_json() | {"secure_aggregation": changes}
    with pytest.raises(ConfigError, match=named):
        ExperimentConfig.from_json(values)


def test_a_task_arrives_as_it_was_sent_and_a_malformed_one_is_refused(experiment: ExperimentConfig) -> None:
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.app_common.utils.fl_model_utils import FLModelUtils

    header = TaskHeader(run_id="r", round_number=3, config_sha256="a", schedule_sha256="b")
    arrays = {"w": np.arange(3, dtype=np.float32)}
    received, again, _ = read_task(FLModelUtils.to_shareable(task_model(arrays, header)))
    assert again == header
    np.testing.assert_array_equal(received["w"], arrays["w"])
    with pytest.raises(ConfigError, match="task"):
        read_task(DXO(DataKind.WEIGHTS, data=arrays, meta={"task": {"run_id": "r"}}).to_shareable())
    with pytest.raises(ValueError, match="kind"):
        read_task(DXO(DataKind.WEIGHT_DIFF, data=arrays).to_shareable())
