"""A self-supervised embedding: copies of an image lie close to it, whether flipped, turned, shifted or brightened.

    two random views of each image → encoder → unit vectors → each view must find the other among all views of a batch

Contrastive learning (SimCLR, arXiv:2002.05709) with the use that Dar et al. make of it: to find copies of training
images among a generative model's samples (arXiv:2402.01054). The embedding is trained on a site's own images, knows
them, and never leaves the site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor
from tqdm import tqdm

from privacy.audit.errors import require

DEFAULT_STEPS = 1200  # about 35 s on one CPU core for slices of 32 × 32
BATCH = 128  # images a step, each in two views
TEMPERATURE = 0.1  # τ of NT-Xent
LEARNING_RATE = 2e-3  # of Adam, at the start of a cosine
SMALLEST_SIDE = 8
CHANNELS = 64  # of the last halving; each before it has half as many, but at least 8
CELLS = 4  # a side, over which the last features are averaged: where something lies is part of the picture
DIMENSIONS = 128  # of the embedding

# Views: what a copy may have gone through and still be a copy.
TURN = math.radians(10)  # in the plane of a slice
ZOOM = (0.8, 1.1)  # part of the image's side that is seen: below 1 a crop
SHIFT = 0.1  # of the image's side
GAIN, OFFSET = 0.2, 0.1
NOISE = 0.1  # largest standard deviation

_GROUPS = 8
_EMBEDDED_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """An encoder of images; it was made from patients' images and stays where they are.

    Attributes:
        layers: (weight [out, in, *kernel], gain [out], bias [out]) of each halving convolution and its group norm.
        projection: [DIMENSIONS, CHANNELS · CELLS^dimensions].
    """

    layers: tuple[tuple[Tensor, Tensor, Tensor], ...]
    projection: Tensor

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit vectors float32 [N, DIMENSIONS]: their products are cosine similarities.

        Args:
            images: float32 [N, 1, *spatial] in [-1, 1], with as many dimensions as the embedding was trained on.

        Raises:
            Unattackable: images of another kind, too small or not finite.
        """
        dimensions = self.layers[0][0].ndim - 2
        _require_images(images)
        spatial = images.shape[2:]
        fits = len(spatial) == dimensions
        require(fits, "images", images.shape, f"give images of {dimensions} dimensions, as in training")
        found = np.empty((len(images), DIMENSIONS), dtype=np.float32)
        with torch.no_grad():
            for start in range(0, len(images), _EMBEDDED_AT_ONCE):
                rows = slice(start, start + _EMBEDDED_AT_ONCE)
                batch = _tensor(images[rows]).to(self.projection.device)
                found[rows] = _encode(batch, self.layers, self.projection).cpu().numpy()
        return found


