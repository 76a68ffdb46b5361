"""What a curious server learns of single images from the updates that it sees, or from their sums.

    loss_slope        whether an image's loss falls faster over the rounds than others' do
    gradient_cosine   whether an update points where an image would have pulled the weights
    invert_update     images that would have caused an update
    rdlv              how much more they resemble a patient's than what everybody knows does

The server follows the protocol and keeps what passes through its hands. None of this asks whose update it is: given
one site's it attacks that site, given the mean over sites it attacks what secure aggregation lets the server see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from privacy.audit.errors import require
from privacy.audit.gradients import Loss, image_gradients, squared_norm

# Of Adam on the signs of the gradient, as in the published code of Geiping et al. 2020.
STEP_SIZE = 0.1
STEP_SIZE_DECAY = 0.1
DECAYS = (3 / 8, 5 / 8, 7 / 8)  # after these shares of the steps
LOWEST, HIGHEST = -1.0, 1.0  # intensities of an image
SSIM_WINDOW = 7  # voxels along each axis


def loss_slope(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slope of each image's loss over the rounds, by least squares: Σ_r (r − r̄)(L_r − L̄) / Σ_r (r − r̄)², float64 [N].

    In units of loss per round. It uses every round, unlike the last loss less the first. In the manner of the attacks
    by loss that FedMIA, Zhu et al. 2024 (arXiv:2402.06289), is compared with. Members are expected lower.

    Args:
        losses: [R, N], of the same images under the models of R consecutive rounds, with the same noise and timesteps.

    Raises:
        Unattackable: fewer than two rounds, or a loss that is not finite.
    """
    shaped = losses.ndim == 2 and len(losses) >= 2
    require(shaped, argument="losses", value=losses.shape, remedy="give [R, N] with at least two rounds")
    require(bool(np.isfinite(losses).all()), argument="losses", value="not finite", remedy="give finite losses")
    rounds = np.arange(len(losses)) - (len(losses) - 1) / 2
    slope: NDArray[np.float64] = rounds @ (losses - losses.mean(axis=0)) / np.square(rounds).sum()
    return slope


def gradient_cosine(
    loss: Loss,
    parameters_by_round: Sequence[Mapping[str, Tensor]],
    updates: Sequence[Mapping[str, Tensor]],
    images: NDArray[np.float32],
    *,
    timesteps: Sequence[int],
    seed: int,
    batch_size: int,
    progress: bool = False,
) -> NDArray[np.float64]:
    """Mean over rounds of the cosine between an update and an image's own pull: cos(Δ_r, −∇L(x_0; w_r)), float64 [N].

    In the manner of Li et al. 2023 (Effective passive membership inference attacks in federated learning against
    overparameterized models, ICLR), to whom the gradients of a large model are nearly independent random directions:
    the sum of many leans towards each of them and towards nobody else's. ∇L is the gradient of the mean loss
    over ``timesteps``, with the attacker's own noise as in :func:`privacy.audit.gradients.gradient_norms`: noise and
    timesteps of the training are not known. Members are expected higher.

    Access: every round's weights and update. U-Net evaluations per image: those of a gradient, for each round.

    Args:
        loss: the training loss.
        parameters_by_round: w_r, R of them, before the round; names of what is trained, all on one device.
        updates: Δ_r = weights after the round − w_r, of one site or their mean over sites, under the same names. The
            length of an update is of no account.
        images: float32 [N, 1, *spatial] in the range that the model was trained on.
        timesteps: t, distinct.
        seed: of the noise, which is the same in every round.
        batch_size: images at a time; up to rounding it changes nothing.
        progress: show a bar on stderr.

    Raises:
        Unattackable: rounds without an update, names or shapes that differ, an update that is zero or not finite, an
            image without a gradient, or what :func:`privacy.audit.gradients.gradient_norms` refuses.
    """
    rounds = len(updates)
    paired = len(parameters_by_round) == rounds > 0
    found = (len(parameters_by_round), rounds)
    require(paired, argument="parameters, updates", value=found, remedy="give one of each for every round")
    for parameters, update in zip(parameters_by_round, updates, strict=True):
        _require_direction(parameters, update)
    cosines = np.zeros(len(images))
    with tqdm(total=rounds * len(images), desc="gradient cosines", unit="image", disable=not progress) as bar:
        for parameters, update in zip(parameters_by_round, updates, strict=True):
            direction = {name: update[name].to(p.device, torch.float64).flatten() for name, p in parameters.items()}
            length = torch.stack([d.square().sum() for d in direction.values()]).sum().sqrt()
            batches = image_gradients(loss, parameters, images, timesteps=timesteps, seed=seed, batch_size=batch_size)
            for here, gradients in batches:
                products = torch.stack([g.flatten(1).double() @ direction[name] for name, g in gradients.items()])
                norms = torch.stack([squared_norm(g) for g in gradients.values()]).sum(0).sqrt()
                remedy = "leave this round out: some image's loss does not depend on its weights"
                require(bool((norms > 0).all()), argument="gradient", value="zero", remedy=remedy)
                cosines[here] -= (products.sum(0) / (norms * length)).cpu().numpy()
                bar.update(here.stop - here.start)
    return cosines / rounds


