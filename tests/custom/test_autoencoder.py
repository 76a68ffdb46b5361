"""The autoencoder of latent diffusion and its loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from custom.config import ExperimentConfig
from custom.diffusion.autoencoder import SCALE_RATE, SCALE_WEIGHT, autoencoder_loss, build_autoencoder
from custom.model_config import AutoencoderConfig, TrainingConfig
from custom.training import train_round
from medical_data.cohort import Cohort

CPU = torch.device("cpu")
SMALL = AutoencoderConfig(channels=(8, 16), latent_channels=3, rounds=1)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_latents_are_smaller_and_come_back_as_images(spatial_dims: int) -> None:
    network = build_autoencoder(SMALL, spatial_dims=spatial_dims, seed=0)
    x = rand(2, 1, *(8,) * spatial_dims)
    latents = network.encode(x)
    assert latents.shape == (2, 3, *(4,) * spatial_dims)
    assert network.decode(latents).shape == x.shape
    assert not dict(network.named_buffers()), "all of its state is parameters: what leaves is what is trained"


def test_images_of_a_batch_do_not_mix() -> None:
    network = build_autoencoder(SMALL, spatial_dims=3, seed=0)
    x, noise = rand(3, 1, 8, 8, 8), rand(3, 3, 4, 4, 4, seed=1)
    losses = autoencoder_loss(network, x, noise, kl_weight=0.1)
    for i in range(3):
        alone = autoencoder_loss(network, x[i : i + 1], noise[i : i + 1], kl_weight=0.1)
        torch.testing.assert_close(losses[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_the_seed_decides_the_weights() -> None:
    one, same, other = (build_autoencoder(SMALL, spatial_dims=2, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_loss_is_the_formula_and_the_scale_adds_a_gradient_only() -> None:
    network = build_autoencoder(SMALL, spatial_dims=2, seed=0)
    nn.init.constant_(network.scale, 0.05)
    nn.init.constant_(network.shift, 0.02)
    x, noise = rand(2, 1, 8, 8), rand(2, 3, 4, 4, seed=1)
    loss = autoencoder_loss(network, x, noise, kl_weight=0.3)
    mean, deviation = network.kl.encode(x)
    images = network.kl.decode(mean + deviation * noise)
    kl = 0.5 * (mean**2 + deviation**2 - 1 - 2 * deviation.log())
    wanted = (images - x).abs().mean(dim=(1, 2, 3)) + 0.3 * kl.mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, wanted)
    scale, shift = torch.autograd.grad(loss.mean(), (network.scale, network.shift))
    # d/dθ of (z - m)²/2s² + log s with s = exp(RATE θ), and with m = RATE θ; averaged over images, channels and places
    off, variance = mean - SCALE_RATE * 0.02, float(np.exp(2 * SCALE_RATE * 0.05))
    square = (off**2).mean(dim=(0, 2, 3)) / variance
    torch.testing.assert_close(scale.flatten(), SCALE_WEIGHT * SCALE_RATE * (1 - square) / 3)
    torch.testing.assert_close(shift.flatten(), -SCALE_WEIGHT * SCALE_RATE * off.mean(dim=(0, 2, 3)) / variance / 3)


def test_scaled_latents_have_unit_deviation_after_training(latent_experiment: ExperimentConfig, cohort: Cohort) -> None:
    """Also from a scale that is seven times too large: it is learnt, and nobody reports a statistic."""
    from custom.stages import fresh_weights, model_autoencoder

    assert latent_experiment.autoencoder is not None
    assert latent_experiment.autoencoder.training is not None
    training = replace(latent_experiment.autoencoder.training, steps_per_round=300)
    longer = replace(latent_experiment, autoencoder=replace(latent_experiment.autoencoder, training=training))
    weights = fresh_weights(longer, seed=0)
    weights["autoencoder.scale"] = weights["autoencoder.scale"] + 0.2

    def moments(values: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            latents = model_autoencoder(longer, values).encode(torch.from_numpy(cohort.images))
        return latents.std(dim=(0, 2, 3)), latents.mean(dim=(0, 2, 3))

    update = train_round(
        cohort=cohort,
        weights=weights,
        state={},
        config=longer,
        site="a",
        round_number=0,
        device=CPU,
    )
    (after, centre) = moments({**weights, **{name: weights[name] + d for name, d in update.difference.items()}})
    before, _ = moments(weights)
    assert (before < 0.25).all()
    assert (after.log().abs() < 0.35).all(), (before, after)
    assert (centre.abs() < 0.35).all(), centre
    assert update.metrics["train_loss"] < 2 * update.metrics["held_out_loss"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"channels": (8,)}, "autoencoder.channels"),
        ({"channels": (8, 12)}, "autoencoder.channels"),
        ({"latent_channels": 0}, "autoencoder.latent_channels"),
        ({"rounds": -1}, "autoencoder.rounds"),
        ({"rounds": 0}, "autoencoder.rounds"),
        ({"frozen": "public"}, "autoencoder.rounds"),
        ({"rounds": 0, "frozen": "../public"}, "autoencoder.frozen"),
        ({"kl_weight": -1.0}, "autoencoder.kl_weight"),
        ({"rounds": 0, "frozen": "p", "training": TrainingConfig(steps_per_round=1)}, "autoencoder.training"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(SMALL, **changes)
