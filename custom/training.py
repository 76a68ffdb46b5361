"""One local round: a site's cohort and the global weights become a weight difference and what may be reported."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from custom.config import ExperimentConfig
from custom.device import images_at_once, mixed_precision
from custom.diffusion.checkpointing import checkpointed
from custom.diffusion.objective import Objective
from custom.site_file import HardwareConfig, Precision
from custom.stages import Stage, stage_objective, stage_of
from medical_data.cohort import Cohort

HELD_OUT_IMAGES = 64
HELD_OUT_BATCH = 16
HELD_OUT_SEED = 20_201_219  # the same noise in every round and at every site, so that losses can be compared

Progress = Callable[[int, float], None]


class TrainingDiverged(RuntimeError):
    """The loss is not finite any more; nothing leaves the site."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalUpdate:
    """Result of one local round.

    Attributes:
        difference: local minus global weights of the round's stage, float32 on the CPU, by name.
        optimizer: AdamW's moments and step counts by name, for the site's own state.
        metrics: ``train_loss`` (mean over the round), ``held_out_loss`` (of the global weights that came in, on the
            site's held-out patients) and ``seconds``.
    """

    difference: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    metrics: dict[str, float]


def train_round(
    *,
    cohort: Cohort,
    weights: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    config: ExperimentConfig,
    site: str,
    round_number: int,
    device: torch.device,
    hardware: HardwareConfig | None = None,
    progress: Progress | None = None,
) -> LocalUpdate:
    """Train the global weights on one site's training patients.

    The randomness of a round is a function of (seed, site, round): a site whose process is new in every round trains
    as one whose process lives on.

    Args:
        cohort: the site's images, or their latents where the round's stage denoises these.
        weights: global weights by name.
        optimizer_state: as :attr:`LocalUpdate.optimizer` of the site's last round of this stage; empty in its first.
        config: the experiment.
        site: the site's name.
        round_number: from 0.
        device: where to compute.
        hardware: the site's, for checkpointing and precision; None for the defaults.
        progress: called with (steps done, mean loss so far) after each step.

    Raises:
        TrainingDiverged: a loss that is not finite.
    """
    start = time.monotonic()
    hardware = HardwareConfig() if hardware is None else hardware
    stage = stage_of(config, round_number)
    objective = stage_objective(config, stage, weights, device)
    network = objective.network
    held_out = held_out_loss(objective, cohort, device)

    network.train()
    if hardware.checkpointing:
        checkpointed(network)
    training = stage.training
    assert training.batch_size is not None  # noqa: S101 - only a job with differential privacy has none
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    restore_optimizer(optimizer, parameters, optimizer_state)
    generator = torch.Generator().manual_seed(_derived_seed(config.seed, site, round_number))
    draw = _PatientSampler(cohort, generator)
    total = torch.zeros((), device=device)
    for step in range(training.steps_per_round):
        rate = learning_rate(stage, round_number, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x0 = draw(training.batch_size).to(device)
        total += training_step(
            objective,
            optimizer,
            x0,
            generator,
            gradient_clip=training.gradient_clip,
            precision=hardware.precision,
        )
        if progress is not None:
            progress(step + 1, float(total) / (step + 1))
    train_loss = float(total) / training.steps_per_round
    if not math.isfinite(train_loss):
        raise TrainingDiverged(f"train_loss = {train_loss}: lower training.learning_rate or training.gradient_clip")
    return LocalUpdate(
        difference=differences(network, stage, weights),
        optimizer=stored_optimizer(optimizer, parameters),
        metrics={"train_loss": train_loss, "held_out_loss": held_out, "seconds": time.monotonic() - start},
    )


def training_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    x0: Tensor,
    generator: torch.Generator,
    *,
    gradient_clip: float | None,
    precision: Precision = "auto",
) -> Tensor:
    """One optimizer step on the mean loss of images [B, C, *spatial], with fresh noise and timesteps; returns the loss.

    Args:
        objective: its network is on the images' device.
        optimizer: of the network.
        x0: images in [-1, 1], or latents.
        generator: of noise and timesteps, on the CPU.
        gradient_clip: bound on the L2 norm of the gradient, or None.
        precision: of the arithmetic.
    """
    network = objective.network
    noise = torch.randn((len(x0), *objective.noise_shape(x0.shape[1:])), generator=generator).to(x0.device)
    timesteps = torch.randint(objective.timesteps, (len(x0),), generator=generator).to(x0.device)
    with mixed_precision(x0.device, precision):
        loss = objective.loss(network, x0, noise, timesteps).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if gradient_clip is not None:
        nn.utils.clip_grad_norm_(network.parameters(), gradient_clip)
    optimizer.step()
    return loss.detach()


