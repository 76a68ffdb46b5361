"""Fixtures that every room may use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from custom.config import ExperimentConfig, FederationConfig
from custom.model_config import AutoencoderConfig, NetworkConfig, SamplingConfig, TrainingConfig
from custom.privacy_config import MeanImageConfig, PrivacyConfig
from medical_data.cohort import Cohort
from medical_data.preprocess import PreprocessConfig

torch.set_num_threads(1)  # small tensors: a second thread only gets in the way

SHARED_CT = Path(__file__).resolve().parents[2] / "shared" / "ct"


@pytest.fixture(scope="session")
def shared_ct() -> Path:
    """Folder of real CT data, one folder a patient, beside the checkout."""
    if not (SHARED_CT / "MANIFEST.md").is_file():
        pytest.skip(f"no real CT data at {SHARED_CT}")
    return SHARED_CT


@pytest.fixture(scope="session")
def experiment() -> ExperimentConfig:
    """The smallest experiment that is whole."""
    return ExperimentConfig(
        name="small",
        seed=3,
        preprocess=PreprocessConfig(size=16, images_per_patient=4),
        network=NetworkConfig(channels=(8, 16), attention=(False, True), norm_groups=4, head_channels=8),
        training=TrainingConfig(steps_per_round=3, batch_size=4, warmup_steps=0, gradient_clip=1.0),
        federation=FederationConfig(rounds=2, round_timeout_s=120),
        sampling=SamplingConfig(steps=4, grid_images=4, evaluation_images=24),
    )


@pytest.fixture(scope="session")
def latent_experiment(experiment: ExperimentConfig) -> ExperimentConfig:
    """The same on the latents of an autoencoder, which its first of two rounds trains."""
    return replace(
        experiment,
        autoencoder=AutoencoderConfig(
            channels=(8, 8),
            latent_channels=2,
            rounds=1,
            training=TrainingConfig(steps_per_round=3, batch_size=4, warmup_steps=0, learning_rate=0.01),
        ),
    )


@pytest.fixture(scope="session")
def private_experiment(experiment: ExperimentConfig) -> ExperimentConfig:
    """The same with differential privacy, for a cohort of few patients."""
    return replace(
        experiment,
        training=TrainingConfig(steps_per_round=3, warmup_steps=0),
        federation=replace(experiment.federation, weighting="uniform"),
        privacy=PrivacyConfig(
            patients=4,
            delta=1e-2,
            clip_norm=1.0,
            sampling_rate=0.5,
            noise_multiplier=1.0,
            mean_image=MeanImageConfig(clip_norm=1.0, noise_multiplier=1.0, warm_up_steps=60),
        ),
    )


@pytest.fixture(scope="session")
def cohort() -> Cohort:
    """Six patients of four images each: a disc whose size and brightness are the patient's own."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:16j, -1:1:16j]
    images = np.stack(
        [
            np.where(x**2 + y**2 < (0.5 + 0.05 * patient) ** 2, 0.1 * patient, -1.0) + rng.normal(0, 0.02, x.shape)
            for patient in range(6)
            for _ in range(4)
        ]
    ).astype(np.float32)
    return Cohort(
        images=images[:, None],
        patient=np.repeat(np.arange(6, dtype=np.int32), 4),
        pseudonyms=tuple(f"p{patient}" for patient in range(6)),
        held_out=np.array([True, False, False, True, False, False]),
        manifest_sha256="0" * 64,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The machine's own Chromium, headless."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine (Debian's package is called chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()
