from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from custom.cli import main
from custom.config import ExperimentConfig
from custom.diffusion.autoencoder import build_autoencoder
from custom.diffusion.networks import build_network
from custom.latents import encoded
from custom.model_config import NetworkConfig, TrainingConfig
from custom.model_file import load_model
from custom.named_models import frozen_autoencoder, start_weights
from custom.privacy_config import PrivacyConfig
from custom.stages import PREFIX, fresh_weights, model_autoencoder
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


# ---- latent diffusion


@pytest.fixture
def latent_job(latent_experiment: ExperimentConfig, tmp_path: Path) -> ExperimentConfig:
    config = tmp_path / "job" / "app" / "config"
    config.mkdir(parents=True)
    (config / "experiment.json").write_text(json.dumps(latent_experiment.to_json()))
    return latent_experiment


def test_both_networks_of_a_latent_job_are_trained(latent_job: ExperimentConfig, tmp_path: Path) -> None:
    assert pretrain(tmp_path) == 0
    fresh = fresh_weights(latent_job, seed=latent_job.seed)
    weights = start_weights(tmp_path / "models", replace(latent_job, start_from="phantom"))
    trained = {name for name in fresh if not torch.equal(fresh[name], weights[name])}
    assert {name.startswith(PREFIX) for name in trained} == {True, False}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_published_weights_are_taken_as_they_are_and_scaled_by_public_images(
    latent_job: ExperimentConfig, tmp_path: Path, suffix: str
) -> None:
    assert latent_job.autoencoder is not None
    published = build_autoencoder(latent_job.autoencoder, spatial_dims=2, seed=77).kl.state_dict()
    file = tmp_path / f"published{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": published}, file)
    else:
        save_file(published, file)
    out = tmp_path / "models" / "phantom.safetensors"
    command = ["pretrain", str(tmp_path / "job"), str(out), "--patients", "4", "--steps", "3"]
    assert main([*command, "--autoencoder", str(file)]) == 0
    written = load_model(out)
    for name, tensor in published.items():
        assert torch.equal(written.ema[f"{PREFIX}kl.{name}"], tensor), "no step has moved it"
    config = replace(latent_job.autoencoder, rounds=0, frozen="phantom", training=None)
    frozen = frozen_autoencoder(tmp_path / "models", replace(latent_job, autoencoder=config), "phantom")
    (images,) = (np.load(f) for f in (tmp_path / "models").rglob("images.npy"))
    (latents,) = (np.load(f) for f in (tmp_path / "models").rglob("latents.npy"))
    autoencoder = model_autoencoder(latent_job, {**written.ema, **frozen})
    np.testing.assert_array_equal(encoded(autoencoder, images, torch.device("cpu")), latents)
    np.testing.assert_allclose(latents.mean(axis=(0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(latents.std(axis=(0, 2, 3)), 1, rtol=1e-4)


def test_other_weights_are_refused_by_name(
    latent_job: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latent_job.autoencoder is not None
    other = build_autoencoder(replace(latent_job.autoencoder, latent_channels=5), spatial_dims=2).kl.state_dict()
    save_file(other, tmp_path / "other.safetensors")
    (tmp_path / "broken.pt").write_bytes(b"no pickle")
    torch.save([1, 2], tmp_path / "list.pt")
    same = build_autoencoder(latent_job.autoencoder, spatial_dims=2).kl.state_dict()
    save_file({name: torch.zeros_like(tensor) for name, tensor in same.items()}, tmp_path / "zeros.safetensors")
    command = ["pretrain", str(tmp_path / "job"), str(tmp_path / "m.safetensors"), "--patients", "4", "--steps", "1"]
    for name, said in (
        ("other.safetensors", "architecture"),
        ("zeros.safetensors", "gives nothing of these images"),
        ("broken.pt", "file of tensors alone"),
        ("list.pt", "state dictionary"),
        ("nowhere.pt", "no such file"),
    ):
        assert main([*command, "--autoencoder", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


def test_a_job_without_an_autoencoder_takes_none(
    job: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", str(tmp_path / "job"), str(tmp_path / "m.safetensors"), "--autoencoder", "x.pt"]
    assert main(command) == 2
    assert "has no autoencoder" in capsys.readouterr().err
