"""White-box membership attack: how large the gradient of one image's loss still is, layer by layer.

A model that was trained on an image sits where that image's loss is flat. The attacker has the weights and a training
loss; a gradient is computed for each image alone, never for a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from privacy.audit.errors import require
from privacy.audit.queries import shared_noise
from privacy.gradients import per_patient_gradients

# Loss(parameters by name, x_0 [B, 1, *spatial], noise [B, 1, *spatial], timesteps int64 [B]) → [B], one for each image.
# Differentiable in the parameters, fit for vmap, and without random numbers of its own.
Loss: TypeAlias = Callable[[Mapping[str, Tensor], Tensor, Tensor, Tensor], Tensor]

# What a forward pass and the backward pass after it cost, in forward passes.
FORWARDS_PER_GRADIENT = 3.0


def gradient_norms(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    images: NDArray[np.float32],
    *,
    timesteps: Sequence[int],
    seed: int,
    batch_size: int,
    progress: bool = False,
) -> NDArray[np.float64]:
    """Norms, not their logarithms, of each image's gradient: ‖∂/∂W_l (1/T) Σ_t L(x_0, ε_t, t)‖_2 for every tensor W_l.

    GSA_1 of Pang et al. 2023 (arXiv:2308.06405): one gradient of the mean loss over some timesteps, and of it one norm
    for each parameter tensor, as their published code takes them; a classifier is fitted on the norms. Here ε_t depends
    on seed and timestep alone, so that all images get the same (:func:`privacy.audit.queries.shared_noise`); there each
    image draws its own.

    Access: white box. U-Net evaluations per image: :func:`evaluations_per_image`. Members are expected lower.

    Args:
        loss: a training loss.
        parameters: at which; by name, all on one device, which computes.
        images: float32 [N, C, *spatial] in the range that the model was trained on.
        timesteps: t, distinct; at most what ``loss`` knows.
        seed: of the noise.
        batch_size: images at a time: so many gradients are in memory at once, and the activations of so many images
            at all timesteps. Up to rounding it changes nothing.
        progress: show a bar on stderr.

    Returns:
        float64 [N, L]; columns in the order of ``parameters``.

    Raises:
        Unattackable: arguments that are not as above, or a gradient that is not finite.
    """
    norms = np.empty((len(images), len(parameters)))
    with tqdm(total=len(images), desc="gradient norms", unit="image", disable=not progress) as bar:
        batches = image_gradients(loss, parameters, images, timesteps=timesteps, seed=seed, batch_size=batch_size)
        for here, gradients in batches:
            norms[here] = torch.stack([squared_norm(g) for g in gradients.values()], 1).sqrt().cpu().numpy()
            bar.update(here.stop - here.start)
    return norms


def gradient_score(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Minus the norm of the whole gradient, −√(Σ_l ‖∂L/∂W_l‖²), float64 [N]; members are expected higher.

    For who has no members to fit a classifier on.

    Args:
        norms: float64 [N, L], from :func:`gradient_norms`.
    """
    total: NDArray[np.float64] = np.sqrt(np.square(norms).sum(axis=1))
    return -total


def evaluations_per_image(timesteps: Sequence[int]) -> float:
    """What one image's gradient costs, in U-Net evaluations: a backward pass counts as two of them."""
    return FORWARDS_PER_GRADIENT * len(timesteps)


def image_gradients(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    images: NDArray[np.float32],
    *,
    timesteps: Sequence[int],
    seed: int,
    batch_size: int,
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """The gradients behind :func:`gradient_norms`, batch by batch: which images, and [B, *parameter shape] by name.

    Raises:
        Unattackable: as :func:`gradient_norms`, before the first batch.
    """
    _require_images(images, batch_size)
    _require_draws(timesteps, seed)
    require(len(parameters) > 0, argument="parameters", value="none", remedy="give the model's parameters by name")
    device = next(iter(parameters.values())).device
    noise = torch.cat([shared_noise(seed, t, 0, images.shape[1:]) for t in timesteps])[None].to(device)
    steps = torch.tensor(list(timesteps), device=device)[None]

    def batches() -> Iterator[tuple[slice, dict[str, Tensor]]]:
        for start in range(0, len(images), batch_size):
            x0 = torch.from_numpy(images[start : start + batch_size].copy()).to(device)
            each = len(x0), len(timesteps)
            draws = (
                x0[:, None].expand(*each, *x0.shape[1:]),
                noise.expand(*each, *x0.shape[1:]),
                steps.expand(*each),
            )
            gradients = per_patient_gradients(loss, parameters, draws)
            finite = all(bool(g.isfinite().all()) for g in gradients.values())
            remedy = "check the model's weights, the timesteps and the intensity range of the images"
            require(finite, argument="gradient", value="not finite", remedy=remedy)
            yield slice(start, start + len(x0)), gradients

    return batches()


def squared_norm(gradients: Tensor) -> Tensor:
    """‖g‖² of each [B, …], float64 [B]."""
    norm: Tensor = torch.linalg.vector_norm(gradients.flatten(1), dim=1, dtype=torch.float64)
    return norm.square()


def _require_images(images: NDArray[np.float32], batch_size: int) -> None:
    shaped = images.ndim in (4, 5) and images.size > 0 and images.dtype == np.float32
    found = (str(images.dtype), images.shape)
    require(shaped, argument="images", value=found, remedy="give float32 [N, C, *spatial] in 2D or 3D")
    require(bool(np.isfinite(images).all()), argument="images", value="not finite", remedy="give finite images")
    whole = type(batch_size) is int and batch_size > 0
    require(whole, argument="batch_size", value=batch_size, remedy="give an integer of at least 1")


def _require_draws(timesteps: Sequence[int], seed: int) -> None:
    whole = len(timesteps) > 0 and all(type(t) is int and t >= 0 for t in timesteps)
    distinct = len(set(timesteps)) == len(timesteps)
    remedy = "give distinct integers of at least 0"
    require(whole and distinct, argument="timesteps", value=tuple(timesteps), remedy=remedy)
    require(type(seed) is int and seed >= 0, argument="seed", value=seed, remedy="give an integer of at least 0")
