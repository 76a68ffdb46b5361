from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.diffusion.objective import denoising
from custom.diffusion.schedule import build_schedule
from custom.job_plan import privacy_plan
from custom.model_config import AutoencoderConfig, ScheduleConfig, TrainingConfig
from custom.privacy_config import MeanImageConfig, PrivacyConfig
from custom.private_training import (
    CLIP_NORM,
    PatientDraws,
    PrivateUpdate,
    patient_loss,
    release_mean_image,
    train_private_round,
    trained_parameters,
)
from custom.site_state import SiteState
from custom.stages import fresh_weights, stage_objective, stage_of
from custom.strict import ConfigError
from custom.training import TrainingDiverged, held_out_loss
from medical_data.cohort import Cohort
from medical_data.preprocess import PreprocessConfig
from privacy.accounting import SampledGaussian
from privacy.dpsgd import _NOISE_BLOCK, CLIP_MARGIN
from privacy.plan import AdaptiveClipping, DPConfig, DPPlan, calibrate
from privacy.rng import SeededRandomnessForTests

CPU = torch.device("cpu")
DENOISING = denoising(nn.Identity(), build_schedule(ScheduleConfig()))
MEAN_IMAGE = MeanImageConfig(clip_norm=10.0, noise_multiplier=4.0, warm_up_steps=5)


def private(experiment: ExperimentConfig, **changes: object) -> ExperimentConfig:
    values: dict[str, object] = {
        "patients": 4,
        "delta": 1e-2,
        "clip_norm": 1.0,
        "sampling_rate": 0.75,
        "draws_per_patient": 3,
        "noise_multiplier": 1.0,
    }
    return replace(
        experiment,
        training=TrainingConfig(steps_per_round=3, warmup_steps=0),
        federation=replace(experiment.federation, weighting="uniform"),
        privacy=PrivacyConfig(**{**values, **changes}),  # type: ignore[arg-type]
    )


def plan_of(config: ExperimentConfig) -> DPPlan:
    plan = privacy_plan(config)
    assert plan is not None
    return plan


def initial(config: ExperimentConfig) -> dict[str, Tensor]:
    return fresh_weights(config, seed=config.seed)


def one_round(
    config: ExperimentConfig,
    cohort: Cohort,
    *,
    weights: dict[str, Tensor] | None = None,
    state: dict[str, Tensor] | None = None,
    number: int = 0,
    seed: int | None = 1,
    patients_in_memory: int = 2,
) -> PrivateUpdate:
    """With a seed, everything is repeatable; without one, as at a site."""
    return train_private_round(
        cohort=cohort,
        weights=weights or initial(config),
        state=state or {},
        config=config,
        plan=plan_of(config),
        round_number=number,
        device=CPU,
        patients_in_memory=patients_in_memory,
        randomness=None if seed is None else SeededRandomnessForTests(seed),
        draws_seed=seed,
    )


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- a round


