"""Models that an audit trains for itself: references that never saw a patient, and one that saw too much of them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from custom.diffusion.loss import denoising_loss
from custom.diffusion.objective import denoising
from custom.diffusion.schedule import Schedule
from custom.training import training_step

BATCH = 16
LEARNING_RATE = 2e-3
OVERFITTED = 2.0  # loss of others, as a multiple of that of the images that were trained on
MOST_TURNS = 6


def fit(
    network: nn.Module,
    schedule: Schedule,
    images: NDArray[np.float32],
    *,
    steps: int,
    seed: int,
    device: torch.device,
    label: str,
    progress: bool,
) -> nn.Module:
    """Train a network in place on images [N, 1, *spatial], drawn uniformly; the learning rate falls to zero.

    Args:
        network: to start from.
        schedule: forward process and prediction type.
        images: in [-1, 1].
        steps: of 16 images each.
        seed: of images, noise and timesteps.
        device: where to compute.
        label: of the progress bar.
        progress: show it on stderr.
    """
    objective = denoising(network.to(device).train(), schedule)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc=label, unit="step", disable=not progress):
        rows = torch.randint(len(images), (min(BATCH, len(images)),), generator=generator)
        x0 = torch.from_numpy(images[rows.numpy()]).to(device)
        training_step(objective, optimizer, x0, generator, gradient_clip=1.0)
        falling.step()
    return network.eval()


def overfit(
    network: nn.Module,
    schedule: Schedule,
    images: NDArray[np.float32],
    others: NDArray[np.float32],
    *,
    steps: int,
    device: torch.device,
    progress: bool,
) -> nn.Module:
    """Train a network in place, in turns of so many steps, until it knows the images by heart.

    That is, until its loss on others is twice that on the images, with noise that no attack uses; or six turns. A
    network that has learnt little so far needs more turns than a finished one.

    Args:
        network, schedule, images, device, progress: as for :func:`fit`.
        others: images that it must not know, [M, 1, *spatial].
        steps: of a turn.
    """
    for turn in range(MOST_TURNS):
        label = f"overfitting the positive control, turn {turn + 1}"
        fit(network, schedule, images, steps=steps, seed=turn, device=device, label=label, progress=progress)
        known, unknown = (_mean_loss(network, schedule, each, device) for each in (images, others))
        if unknown > OVERFITTED * known:
            break
    return network


@torch.no_grad()
def _mean_loss(network: nn.Module, schedule: Schedule, images: NDArray[np.float32], device: torch.device) -> float:
    generator = torch.Generator().manual_seed(20_211_105)
    x0 = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    noise = torch.randn(x0.shape, generator=generator).to(device)
    spread = (torch.arange(len(x0)) + 0.5) / len(x0) / 3  # low noise: where single images are told apart
    timesteps = (spread * schedule.config.timesteps).long().to(device)
    return float(denoising_loss(network, schedule, x0, noise, timesteps).mean())
