"""An autoencoder that somebody has published, in place of one that the sites train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from custom.config import ExperimentConfig
from custom.diffusion.autoencoder import SCALE_RATE
from custom.latents import encoded
from custom.stages import PREFIX, model_autoencoder, model_shapes, part
from custom.strict import ConfigError, require

KL = "kl."  # of MONAI's tensors in ours
WRAPPERS = ("state_dict", "model", "autoencoder_state_dict")  # under which people store states


def with_public_autoencoder(
    weights: Mapping[str, Tensor], file: Path, experiment: ExperimentConfig, images: NDArray[np.float32]
) -> dict[str, Tensor]:
    """A model's weights with the autoencoder of a file, scaled by public images.

    Args:
        weights: of the model by name.
        file: state of a MONAI AutoencoderKL of the experiment's architecture, ``.safetensors`` or a torch file, of
            which only tensors are read.
        experiment: whose autoencoder it is to be.
        images: public, [N, 1, *spatial] in [-1, 1]: their latents' mean and standard deviation become centre and scale.

    Raises:
        ConfigError: no such file, or other tensors than MONAI's AutoencoderKL of that architecture has.
    """
    state = _read(file)
    ours = part(model_shapes(experiment), "autoencoder")
    wanted = {name.removeprefix(KL): shape for name, shape in ours.items() if name.startswith(KL)}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differing = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ConfigError(
            f"--autoencoder = {file}: {len(differing)} tensors are not those of the job's autoencoder, such as {name}: "
            f"{found.get(name)}, wanted {wanted.get(name)}; describe its architecture in the job's autoencoder block"
        )
    zeros = torch.zeros_like(weights[f"{PREFIX}scale"])
    taken = {f"{PREFIX}{KL}{name}": tensor.float() for name, tensor in state.items()}
    unscaled = {**weights, **taken, f"{PREFIX}shift": zeros, f"{PREFIX}scale": zeros}
    latents = encoded(model_autoencoder(experiment, unscaled), images, torch.device("cpu")).astype(np.float64)
    axes = (0, *range(2, latents.ndim))
    centre, deviation = latents.mean(axis=axes), latents.std(axis=axes)
    argument, remedy = "--autoencoder: latents", "it gives nothing of these images; is it one for CT in [-1, 1]?"
    require(bool(np.isfinite(deviation).all() and deviation.min() > 0), argument=argument, value=None, remedy=remedy)
    found = {"shift": centre / SCALE_RATE, "scale": np.log(deviation) / SCALE_RATE}
    return {**unscaled, **{PREFIX + name: torch.from_numpy(one).float().view_as(zeros) for name, one in found.items()}}


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ConfigError(f"--autoencoder = {file}: no such file")
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # neither library names a type for what a malformed file may raise
        raise ConfigError(f"--autoencoder = {file}: {type(error).__name__}; give a file of tensors alone") from error
    while isinstance(state, dict) and (inner := [state[key] for key in WRAPPERS if isinstance(state.get(key), dict)]):
        state = inner[0]
    tensors = isinstance(state, dict) and len(state) > 0 and all(torch.is_tensor(value) for value in state.values())
    require(tensors, argument="--autoencoder", value=str(file), remedy="give a state dictionary of tensors")
    return dict(state)
