"""The noise predictor as an attacker may query it, one batch of images at a time.

Symbols as in the papers: x_0 an image, ᾱ_t the cumulative product of the noise schedule, ε_θ(x, t) the predicted noise.
Attacks that ask for the same prediction share it, and what was asked is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from privacy.audit.errors import require

# Timesteps between two points of the deterministic inversion; the interval of SecMI's published experiments.
STRIDE = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Denoiser:
    """A model as attackers may query it.

    Attributes:
        epsilon: ε_θ, called with x_t float32 [B, C, *spatial] and timesteps int64 [B], both on the device of
            ``alphas_cumprod``; returns the predicted noise in the shape of x_t. It treats each image by itself and
            the same way each time: a network in evaluation mode.
        alphas_cumprod: ᾱ, float [T], strictly decreasing in (0, 1]; on the device that the network is on.

    Raises:
        Unattackable: an ᾱ that is no noise schedule.
    """

    epsilon: Callable[[Tensor, Tensor], Tensor]
    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        alphas = self.alphas_cumprod
        shaped = alphas.ndim == 1 and len(alphas) > 0 and alphas.is_floating_point()
        require(shaped, argument="alphas_cumprod", value=tuple(alphas.shape), remedy="give floats [T]")
        falls = bool(((alphas > 0) & (alphas <= 1)).all() and (alphas.diff() < 0).all())
        remedy = "give the cumulative product of 1 - β_t, which falls strictly within (0, 1]"
        require(falls, argument="alphas_cumprod", value="not a noise schedule", remedy=remedy)


def shared_noise(seed: int, t: int, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32 [1, C, *spatial] for images of shape [C, *spatial], which all get the same.

    It depends on its arguments alone: not on batches, on the order of images or on the device. Two images then differ
    in their score by what they are and not by how lucky their noise was.
    """
    values = np.random.default_rng([seed, t, draw]).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values)[None]


class Queries:
    """One batch of images and every prediction that was asked for it.

    Each prediction and each point of the inversion is kept until the object goes: in memory about as many copies of
    the batch as ``evaluations``, plus one for each point of the inversion.

    Args:
        denoiser: the model.
        images: x_0, [B, C, *spatial]; copied to the device of the noise schedule.

    Attributes:
        images: x_0, float32 [B, C, *spatial].
        evaluations: U-Net evaluations per image so far.

    Raises:
        Unattackable: (all methods) a timestep outside [0, T), a point that the inversion does not pass, or a
            prediction that is not a finite tensor in the shape of its input.
    """

    def __init__(self, denoiser: Denoiser, images: Tensor) -> None:
        self._denoiser = denoiser
        self._alphas: list[float] = denoiser.alphas_cumprod.cpu().double().tolist()
        self.images = images.to(denoiser.alphas_cumprod.device, torch.float32)
        self.evaluations = 0
        self._predictions: dict[Hashable, Tensor] = {}
        self._inverted = [self.images]  # at 0, STRIDE, 2 STRIDE, …

    def clean(self, t: int) -> Tensor:
        """ε_θ(x_0, t): the image as it is, as though it were x_t."""
        return self._predicted(("clean", t), self.images, t)

    def diffused(self, name: Hashable, noise: Tensor, t: int) -> Tensor:
        """ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t).

        Args:
            name: tells this noise from every other one at the same t.
            noise: ε, broadcast to [B, C, *spatial].
            t: timestep.
        """
        a, b = self._coefficients(t)
        return self._predicted(("diffused", name, t), a * self.images + b * noise.to(self.images), t)

    def inverted(self, t: int) -> Tensor:
        """x̃_t: where deterministic DDIM steps of STRIDE take x_0, itself x̃_0; t is a multiple of STRIDE."""
        fits = t >= 0 and t % STRIDE == 0
        require(fits, argument="timestep", value=t, remedy=f"the inversion passes multiples of {STRIDE} only")
        while len(self._inverted) <= t // STRIDE:
            s = (len(self._inverted) - 1) * STRIDE
            self._inverted.append(self.ddim(self._inverted[-1], self.on_path(s), s, s + STRIDE))
        return self._inverted[t // STRIDE]

    def on_path(self, t: int) -> Tensor:
        """ε_θ(x̃_t, t)."""
        return self._predicted(("path", t), self.inverted(t), t) if t else self.clean(0)

    def image_from(self, x: Tensor, epsilon: Tensor, t: int) -> Tensor:
        """x̂_0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t."""
        a, b = self._coefficients(t)
        return (x - b * epsilon) / a

    def ddim(self, x: Tensor, epsilon: Tensor, t: int, target: int) -> Tensor:
        """x_t taken to another timestep, earlier or later: √ᾱ_target x̂_0 + √(1−ᾱ_target) ε.

        Song et al. 2021 (arXiv:2010.02502), Eq. 12 with σ = 0.
        """
        a, b = self._coefficients(target)
        return a * self.image_from(x, epsilon, t) + b * epsilon

    def _require_known(self, t: int) -> None:
        known = 0 <= t < len(self._alphas)
        require(known, argument="timestep", value=t, remedy=f"the model knows 0 … {len(self._alphas) - 1}")

    def _coefficients(self, t: int) -> tuple[float, float]:
        """(√ᾱ_t, √(1−ᾱ_t))."""
        self._require_known(t)
        return self._alphas[t] ** 0.5, (1 - self._alphas[t]) ** 0.5

    def _predicted(self, key: Hashable, x: Tensor, t: int) -> Tensor:
        self._require_known(t)
        if key not in self._predictions:
            timesteps = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
            epsilon = self._denoiser.epsilon(x, timesteps)
            self.evaluations += 1
            shape = tuple(epsilon.shape)
            require(shape == tuple(x.shape), argument="epsilon", value=shape, remedy="return the shape of x_t")
            finite = bool(epsilon.isfinite().all())
            remedy = "the model's prediction must be finite: check its weights and the intensity range of the images"
            require(finite, argument="epsilon", value=f"not finite at t={t}", remedy=remedy)
            self._predictions[key] = epsilon.to(x)
        return self._predictions[key]
