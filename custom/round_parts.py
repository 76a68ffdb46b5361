"""Which of a model's tensors a round trains, which of these leave a site, and which are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from torch import Tensor

from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from custom.diffusion.split_denoiser import LOW_NOISE
from custom.stages import Stage, model_shapes, part, stage_of, stage_shapes, stages
from custom.strict import require

CONTROL = "control."  # of the names of SCAFFOLD's variates in a message


@dataclass(frozen=True, kw_only=True)
class RoundParts:
    """Names, as in messages, of what a round trains.

    Attributes:
        shared: leave the site, in the model's order.
        waiting: stay there until their turn, in the model's order.
        personal: stay there for good, in the model's order.
        resumed: of all, those that begin as the site has kept them from earlier rounds, if it has; the others begin as
            the server says.
    """

    shared: tuple[str, ...]
    waiting: tuple[str, ...]
    personal: tuple[str, ...]
    resumed: tuple[str, ...]

    @property
    def own(self) -> tuple[str, ...]:
        """What the site keeps after the round."""
        return (*self.waiting, *self.personal)


@lru_cache(maxsize=64)
def round_parts(experiment: ExperimentConfig, round_number: int) -> RoundParts:
    """What a round trains.

    Raises:
        ConfigError: a pattern that fits no tensor, a round in which nothing would be shared, or tensors that would be
            trained and never leave.
    """
    stage = stage_of(experiment, round_number)
    names, turn = tuple(stage_shapes(experiment, stage)), round_number - stage.first
    updates, personal = experiment.updates, experiment.personal
    if stage.name == "autoencoder":
        return RoundParts(shared=names, waiting=(), personal=(), resumed=())
    own: tuple[str, ...] = ()
    if personal is not None and turn >= personal.shared_rounds:
        if personal.parts is not None:
            own = _fitting(names, personal.parts, "personal.parts")
        elif personal.below_timestep is not None:
            own = tuple(LOW_NOISE + name for name in names)
    shared = names
    if updates is not None and updates.parts is not None:
        shared = _fitting(names, updates.parts[turn % len(updates.parts)], "updates.parts")
    shared = tuple(name for name in shared if name not in set(own))
    remedy = "a round would share nothing; leave something to share"
    require(len(shared) > 0, argument="updates.parts", value=updates and updates.parts, remedy=remedy)
    if updates is None or updates.train == "sent":
        return RoundParts(shared=shared, waiting=(), personal=own, resumed=own)
    waiting = tuple(name for name in names if name not in {*shared, *own})
    never = [name for name in waiting if not any(fnmatchcase(name, p) for part in updates.parts or () for p in part)]
    remedy = f"{len(never)} tensors would be trained and never leave; name all of them, or give train = sent"
    require(not never, argument="updates.parts", value=never[:1], remedy=remedy)
    return RoundParts(shared=shared, waiting=waiting, personal=own, resumed=(*shared, *waiting, *own))


def update_shapes(experiment: ExperimentConfig, round_number: int) -> Shapes:
    """Name and shape of every tensor that a site sends after a round; SCAFFOLD's variates follow the weights."""
    shapes = stage_shapes(experiment, stage_of(experiment, round_number))
    sent = {name: shapes[name] for name in round_parts(experiment, round_number).shared}
    variates = {CONTROL + name: shape for name, shape in sent.items()}
    return sent | (variates if experiment.federation.control_variates else {})


@lru_cache(maxsize=8)
def every_update(experiment: ExperimentConfig) -> dict[int, Shapes]:
    """Each set of tensors that a site sends after some round, once, by the first such round."""
    found: dict[tuple[str, ...], int] = {}
    for stage in stages(experiment):
        for number in _turns(experiment, stage):
            found.setdefault(tuple(update_shapes(experiment, number)), number)
    return {number: update_shapes(experiment, number) for number in found.values()}


def own_tensors(experiment: ExperimentConfig, weights: Mapping[str, Tensor], round_number: int) -> dict[str, Tensor]:
    """What a site that has no tensors of its own yet begins with: the global ones."""
    return {name: weights[name.removeprefix(LOW_NOISE)] for name in round_parts(experiment, round_number).own}


def personal_shapes(experiment: ExperimentConfig) -> Shapes:
    """Name and shape of every tensor of a site's own model."""
    shapes, personal = model_shapes(experiment), experiment.personal
    if personal is None or personal.below_timestep is None:
        return shapes
    return shapes | {LOW_NOISE + name: shape for name, shape in part(shapes, "denoiser").items()}


def _turns(experiment: ExperimentConfig, stage: Stage) -> range:
    """Rounds of a stage after which its sets of tensors come again."""
    updates, personal = experiment.updates, experiment.personal
    cycle = 1 if updates is None or updates.parts is None else len(updates.parts)
    shared = personal.shared_rounds if personal is not None and personal.split else 0
    return range(stage.first, min(stage.first + stage.rounds, stage.first + shared + cycle))


def _fitting(names: Sequence[str], patterns: Sequence[str], argument: str) -> tuple[str, ...]:
    for pattern in patterns:
        fits = any(fnmatchcase(name, pattern) for name in names)
        require(fits, argument=argument, value=pattern, remedy=f"fits no tensor such as {min(names)!r}")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
