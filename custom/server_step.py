"""The optimiser's step at the server, where sites sum gradients instead of sending weight differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from custom.diffusion.ema import updated_ema
from custom.model_file import ModelFile
from custom.training import learning_rate, restore_optimizer, stored_optimizer


def stepped(model: ModelFile, gradient: Mapping[str, NDArray[np.float32]]) -> ModelFile:
    """The model after one step of AdamW with the sites' mean gradient; what is not in it stays as it is.

    Args:
        model: before, with the optimiser's state of earlier steps.
        gradient: by name; already noised, so that whatever is made of it costs no privacy.
    """
    training = model.experiment.training
    trained = {name: nn.Parameter(model.weights[name].clone()) for name in gradient}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=training.weight_decay)
    restore_optimizer(optimizer, trained, model.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(model.experiment, model.rounds_done)
    for name, parameter in trained.items():
        parameter.grad = torch.from_numpy(gradient[name])
    optimizer.step()
    weights = {**model.weights, **{name: parameter.detach() for name, parameter in trained.items()}}
    # The average starts at the first trained model, not at noise.
    decay = model.experiment.federation.server_ema if model.rounds_done else 0.0
    return replace(
        model,
        rounds_done=model.rounds_done + 1,
        weights=weights,
        ema=updated_ema(model.ema, weights, decay),
        optimizer=stored_optimizer(optimizer, trained),
    )
