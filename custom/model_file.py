"""A model on disk: weights and everything needed to use them, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from custom.atomic import write_atomically
from custom.config import ExperimentConfig
from custom.diffusion.autoencoder import Autoencoder
from custom.diffusion.schedule import Schedule, build_schedule
from custom.round_parts import personal_shapes
from custom.stages import fresh_weights, model_autoencoder, model_denoiser, model_shapes
from custom.strict import ConfigError

EMA_PREFIX = "ema/"
OPTIMIZER_PREFIX = "optimizer/"


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelFile:
    """What a model file holds.

    Attributes:
        experiment: how it was trained.
        rounds_done: rounds that have gone into it.
        weights: of the global model, float32, by name.
        ema: their exponential moving average by name; what samples are drawn from. In a finished model the only
            weights there are, so ``weights`` equals it.
        optimizer: moments of the server's own, where it makes steps, and SCAFFOLD's variates; in checkpoints only.
    """

    experiment: ExperimentConfig
    rounds_done: int
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)

    def sampling_network(self) -> tuple[nn.Module, Schedule]:
        """The denoiser with the averaged weights, and its schedule."""
        return model_denoiser(self.experiment, self.ema), build_schedule(self.experiment.schedule)

    def autoencoder(self) -> Autoencoder | None:
        """The averaged autoencoder; None where images themselves are denoised."""
        return None if self.experiment.autoencoder is None else model_autoencoder(self.experiment, self.ema)


def initial_model(experiment: ExperimentConfig) -> ModelFile:
    """Fresh weights, which the experiment's seed determines."""
    weights = fresh_weights(experiment, seed=experiment.seed)
    return ModelFile(experiment=experiment, rounds_done=0, weights=weights, ema=weights)


def save_checkpoint(file: Path, model: ModelFile) -> None:
    """Write weights and average, atomically."""
    average = {EMA_PREFIX + name: tensor.clone() for name, tensor in model.ema.items()}
    optimizer = {OPTIMIZER_PREFIX + name: tensor for name, tensor in model.optimizer.items()}
    _save(file, model, {**model.weights, **average, **optimizer})


def save_model(file: Path, model: ModelFile) -> None:
    """Write the finished model: its averaged weights under the network's own names, atomically."""
    _save(file, model, model.ema)


def load_model(file: Path) -> ModelFile:
    """Read a model or a checkpoint.

    Raises:
        ConfigError: no such file, not one of ours, or made with another schedule than this version computes.
    """
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model = {file}: {type(error).__name__}; give a model.safetensors of a run") from error
    if "experiment" not in metadata:
        raise ConfigError(f"model = {file}: no experiment in its metadata; give a model.safetensors of a run")
    experiment = ExperimentConfig.from_json(json.loads(metadata["experiment"]))
    schedule = build_schedule(experiment.schedule)
    if metadata.get("schedule_sha256") != schedule.sha256:
        raise ConfigError(f"model = {file}: its noise schedule differs from what this version of fedct computes")
    ema, optimizer = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in (EMA_PREFIX, OPTIMIZER_PREFIX)
    )
    prefixes = (EMA_PREFIX, OPTIMIZER_PREFIX)
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} not in (
        model_shapes(experiment),
        personal_shapes(experiment),
    ):
        raise ConfigError(f"model = {file}: its tensors are not those of its own experiment; fetch it again")
    return ModelFile(
        experiment=experiment,
        rounds_done=int(metadata["rounds_done"]),
        weights=weights,
        ema=ema or weights,
        optimizer=optimizer,
    )


def _save(file: Path, model: ModelFile, tensors: Mapping[str, Tensor]) -> None:
    metadata = {
        "experiment": json.dumps(model.experiment.to_json(), sort_keys=True),
        "rounds_done": str(model.rounds_done),
        "schedule_sha256": build_schedule(model.experiment.schedule).sha256,
    }
    write_atomically(file, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
