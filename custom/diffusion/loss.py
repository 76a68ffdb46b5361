"""The denoising loss, one value per image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from custom.diffusion.schedule import Schedule


def denoising_loss(
    network: Callable[..., Tensor], schedule: Schedule, x0: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Mean squared error of the prediction, L_simple of arXiv:2006.11239, eq. 14, for ε or v.

    Args:
        network: called as ``network(x=…, timesteps=…)``.
        schedule: forward process and prediction type.
        x0: images in [-1, 1], [B, 1, *spatial].
        noise: standard normal, the shape of ``x0``.
        timesteps: int64 [B] in [0, T).

    Returns:
        Mean over pixels, one value per image, [B].
    """
    prediction: Tensor = network(x=schedule.noised(x0, noise, timesteps), timesteps=timesteps)
    error = prediction - schedule.target(x0, noise, timesteps)
    return error.square().flatten(start_dim=1).mean(dim=1)
