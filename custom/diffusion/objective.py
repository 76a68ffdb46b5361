"""What a network is trained on: the loss of single images under noise, for a denoiser or an autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from custom.diffusion.autoencoder import autoencoder_loss
from custom.diffusion.loss import denoising_loss
from custom.diffusion.schedule import Schedule
from custom.model_config import AutoencoderConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """A network with its loss.

    Attributes:
        network: whose parameters are trained.
        loss: ``loss(call, x0, noise, timesteps)`` → one value per image, [B]; ``call`` is the network, or a function
            that calls it with other parameters.
        noise_shape: shape of an image's noise, from the image's [C, *spatial].
        timesteps: T, below which timesteps are drawn; an autoencoder has no use for them.
    """

    network: nn.Module
    loss: Callable[[Callable[..., Any], Tensor, Tensor, Tensor], Tensor]
    noise_shape: Callable[[Shape], Shape]
    timesteps: int


def denoising(network: nn.Module, schedule: Schedule) -> Objective:
    """To predict ε or v: :func:`custom.diffusion.loss.denoising_loss`."""

    def loss(call: Callable[..., Any], x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return denoising_loss(call, schedule, x0, noise, timesteps)

    steps = schedule.config.timesteps
    return Objective(network=network, loss=loss, noise_shape=lambda image: image, timesteps=steps)


def reconstructing(network: nn.Module, config: AutoencoderConfig) -> Objective:
    """To give images back through latents: :func:`custom.diffusion.autoencoder.autoencoder_loss`."""

    def loss(call: Callable[..., Any], x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return autoencoder_loss(call, x0, noise, kl_weight=config.kl_weight)

    def latent(image: Shape) -> Shape:
        return (config.latent_channels, *(edge // config.shrink for edge in image[1:]))

    return Objective(network=network, loss=loss, noise_shape=latent, timesteps=1)
