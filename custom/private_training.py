"""One local round under patient-level differential privacy, and what may be released before training.

The plan decides sampling, clipping and noise (:mod:`privacy.dpsgd`); this file only says what a patient's draws and
loss are. Nothing here but ``difference`` and the mean image is meant to leave the site.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from custom.config import ExperimentConfig
from custom.diffusion.objective import Objective
from custom.privacy_config import MeanImageConfig
from custom.stages import stage_objective, stage_of
from custom.strict import require
from custom.training import TrainingDiverged, differences, named_tensors, restore_optimizer, stored_optimizer
from medical_data.cohort import Cohort
from privacy.accounting import SampledGaussian
from privacy.dpsgd import PatientSGD, noisy_clipped_sum, release_share
from privacy.plan import DPPlan
from privacy.rng import Randomness, SecureRandomness

CLIP_NORM = "clip_norm"  # of the next step, in the site's state


@dataclass(frozen=True, kw_only=True, eq=False)
class PrivateUpdate:
    """Result of one local round.

    Attributes:
        difference: local minus global weights of the round's stage, float32 on the CPU, by name; zero where nothing is
            trained.
        state: for the site's own state: AdamW's moments and step counts by name, and an adaptive clip norm.
        event: the steps that ran, for the ledger.
    """

    difference: dict[str, Tensor]
    state: dict[str, Tensor]
    event: SampledGaussian


def train_private_round(
    *,
    cohort: Cohort,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    config: ExperimentConfig,
    plan: DPPlan,
    round_number: int,
    device: torch.device,
    patients_in_memory: int,
    progress: Callable[[int], None] | None = None,
    randomness: Randomness | None = None,
    draws_seed: int | None = None,
) -> PrivateUpdate:
    """Train the global weights on one site's training patients with DP-SGD.

    Args:
        cohort: the site's images, or their latents where the round's stage denoises these.
        weights: global weights by name.
        state: as :attr:`PrivateUpdate.state` of the site's last charged round of this stage; empty in its first.
        config: the experiment, with a privacy block.
        plan: its calibrated plan.
        round_number: from 0.
        device: where to compute.
        patients_in_memory: patients whose gradients are held at once; changes memory and time, not the result.
        progress: called with the steps done after each step.
        randomness: of sampling and noise; None for a new secure stream. Another one is for tests.
        draws_seed: of the choice of slices, timesteps and diffusion noise, on which the guarantee does not rest;
            None for a fresh one.

    Raises:
        TrainingDiverged: weights that are not finite.
        ConfigError: patterns of trained parameters that fit none.
    """
    assert config.privacy is not None  # noqa: S101 - it has a plan
    stage = stage_of(config, round_number)
    objective = stage_objective(config, stage, weights, device)
    network = objective.network.train()
    parameters = trained_parameters(network, config.privacy.trained)
    training = stage.training
    optimizer = torch.optim.AdamW(parameters.values(), lr=training.learning_rate, weight_decay=training.weight_decay)
    restore_optimizer(optimizer, parameters, {name: t for name, t in state.items() if name != CLIP_NORM})
    sgd = PatientSGD(
        parameters=parameters,
        optimizer=optimizer,
        loss=patient_loss(objective),
        plan=plan,
        patients=len(training_patients(cohort)),
        chunk_size=patients_in_memory,
        clip_norm=float(state[CLIP_NORM]) if CLIP_NORM in state else None,
        randomness=randomness,
    )
    seed = secrets.randbits(63) if draws_seed is None else draws_seed
    draw = PatientDraws(cohort, plan, objective, torch.Generator().manual_seed(seed), device)
    for step in range(plan.config.steps_per_round):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate(stage.span(round_number).first + step)
        sgd.step(draw)
        if progress is not None:
            progress(step + 1)
    difference = differences(named_tensors(network, stage), weights)
    if not all(bool(tensor.isfinite().all()) for tensor in difference.values()):
        raise TrainingDiverged("weights = not finite: lower training.learning_rate")
    (event,) = sgd.events
    after = stored_optimizer(optimizer, parameters)
    if plan.config.adaptive_clipping is not None:
        after[CLIP_NORM] = torch.tensor(sgd.clip_norm, dtype=torch.float64)
    return PrivateUpdate(difference=difference, state=after, event=event)


def shared_gradient(
    *,
    cohort: Cohort,
    weights: Mapping[str, Tensor],
    config: ExperimentConfig,
    plan: DPPlan,
    round_number: int,
    device: torch.device,
    patients_in_memory: int,
    sites: int,
    randomness: Randomness | None = None,
    draws_seed: int | None = None,
) -> NDArray[np.int64]:
    """One site's part of one step with shared noise: its patients' clipped gradients, summed, with its share.

    Args:
        cohort, weights, config, plan, round_number, device, patients_in_memory, randomness, draws_seed: as in
            :func:`train_private_round`.
        sites: on the roster of the sum.

    Raises:
        ConfigError: patterns of trained parameters that fit none.

    Returns:
        int64 [d], as :meth:`privacy.dpsgd.PatientSGD.share`; leaves under secure aggregation only.
    """
    assert config.privacy is not None  # noqa: S101 - it has a plan
    objective = stage_objective(config, stage_of(config, round_number), weights, device)
    parameters = trained_parameters(objective.network.train(), config.privacy.trained)
    sgd = PatientSGD(
        parameters=parameters,
        optimizer=torch.optim.SGD(parameters.values()),  # makes no step
        loss=patient_loss(objective),
        plan=plan,
        patients=len(training_patients(cohort)),
        chunk_size=patients_in_memory,
        randomness=randomness,
    )
    seed = secrets.randbits(63) if draws_seed is None else draws_seed
    draw = PatientDraws(cohort, plan, objective, torch.Generator().manual_seed(seed), device)
    return sgd.share(draw, sites=sites)


def trained_parameters(network: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters whose names fit a pattern (``fnmatch``), by name; all others are made constants.

    Raises:
        ConfigError: a pattern that fits no parameter.
    """
    named = dict(network.named_parameters())
    for pattern in patterns:
        fits = any(fnmatchcase(name, pattern) for name in named)
        require(fits, argument="privacy.trained", value=pattern, remedy=f"fits no parameter such as {min(named)!r}")
    trained = {name: p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
    return trained


def patient_loss(objective: Objective) -> Callable[..., Tensor]:
    """The loss of one patient's draws, [K], as :class:`privacy.dpsgd.PatientSGD` calls it."""

    def loss(parameters: Mapping[str, Tensor], x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        def call(**inputs: Tensor) -> Any:
            return functional_call(objective.network, dict(parameters), (), inputs)

        return objective.loss(call, x0, noise, timesteps)

    return loss


def training_patients(cohort: Cohort) -> NDArray[np.int64]:
    """Indices of the patients that train, ascending."""
    return np.flatnonzero(~cohort.held_out)


class PatientDraws:
    """Draws (image, noise, timestep) for sampled patients, each from the patient's own images only.

    The K timesteps of a patient are spread over K equal parts of the schedule, and the K images over K equal parts of
    the patient's images, matched at random: each draw is uniform, and their mean varies less.

    Args:
        cohort: the site's images.
        plan: has K.
        objective: for which they are.
        generator: of everything drawn here.
        device: where the draws go.
    """

    def __init__(
        self, cohort: Cohort, plan: DPPlan, objective: Objective, generator: torch.Generator, device: torch.device
    ) -> None:
        self._images = cohort.images
        self._rows = [np.flatnonzero(cohort.patient == patient) for patient in training_patients(cohort)]
        self._draws = plan.config.draws_per_patient
        self._objective = objective
        self._generator = generator
        self._device = device

    def __call__(self, patients: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Images [b, K, C, *spatial], standard normal noise, timesteps int64 [b, K].

        Args:
            patients: places in the list of training patients, [b].
        """
        places = self._spread(len(patients))
        rows = np.stack(
            [self._rows[p][(u * len(self._rows[p])).astype(int)] for p, u in zip(patients, places.numpy(), strict=True)]
        )
        x0 = torch.from_numpy(self._images[rows])
        shape = (*x0.shape[:2], *self._objective.noise_shape(x0.shape[2:]))
        noise = torch.randn(shape, generator=self._generator)
        timesteps = (self._spread(len(patients)) * self._objective.timesteps).long()
        return x0.to(self._device), noise.to(self._device), timesteps.to(self._device)

    def _spread(self, patients: int) -> Tensor:
        """Numbers in [0, 1), float64 [patients, K]: one in each of K equal parts, in random order."""
        shape = (patients, self._draws)
        order = torch.rand(shape, generator=self._generator).argsort(dim=1)
        inside = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return ((order + inside) / self._draws).clamp(max=math.nextafter(1.0, 0.0))


def release_mean_image(
    cohort: Cohort, config: MeanImageConfig, plan: DPPlan, *, randomness: Randomness | None = None
) -> Tensor:
    """The noisy mean of the training patients' own mean images, with air at 0.

    A patient counts once, with at most ``clip_norm``, however many images there are. Whoever calls this charges
    ``plan.release_event`` before the result leaves.

    Args:
        cohort: the site's images.
        config: the clip norm.
        plan: has N, by which the sum is divided.
        randomness: of the noise; None for a new secure stream.

    Returns:
        float32 [1, *spatial].
    """
    total = noisy_clipped_sum(
        _mean_images(cohort),
        clip_norm=config.clip_norm,
        noise_multiplier=config.noise_multiplier,
        randomness=SecureRandomness() if randomness is None else randomness,
    )
    return (total / plan.patients).float()


def shared_mean_image(
    cohort: Cohort, config: MeanImageConfig, plan: DPPlan, *, sites: int, randomness: Randomness | None = None
) -> NDArray[np.int64]:
    """One site's part of the noisy mean over all sites' patients, as integers with its share of the noise.

    Args:
        cohort, config, plan, randomness: as in :func:`release_mean_image`.
        sites: on the roster of the sum.

    Returns:
        int64 [pixels], as :func:`privacy.dpsgd.release_share`; leaves under secure aggregation only.
    """
    return release_share(
        _mean_images(cohort),
        clip_norm=config.clip_norm,
        plan=plan,
        sites=sites,
        randomness=SecureRandomness() if randomness is None else randomness,
    )


def _mean_images(cohort: Cohort) -> Tensor:
    """Each training patient's own mean image with air at 0, [P, 1, *spatial]."""
    means = [cohort.images[cohort.patient == p].mean(axis=0) + 1 for p in training_patients(cohort)]
    return torch.from_numpy(np.stack(means))
