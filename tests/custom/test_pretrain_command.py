from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from custom.cli import main
from custom.config import ExperimentConfig, NetworkConfig, TrainingConfig
from custom.controllers.diffusion_fedavg import start_weights
from custom.diffusion.networks import build_network
from custom.model_file import load_model
from custom.privacy_config import PrivacyConfig
from custom.strict import ConfigError


@pytest.fixture
def job(experiment: ExperimentConfig, tmp_path: Path) -> ExperimentConfig:
    private = replace(
        experiment,
        start_from="phantom",
        training=TrainingConfig(steps_per_round=3),
        federation=replace(experiment.federation, weighting="uniform"),
        privacy=PrivacyConfig(patients=4, delta=1e-2, clip_norm=1.0, sampling_rate=0.5, noise_multiplier=1.0),
    )
    config = tmp_path / "job" / "app" / "config"
    config.mkdir(parents=True)
    (config / "experiment.json").write_text(json.dumps(private.to_json()))
    return private


def pretrain(tmp_path: Path) -> int:
    out = tmp_path / "models" / "phantom.safetensors"
    return main(["pretrain", str(tmp_path / "job"), str(out), "--patients", "4", "--steps", "3"])


def test_the_job_starts_from_what_the_command_wrote(
    job: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(tmp_path) == 0
    assert "start_from" in capsys.readouterr().out
    weights = start_weights(tmp_path / "models", job)
    written = load_model(tmp_path / "models" / "phantom.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in written.ema.items())
    fresh = build_network(job.network, spatial_dims=2, seed=job.seed).state_dict()
    assert any(not torch.equal(weights[name], tensor) for name, tensor in fresh.items())
    assert written.experiment.privacy is None
    assert pretrain(tmp_path) == 2, "an existing model is not overwritten"
    assert "exists" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused(job: ExperimentConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedct pretrain"):
        start_weights(tmp_path / "models", job)
    assert pretrain(tmp_path) == 0
    for other, named in (
        (replace(job, network=NetworkConfig(channels=(8, 8), attention=(False, False))), r"start_from\.network"),
        (replace(job, schedule=replace(job.schedule, timesteps=500)), r"start_from\.schedule"),
    ):
        with pytest.raises(ConfigError, match=named):
            start_weights(tmp_path / "models", other)
