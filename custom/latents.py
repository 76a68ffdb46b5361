"""Images into latents and back, in pieces that fit into memory."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from custom.device import images_at_once
from custom.diffusion.autoencoder import Autoencoder
from medical_data.cache import build_once, verify
from medical_data.cohort import Cohort

FILE = "latents.npy"


@torch.no_grad()
def encoded(autoencoder: Autoencoder, images: NDArray[np.float32], device: torch.device) -> NDArray[np.float32]:
    """Scaled latents, float32 [N, C, *latent], of images [N, 1, *spatial] in [-1, 1]."""
    autoencoder.to(device).eval()
    batch = images_at_once(images.shape[1:])
    pieces = [
        autoencoder.encode(torch.from_numpy(images[first : first + batch].copy()).to(device)).cpu().numpy()
        for first in range(0, len(images), batch)
    ]
    return np.concatenate(pieces)


@torch.no_grad()
def decoded(autoencoder: Autoencoder, latents: Tensor, device: torch.device) -> NDArray[np.float32]:
    """Images, float32 [N, 1, *spatial] in [-1, 1], of scaled latents [N, C, *latent]."""
    autoencoder.to(device).eval()
    pieces = [autoencoder.decode(one[None].to(device)).clamp(-1, 1).cpu().numpy() for one in latents]
    return np.concatenate(pieces)


def latent_cohort(cohort: Cohort, autoencoder: Autoencoder, *, state: Path, device: torch.device) -> Cohort:
    """The cohort with latents for images, encoded once and kept.

    Args:
        cohort: of images.
        autoencoder: finished.
        state: folder of the run's state at the site; ``latents/<key>`` in it holds them, sealed like the cache of
            images. Those of an earlier autoencoder go: a server that keeps changing it does not fill the disk.
        device: where to encode.

    Raises:
        CacheCorrupted: the kept latents are not what was written.
    """
    weights = {name: tensor.cpu().contiguous() for name, tensor in autoencoder.state_dict().items()}
    key = hashlib.sha256(cohort.manifest_sha256.encode() + b"\0" + save(weights)).hexdigest()[:32]
    folder = state / "latents" / key
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for old in folder.parent.iterdir():
        if old.is_dir() and old.name != key:
            shutil.rmtree(old)
    build_once(folder, lambda partial: np.save(partial / FILE, encoded(autoencoder, cohort.images, device)))
    verify(folder)
    return replace(cohort, images=np.load(folder / FILE, mmap_mode="r"))