@pytest.mark.parametrize("latent", [False, True], ids=["denoiser", "autoencoder"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_difference_is_that_of_a_plain_loop(experiment: ExperimentConfig, spatial_dims: int, latent: bool) -> None:
    """The slow obvious reference: patient by patient, gradients clipped by hand, noise from the same stream."""
    config = private(experiment)
    if latent:
        config = replace(config, autoencoder=AutoencoderConfig(channels=(8, 8), latent_channels=2, rounds=1))
    edge = (8,) * spatial_dims
    if spatial_dims == 3:
        volumes = PreprocessConfig(spatial_dims=3, size=8, images_per_patient=4, spacing_mm=(8.0, 8.0, 8.0))
        config = replace(config, preprocess=volumes)
    else:
        config = replace(config, preprocess=PreprocessConfig(size=8, images_per_patient=4))
    images = np.random.default_rng(0).uniform(-1, 1, (24, 1, *edge)).astype(np.float32)
    cohort = Cohort(
        images=images,
        patient=np.repeat(np.arange(6, dtype=np.int32), 4),
        pseudonyms=tuple(f"p{patient}" for patient in range(6)),
        held_out=np.array([True, False, False, True, False, False]),
        manifest_sha256="0" * 64,
    )
    stage = stage_of(config, 0)
    assert stage.name == ("autoencoder" if latent else "denoiser")
    update = one_round(config, cohort)

    objective = stage_objective(config, stage, initial(config), CPU)
    network = objective.network
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=config.training.weight_decay)
    randomness = SeededRandomnessForTests(1)
    draw = PatientDraws(cohort, plan_of(config), objective, torch.Generator().manual_seed(1), CPU)
    loss = patient_loss(objective)
    for step in range(config.training.steps_per_round):
        sampled = randomness.poisson_sample(4, 0.75)
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        # In chunks of two patients, as the round draws them.
        for chunk in (sampled[first : first + 2] for first in range(0, len(sampled), 2)):
            x0, noise, timesteps = draw(chunk)
            for i in range(len(chunk)):
                gradients = torch.autograd.grad(
                    loss(parameters, x0[i], noise[i], timesteps[i]).mean(), list(parameters.values())
                )
                norm = torch.stack([g.norm() for g in gradients]).norm()
                factor = min(1.0, 1.0 * (1 - CLIP_MARGIN) / float(norm))
                for name, gradient in zip(parameters, gradients, strict=True):
                    total[name] += factor * gradient
        sizes = [parameter.numel() for parameter in parameters.values()]
        blocks = torch.split(torch.zeros(sum(sizes)), _NOISE_BLOCK)
        noise_of = torch.cat([randomness.normal(block.shape).float() for block in blocks]).split(sizes)
        for (name, parameter), added in zip(parameters.items(), noise_of, strict=True):
            parameter.grad = (total[name] + 1.0 * 1.0 * added.view_as(parameter)) / (0.75 * 4)
        optimizer.param_groups[0]["lr"] = stage.learning_rate(step)
        optimizer.step()
    for name, tensor in network.state_dict().items():
        name = stage.prefix + name
        torch.testing.assert_close(update.difference[name], tensor - initial(config)[name], atol=5e-5, rtol=1e-3)


def test_the_round_is_charged_for_exactly_what_ran(experiment: ExperimentConfig, cohort: Cohort) -> None:
    config = private(experiment)
    update = one_round(config, cohort)
    assert update.event == plan_of(config).round_event
    assert update.event == SampledGaussian(sampling_rate=0.75, noise_multiplier=1.0, steps=3)


def test_a_repeated_round_is_another_release(experiment: ExperimentConfig, cohort: Cohort) -> None:
    """Without a seed, which only tests give, nothing of a round can be repeated: neither sampling nor noise."""
    config = private(experiment)
    first, again = (one_round(config, cohort, seed=None).difference for _ in range(2))
    assert not any(torch.equal(first[name], again[name]) for name in first)
    assert same(one_round(config, cohort).difference, one_round(config, cohort).difference)


def test_a_cohort_smaller_than_announced_is_fine(experiment: ExperimentConfig, cohort: Cohort) -> None:
    """The sum is divided by the announced count: the site's own does not leave."""
    config = private(experiment, patients=80, sampling_rate=1.0)
    assert all(bool(t.isfinite().all()) for t in one_round(config, cohort).difference.values())


def test_optimizer_and_clip_norm_survive_the_death_of_the_process(
    experiment: ExperimentConfig, cohort: Cohort, tmp_path: Path
) -> None:
    adaptive = AdaptiveClipping(
        target_quantile=0.5, learning_rate=0.3, min_norm=0.01, max_norm=100.0, count_noise_multiplier=2.0
    )
    config = private(experiment, adaptive_clipping=adaptive)
    first = one_round(config, cohort)
    assert float(first.state[CLIP_NORM]) != 1.0
    SiteState(tmp_path).save(0, first.state)
    moved = {name: tensor + first.difference[name] for name, tensor in initial(config).items()}
    lived_on = one_round(config, cohort, weights=moved, state=first.state, number=1)
    started_anew = one_round(config, cohort, weights=moved, state=SiteState(tmp_path).before(1), number=1)
    forgot = one_round(config, cohort, weights=moved, number=1)
    assert same(lived_on.difference, started_anew.difference)
    assert same(lived_on.state, started_anew.state)
    assert not same(lived_on.difference, forgot.difference)


def test_only_the_named_layers_are_trained(experiment: ExperimentConfig, cohort: Cohort) -> None:
    config = private(experiment, trained=("*attn*", "*norm*", "out.*"))
    update = one_round(config, cohort)
    trained = trained_parameters(build_network(config.network, spatial_dims=2), ("*attn*", "*norm*", "out.*"))
    assert 0 < len(trained) < len(update.difference)
    for name, difference in update.difference.items():
        assert bool(difference.any()) == (name in trained), name
    with pytest.raises(ConfigError, match=r"trained = 'atn'"):
        one_round(private(experiment, trained=("out.*", "atn")), cohort)


def test_weights_that_are_not_finite_do_not_leave(experiment: ExperimentConfig, cohort: Cohort) -> None:
    config = private(experiment)
    weights = initial(config)
    weights["out.2.conv.bias"] = torch.full_like(weights["out.2.conv.bias"], float("inf"))
    with pytest.raises(TrainingDiverged, match="finite"):
        one_round(config, cohort, weights=weights)


def test_training_lowers_the_held_out_loss(experiment: ExperimentConfig, cohort: Cohort) -> None:
    """With hardly any noise, so that it is the direction which is tested."""
    config = private(experiment, noise_multiplier=0.31, sampling_rate=1.0, patients=4)
    config = replace(config, training=TrainingConfig(steps_per_round=40, warmup_steps=0))
    weights, schedule = initial(config), build_schedule(config.schedule)
    update = one_round(config, cohort, weights=weights)
    network = build_network(config.network, spatial_dims=2)
    losses = []
    for values in (weights, {name: weights[name] + difference for name, difference in update.difference.items()}):
        network.load_state_dict(values)
        losses.append(held_out_loss(denoising(network, schedule), cohort, CPU))
    assert losses[1] < 0.9 * losses[0]


# ---- draws


def test_a_patients_draws_are_the_patients_own_and_uniform(experiment: ExperimentConfig, cohort: Cohort) -> None:
    marked = replace(
        cohort, images=np.broadcast_to(np.arange(24, dtype=np.float32)[:, None, None, None], (24, 1, 2, 2)).copy()
    )
    draw = PatientDraws(marked, plan_of(private(experiment)), DENOISING, torch.Generator().manual_seed(0), CPU)
    trains = np.flatnonzero(~cohort.held_out)
    rows, times = [], []
    for _ in range(400):
        x0, noise, timesteps = draw(np.array([2, 0]))
        assert x0.shape == noise.shape == (2, 3, 1, 2, 2)
        rows.append(x0[:, :, 0, 0, 0].long())
        times.append(timesteps)
    drawn, timesteps = torch.stack(rows), torch.stack(times)
    assert set(cohort.patient[drawn[:, 0].unique().numpy()]) == {trains[2]}
    assert set(cohort.patient[drawn[:, 1].unique().numpy()]) == {trains[0]}
    share = torch.bincount(drawn[:, 0].flatten() - 4 * int(trains[2]), minlength=4) / drawn[:, 0].numel()
    assert (share - 0.25).abs().max() < 0.05
    assert timesteps.min() >= 0
    assert timesteps.max() < 1000
    within = timesteps.sort(dim=2).values - torch.arange(3) * 1000 / 3
    assert -1 < float(within.min()) <= float(within.max()) <= 1000 / 3, "one timestep in each third of the schedule"
    assert abs(float(timesteps.float().mean()) - 500) < 15


@settings(max_examples=30, deadline=None)
@given(draws=st.integers(1, 9), images=st.integers(1, 5))
def test_any_number_of_draws_works_with_any_number_of_images(draws: int, images: int) -> None:
    cohort = Cohort(
        images=np.zeros((2 * images, 1, 2, 2), np.float32),
        patient=np.repeat(np.arange(2, dtype=np.int32), images),
        pseudonyms=("a", "b"),
        held_out=np.array([True, False]),
        manifest_sha256="0" * 64,
    )
    wanted = DPConfig(
        delta=0.1,
        clip_norm=1,
        sampling_rate=1,
        steps_per_round=1,
        rounds=1,
        draws_per_patient=draws,
        noise_multiplier=1,
    )
    draw = PatientDraws(cohort, calibrate(wanted, patients=2), DENOISING, torch.Generator().manual_seed(0), CPU)
    x0, _, timesteps = draw(np.array([0]))
    assert x0.shape[:2] == timesteps.shape == (1, draws)
    assert int(timesteps.max()) < 1000


# ---- the mean image before training


def test_mean_image_are_the_mean_of_patients_and_their_noise_is_the_plans(
    experiment: ExperimentConfig, cohort: Cohort
) -> None:
    config = private(experiment, mean_image=MEAN_IMAGE)
    plan = plan_of(config)
    trains = np.flatnonzero(~cohort.held_out)
    means = cohort.images.reshape(6, 4, 1, 16, 16)[trains].mean(axis=1) + 1
    norms = np.linalg.norm(means.reshape(4, -1), axis=1)
    assert (norms > 10.0).any()
    expected = (means * np.minimum(1, 10.0 / norms)[:, None, None, None]).sum(0) / 4
    noisy = torch.stack([release_mean_image(cohort, MEAN_IMAGE, plan) for _ in range(120)])
    assert noisy.shape[1:] == (1, 16, 16)
    std = 4.0 * 10.0 / 4
    error = (noisy - torch.from_numpy(expected)) / std
    assert abs(float(error.std()) - 1) < 0.02
    assert abs(float(error.mean())) < 4 / math.sqrt(error.numel())


@settings(max_examples=25, deadline=None)
@given(images=st.integers(1, 9), value=st.sampled_from([-1.0, 0.3, 1.0, 1e6, float("nan")]))
def test_one_patient_moves_the_released_sum_by_at_most_the_clip_norm(images: int, value: float) -> None:
    config = MeanImageConfig(clip_norm=2.0, noise_multiplier=1.0)
    others = np.random.default_rng(0).uniform(-1, 1, (8, 1, 4, 4)).astype(np.float32)
    added = np.full((images, 1, 4, 4), value, np.float32)
    cohorts = [
        Cohort(
            images=pixels,
            patient=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            pseudonyms=tuple(map(str, range(len(counts)))),
            held_out=np.array([True] + [False] * (len(counts) - 1)),
            manifest_sha256="0" * 64,
        )
        for pixels, counts in ((others, (2, 3, 3)), (np.concatenate([others, added]), (2, 3, 3, images)))
    ]
    wanted = DPConfig(
        delta=0.1,
        clip_norm=1,
        sampling_rate=1,
        steps_per_round=1,
        rounds=1,
        noise_multiplier=1,
        release_noise_multiplier=1,
    )
    plan = calibrate(wanted, patients=3)
    one, other = (release_mean_image(c, config, plan, randomness=SeededRandomnessForTests(5)) for c in cohorts)
    assert float((one - other).double().norm()) * 3 <= 2.0 + 1e-5
