"""The model after a round: the sites' mean difference added, or a step of the server's along their gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from custom.diffusion.ema import updated_ema
from custom.model_file import ModelFile
from custom.stages import stage_of
from custom.training import learning_rate, restore_optimizer, stored_optimizer


def moved(model: ModelFile, difference: Mapping[str, NDArray[np.float32]]) -> ModelFile:
    """The model with a mean difference added to the tensors of its stage.

    Args:
        model: before.
        difference: by name.
    """
    return _advanced(model, {name: model.weights[name] + torch.tensor(array) for name, array in difference.items()})


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
        group["lr"] = learning_rate(stage, model.rounds_done, 0)
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