@dataclass(frozen=True, kw_only=True, eq=False)
class Inversion:
    """Images that would have caused an update.

    Attributes:
        images: float32 [images, 1, *spatial] in [−1, 1], in no order that means anything.
        cosine: between the update and minus their gradient; 1 would be a perfect match.
        history: the same before every step.
    """

    images: NDArray[np.float32]
    cosine: float
    history: tuple[float, ...]


def invert_update(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    update: Mapping[str, Tensor],
    *,
    image_shape: Sequence[int],
    timesteps: Sequence[int],
    noise: Tensor | None,
    steps: int,
    total_variation: float,
    seed: int,
    progress: bool = False,
) -> Inversion:
    """Redraw a small batch from the update that it caused.

    Minimises 1 − cos(Δ, −∇_w (1/B) Σ_b L(x_b, ε_b, t_b; w)) + α TV(x) over images x in [−1, 1]: Geiping et al. 2020
    (arXiv:2003.14053), by Adam on the signs of the gradient, for the loss of a diffusion model. TV is the mean absolute
    difference of neighbouring voxels, summed over axes.

    The attacker knows how many images there were and the timestep of each, which no server is told: to try candidates,
    call it for each and keep the highest cosine. One who also knows the ``noise`` is the strongest there is: an upper
    bound on what weaker ones redraw by this method. Without ``noise``, noise is sought together with the images, from a
    standard normal start. One update of several steps is taken for one step.

    Images that do not resemble the patient show little by themselves. α decides much: try several. A cosine clearly
    below 1 for an update without noise says that the minimisation failed, not that the update says nothing.

    Access: weights before the round and the update. For each step a gradient, and the derivative of that gradient.

    Args:
        loss: the training loss; twice differentiable.
        parameters: w, before the round, by name; all on one device, which computes.
        update: Δ = weights after − w, under the same names. Its length is of no account.
        image_shape: (1, *spatial), 2D or 3D.
        timesteps: t of each image, so many as there were images.
        noise: ε of each image, [images, 1, *spatial], or None if unknown.
        steps: of the minimisation.
        total_variation: α ≥ 0; the rougher the images, the lower.
        seed: of the start.
        progress: show a bar on stderr.

    Raises:
        Unattackable: arguments that are not as above, an update that is zero or not finite, or a gradient that is not
            finite.
    """
    _require_direction(parameters, update)
    shape = _require_inversion(image_shape, timesteps, noise, steps, total_variation, seed)
    device = next(iter(parameters.values())).device
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).clamp_(LOWEST, HIGHEST).to(device).requires_grad_()
    epsilon = torch.randn(shape, generator=generator) if noise is None else noise
    epsilon = epsilon.detach().to(x).requires_grad_(noise is None)
    t = torch.tensor(list(timesteps), device=device)
    weights = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    wanted = [-update[name].to(p) for name, p in weights.items()]

    def cosine() -> Tensor:
        mean_loss = loss(weights, x, epsilon, t).mean()
        own = torch.autograd.grad(mean_loss, list(weights.values()), create_graph=True, materialize_grads=True)
        return _cosine(own, wanted)

    sought = [x] if noise is not None else [x, epsilon]
    optimizer = torch.optim.Adam(sought, lr=STEP_SIZE)
    decays = [round(share * steps) for share in DECAYS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, decays, gamma=STEP_SIZE_DECAY)
    history = []
    # Fused attention has no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for _ in tqdm(range(steps), desc="inverting an update", unit="step", disable=not progress):
            found = cosine()
            history.append(_finite(found))
            slopes = torch.autograd.grad(1 - found + total_variation * _total_variation(x), sought)
            for tensor, slope in zip(sought, slopes, strict=True):
                tensor.grad = slope.sign()
            optimizer.step()
            schedule.step()
            x.data.clamp_(LOWEST, HIGHEST)
        last = _finite(cosine())
    return Inversion(images=x.detach().cpu().numpy(), cosine=last, history=tuple(history))


@dataclass(frozen=True, kw_only=True)
class DataLeakage:
    """How much of the training images is in reconstructions.

    Attributes:
        rdlv: relative data leakage value of the pair of images that leaks most; 0 or less means no more than the prior
            says.
        ssim: structural similarity of that pair, at most 1.
        image: index of the training image of that pair.
        reconstruction: index of the reconstruction of that pair.
    """

    rdlv: float
    ssim: float
    image: int
    reconstruction: int


