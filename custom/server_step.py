"""The model after a round: the sites' mean difference added, or a step of the server's along their gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from custom.diffusion.ema import updated_ema
from custom.federation_config import ServerOptimizerConfig
from custom.model_file import ModelFile
from custom.round_parts import CONTROL
from custom.stages import stage_of
from custom.training import restore_optimizer, stored_optimizer


def moved(model: ModelFile, difference: Mapping[str, NDArray[np.float32]], *, present: float = 1.0) -> ModelFile:
    """The model after a round: the server's step along a mean difference, which FedAvg adds.

    Args:
        model: before, with the server optimizer's state of earlier rounds, and with SCAFFOLD the server's variates.
        difference: by name; tensors that are not in it stay as they are.
        present: share of the federation's sites that took part.
    """
    stage = stage_of(model.experiment, model.rounds_done)
    asked = model.experiment.federation.server_optimizer
    kept = model.optimizer if model.rounds_done > stage.first else {}
    deltas = {name: torch.tensor(array) for name, array in difference.items() if not name.startswith(CONTROL)}
    variates = {name: tensor for name, tensor in kept.items() if name.startswith(CONTROL)}
    span = stage.span(model.rounds_done)
    rates = sum(stage.learning_rate(span.first + step) for step in range(span.steps))
    for name in set(difference) - set(deltas):  # c ← c + |S|/N mean(c_i⁺ - c_i); arXiv:1910.06378, alg. 1
        change = torch.tensor(difference[name]) * (present / rates)
        variates[name] = variates[name] + change if name in variates else change
    if asked is None:
        changed = {name: model.weights[name] + delta for name, delta in deltas.items()}
        return replace(_advanced(model, changed), optimizer=variates)
    trained = {name: nn.Parameter(model.weights[name].clone()) for name in deltas}
    optimizer = _server_optimizer(asked, list(trained.values()))
    moments = {key: t for key, t in kept.items() if not key.startswith(CONTROL)}
    restore_optimizer(optimizer, trained, {k: t for k, t in moments.items() if k.rpartition("/")[0] in trained})
    for name, parameter in trained.items():
        parameter.grad = -deltas[name]
    optimizer.step()
    changed = {name: parameter.detach() for name, parameter in trained.items()}
    moments |= stored_optimizer(optimizer, trained)
    return replace(_advanced(model, changed), optimizer={**variates, **moments})


def server_variates(model: ModelFile, names: Iterable[str]) -> dict[str, Tensor]:
    """SCAFFOLD's c for a round's task, by name; zeros where there is none yet. Empty in other jobs."""
    if not model.experiment.federation.control_variates:
        return {}
    stage = stage_of(model.experiment, model.rounds_done)
    kept = model.optimizer if model.rounds_done > stage.first else {}
    return {CONTROL + name: kept.get(CONTROL + name, torch.zeros_like(model.weights[name])) for name in names}


def _server_optimizer(asked: ServerOptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if asked.name == "adam":
        betas = (asked.momentum, asked.second_momentum)
        return torch.optim.Adam(parameters, lr=asked.learning_rate, betas=betas, eps=asked.epsilon)
    nesterov = asked.name == "nesterov"
    return torch.optim.SGD(parameters, lr=asked.learning_rate, momentum=asked.momentum, nesterov=nesterov)


def stepped(model: ModelFile, gradient: Mapping[str, NDArray[np.float32]]) -> ModelFile:
    """The model after one step of AdamW with the sites' mean gradient; what is not in it stays as it is.

    Args:
        model: before, with the optimiser's state of earlier steps.
        gradient: by name; already noised, so that whatever is made of it costs no privacy.
    """
    stage = stage_of(model.experiment, model.rounds_done)
    trained = {name: nn.Parameter(model.weights[name].clone()) for name in gradient}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=stage.training.weight_decay)
    restore_optimizer(optimizer, trained, model.optimizer if model.rounds_done > stage.first else {})
    for group in optimizer.param_groups:
        group["lr"] = stage.learning_rate(stage.span(model.rounds_done).first)
    for name, parameter in trained.items():
        parameter.grad = torch.from_numpy(gradient[name])
    optimizer.step()
    changed = {name: parameter.detach() for name, parameter in trained.items()}
    return replace(_advanced(model, changed), optimizer=stored_optimizer(optimizer, trained))


def _advanced(model: ModelFile, changed: Mapping[str, Tensor]) -> ModelFile:
    """The model a round later; what a finished stage trained stays at its average from then on."""
    stage = stage_of(model.experiment, model.rounds_done)
    # The average starts at the stage's first trained weights, not at noise.
    decay = model.experiment.federation.server_ema if model.rounds_done > stage.first else 0.0
    average = updated_ema({name: model.ema[name] for name in changed}, changed, decay)
    done = stage.name == "autoencoder" and model.rounds_done + 1 == stage.first + stage.rounds
    return replace(
        model,
        rounds_done=model.rounds_done + 1,
        weights={**model.weights, **(average if done else changed)},
        ema={**model.ema, **average},
        optimizer={},
    )
