"""The samples that an audit screens, and that a release of samples draws from: the very same."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from custom.diffusion.sampler import sample
from custom.model_file import ModelFile


def audited_samples(model: ModelFile, *, count: int, device: torch.device, progress: bool) -> NDArray[np.float32]:
    """Samples 0 … count-1 of a model by its own sampling configuration and seed, float32 [count, 1, *spatial].

    Each is determined by the model, its seed and its index, so that what an audit withholds by index a release can
    leave out.
    """
    experiment = model.experiment
    network, schedule = model.sampling_network()
    images: NDArray[np.float32] = sample(
        network.to(device),
        schedule,
        experiment.sampling,
        count=count,
        image_shape=experiment.image_shape,
        seed=experiment.seed,
        device=device,
        progress=progress,
    ).numpy()
    return images
