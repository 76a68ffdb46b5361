"""From noise to images: DDPM, DDIM and DPM-Solver++(2M), each image determined by its own seed."""

from __future__ import annotations

from math import log, sqrt

import torch
from torch import Tensor, nn
from tqdm import tqdm

from custom.diffusion.schedule import Schedule
from custom.model_config import SamplingConfig


@torch.no_grad()
def sample(
    network: nn.Module,
    schedule: Schedule,
    config: SamplingConfig,
    *,
    count: int,
    image_shape: tuple[int, ...],
    seed: int,
    device: torch.device,
    clip: bool = True,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Draw images from the model.

    Every image has a generator of its own, seeded with (seed, index): asking for more images, or for other batches,
    does not change the first ones (up to the rounding of batched arithmetic).

    Args:
        network: the denoiser, called as ``network(x=…, timesteps=…)``; put into eval mode.
        schedule: what it was trained with.
        config: sampler and number of steps.
        count: number of images.
        image_shape: [C, *spatial].
        seed: determines all of them.
        device: where to compute.
        clip: keep x̂_0 within [-1, 1], where images lie; latents lie anywhere.
        batch_size: images at a time.
        progress: show a bar on stderr.

    Returns:
        float32 [count, C, *spatial] on the CPU.
    """
    network.eval()
    done = []
    with tqdm(total=count, desc="sampling", unit="image", disable=not progress) as bar:
        for first in range(0, count, batch_size):
            indices = range(first, min(first + batch_size, count))
            generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63) for i in indices]
            done.append(_denoise(network, schedule, config, generators, image_shape, device, clip))
            bar.update(len(generators))
    return torch.cat(done)


def _denoise(
    network: nn.Module,
    schedule: Schedule,
    config: SamplingConfig,
    generators: list[torch.Generator],
    image_shape: tuple[int, ...],
    device: torch.device,
    clip: bool,
) -> Tensor:
    def normal() -> Tensor:
        return torch.stack([torch.randn(image_shape, generator=g) for g in generators]).to(device)

    last = schedule.config.timesteps - 1
    timesteps = torch.linspace(last, 0, config.steps).round().long().tolist()
    # float64: 1 - ᾱ and the log-SNR lose digits at both ends of the schedule.
    alpha_bars = [float(schedule.alphas_cumprod[t].double()) for t in timesteps] + [1.0]
    x = normal()
    history: list[tuple[float, Tensor]] = []  # (log-SNR step, x̂_0) of the step before
    for t, a_t, a_s in zip(timesteps, alpha_bars, alpha_bars[1:], strict=False):
        output = network(x=x, timesteps=torch.full((len(x),), t, device=device)).float()
        x0 = _predicted_x0(schedule, output, x, a_t)
        if clip:
            x0 = x0.clamp(-1, 1)
        if a_s == 1.0:
            return x0.cpu()
        if config.sampler == "ddpm":
            x = ddpm_step(x, x0, a_t, a_s, normal())
        elif config.sampler == "ddim":
            x = ddim_step(x, x0, a_t, a_s)
        else:
            step = _half_log_snr(a_s) - _half_log_snr(a_t)
            x = dpm_solver_step(x, x0, a_t, a_s, history[0] if history else None)
            history = [(step, x0)]
    raise AssertionError("the last step always returns")


def ddpm_step(x: Tensor, x0: Tensor, a_t: float, a_s: float, noise: Tensor) -> Tensor:
    """Draw from q(x_s | x_t, x_0), arXiv:2006.11239, eq. 6-7, for any s < t with ᾱ_t = ``a_t``, ᾱ_s = ``a_s``."""
    a_ts = a_t / a_s
    mean = (sqrt(a_s) * (1 - a_ts) * x0 + sqrt(a_ts) * (1 - a_s) * x) / (1 - a_t)
    return mean + sqrt((1 - a_s) / (1 - a_t) * (1 - a_ts)) * noise


def ddim_step(x: Tensor, x0: Tensor, a_t: float, a_s: float) -> Tensor:
    """Deterministic step, arXiv:2010.02502, eq. 12 with σ = 0."""
    noise = (x - sqrt(a_t) * x0) / sqrt(1 - a_t)
    return sqrt(a_s) * x0 + sqrt(1 - a_s) * noise


def dpm_solver_step(x: Tensor, x0: Tensor, a_t: float, a_s: float, before: tuple[float, Tensor] | None) -> Tensor:
    """Second-order multistep, DPM-Solver++(2M), arXiv:2211.01095, alg. 2; first order without a step before."""
    h = _half_log_snr(a_s) - _half_log_snr(a_t)
    direction = x0
    if before is not None:
        ratio = before[0] / h
        direction = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * before[1]
    shrink = sqrt((1 - a_s) / (1 - a_t))
    return shrink * x + (sqrt(a_s) - shrink * sqrt(a_t)) * direction


def _half_log_snr(alpha_bar: float) -> float:
    """λ = log(√ᾱ / √(1-ᾱ))."""
    return 0.5 * log(alpha_bar / (1 - alpha_bar))


def _predicted_x0(schedule: Schedule, output: Tensor, x: Tensor, a_t: float) -> Tensor:
    if schedule.config.prediction == "epsilon":
        return (x - sqrt(1 - a_t) * output) / sqrt(a_t)
    return sqrt(a_t) * x - sqrt(1 - a_t) * output
