"""Samples of a model, whatever it is: slices or volumes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from custom.device import images_at_once
from custom.diffusion.sampler import sample
from custom.latents import decoded
from custom.model_config import SamplingConfig
from custom.model_file import ModelFile

MOST_AT_ONCE = 64


def draw(
    model: ModelFile,
    *,
    count: int,
    device: torch.device,
    sampling: SamplingConfig | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Samples 0 … count-1 of a model, each determined by the model, the seed and its index.

    What an audit screens and withholds by index a release can therefore leave out.

    Args:
        model: whose averaged weights draw.
        count: how many.
        device: where to compute.
        sampling: sampler and steps; None for the model's own.
        seed: None for the experiment's.
        progress: show a bar on stderr.

    Returns:
        float32 [count, 1, *spatial] in [-1, 1].
    """
    experiment, autoencoder = model.experiment, model.autoencoder()
    network, schedule = model.sampling_network()
    images = sample(
        network.to(device),
        schedule,
        experiment.sampling if sampling is None else sampling,
        count=count,
        image_shape=experiment.denoised_shape,
        seed=experiment.seed if seed is None else seed,
        device=device,
        clip=autoencoder is None,
        batch_size=min(MOST_AT_ONCE, images_at_once(experiment.denoised_shape)),
        progress=progress,
    )
    return images.numpy() if autoencoder is None else decoded(autoencoder, images, device)
