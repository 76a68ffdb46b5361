from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from custom.config import ExperimentConfig
from custom.diffusion.checkpointing import BLOCKS, checkpointed
from custom.memory import LiveMemory
from custom.model_config import AutoencoderConfig
from custom.private_training import patient_loss
from custom.stages import fresh_weights, stage_objective, stages
from privacy.gradients import per_patient_gradients

Pass = tuple[dict[str, Tensor], Tensor, int]
CPU = torch.device("cpu")


def trained(network: nn.Module, loss: Callable[[], Tensor]) -> Pass:
    """Gradients, loss and peak memory of one pass."""
    network.zero_grad()
    with LiveMemory() as memory:
        value = loss()
        value.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}, value.detach(), memory.peak


@pytest.mark.parametrize("stage_number", [0, 1])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_same_loss_and_gradients_in_less_memory(
    experiment: ExperimentConfig, stage_number: int, spatial_dims: int
) -> None:
    """Of the autoencoder and of the denoiser."""
    latent = replace(
        experiment,
        preprocess=replace(
            experiment.preprocess,
            spatial_dims=spatial_dims,
            size=16,
            spacing_mm=(1.0, 1.0, 1.0) if spatial_dims == 3 else None,
        ),
        autoencoder=AutoencoderConfig(channels=(8, 16), latent_channels=2, norm_groups=4, rounds=1),
    )
    stage = stages(latent)[stage_number]
    objective = stage_objective(latent, stage, fresh_weights(latent, seed=1), CPU)
    shape = latent.image_shape if stage.name == "autoencoder" else latent.denoised_shape
    x0, noise = torch.rand(8, *shape), torch.randn(8, *objective.noise_shape(shape))
    timesteps = torch.randint(objective.timesteps, (8,))
    network = objective.network
    with torch.no_grad():  # at its start the network's last layers are zero, and most gradients with them
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    names = list(network.state_dict())

    def loss() -> Tensor:
        return objective.loss(network, x0, noise, timesteps).mean()

    gradients, value, memory = trained(network, loss)
    assert checkpointed(network) is network
    assert list(network.state_dict()) == names
    again, same_value, less_memory = trained(network, loss)
    assert torch.equal(value, same_value)
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6)
    assert less_memory < 0.8 * memory


def test_there_is_something_to_compute_again(experiment: ExperimentConfig) -> None:
    """A newer MONAI could call its blocks otherwise."""
    network = stage_objective(experiment, stages(experiment)[0], fresh_weights(experiment, seed=1), CPU).network
    blocks = [name for name, module in network.named_modules() if isinstance(module, BLOCKS)]
    for place in ("down_blocks", "middle_block", "up_blocks"):
        assert any(name.startswith(place) for name in blocks)


def test_per_patient_gradients_refuse_it(private_experiment: ExperimentConfig) -> None:
    """Why the site's setting does nothing under differential privacy."""
    objective = stage_objective(
        private_experiment, stages(private_experiment)[0], fresh_weights(private_experiment, seed=1), CPU
    )
    checkpointed(objective.network)
    x0 = torch.rand(2, 1, *private_experiment.image_shape)
    parameters = dict(objective.network.named_parameters())
    with pytest.raises(RuntimeError, match="vmapped"):
        per_patient_gradients(
            patient_loss(objective), parameters, (x0, torch.randn(x0.shape), torch.zeros(2, 1, dtype=torch.int64))
        )
