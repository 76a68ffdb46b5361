"""The server's look at an update on its own public images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from custom.codec import to_numpy
from custom.config import ExperimentConfig
from custom.diffusion.objective import Objective
from custom.diffusion.schedule import build_schedule
from custom.federation_config import RobustConfig
from custom.latents import encoded
from custom.reference_check import BANDS, IMAGES, ReferenceCheck
from custom.stages import Stage, fresh_weights, model_autoencoder, model_denoiser, stage_of, stage_shapes
from custom.strict import ConfigError
from medical_data.cohort import Cohort

CPU = torch.device("cpu")


def check_of(
    experiment: ExperimentConfig,
    weights: dict[str, Tensor],
    images: NDArray[np.float32],
    *,
    round_number: int = 0,
    tolerance: float = 0.5,
) -> ReferenceCheck:
    check = ReferenceCheck.of_round(images, weights, asking(experiment, tolerance), round_number, CPU)
    assert check is not None
    return check


def asking(experiment: ExperimentConfig, tolerance: float = 0.5) -> ExperimentConfig:
    robust = RobustConfig(reference=True, reference_tolerance=tolerance)
    return replace(experiment, federation=replace(experiment.federation, weighting="uniform", robust=robust))


def nothing(experiment: ExperimentConfig, stage: Stage) -> dict[str, NDArray[np.float32]]:
    return {name: np.zeros(shape, np.float32) for name, shape in stage_shapes(experiment, stage).items()}


class OneWeight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))


def worse_in_a_band(band: int) -> Objective:
    """Loss is the first weight, and in one of the bands of 100 timesteps the second one."""

    def loss(call: object, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        weight: Tensor = call()  # type: ignore[operator]
        return weight[(timesteps // 25 == band).long()]

    network = OneWeight()
    network.forward = lambda: network.weight  # type: ignore[method-assign]
    return Objective(network=network, loss=loss, noise_shape=lambda image: image, timesteps=100)


@pytest.mark.parametrize("band", range(BANDS))
def test_worse_in_one_band_is_enough_and_the_reason_names_it(band: int) -> None:
    images = np.zeros((40, 1, 4, 4), np.float32)
    check = ReferenceCheck(worse_in_a_band(band), prefix="p.", images=images, device=CPU, tolerance=0.5)
    assert check({"p.weight": np.array([0.0, 0.49], np.float32)}) is None
    assert check({"p.weight": np.array([-1.0, -1.0], np.float32)}) is None
    reason = check({"p.weight": np.array([-0.9, 0.6], np.float32)})
    assert reason is not None
    assert f"timesteps {band / 4:g} T to {(band + 1) / 4:g} T: 1.6 times" in reason
    assert "reference_tolerance" in reason


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_refused(value: float) -> None:
    images = np.zeros((3, 1, 4, 4), np.float32)
    check = ReferenceCheck(worse_in_a_band(1), prefix="", images=images, device=CPU, tolerance=0.5)
    assert check({"weight": np.array([0.0, value], np.float32)}) is not None


def test_what_cannot_be_compared_is_refused() -> None:
    objective = worse_in_a_band(1)
    with torch.no_grad():
        objective.network.weight.fill_(torch.nan)  # type: ignore[operator, union-attr]
    images = np.zeros((3, 1, 4, 4), np.float32)
    check = ReferenceCheck(objective, prefix="", images=images, device=CPU, tolerance=0.5)
    assert check({"weight": np.zeros(2, np.float32)}) is not None


def test_losses_are_those_of_a_plain_loop(experiment: ExperimentConfig, cohort: Cohort) -> None:
    weights = fresh_weights(experiment, seed=1)
    weights = {name: tensor + 0.02 for name, tensor in weights.items()}
    images = np.concatenate([cohort.images, cohort.images])
    check = check_of(experiment, weights, images)
    network, schedule = model_denoiser(experiment, weights).eval(), build_schedule(experiment.schedule)
    assert check._timesteps.shape == (BANDS, IMAGES)
    assert len(torch.unique(check._timesteps)) == BANDS * IMAGES, "spread evenly"
    for band in range(BANDS):
        losses = []
        assert ((250 * band <= check._timesteps[band]) & (check._timesteps[band] < 250 * (band + 1))).all()
        for x0, noise, t in zip(check._x0, check._noise[band], check._timesteps[band], strict=True):
            a = schedule.alphas_cumprod[t]
            x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
            with torch.no_grad():
                error = network(x=x_t[None], timesteps=t[None])[0] - (a.sqrt() * noise - (1 - a).sqrt() * x0)
            losses.append(float(error.square().mean()))
        assert check._before[band] == pytest.approx(np.mean(losses), rel=1e-4)


def test_an_untrained_model_has_losses_near_one(experiment: ExperimentConfig, cohort: Cohort) -> None:
    """Why an honest first update, which lowers them, is never refused."""
    check = check_of(experiment, fresh_weights(experiment, seed=1), cohort.images)
    assert all(0.5 < loss < 1.1 for loss in check._before)


def test_an_update_is_judged_as_the_model_that_it_makes(experiment: ExperimentConfig, cohort: Cohort) -> None:
    weights, better = fresh_weights(experiment, seed=1), fresh_weights(experiment, seed=2)
    update = {name: 0.3 * array for name, array in to_numpy(better).items()}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    check = check_of(experiment, weights, cohort.images, tolerance=1e-6)
    moved = {name: tensor + torch.from_numpy(update[name]) for name, tensor in weights.items()}
    after = check_of(experiment, moved, cohort.images)._before
    assert check._losses({name: moved[name] for name in check._weights}) == pytest.approx(after, rel=1e-6)
    assert check(nothing(experiment, stage_of(experiment, 0))) is None
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert check._losses(check._weights) == check._before, "judging leaves no trace"


def test_parts_of_an_update_and_unknown_names(experiment: ExperimentConfig, cohort: Cohort) -> None:
    weights = fresh_weights(experiment, seed=1)
    beside = {**weights, "control.out.2.conv.bias": torch.ones(1)}
    check = check_of(experiment, beside, cohort.images)
    assert check({}) is None
    assert check({"control.out.2.conv.bias": np.full(1, 9.0, np.float32)}) is None
    assert check({"out.2.conv.bias": np.full(1, 9.0, np.float32)}) is not None


def test_no_image_is_no_check(experiment: ExperimentConfig, cohort: Cohort) -> None:
    with pytest.raises(ValueError, match="reference images = 0"):
        check_of(experiment, fresh_weights(experiment, seed=1), cohort.images[:0])


def test_a_job_that_asks_for_it_gets_one_or_an_error(experiment: ExperimentConfig, cohort: Cohort) -> None:
    weights = fresh_weights(experiment, seed=1)
    assert ReferenceCheck.of_round(cohort.images, weights, experiment, 0, CPU) is None
    with pytest.raises(ConfigError, match=r"server\.reference.*name public scans"):
        ReferenceCheck.of_round(None, weights, asking(experiment), 0, CPU)


def test_one_image_is_a_check(experiment: ExperimentConfig, cohort: Cohort) -> None:
    check = check_of(experiment, fresh_weights(experiment, seed=1), cohort.images[:1])
    assert check(nothing(experiment, stage_of(experiment, 0))) is None


@pytest.mark.parametrize("round_number", [0, 1])
def test_both_stages_of_a_latent_model(latent_experiment: ExperimentConfig, cohort: Cohort, round_number: int) -> None:
    weights = fresh_weights(latent_experiment, seed=1)
    stage = stage_of(latent_experiment, round_number)
    check = check_of(latent_experiment, stage.needed(weights), cohort.images, round_number=round_number)
    if stage.name == "denoiser":  # the images became latents
        latents = encoded(model_autoencoder(latent_experiment, weights), cohort.images, CPU)
        assert check._x0.shape[1:] == latents.shape[1:]
    assert len(check._before) == (1 if stage.name == "autoencoder" else BANDS)
    update = nothing(latent_experiment, stage)
    assert check(update) is None
    rng = np.random.default_rng(0)
    noise = {name: rng.normal(0, 1, array.shape).astype(np.float32) for name, array in update.items()}
    assert check(noise) is not None
    other = stage_shapes(latent_experiment, stage_of(latent_experiment, 1 - round_number))
    assert check({name: np.ones(shape, np.float32) for name, shape in other.items()}) is None, "not of this stage"


def test_volumes(experiment: ExperimentConfig) -> None:
    volumes = replace(
        experiment,
        preprocess=replace(experiment.preprocess, spatial_dims=3, spacing_mm=(8.0, 8.0, 8.0)),
    )
    images = np.full((2, 1, 16, 16, 16), -1, np.float32)
    check = check_of(volumes, fresh_weights(volumes, seed=1), images)
    assert check(nothing(volumes, stage_of(volumes, 0))) is None
