"""Grey-box membership attacks on a diffusion model: from images to one score per image, seed and timestep.

The attacker knows the image, may choose what the noise predictor ε_θ gets and reads what it returns, and sees neither
weights nor gradients. A score is the raw statistic of the paper; which sign means member is decided later, on tuning
data, and each attack says what its paper expects.

    loss        how well noise in the image is predicted, with random noise
    sima        how much noise is seen in the clean image
    pia, pian   how well noise in the image is predicted, with noise that the model itself proposes
    secmi       how well a step of the deterministic inversion is undone
    band_pass   how well the image comes back from its inversion, at middle frequencies

Symbols are those of :mod:`privacy.audit.queries`. Sums over pixels are in float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from privacy.audit.errors import require
from privacy.audit.queries import STRIDE, Denoiser, Queries, shared_noise

GREY_BOX_ACCESS = "the image, and the predicted noise at inputs and timesteps of the attacker's choice"

# Noises that a `loss` averages over for each seed and timestep.
LOSS_DRAWS = 2
# p of the norms of SimA, PIA and PIAN, as in both papers' experiments.
NORM = 4
# E|z| of a standard normal z: what PIAN makes the mean absolute value of the proposed noise.
MEAN_ABSOLUTE_NORMAL = math.sqrt(2 / math.pi)
# Middle frequencies, as shares of the Nyquist frequency (half a cycle per pixel), by radius in the frequency domain.
BAND = (0.1, 0.5)


def loss(queries: Queries, t: int, seed: int) -> Tensor:
    """Denoising loss at one timestep: mean over noises and pixels of (ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t))².

    Matsumoto et al. 2023 (arXiv:2302.03262) and Carlini et al. 2023 (arXiv:2301.13188) threshold the training loss, Eq.
    14 of Ho et al. 2020 (arXiv:2006.11239), at one timestep. Here every image of an audit gets the same LOSS_DRAWS
    noises for a seed and a timestep.

    Access: grey box. U-Net evaluations per image: LOSS_DRAWS for each seed and timestep. Members are expected lower.

    Returns:
        float64 [B].
    """
    losses = []
    for draw in range(LOSS_DRAWS):
        noise = shared_noise(seed, t, draw, tuple(queries.images.shape[1:])).to(queries.images)
        error = noise - queries.diffused(("random", seed, draw), noise, t)
        losses.append(error.double().square().flatten(1).mean(1))
    return torch.stack(losses).mean(0)


def sima(queries: Queries, t: int, seed: int) -> Tensor:
    """Norm of the noise that is predicted for the clean image: ‖ε_θ(x_0, t)‖_4.

    SimA, Rao et al. 2025 (arXiv:2509.25003). The published code leaves out the fourth root, which changes no order.

    Access: grey box. U-Net evaluations per image: one for each timestep. Members are expected lower.

    Returns:
        float64 [B].
    """
    return _norm(queries.clean(t))


def pia(queries: Queries, t: int, seed: int) -> Tensor:
    """How far the prediction is from noise that the model proposes: ‖ε_0 − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε_0, t)‖_4.

    ε_0 = ε_θ(x_0, 0), the proximal initialization: PIA, Kong et al. 2024 (arXiv:2305.18355). The published code leaves
    out the fourth root, which changes no order.

    Access: grey box. U-Net evaluations per image: one, and one for each timestep. Members are expected lower.

    Returns:
        float64 [B].
    """
    proposed = queries.clean(0)
    return _norm(proposed - queries.diffused("proposed", proposed, t))


def pian(queries: Queries, t: int, seed: int) -> Tensor:
    """PIA with a proposed noise that was scaled to the size of standard normal noise: ε_0 √(2/π) / mean|ε_0|.

    PIAN, Kong et al. 2024 (arXiv:2305.18355), with the constant of a standard normal:
    E|z| = √(2/π).

    Access: grey box. U-Net evaluations per image: one, and one for each timestep. Members are expected lower.

    Returns:
        float64 [B]; not a number for an image in which the model sees no noise at all.
    """
    proposed = queries.clean(0)
    size = proposed.abs().mean(tuple(range(1, proposed.ndim)), keepdim=True)
    scaled = proposed / size * MEAN_ABSOLUTE_NORMAL
    return _norm(scaled - queries.diffused("scaled", scaled, t))


def secmi(queries: Queries, t: int, seed: int) -> Tensor:
    """t-error: ‖ψ(φ(x̃_t)) − x̃_t‖²_2, a deterministic step from x̃_t to t + STRIDE and back.

    SecMI_stat, Duan et al. 2023 (arXiv:2302.01316). x̃_t is the deterministic inversion of x_0 with steps of STRIDE,
    so that φ(x̃_t) = x̃_{t+STRIDE}, its next point.

    Access: grey box. U-Net evaluations per image: t / STRIDE + 2 for the last timestep, and no more for those
    before it. Members are expected lower.

    Returns:
        float64 [B].
    """
    later = t + STRIDE
    back = queries.ddim(queries.inverted(later), queries.on_path(later), later, t)
    return (back - queries.inverted(t)).double().square().flatten(1).sum(1)


def band_pass(queries: Queries, t: int, seed: int) -> Tensor:
    """Error of a reconstruction at middle frequencies: mean over pixels of (h ∗ (x̂_0(x̃_t) − x_0))², h the band BAND.

    In the manner of FCRE, Zhao et al. 2025 (arXiv:2506.14919), who compare the middle frequencies of image and
    reconstruction by their structural similarity. Here it is the mean squared error, the reconstruction is the one step
    x̂_0 from SecMI's x̃_t, and the band is a ring, or in 3D a shell, in the discrete Fourier transform.

    Access: grey box. U-Net evaluations per image: t / STRIDE + 1 for the last timestep, all shared with SecMI. Members
    are expected lower.

    Returns:
        float64 [B].

    Raises:
        Unattackable: an image too small to have a frequency within the band.
    """
    x_t = queries.inverted(t)
    error = (queries.image_from(x_t, queries.on_path(t), t) - queries.images).double()
    spectrum: Tensor = torch.fft.fftn(error, dim=tuple(range(2, error.ndim)), norm="forward")
    # Parseval: the mean over pixels is the sum over frequencies.
    return (spectrum.abs().square() * _band(tuple(error.shape[2:])).to(error.device)).flatten(1).sum(1)


def _norm(error: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(error.double().flatten(1), NORM, dim=1)
    return norm


def _band(spatial: tuple[int, ...]) -> Tensor:
    """Which frequencies of the discrete Fourier transform lie within BAND, bool [*spatial]."""
    in_nyquist = [2 * torch.fft.fftfreq(size, dtype=torch.float64) for size in spatial]
    radius = torch.stack(torch.meshgrid(*in_nyquist, indexing="ij")).square().sum(0).sqrt()
    low, high = BAND
    band = (low <= radius) & (radius <= high)
    remedy = f"give images with a frequency within {low} … {high} of Nyquist, or leave band_pass out"
    require(bool(band.any()), argument="images", value=spatial, remedy=remedy)
    return band


@dataclass(frozen=True, kw_only=True, eq=False)
class Attack:
    """One statistic.

    Attributes:
        name: as in scores and reports.
        paper: where it comes from.
        statistic: in one plain sentence.
        access: what the attacker needs.
        member_is: whether the paper expects members to score lower or higher.
        score: called with queries of a batch, a timestep and a seed; float64 [B]. One that draws no noise leaves the
            seed aside.
        evaluations: U-Net evaluations per image that it needs by itself, from ascending timesteps and the number of
            seeds.
        draws_noise: whether its scores differ between seeds.
        inverts: it follows the deterministic inversion this many steps of STRIDE beyond its timestep; None without
            inversion.
    """

    name: str
    paper: str
    statistic: str
    access: str
    member_is: Literal["lower", "higher"]
    score: Callable[[Queries, int, int], Tensor]
    evaluations: Callable[[Sequence[int], int], int]
    draws_noise: bool = False
    inverts: int | None = None


_ATTACKS = (
    Attack(
        name="loss",
        paper="Matsumoto et al. 2023, arXiv:2302.03262; Carlini et al. 2023, arXiv:2301.13188",
        statistic="Mean squared error of the predicted noise when random noise is added to the image.",
        access=GREY_BOX_ACCESS,
        member_is="lower",
        score=loss,
        evaluations=lambda timesteps, seeds: len(timesteps) * seeds * LOSS_DRAWS,
        draws_noise=True,
    ),
    Attack(
        name="sima",
        paper="Rao et al. 2025, arXiv:2509.25003",
        statistic="Size of the noise that the model sees in the clean image.",
        access=GREY_BOX_ACCESS,
        member_is="lower",
        score=sima,
        evaluations=lambda timesteps, seeds: len(timesteps),
    ),
    Attack(
        name="pia",
        paper="Kong et al. 2024, arXiv:2305.18355",
        statistic="Error of the predicted noise when the noise that the model sees in the clean image is added to it.",
        access=GREY_BOX_ACCESS,
        member_is="lower",
        score=pia,
        evaluations=lambda timesteps, seeds: 1 + len(timesteps),
    ),
    Attack(
        name="pian",
        paper="Kong et al. 2024, arXiv:2305.18355",
        statistic="The same as pia, with the added noise scaled to the size of standard normal noise.",
        access=GREY_BOX_ACCESS,
        member_is="lower",
        score=pian,
        evaluations=lambda timesteps, seeds: 1 + len(timesteps),
    ),
    Attack(
        name="secmi",
        paper="Duan et al. 2023, arXiv:2302.01316",
        statistic="Squared error after one step further along the image's deterministic inversion and one step back.",
        access=GREY_BOX_ACCESS,
        member_is="lower",
        score=secmi,
        evaluations=lambda timesteps, seeds: timesteps[-1] // STRIDE + 2,
        inverts=1,
    ),
    Attack(
        name="band_pass",
        paper="in the manner of Zhao et al. 2025, arXiv:2506.14919",
        statistic="Mean squared error, at middle frequencies, of the image that the model sees behind its inversion.",
        access=GREY_BOX_ACCESS,
        member_is="lower",
        score=band_pass,
        evaluations=lambda timesteps, seeds: timesteps[-1] // STRIDE + 1,
        inverts=0,
    ),
)

GREY_BOX: Mapping[str, Attack] = MappingProxyType({attack.name: attack for attack in _ATTACKS})


@dataclass(frozen=True, kw_only=True, eq=False)
class GreyBoxScores:
    """What the attacks found; each mapping is by name of the attack.

    Attributes:
        scores: float64 [seeds, N, settings], finite. Without noise all seeds have the same.
        settings: what the last axis is, such as ``t=100``.
        evaluations_per_image: U-Net evaluations that the attack would need by itself.
        shared_evaluations_per_image: U-Net evaluations that all of them together took.
        seconds: wall time of all of them together.
    """

    scores: dict[str, NDArray[np.float64]]
    settings: dict[str, tuple[str, ...]]
    evaluations_per_image: dict[str, float]
    shared_evaluations_per_image: float
    seconds: float


@torch.no_grad()
def grey_box_scores(
    denoiser: Denoiser,
    images: NDArray[np.float32],
    *,
    timesteps: tuple[int, ...],
    seeds: tuple[int, ...],
    attacks: Sequence[str] = tuple(GREY_BOX),
    batch_size: int,
    progress: bool = False,
) -> GreyBoxScores:
    """Score every image with every attack at every timestep.

    A score depends on the image, the model, the timestep and the seed; not on the other images, their order or, up to
    rounding, on ``batch_size``.

    Args:
        denoiser: the model.
        images: float32 [N, C, *spatial], 2D or 3D, finite, in the range that the model was trained on.
        timesteps: t, ascending. Those of secmi and band_pass are multiples of STRIDE; secmi also needs t + STRIDE.
        seeds: of the noise; distinct, not negative.
        attacks: names in GREY_BOX.
        batch_size: images at a time. All predictions for a batch are kept until it is done.
        progress: show a bar.

    Raises:
        Unattackable: images, timesteps, seeds or attacks that are not as above, a prediction of the wrong shape or
            that is not finite, or a score that is not finite.
    """
    _require_images(images, batch_size)
    chosen = _chosen(attacks)
    _require_settings(chosen, timesteps, seeds, len(denoiser.alphas_cumprod))
    started = time.perf_counter()
    count, evaluations = len(images), 0
    scores = {attack.name: np.empty((len(seeds), count, len(timesteps))) for attack in chosen}
    with tqdm(total=count, desc="grey-box attacks", unit="image", disable=not progress) as bar:
        for start in range(0, count, batch_size):
            queries = Queries(denoiser, torch.from_numpy(images[start : start + batch_size].copy()))
            here = slice(start, start + len(queries.images))
            for attack in chosen:
                for column, t in enumerate(timesteps):
                    for row, seed in enumerate(seeds if attack.draws_noise else seeds[:1]):
                        rows = row if attack.draws_noise else slice(None)
                        scores[attack.name][rows, here, column] = _finite(attack, queries, t, seed)
            evaluations += queries.evaluations * len(queries.images)
            bar.update(len(queries.images))
    return GreyBoxScores(
        scores=scores,
        settings={attack.name: tuple(f"t={t}" for t in timesteps) for attack in chosen},
        evaluations_per_image={a.name: float(a.evaluations(timesteps, len(seeds))) for a in chosen},
        shared_evaluations_per_image=evaluations / count,
        seconds=time.perf_counter() - started,
    )


def _finite(attack: Attack, queries: Queries, t: int, seed: int) -> NDArray[np.float64]:
    score: NDArray[np.float64] = attack.score(queries, t, seed).cpu().numpy()
    remedy = f"{attack.name} has no value for some image at t={t}: leave the attack out or mend the model"
    require(bool(np.isfinite(score).all()), argument="score", value="not finite", remedy=remedy)
    return score


def _require_images(images: NDArray[np.float32], batch_size: int) -> None:
    shaped = images.ndim in (4, 5) and images.size > 0 and images.dtype == np.float32
    found = (str(images.dtype), images.shape)
    require(shaped, argument="images", value=found, remedy="give float32 [N, C, *spatial] in 2D or 3D")
    require(bool(np.isfinite(images).all()), argument="images", value="not finite", remedy="give finite images")
    whole = type(batch_size) is int and batch_size > 0
    require(whole, argument="batch_size", value=batch_size, remedy="give an integer of at least 1")


def _chosen(names: Sequence[str]) -> list[Attack]:
    known = len(names) > 0 and len(set(names)) == len(names) and set(names) <= set(GREY_BOX)
    require(known, argument="attacks", value=tuple(names), remedy=f"give some of {', '.join(GREY_BOX)}, each once")
    return [GREY_BOX[name] for name in names]


def _require_settings(attacks: Sequence[Attack], timesteps: Sequence[int], seeds: Sequence[int], steps: int) -> None:
    """Refuse before the first evaluation what would fail after hours of them."""
    whole = len(seeds) > 0 and all(type(seed) is int and seed >= 0 for seed in seeds)
    distinct = len(set(seeds)) == len(seeds)
    require(whole and distinct, argument="seeds", value=seeds, remedy="give distinct integers of at least 0")
    whole = len(timesteps) > 0 and all(type(t) is int and 0 <= t < steps for t in timesteps)
    require(whole, argument="timesteps", value=timesteps, remedy=f"give integers within 0 … {steps - 1}")
    ascending = list(timesteps) == sorted(set(timesteps))
    require(ascending, argument="timesteps", value=timesteps, remedy="give them ascending, each once")
    for attack in attacks:
        if attack.inverts is not None:
            fits = all(t % STRIDE == 0 for t in timesteps) and timesteps[-1] + attack.inverts * STRIDE < steps
            remedy = f"{attack.name} needs multiples of {STRIDE} up to {steps - 1 - attack.inverts * STRIDE}"
            require(fits, argument="timesteps", value=timesteps, remedy=remedy)
