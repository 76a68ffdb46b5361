"""Learn from the released mean image before training: all here is made of what has left the sites, noisy, already.

DP-FETA (arXiv:2504.01395) trains on the noisy central images themselves. Here the noise is first smoothed away and the
network sees the image bent, moved, scaled, in other contrasts and with sharper edges: it learns to denoise bodies
rather than one picture, and the private steps that follow start nearer to the patients. Post-processing of a private
release costs no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from custom.config import ExperimentConfig
from custom.stages import stage_objective, stage_of
from custom.training import training_step

LEARNING_RATE = 2e-3
GRADIENT_CLIP = 1.0
BATCH_SIZE = 16
VARIANTS = 1024  # of the released image; each is seen several times

SMOOTHING = 0.1  # weight of total variation (Chambolle 2004, doi:10.1023/B:JMIV.0000011325.36760.1e), in window units
# How patients may differ from their mean, chosen without looking at any: ranges of the random transforms.
ROTATION_RAD = 0.15
SHEAR = 0.1
SHIFT = 1 / 16  # of an edge
SCALE = 0.2
BENDING = 0.25  # of a grid cell
BENDING_CELLS = 4
GAMMA = (0.6, 1.6)
# A mean is blurred where patients differ; a patient has edges, between tissues of nearly one density each.
STEEPNESS = 6.0  # up to which contrast is raised,
TURN = (0.35, 0.6)  # about this share of the brightest,
PLATEAU = (0.8, 1.0)  # and cut above this share of it


def warmed_up(
    weights: Mapping[str, Tensor], image: Tensor, config: ExperimentConfig, device: torch.device
) -> dict[str, Tensor]:
    """Train on variants of the released mean image; deterministic given it.

    Args:
        weights: where to start, by name.
        image: [1, *spatial], air at 0, as :func:`custom.private_training.release_mean_image` gives it, or the mean of
            several sites'.
        config: the experiment, with ``privacy.mean_image``.
        device: where to compute.

    Returns:
        The new weights by name, on the CPU.
    """
    assert config.privacy is not None and config.privacy.mean_image is not None  # noqa: S101, PT018
    steps = config.privacy.mean_image.warm_up_steps
    objective = stage_objective(config, stage_of(config, 0), weights, device)
    network = objective.network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(config.seed)
    pool = variants(image, count=min(VARIANTS, steps * BATCH_SIZE), seed=config.seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        x0 = pool[torch.randint(len(pool), (BATCH_SIZE,), generator=generator)].to(device)
        training_step(objective, optimizer, x0, generator, gradient_clip=GRADIENT_CLIP)
    return {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}


def variants(image: Tensor, *, count: int, seed: int) -> Tensor:
    """The mean image smoothed, bent, moved, scaled, in other contrasts and with sharper edges.

    Args:
        image: [1, *spatial], air at 0 and the window's top at 2, with noise.
        count: how many.
        seed: determines them.

    Returns:
        float32 [count, 1, *spatial] in [-1, 1].
    """
    from monai.transforms import Compose, RandAdjustContrast, RandAffine, RandGridDistortion
    from skimage.restoration import denoise_tv_chambolle

    smooth = torch.from_numpy(denoise_tv_chambolle(image[0].double().numpy() / 2, weight=SMOOTHING)).float()[None]
    vary = Compose(
        [
            RandAffine(
                prob=1.0,
                rotate_range=ROTATION_RAD,
                shear_range=SHEAR,
                translate_range=image.shape[-1] * SHIFT,
                scale_range=SCALE,
                padding_mode="border",
            ),
            RandGridDistortion(prob=1.0, num_cells=BENDING_CELLS, distort_limit=BENDING, padding_mode="border"),
            RandAdjustContrast(prob=1.0, gamma=GAMMA),
        ]
    ).set_random_state(seed)
    made = torch.stack([vary(smooth).as_tensor() for _ in range(count)])
    return (_sharpened(made, seed) * 2 - 1).clamp(-1, 1)


def _sharpened(images: Tensor, seed: int) -> Tensor:
    """Each image's contrast raised by a random factor about a random level, with a plateau; [N, 1, *spatial], ≥ 0."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((len(images), *(1,) * (images.ndim - 1)), generator=generator)

    brightest = images.flatten(1).amax(1).view(-1, *(1,) * (images.ndim - 1))
    turn, plateau = brightest * uniform(*TURN), brightest * uniform(*PLATEAU)
    steep = turn + uniform(0, math.log(STEEPNESS)).exp() * (images - turn)
    return steep.clamp(min=0).minimum(plateau)