def train_embedding(
    images: NDArray[np.float32],
    patient: NDArray[np.int64],
    *,
    steps: int = DEFAULT_STEPS,
    seed: int,
    device: str = "cpu",
    progress: bool = False,
) -> Embedding:
    """Train an encoder with NT-Xent (arXiv:2002.05709, eq. 1) on two views of each image of a batch.

    A view's positive is the other view of its image; its negatives are the views of other patients' images. Other
    images of the same patient are neither: Dar et al. push every other image away, but neighbouring slices are nearly
    the same picture, and pushing them apart would teach the encoder what changes along a patient and not what tells
    patients apart. A sample between two slices of a patient is to be found close to both.

    An audit's images are those of members and of held-outs together: an embedding that was trained on one side only
    would treat the two differently, and no test could tell that from a model that does.

    Args:
        images: float32 [N, 1, *spatial] in [-1, 1], two or three spatial dimensions of at least 8.
        patient: int64 [N], whose they are.
        steps: of Adam, over batches of at most ``BATCH`` images.
        seed: of weights, batches and views. One seed gives one embedding on one machine with as many threads; PyTorch's
            own random state is neither used nor changed.
        device: where to train, such as ``cuda``.
        progress: show a bar.

    Raises:
        Unattackable: images that are too small or not finite, patients that do not fit, images of a single patient
            (nobody to tell it from), or fewer than one step.
    """
    _require_images(images)
    shape = patient.shape
    require(shape == (len(images),), "patient", shape, f"give a patient for each of {len(images)} images")
    patients = len(np.unique(patient))
    require(patients >= 2, "patients", patients, "give images of two patients at least")
    require(type(steps) is int and steps >= 1, "steps", steps, "give at least one step")

    generator = Generator().manual_seed(seed)
    layers, projection = _start(images.shape[2:], generator, device)
    parameters = [*(tensor for layer in layers for tensor in layer), projection]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    everyone = torch.from_numpy(patient.astype(np.int64))
    for step in tqdm(range(steps), desc="embedding", unit="step", disable=not progress):
        chosen = torch.randperm(len(images), generator=generator)[:BATCH]
        batch = _tensor(images[chosen.numpy()])
        views = torch.cat([view(batch, generator).to(device) for _ in range(2)])
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.enable_grad():
            loss = nt_xent(_encode(views, layers, projection), everyone[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    trained = tuple((w.detach(), gain.detach(), bias.detach()) for w, gain, bias in layers)
    return Embedding(layers=trained, projection=projection.detach())


def nt_xent(z: Tensor, patient: Tensor) -> Tensor:
    """Mean over all views i of -log( exp(z_i·z_j/τ) / Σ_k exp(z_i·z_k/τ) ), j the other view of i's image.

    The sum runs over j and the views of other patients' images (SimCLR's eq. 1 sums over all views but i).

    Args:
        z: unit vectors [2B, d]: a first view of each of B images, then a second.
        patient: [B], whose images they are.
    """
    count = len(patient)
    views = torch.arange(2 * count, device=z.device)
    other = (views + count) % (2 * count)
    whose = patient.repeat(2)
    left_out = whose[:, None] == whose[None, :]
    left_out[views, other] = False
    logits = (z @ z.T / TEMPERATURE).masked_fill(left_out, -math.inf)
    return F.cross_entropy(logits, other)


def view(images: Tensor, generator: Generator) -> Tensor:
    """A random view of each image: flipped, turned in the plane, cropped or widened, shifted, brightened and noisy.

    Args:
        images: [B, 1, *spatial] on the CPU.
        generator: of the CPU.

    Returns:
        [B, 1, *spatial]; what lies beyond an image repeats its edge.
    """
    count, dims = len(images), images.ndim - 2

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    # Coordinates run from -1 to 1 in the order x, y(, z), the plane of a slice first.
    flips = torch.randint(0, 2, (count, dims), generator=generator) * 2.0 - 1
    turn = uniform(-TURN, TURN)
    linear = torch.eye(dims).repeat(count, 1, 1)
    linear[:, 0, 0] = linear[:, 1, 1] = turn.cos()
    linear[:, 1, 0] = turn.sin()
    linear[:, 0, 1] = -turn.sin()
    linear = linear * (flips * uniform(*ZOOM, 1))[:, None, :]
    shift = uniform(-2 * SHIFT, 2 * SHIFT, dims, 1)
    grid = F.affine_grid(torch.cat([linear, shift], dim=2), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    each = (1,) * (dims + 1)
    noise = uniform(0, NOISE, *each) * torch.randn(images.shape, generator=generator)
    return moved * uniform(1 - GAIN, 1 + GAIN, *each) + uniform(-OFFSET, OFFSET, *each) + noise


def _start(
    spatial: Sequence[int], generator: Generator, device: str
) -> tuple[tuple[tuple[Tensor, Tensor, Tensor], ...], Tensor]:
    """Random weights (He), as many halvings as leave a side of about `CELLS`."""
    halvings = max(2, round(math.log2(min(spatial) / CELLS)))
    widths = [max(_GROUPS, CHANNELS >> before_last) for before_last in reversed(range(halvings))]

    def normal(*shape: int) -> Tensor:
        deviation = math.sqrt(2 / math.prod(shape[1:]))
        return (deviation * torch.randn(shape, generator=generator)).to(device).requires_grad_()

    kernel = (3,) * len(spatial)
    layers = tuple(
        (
            normal(width, before, *kernel),
            torch.ones(width, device=device).requires_grad_(),
            torch.zeros(width, device=device).requires_grad_(),
        )
        for before, width in zip((1, *widths), widths, strict=False)
    )
    return layers, normal(DIMENSIONS, CHANNELS * CELLS ** len(spatial))


def _encode(x: Tensor, layers: Sequence[tuple[Tensor, Tensor, Tensor]], projection: Tensor) -> Tensor:
    convolve, average = (F.conv2d, F.adaptive_avg_pool2d) if x.ndim == 4 else (F.conv3d, F.adaptive_avg_pool3d)
    for weight, gain, bias in layers:
        x = F.silu(F.group_norm(convolve(x, weight, stride=2, padding=1), _GROUPS, gain, bias))
    return F.normalize(F.linear(average(x, CELLS).flatten(1), projection))


def _tensor(images: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.array(images, dtype=np.float32))


def _require_images(images: NDArray[np.float32]) -> None:
    shape = images.shape
    alike = images.ndim in (4, 5) and shape[1] == 1 and len(images) > 0
    require(alike, "images", shape, "give float32 [N, 1, *spatial] with two or three spatial dimensions")
    require(min(shape[2:]) >= SMALLEST_SIDE, "images", shape, f"give images of at least {SMALLEST_SIDE} a side")
    require(bool(np.isfinite(images).all()), "images", "not finite", "give finite images")
