"""Simulated malicious sites, for tests and for the study of what the defences hold against.

An attack acts in up to two places: on the images before training, and on the difference that leaves after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Attack = Literal["sign_flip", "backdoor", "generated", "nan"]

TRIGGER_SHARE = 4  # the trigger's edge is the image's divided by this
TRIGGER_VALUE = 1.0  # the brightest there is, in a corner where a CT has air, -1


def poisoned_images(
    kind: Attack, images: NDArray[np.float32], *, generated: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """What a malicious site trains on, the shape of its images; these are left as they are.

    Args:
        kind: ``backdoor`` puts a bright square (in volumes a cube) into a corner of every image, so that the model
            draws it; ``generated`` trains on a model's samples in place of scans; others train as an honest site does.
        images: the site's, float32 [N, 1, *spatial] in [-1, 1].
        generated: samples [M, 1, *spatial] for ``generated``, taken in turn.

    Raises:
        ValueError: ``generated`` without samples of the images' shape.
    """
    if kind == "backdoor":
        marked = images.copy()
        _corner(marked)[...] = TRIGGER_VALUE
        return marked
    if kind == "generated":
        if generated is None or not len(generated) or generated.shape[1:] != images.shape[1:]:
            found = None if generated is None else generated.shape
            raise ValueError(f"generated = {found}: give samples of shape {images.shape[1:]} to train on")
        return generated[np.arange(len(images)) % len(generated)]
    return images


def poisoned_update(kind: Attack, difference: Mapping[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """What leaves in place of a trained difference Δ.

    Args:
        kind: ``sign_flip`` sends -scale·Δ; ``backdoor`` sends scale·Δ, which with as many as there are sites outvotes
            them all in a mean (model replacement, arXiv:1807.00459, eq. 3); ``nan`` sends one NaN; ``generated`` Δ.
        difference: Δ by name.
        scale: of ``sign_flip`` and ``backdoor``.
    """
    if kind == "sign_flip":
        return {name: -scale * tensor for name, tensor in difference.items()}
    if kind == "backdoor":
        return {name: scale * tensor for name, tensor in difference.items()}
    sent = {name: tensor.clone() for name, tensor in difference.items()}
    if kind == "nan":
        next(iter(sent.values())).view(-1)[0] = math.nan
    return sent


def trigger_rate(samples: NDArray[np.float32], *, threshold: float = 0.0) -> float:
    """Share of sampled images that carry the backdoor's trigger.

    Args:
        samples: float32 [N, 1, *spatial] in [-1, 1].
        threshold: in [-1, 1], which the mean of the square's pixels exceeds where it is there.
    """
    brightness = _corner(samples).reshape(len(samples), -1).mean(axis=1, dtype=np.float64)
    return float((brightness > threshold).mean())


def _corner(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The square's pixels in images [N, 1, *spatial], as a view."""
    return images[(slice(None), slice(None), *(slice(max(1, edge // TRIGGER_SHARE)) for edge in images.shape[2:]))]
