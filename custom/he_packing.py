"""What is encrypted: an update as one vector, its weight as the last number.

A site sends Enc([w·u, w]) for its update u and weight w; the server adds: Enc([Σ w·u, Σ w]); a site that has the key
opens the sum and returns Σ w·u / Σ w. So the mean needs no weight in the clear.

Knows neither NVFlare nor TenSEAL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from custom.diffusion.networks import Shapes
from custom.egress import MEAN_IMAGE
from custom.stages import PREFIX
from custom.strict import require
from privacy.rng import Randomness, with_gaussian_noise

UPDATE = "update"
ALGORITHM = "CKKS"

# Whoever holds a CKKS ciphertext and its exact decryption can solve for the secret key (Li and Micciancio 2021, eprint
# 2020/1533), and the server holds the sum's ciphertext. So noise goes over what is opened (Li, Micciancio, Schultz and
# Sorrell 2022, eprint 2022/816): 2⁵⁰ times a ciphertext's error, and little to an update, whose numbers are near 1e-3.
FLOOD_STD = 2.0**-20

WEIGHT_TOLERANCE = 1e-6  # of a sum of whole numbers; under another key it is off by 1e12


def packed_name(shapes: Mapping[str, object]) -> str:
    """The name of the one vector that stands for these tensors: another one for each set that may leave in a job."""
    if set(shapes) == {MEAN_IMAGE}:
        return MEAN_IMAGE
    return PREFIX + UPDATE if all(name.startswith(PREFIX) for name in shapes) else UPDATE


def packed_size(shapes: Shapes) -> int:
    """Numbers in the vector: those of all tensors, and the weight."""
    return sum(math.prod(shape) for shape in shapes.values()) + 1


def packed(arrays: Mapping[str, NDArray[np.float32]], weight: float) -> NDArray[np.float64]:
    """[w·u, w], with the tensors in the order of their names; float64 of :func:`packed_size`."""
    numbers = [arrays[name].ravel().astype(np.float64) for name in sorted(arrays)]
    return np.concatenate([*numbers, [1.0]]) * weight


def opened(total: Sequence[float], shapes: Shapes, randomness: Randomness) -> dict[str, NDArray[np.float32]]:
    """The weighted mean from a decrypted sum, with noise over what would betray the key.

    Args:
        total: [Σ w·u, Σ w] as decrypted.
        shapes: names and shapes of the tensors.
        randomness: secret.

    Returns:
        Σ w·u / Σ w plus N(0, (``FLOOD_STD`` / Σ w)²) a number, by name. Σ w itself is for nobody.

    Raises:
        ConfigError: another size, or a sum of weights that cannot be one: it was encrypted under other keys.
    """
    size = packed_size(shapes)
    require(len(total) == size, argument="sum", value=f"{len(total)} numbers", remedy=f"must be {size}")
    numbers = np.asarray(total, np.float64)
    weight = round(float(numbers[-1])) if np.isfinite(numbers[-1]) else 0
    require(
        weight >= 1 and abs(numbers[-1] - weight) < WEIGHT_TOLERANCE,
        argument="sum of weights",
        value="not a whole number",
        remedy="it was not encrypted under this site's key; give all sites the same client context",
    )
    noisy = with_gaussian_noise(torch.from_numpy(numbers[:-1]), std=FLOOD_STD, randomness=randomness)
    mean = (noisy.numpy() / weight).astype(np.float32)
    out, start = {}, 0
    for name in sorted(shapes):
        stop = start + math.prod(shapes[name])
        out[name] = mean[start:stop].reshape(shapes[name])
        start = stop
    return out
