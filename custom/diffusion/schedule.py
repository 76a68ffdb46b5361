"""The forward process q(x_t | x_0) and what the network is asked to predict."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from custom.diffusion.light_monai import light_monai
from custom.model_config import ScheduleConfig

with light_monai():
    from monai.networks.schedulers import DDPMScheduler


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """ᾱ_t of arXiv:2006.11239, eq. 4, for t = 0 … T-1.

    Attributes:
        config: from which it was made.
        alphas_cumprod: ᾱ, float32 [T], decreasing.
    """

    config: ScheduleConfig
    alphas_cumprod: Tensor

    @property
    def sha256(self) -> str:
        """Hash of ᾱ and of the prediction type: it travels with the model, and a site with another one refuses."""
        values = self.alphas_cumprod.to(torch.float32).cpu().numpy().astype("<f4").tobytes()
        return hashlib.sha256(self.config.prediction.encode() + b"\0" + values).hexdigest()

    def noised(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t·x_0 + √(1-ᾱ_t)·ε (arXiv:2006.11239, eq. 4); tensors [B, 1, *spatial], timesteps int [B]."""
        signal, sigma = self._coefficients(timesteps, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """ε, or v = √ᾱ_t·ε - √(1-ᾱ_t)·x_0 (arXiv:2202.00512, app. D)."""
        if self.config.prediction == "epsilon":
            return noise
        signal, sigma = self._coefficients(timesteps, x0)
        return signal * noise - sigma * x0

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alphas_cumprod.to(like.device)[timesteps].view(-1, *(1,) * (like.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule as MONAI computes it."""
    scheduler = DDPMScheduler(num_train_timesteps=config.timesteps, schedule=config.noise)
    return Schedule(config=config, alphas_cumprod=scheduler.alphas_cumprod)
