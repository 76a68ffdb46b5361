"""Models that an audit trains for itself: references that never saw a patient, and one that saw too much of them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from custom.diffusion.schedule import Schedule
from custom.training import denoising_step

BATCH = 16
LEARNING_RATE = 2e-3


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
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc=label, unit="step", disable=not progress):
        rows = torch.randint(len(images), (min(BATCH, len(images)),), generator=generator)
        x0 = torch.from_numpy(images[rows.numpy()]).to(device)
        denoising_step(network, schedule, optimizer, x0, generator, gradient_clip=1.0)
        falling.step()
    return network.eval()
