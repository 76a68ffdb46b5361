"""Models that a job starts from. A job names a model in the server's folder of models, never a path on the server."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from custom.config import ExperimentConfig
from custom.model_file import ModelFile, load_model
from custom.stages import PREFIX
from custom.strict import ConfigError, require


def start_weights(models: Path, experiment: ExperimentConfig) -> dict[str, Tensor]:
    """The weights of the model that ``start_from`` names.

    Raises:
        ConfigError: no such model, or one of another network, autoencoder or noise schedule.
    """
    alike = ("network", "schedule", "spatial_dims", "autoencoder")
    return _named("start_from", str(experiment.start_from), models, experiment, alike).ema


def frozen_autoencoder(models: Path, experiment: ExperimentConfig, name: str) -> dict[str, Tensor]:
    """The autoencoder of the model that ``autoencoder.frozen`` names, by the tensors' names in a model.

    Raises:
        ConfigError: no such model, one without an autoencoder, or with another one than the job describes.
    """
    given = _named("autoencoder.frozen", name, models, experiment, ("spatial_dims", "autoencoder"))
    return {key: tensor for key, tensor in given.ema.items() if key.startswith(PREFIX)}


def _named(argument: str, name: str, models: Path, experiment: ExperimentConfig, alike: tuple[str, ...]) -> ModelFile:
    """The model, if what its weights mean is what the job means by them."""
    file = models / f"{name}.safetensors"
    if not file.is_file():
        raise ConfigError(f"{argument} = {name!r}: no {file}; make it: fedct pretrain jobs/{experiment.name} {file}")
    given = load_model(file)
    theirs, ours = _meaning(given.experiment), _meaning(experiment)
    for key in alike:
        remedy = f"this job has {ours[key]}; name a model that was made for it"
        require(theirs[key] == ours[key], argument=f"{argument}.{key}", value=theirs[key], remedy=remedy)
    return given


def _meaning(experiment: ExperimentConfig) -> dict[str, object]:
    autoencoder = experiment.autoencoder
    return {
        "network": experiment.network,
        "schedule": experiment.schedule,
        "spatial_dims": experiment.preprocess.spatial_dims,
        "autoencoder": None if autoencoder is None else autoencoder.architecture,
    }
