"""Volumes in NVFlare's real simulator: slice by slice no more, and latent diffusion as two stages of one job."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from simulator import Run, real_sites, simulate

from custom.cli import main
from custom.config import ExperimentConfig
from custom.job_plan import privacy_plan
from custom.model_config import AutoencoderConfig, SamplingConfig, TrainingConfig
from custom.privacy_config import PrivacyConfig
from custom.run_folder import check_receipt
from custom.secure_config import SecureAggregationConfig
from custom.site_ledger import open_ledger
from custom.stages import PREFIX, model_shapes
from medical_data.deidentify import SECRET_BYTES, Pseudonymizer
from medical_data.inspection import iter_volumes
from medical_data.preprocess import PreprocessConfig

SITES = ["site-1", "site-2", "site-3"]
VOLUMES = PreprocessConfig(spatial_dims=3, size=16, images_per_patient=2, spacing_mm=(6.0, 25.0, 25.0))


@pytest.fixture(scope="module")
def volumes(experiment: ExperimentConfig) -> ExperimentConfig:
    return replace(
        experiment,
        name="volumes",
        preprocess=VOLUMES,
        federation=replace(experiment.federation, min_responses=3),
        sampling=SamplingConfig(steps=4, grid_images=2, evaluation_images=12),
    )


@pytest.fixture(scope="module")
def latents(volumes: ExperimentConfig) -> ExperimentConfig:
    """Three rounds: one of the autoencoder, two of the denoiser."""
    return replace(
        volumes,
        name="latents",
        federation=replace(volumes.federation, rounds=3),
        autoencoder=AutoencoderConfig(
            channels=(8, 8), latent_channels=2, rounds=1, training=TrainingConfig(steps_per_round=2, batch_size=2)
        ),
    )


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory, volumes: ExperimentConfig) -> Run:
    return simulate(tmp_path_factory.mktemp("volumes"), volumes, SITES, threads=3)


def test_a_run_on_volumes_leaves_model_pictures_and_figures(completed: Run) -> None:
    assert completed.returncode == 0, completed.output
    check_receipt(completed.folder)
    for name in ("samples.png", "samples/round_0001.png"):
        assert (completed.folder / name).stat().st_size > 0
    metrics = json.loads((completed.folder / "metrics.json").read_text())
    assert {"held_out_loss", "effnet_kid", "effnet_kid_baseline", "effnet_kid_untrained"} <= set(metrics["mean"])
    for site in SITES:
        (picture,) = (completed.base / "sites" / site / "pictures").rglob("real_and_generated.png")
        assert picture.stat().st_size > 0


def test_samples_are_a_dicom_series_each_that_the_reader_accepts(completed: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = str(completed.folder / "model.safetensors")
    assert main(["sample", model, str(out), "--count", "2", "--steps", "3", "--format", "dicom"]) == 0
    (out / "grid.png").unlink()
    found = list(iter_volumes(out, format="dicom", pseudonymizer=Pseudonymizer(bytes(SECRET_BYTES)), progress=False))
    assert len(found) == 2
    for row, volume in found:
        assert row.accepted, row
        assert volume is not None
        assert volume.hu.shape == (16, 16, 16)
        assert volume.spacing_mm == pytest.approx((6.0, 25.0, 25.0))


def test_both_stages_run_under_masks(latents: ExperimentConfig, tmp_path: Path) -> None:
    masked = replace(latents, secure_aggregation=SecureAggregationConfig(min_survivors=3))
    run = simulate(tmp_path, masked, SITES, threads=3)
    assert run.returncode == 0, run.output
    assert check_receipt(run.folder)["participants"] == {str(number): SITES for number in range(3)}
    assert "round 1/3 (autoencoder)" in run.output
    assert "round 2/3 (denoiser)" in run.output
    model = load_file(run.folder / "model.safetensors")
    assert {name: array.shape for name, array in model.items()} == model_shapes(masked)
    assert not (run.folder / "samples" / "round_0001.png").exists(), "an autoencoder alone draws nothing"
    assert (run.folder / "samples" / "round_0002.png").exists()
    for site in SITES:
        (kept,) = (run.base / "sites" / site / "state").rglob("latents.npy")
        assert kept.stat().st_size > 0, "encoded once for both rounds"


def test_both_stages_run_encrypted(latents: ExperimentConfig, tmp_path: Path) -> None:
    pytest.importorskip("tenseal")
    run = simulate(tmp_path, replace(latents, encryption="ckks"), SITES, threads=3)
    assert run.returncode == 0, run.output
    assert check_receipt(run.folder)["participants"] == {str(number): SITES for number in range(3)}
    assert {name: a.shape for name, a in load_file(run.folder / "model.safetensors").items()} == model_shapes(latents)


def test_both_stages_are_charged_by_one_plan(latents: ExperimentConfig, tmp_path: Path) -> None:
    """Also with fresh processes for every task: what a stage builds on lies on the disk."""
    assert latents.autoencoder is not None
    private = replace(
        latents,
        training=TrainingConfig(steps_per_round=2, warmup_steps=0),
        autoencoder=replace(latents.autoencoder, training=None),
        federation=replace(latents.federation, weighting="uniform"),
        privacy=PrivacyConfig(patients=12, delta=1e-2, clip_norm=1.0, sampling_rate=0.5, noise_multiplier=1.5),
    )
    plan = privacy_plan(private)
    assert plan is not None
    run = simulate(tmp_path, private, SITES, threads=1)
    assert run.returncode == 0, run.output
    model = load_file(run.folder / "model.safetensors")
    assert any(name.startswith(PREFIX) for name in model)
    for site in SITES:
        charges = open_ledger(run.base / "sites" / site).statement().charges
        assert [charge.attempt.release for charge in charges] == ["round-0000", "round-0001", "round-0002"]
        assert {charge.event for charge in charges} == {plan.round_event}


@pytest.mark.slow
@pytest.mark.parametrize("latent", [False, True], ids=["volumes", "latents"])
def test_real_scans_train_both(
    shared_ct: Path, tmp_path: Path, volumes: ExperimentConfig, latents: ExperimentConfig, latent: bool
) -> None:
    run = simulate(tmp_path, latents if latent else volumes, real_sites(shared_ct, tmp_path), threads=1)
    assert run.returncode == 0, run.output
    check_receipt(run.folder)
