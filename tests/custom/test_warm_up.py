from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.diffusion.objective import denoising
from custom.diffusion.schedule import build_schedule
from custom.training import held_out_loss
from custom.warm_up import variants, warmed_up
from medical_data.cohort import Cohort

CPU = torch.device("cpu")


def test_warm_up_learns_the_released_image(private_experiment: ExperimentConfig, cohort: Cohort) -> None:
    config = private_experiment
    weights = dict(build_network(config.network, spatial_dims=2, seed=0).state_dict())
    released = torch.from_numpy(cohort.images[4] + 1)
    after = warmed_up(weights, released, config, CPU)
    again = warmed_up(weights, released, config, CPU)
    assert all(torch.equal(after[name], again[name]) for name in after), "a restarted server comes to the same model"
    network, schedule = build_network(config.network, spatial_dims=2), build_schedule(config.schedule)
    like_it = replace(cohort, images=np.broadcast_to(cohort.images[4], cohort.images.shape).copy())
    losses = []
    for values in (weights, after):
        network.load_state_dict(values)
        losses.append(held_out_loss(denoising(network, schedule), like_it, CPU))
    assert losses[1] < 0.6 * losses[0]


@pytest.mark.parametrize("edge", [(24, 24), (8, 8, 8)])
def test_variants_differ_and_stay_in_the_window(edge: tuple[int, ...]) -> None:
    grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in edge), indexing="ij"))
    disc = (grid.square().sum(0) < 0.5).float()
    released = disc[None]
    made = variants(released + 0.05 * torch.randn(released.shape), count=12, seed=0)
    assert made.shape == (12, 1, *edge)
    assert made.dtype == torch.float32
    assert made.min() >= -1
    assert made.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in made}) == 12
    centre = tuple(n // 2 for n in edge)
    corner = (0,) * len(edge)
    assert all(image[0][centre] > image[0][corner] + 0.3 for image in made), "still a disc"


def test_smoothing_takes_the_noise_away() -> None:
    square = torch.zeros(1, 32, 32)
    square[..., 8:24, 8:24] = 1.0
    noisy = square + 0.1 * torch.randn(square.shape, generator=torch.Generator().manual_seed(0))
    still = variants(noisy, count=64, seed=1)
    rough = [image[0, 14:18, 14:18].std() / (image.max() - image.min()) for image in still]
    assert float(torch.stack(rough).mean()) < 0.02
