"""A model as the audit may query it: a callable, and nothing of the network behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from custom.config import ExperimentConfig
from custom.diffusion.loss import denoising_loss
from custom.diffusion.schedule import Schedule
from custom.strict import require
from privacy.audit.queries import Denoiser

Loss = Callable[[Mapping[str, Tensor], Tensor, Tensor, Tensor], Tensor]


def denoiser(network: nn.Module, schedule: Schedule, device: torch.device) -> Denoiser:
    """The network as a predictor of ε, whatever it was trained to predict.

    From v = √ᾱ_t·ε - √(1-ᾱ_t)·x_0 follows ε = √ᾱ_t·v + √(1-ᾱ_t)·x_t (arXiv:2202.00512, app. D).
    """
    network.to(device).eval()
    alphas_cumprod = schedule.alphas_cumprod.to(device)

    def epsilon(x_t: Tensor, timesteps: Tensor) -> Tensor:
        output: Tensor = network(x=x_t, timesteps=timesteps)
        if schedule.config.prediction == "epsilon":
            return output
        alpha_bar = alphas_cumprod[timesteps].view(-1, *(1,) * (x_t.ndim - 1))
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * x_t

    return Denoiser(epsilon=epsilon, alphas_cumprod=alphas_cumprod)


def require_images(experiment: ExperimentConfig, argument: str) -> None:
    """Refuse an attack that knows images only, where the model denoises latents; raises ``ConfigError``."""
    remedy = "leave it out: it attacks models of images, and this one denoises latents"
    require(experiment.autoencoder is None, argument=argument, value=experiment.name, remedy=remedy)


def loss_function(network: nn.Module, schedule: Schedule) -> Loss:
    """The training loss of images as a function of the parameters: (parameters, x_0, ε, t) → [B]."""
    network.eval()

    def loss(parameters: Mapping[str, Tensor], x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        def call(x: Tensor, timesteps: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(network, dict(parameters), (), {"x": x, "timesteps": timesteps})
            return output

        return denoising_loss(call, schedule, x0, noise, timesteps)

    return loss