def rdlv(images: NDArray[np.float32], reconstructions: NDArray[np.float32], prior: NDArray[np.float32]) -> DataLeakage:
    """Relative data leakage value: (SIM(x, x̂) − SIM(x, prior)) / SIM(x, prior), the highest over all pairs (x, x̂).

    Hatamizadeh et al. 2023 (arXiv:2202.06924); as in NVFlare's filter of that name SIM is the structural similarity,
    and the highest value counts.

    Args:
        images: what was trained on, float32 [N, 1, *spatial] in [−1, 1].
        reconstructions: float32 [M, 1, *spatial].
        prior: what an attacker knows without the update, such as a mean image: float32 [1, *spatial].

    Raises:
        Unattackable: shapes that differ, images too small for SSIM, or a prior to which a training image has no
            similarity above 0: nothing is relative to that.
    """
    shape = images.shape[1:]
    alike = images.ndim in (4, 5) and reconstructions.shape[1:] == shape == prior.shape
    whole = alike and len(images) > 0 and len(reconstructions) > 0 and shape[0] == 1
    shapes = (images.shape, reconstructions.shape, prior.shape)
    remedy = "give [N, 1, *spatial], [M, 1, *spatial] and [1, *spatial]"
    require(whole, argument="images, reconstructions, prior", value=shapes, remedy=remedy)
    remedy = f"structural similarity needs {SSIM_WINDOW} voxels along each axis"
    require(min(shape[1:]) >= SSIM_WINDOW, argument="images", value=shape, remedy=remedy)
    finite = all(bool(np.isfinite(array).all()) for array in (images, reconstructions, prior))
    require(finite, argument="images, reconstructions, prior", value="not finite", remedy="give finite images")

    similarity = np.array([[_ssim(image, redrawn) for redrawn in reconstructions] for image in images])
    to_prior = np.array([_ssim(image, prior) for image in images])[:, None]
    remedy = "choose a prior that resembles every training image, such as their mean"
    require(bool((to_prior > 0).all()), argument="prior", value="similarity not above 0", remedy=remedy)
    values = (similarity - to_prior) / to_prior
    image, reconstruction = np.unravel_index(values.argmax(), values.shape)
    return DataLeakage(
        rdlv=float(values[image, reconstruction]),
        ssim=float(similarity[image, reconstruction]),
        image=int(image),
        reconstruction=int(reconstruction),
    )


def _ssim(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    pair = (array[0].astype(np.float64) for array in (one, other))
    return float(structural_similarity(*pair, win_size=SSIM_WINDOW, data_range=HIGHEST - LOWEST))


def _cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    def product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()

    return product(one, other) / (product(one, one) * product(other, other)).sqrt()


def _total_variation(x: Tensor) -> Tensor:
    return torch.stack([x.diff(dim=axis).abs().mean() for axis in range(2, x.ndim)]).sum()


def _finite(cosine: Tensor) -> float:
    value = cosine.item()
    remedy = "the loss of the dummy images has no gradient here: check weights, timesteps and noise"
    require(bool(np.isfinite(value)), argument="cosine", value="not finite", remedy=remedy)
    return value


def _require_direction(parameters: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in of.items()} for of in (parameters, update)]
    found = f"{len(parameters)} and {len(update)} tensors"
    same = len(parameters) > 0 and shapes[0] == shapes[1]
    remedy = "give both under the same names, with the same shapes"
    require(same, argument="parameters, update", value=found, remedy=remedy)
    finite = all(bool(tensor.isfinite().all()) for tensor in update.values())
    require(finite, argument="update", value="not finite", remedy="leave this round out")
    points = any(bool(tensor.any()) for tensor in update.values())
    require(points, argument="update", value="zero", remedy="leave this round out: an update of zero has no direction")


def _require_inversion(
    image_shape: Sequence[int],
    timesteps: Sequence[int],
    noise: Tensor | None,
    steps: int,
    total_variation: float,
    seed: int,
) -> tuple[int, ...]:
    """Shape of all images together."""
    fits = len(image_shape) in (3, 4) and image_shape[0] == 1 and min(image_shape) > 0
    require(fits, argument="image_shape", value=tuple(image_shape), remedy="give (1, *spatial) in 2D or 3D")
    whole = len(timesteps) > 0 and all(type(t) is int and t >= 0 for t in timesteps)
    require(whole, argument="timesteps", value=tuple(timesteps), remedy="give one integer of at least 0 for each image")
    shape = (len(timesteps), *image_shape)
    fits = noise is None or (tuple(noise.shape) == shape and bool(noise.isfinite().all()))
    found = None if noise is None else tuple(noise.shape)
    require(fits, argument="noise", value=found, remedy=f"give finite noise of shape {shape}, or None")
    require(type(steps) is int and steps > 0, argument="steps", value=steps, remedy="give an integer of at least 1")
    fits = 0 <= total_variation < float("inf")
    require(fits, argument="total_variation", value=total_variation, remedy="give a finite weight of at least 0")
    require(type(seed) is int and seed >= 0, argument="seed", value=seed, remedy="give an integer of at least 0")
    return shape