def differences(network: nn.Module, stage: Stage, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A trained network minus the weights it began with, on the CPU, by their names in messages."""
    trained = {stage.prefix + name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    return {name: tensor - weights[name] for name, tensor in trained.items()}


def learning_rate(stage: Stage, round_number: int, step: int) -> float:
    """Linear warm-up, then a cosine to zero over the stage's rounds (arXiv:1608.03983, eq. 5 without restarts).

    Args:
        stage: of the round.
        round_number: of the run.
        step: of the round, from 0.
    """
    training = stage.training
    step += (round_number - stage.first) * training.steps_per_round
    warm_up = min(1.0, (step + 1) / (training.warmup_steps + 1))
    return training.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * step / stage.total_steps))


@torch.no_grad()
def held_out_loss(objective: Objective, cohort: Cohort, device: torch.device) -> float:
    """Loss on the site's held-out patients.

    Images spread evenly over the patients, one timestep each, spread evenly over the schedule, and noise from a
    fixed seed: a low-variance figure that is comparable between rounds of a stage.
    """
    objective.network.eval()
    rows = cohort.rows("held_out")
    rows = rows[np.linspace(0, len(rows) - 1, min(HELD_OUT_IMAGES, len(rows))).round().astype(int)]
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    x0 = torch.from_numpy(cohort.images[rows])
    noise = torch.randn((len(x0), *objective.noise_shape(x0.shape[1:])), generator=generator)
    spread = (torch.arange(len(x0)) + 0.5) / len(x0)
    timesteps = (spread * objective.timesteps).long()[torch.randperm(len(x0), generator=generator)]
    batch = min(HELD_OUT_BATCH, images_at_once(x0.shape[1:]))
    losses = [
        objective.loss(
            objective.network, *(tensor[first : first + batch].to(device) for tensor in (x0, noise, timesteps))
        )
        for first in range(0, len(x0), batch)
    ]
    return float(torch.cat(losses).mean())


class _PatientSampler:
    """Draws training images: a patient uniformly, then one of the patient's images uniformly."""

    def __init__(self, cohort: Cohort, generator: torch.Generator) -> None:
        rows = cohort.rows("train")
        patient_of_row = cohort.patient[rows]
        self._images = cohort.images
        self._generator = generator
        self._rows_of_patient: list[NDArray[np.int64]] = [
            rows[patient_of_row == patient] for patient in np.unique(patient_of_row)
        ]

    def __call__(self, count: int) -> Tensor:
        patients = torch.randint(len(self._rows_of_patient), (count,), generator=self._generator).tolist()
        places = torch.rand(count, generator=self._generator).tolist()
        rows = [
            candidates[int(place * len(candidates))]
            for candidates, place in zip((self._rows_of_patient[p] for p in patients), places, strict=True)
        ]
        return torch.from_numpy(self._images[rows])


def _derived_seed(seed: int, site: str, round_number: int) -> int:
    digest = hashlib.sha256(f"{seed}\0{site}\0{round_number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stored_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Moments and step counts as ``<parameter>/<moment>``, on the CPU."""
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`stored_optimizer` gave."""
    for key, value in stored.items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][moment] = value.to(parameter.device).clone()
