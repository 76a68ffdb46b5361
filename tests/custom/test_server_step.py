from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.model_file import ModelFile, load_model, save_checkpoint
from custom.server_step import stepped
from custom.stages import stage_of


def test_steps_are_adamw_s_also_across_a_checkpoint(experiment: ExperimentConfig, tmp_path: Path) -> None:
    weights = {k: v.detach() for k, v in build_network(experiment.network, spatial_dims=2, seed=1).state_dict().items()}
    names = sorted(weights)[:3]
    rng = np.random.default_rng(0)
    gradients = [
        {name: rng.normal(size=tuple(weights[name].shape)).astype(np.float32) for name in names} for _ in range(3)
    ]
    trained = [torch.nn.Parameter(weights[name].clone()) for name in names]
    optimizer = torch.optim.AdamW(trained, weight_decay=experiment.training.weight_decay)
    model = ModelFile(experiment=experiment, rounds_done=0, weights=weights, ema=weights)
    for number, gradient in enumerate(gradients):
        for group in optimizer.param_groups:
            group["lr"] = stage_of(experiment, number).learning_rate(number * experiment.training.steps_per_round)
        for name, parameter in zip(names, trained, strict=True):
            parameter.grad = torch.from_numpy(gradient[name])
        optimizer.step()
        save_checkpoint(tmp_path / "checkpoint.safetensors", stepped(model, gradient))
        model = load_model(tmp_path / "checkpoint.safetensors")
        assert model.rounds_done == number + 1
    for name, parameter in zip(names, trained, strict=True):
        torch.testing.assert_close(model.weights[name], parameter.detach())
        torch.testing.assert_close(model.ema[name], parameter.detach())
    for name in set(weights) - set(names):
        assert torch.equal(model.weights[name], weights[name])
    assert set(model.optimizer) == {f"{name}/{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert replace(model, optimizer={}).optimizer == {}
