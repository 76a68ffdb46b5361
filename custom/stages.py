"""What a run trains, one after the other: the autoencoder, if it is not a frozen one, and the denoiser.

Both are rounds of the same run: the same tasks, checks, gates, plan of differential privacy and masks. A round's stage
decides only which of the model's tensors are trained and leave.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import torch
from torch import Tensor

from custom.config import ExperimentConfig
from custom.diffusion.autoencoder import Autoencoder, build_autoencoder
from custom.diffusion.networks import Shapes, build_network
from custom.diffusion.objective import Objective, denoising, reconstructing
from custom.diffusion.schedule import build_schedule
from custom.diffusion.split_denoiser import LOW_NOISE, SplitDenoiser
from custom.model_config import TrainingConfig

MOST_EPOCHS = 10  # of a round whose length is chosen
PREFIX = "autoencoder."  # of its tensors' names in a model and in messages; the denoiser's have none

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Span:
    """Gradient steps of one round at one site.

    Attributes:
        first: number of the first one in its stage.
        steps: how many.
    """

    first: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Rounds that train the same tensors.

    Attributes:
        name: of what they train.
        first: number of the first one.
        rounds: how many.
        training: a site's work in each.
    """

    name: Literal["autoencoder", "denoiser"]
    first: int
    rounds: int
    training: TrainingConfig

    @property
    def prefix(self) -> str:
        """Of the names of the tensors that are trained."""
        return PREFIX if self.name == "autoencoder" else ""

    @property
    def total_steps(self) -> int:
        """Gradient steps that one site makes over all rounds of the stage."""
        return self.rounds * self.training.steps_per_round

    def span(self, round_number: int) -> Span:
        """The steps of a round; none if those before it have made all of the stage's.

        A round is one local epoch of ``steps_per_round``, or with ``local_epochs: auto`` as many as the quadratic
        synchronisation rule says (Gu et al. 2024, arXiv:2310.14423, eq. 2): how far sites drift apart grows with the
        learning rate and with the number of steps, so a round has ⌊(η_peak / η)²⌋ epochs for the rate η at its first
        step, at least 1 and at most ``MOST_EPOCHS``. A schedule that nothing at a site decides.
        """
        steps, turn = self.training.steps_per_round, round_number - self.first
        if self.training.local_epochs is None:
            return Span(first=turn * steps, steps=steps)
        first = epochs = 0
        for _ in range(turn + 1):
            first += epochs * steps
            left = (self.total_steps - first) // steps
            calmer = self.training.learning_rate / self._decayed(first) if left else 1.0
            whole = int(calmer**2 + 1e-9)  # halfway it is 4 exactly, and rounding must not make it 3
            epochs = min(max(1, min(whole, MOST_EPOCHS)), left)
        return Span(first=first, steps=epochs * steps)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero over the stage (arXiv:1608.03983, eq. 5 without restarts).

        Args:
            step: of the stage, from 0.
        """
        return min(1.0, (step + 1) / (self.training.warmup_steps + 1)) * self._decayed(step)

    def _decayed(self, step: int) -> float:
        return self.training.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.total_steps))

    def needed(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Those of a model's tensors that a site needs, by their names: a denoiser's rounds also encode images."""
        return {key: tensor for key, tensor in tensors.items() if key.startswith(self.prefix)}


def part(tensors: Mapping[str, T], name: Literal["autoencoder", "denoiser"]) -> dict[str, T]:
    """One network's tensors out of a model's, under the network's own names."""
    if name == "denoiser":
        return {key: tensor for key, tensor in tensors.items() if not key.startswith(PREFIX)}
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}


def stages(experiment: ExperimentConfig) -> tuple[Stage, ...]:
    """The stages of a run in their order."""
    rounds, autoencoder = experiment.federation.rounds, experiment.autoencoder
    first = 0 if autoencoder is None else autoencoder.rounds
    last = Stage(name="denoiser", first=first, rounds=rounds - first, training=experiment.training)
    if autoencoder is None or not first:
        return (last,)
    training = experiment.training if autoencoder.training is None else autoencoder.training
    return Stage(name="autoencoder", first=0, rounds=first, training=training), last


def stage_of(experiment: ExperimentConfig, round_number: int) -> Stage:
    """The stage of a round; after the last round, the last stage."""
    return max((stage for stage in stages(experiment) if stage.first <= round_number), key=lambda stage: stage.first)


@lru_cache(maxsize=8)
def model_shapes(experiment: ExperimentConfig) -> Shapes:
    """Name and shape of every tensor of the model, a frozen autoencoder's too.

    All of them are float32 parameters: our networks have no buffers (checked by tests).
    """
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in fresh_weights(experiment).items()}


def stage_shapes(experiment: ExperimentConfig, stage: Stage) -> Shapes:
    """Name, as in messages, and shape of every tensor that a stage trains."""
    own = part(model_shapes(experiment), stage.name)
    return {stage.prefix + name: shape for name, shape in own.items()}


def fresh_weights(experiment: ExperimentConfig, *, seed: int | None = None) -> dict[str, Tensor]:
    """Weights of a new model by name, which a seed determines."""
    weights = dict(_denoiser(experiment, seed).state_dict())
    if experiment.autoencoder is not None:
        weights |= {PREFIX + name: tensor for name, tensor in _autoencoder(experiment, seed).state_dict().items()}
    return {name: tensor.detach() for name, tensor in weights.items()}


def stage_objective(
    experiment: ExperimentConfig, stage: Stage, weights: Mapping[str, Tensor], device: torch.device
) -> Objective:
    """The network that a stage trains, with the model's weights in it, and its loss."""
    if stage.name == "denoiser":
        return denoising(model_denoiser(experiment, weights).to(device), build_schedule(experiment.schedule))
    assert experiment.autoencoder is not None  # noqa: S101 - it has such a stage
    return reconstructing(model_autoencoder(experiment, weights).to(device), experiment.autoencoder)


def model_denoiser(experiment: ExperimentConfig, weights: Mapping[str, Tensor]) -> torch.nn.Module:
    """The denoiser of a model; of a site's own model with a denoiser for low noise, both as one."""
    tensors = part(weights, "denoiser")
    low = {name.removeprefix(LOW_NOISE): t for name, t in tensors.items() if name.startswith(LOW_NOISE)}
    network = _denoiser(experiment)
    network.load_state_dict({name: t for name, t in tensors.items() if not name.startswith(LOW_NOISE)})
    personal = experiment.personal
    if not low or personal is None or personal.below_timestep is None:
        return network
    low_noise = _denoiser(experiment)
    low_noise.load_state_dict(low)
    return SplitDenoiser(low_noise=low_noise, high_noise=network, below=personal.below_timestep)


def model_autoencoder(experiment: ExperimentConfig, weights: Mapping[str, Tensor]) -> Autoencoder:
    """The autoencoder of a model that has one."""
    network = _autoencoder(experiment)
    network.load_state_dict(part(weights, "autoencoder"))
    return network.eval()


def _denoiser(experiment: ExperimentConfig, seed: int | None = None) -> torch.nn.Module:
    return build_network(
        experiment.network,
        spatial_dims=experiment.preprocess.spatial_dims,
        channels=experiment.denoised_shape[0],
        seed=seed,
    )


def _autoencoder(experiment: ExperimentConfig, seed: int | None = None) -> Autoencoder:
    assert experiment.autoencoder is not None  # noqa: S101 - whoever calls this has looked
    return build_autoencoder(experiment.autoencoder, spatial_dims=experiment.preprocess.spatial_dims, seed=seed)
