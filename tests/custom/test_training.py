from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.diffusion.objective import denoising
from custom.diffusion.schedule import build_schedule
from custom.site_state import SiteState
from custom.stages import stage_of
from custom.training import (
    LocalUpdate,
    PatientSampler,
    TrainingDiverged,
    _derived_seed,
    held_out_loss,
    train_round,
)
from medical_data.cohort import Cohort

CPU = torch.device("cpu")


def initial(experiment: ExperimentConfig) -> dict[str, Tensor]:
    return dict(build_network(experiment.network, spatial_dims=2, seed=experiment.seed).state_dict())


def one_round(
    experiment: ExperimentConfig,
    cohort: Cohort,
    weights: Mapping[str, Tensor],
    *,
    number: int = 0,
    site: str = "a",
    optimizer: Mapping[str, Tensor] | None = None,
) -> LocalUpdate:
    return train_round(
        cohort=cohort,
        weights=weights,
        state=optimizer or {},
        config=experiment,
        site=site,
        round_number=number,
        device=CPU,
    )


def test_the_difference_is_that_of_a_plain_loop(experiment: ExperimentConfig, cohort: Cohort) -> None:
    """The slow obvious reference: the same draws, one image at a time, gradients added up by hand."""
    weights = initial(experiment)
    update = one_round(experiment, cohort, weights)

    network = build_network(experiment.network, spatial_dims=2)
    network.load_state_dict(weights)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, weight_decay=experiment.training.weight_decay)
    generator = torch.Generator().manual_seed(_derived_seed(experiment.seed, "a", 0))
    draw = PatientSampler(cohort, generator)
    alphas = build_schedule(experiment.schedule).alphas_cumprod
    for step in range(experiment.training.steps_per_round):
        x0 = draw(4)
        noise = torch.randn(x0.shape, generator=generator)
        timesteps = torch.randint(1000, (4,), generator=generator)
        optimizer.zero_grad()
        for i in range(4):
            a = alphas[timesteps[i]]
            x_t = a.sqrt() * x0[i] + (1 - a).sqrt() * noise[i]
            v = a.sqrt() * noise[i] - (1 - a).sqrt() * x0[i]
            error = network(x=x_t[None], timesteps=timesteps[i : i + 1])[0] - v
            (error.square().mean() / 4).backward()
        nn.utils.clip_grad_norm_(network.parameters(), experiment.training.gradient_clip)
        optimizer.param_groups[0]["lr"] = stage_of(experiment, 0).learning_rate(step)
        optimizer.step()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(update.difference[name], tensor - weights[name], atol=2e-5, rtol=1e-3)


def test_same_seed_same_update_other_site_or_round_another(experiment: ExperimentConfig, cohort: Cohort) -> None:
    weights = initial(experiment)
    name = next(iter(weights))
    first = one_round(experiment, cohort, weights).difference[name]
    assert torch.equal(first, one_round(experiment, cohort, weights).difference[name])
    assert not torch.equal(first, one_round(experiment, cohort, weights, site="b").difference[name])
    assert not torch.equal(first, one_round(experiment, cohort, weights, number=1).difference[name])


def test_optimizer_survives_the_death_of_the_process(
    experiment: ExperimentConfig, cohort: Cohort, tmp_path: Path
) -> None:
    weights = initial(experiment)
    first = one_round(experiment, cohort, weights)
    SiteState(tmp_path).save(0, first.state)
    moved = {name: weights[name] + change for name, change in first.difference.items()}
    lived_on = one_round(experiment, cohort, moved, number=1, optimizer=first.state)
    started_anew = one_round(experiment, cohort, moved, number=1, optimizer=SiteState(tmp_path).before(1))
    forgot = one_round(experiment, cohort, moved, number=1)
    for name in weights:
        assert torch.equal(lived_on.difference[name], started_anew.difference[name])
    assert any(not torch.equal(lived_on.difference[name], forgot.difference[name]) for name in weights)


def test_training_lowers_the_held_out_loss(experiment: ExperimentConfig, cohort: Cohort) -> None:
    longer = replace(experiment, training=replace(experiment.training, steps_per_round=60))
    weights = initial(longer)
    update = one_round(longer, cohort, weights)
    trained = {name: weights[name] + change for name, change in update.difference.items()}
    after = one_round(longer, cohort, trained, number=1).metrics["held_out_loss"]
    assert after < 0.7 * update.metrics["held_out_loss"]


def test_held_out_patients_are_never_drawn_and_patients_are_drawn_alike(cohort: Cohort) -> None:
    marked = replace(cohort, images=np.broadcast_to(cohort.patient[:, None, None, None], cohort.images.shape).copy())
    uneven = np.concatenate([np.arange(8), np.arange(8, 24)[:4], np.arange(16, 24)])  # patients of unequal size
    marked = replace(marked, images=marked.images[uneven].astype(np.float32), patient=cohort.patient[uneven])
    drawn = PatientSampler(marked, torch.Generator().manual_seed(0))(4000)[:, 0, 0, 0]
    counts = torch.bincount(drawn.long(), minlength=6)
    assert counts[0] == counts[3] == 0
    present = counts[counts > 0]
    assert (present / 4000 - 1 / len(present)).abs().max() < 0.03


def test_held_out_loss_uses_held_out_patients_and_the_same_noise_each_time(
    experiment: ExperimentConfig, cohort: Cohort
) -> None:
    network, schedule = build_network(experiment.network, spatial_dims=2, seed=0), build_schedule(experiment.schedule)
    objective = denoising(network, schedule)
    loss = held_out_loss(objective, cohort, CPU)
    assert loss == held_out_loss(objective, cohort, CPU)
    train_rows = cohort.rows("train")
    changed = cohort.images.copy()
    changed[train_rows] = 0
    assert loss == held_out_loss(objective, replace(cohort, images=changed), CPU)


def test_learning_rate_warms_up_and_ends_near_zero(experiment: ExperimentConfig) -> None:
    config = replace(experiment, training=replace(experiment.training, steps_per_round=100, warmup_steps=20))
    stage = stage_of(config, 0)
    rates = [stage.learning_rate(step) for step in range(stage.total_steps)]
    assert rates[0] < rates[10] < rates[20]
    assert max(rates) <= config.training.learning_rate
    assert rates[-1] < 1e-4 * config.training.learning_rate
    assert rates[100] == pytest.approx(config.training.learning_rate * 0.5 * (1 + math.cos(math.pi / 2)))


def test_a_loss_that_is_not_finite_stops_the_round(experiment: ExperimentConfig, cohort: Cohort) -> None:
    weights = initial(experiment)
    weights["out.2.conv.bias"] = torch.full_like(weights["out.2.conv.bias"], float("inf"))
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        one_round(experiment, cohort, weights)
