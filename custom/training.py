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
from custom.device import mixed_precision
from custom.diffusion.loss import denoising_loss
from custom.diffusion.networks import build_network
from custom.diffusion.schedule import Schedule, build_schedule
from medical_data.cohort import Cohort

HELD_OUT_IMAGES = 64
HELD_OUT_SEED = 20_201_219  # the same noise in every round and at every site, so that losses can be compared

Progress = Callable[[int, float], None]


class TrainingDiverged(RuntimeError):
    """The loss is not finite any more; nothing leaves the site."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalUpdate:
    """Result of one local round.

    Attributes:
        difference: local minus global weights, float32 on the CPU, by name.
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
    progress: Progress | None = None,
) -> LocalUpdate:
    """Train the global weights on one site's training patients.

    The randomness of a round is a function of (seed, site, round): a site whose process is new in every round trains
    as one whose process lives on.

    Args:
        cohort: the site's images.
        weights: global weights by name.
        optimizer_state: as :attr:`LocalUpdate.optimizer` of the site's last round; empty in its first.
        config: the experiment.
        site: the site's name.
        round_number: from 0.
        device: where to compute.
        progress: called with (steps done, mean loss so far) after each step.

    Raises:
        TrainingDiverged: a loss that is not finite.
    """
    start = time.monotonic()
    schedule = build_schedule(config.schedule)
    network = build_network(config.network, spatial_dims=config.preprocess.spatial_dims).to(device)
    network.load_state_dict(dict(weights))
    held_out = held_out_loss(network, schedule, cohort, device)

    network.train()
    training = config.training
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
        rate = learning_rate(config, round_number * training.steps_per_round + step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x0 = draw(training.batch_size).to(device)
        total += denoising_step(network, schedule, optimizer, x0, generator, gradient_clip=training.gradient_clip)
        if progress is not None:
            progress(step + 1, float(total) / (step + 1))
    train_loss = float(total) / training.steps_per_round
    if not math.isfinite(train_loss):
        raise TrainingDiverged(f"train_loss = {train_loss}: lower training.learning_rate or training.gradient_clip")
    return LocalUpdate(
        difference={name: tensor.detach().cpu() - weights[name] for name, tensor in network.state_dict().items()},
        optimizer=stored_optimizer(optimizer, parameters),
        metrics={"train_loss": train_loss, "held_out_loss": held_out, "seconds": time.monotonic() - start},
    )


def denoising_step(
    network: nn.Module,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    x0: Tensor,
    generator: torch.Generator,
    *,
    gradient_clip: float | None,
) -> Tensor:
    """One optimizer step on the mean loss of images [B, 1, *spatial], with fresh noise and timesteps; returns the loss.

    Args:
        network: on the images' device.
        schedule: forward process and prediction type.
        optimizer: of the network.
        x0: images in [-1, 1].
        generator: of noise and timesteps, on the CPU.
        gradient_clip: bound on the L2 norm of the gradient, or None.
    """
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    timesteps = torch.randint(schedule.config.timesteps, (len(x0),), generator=generator).to(x0.device)
    with mixed_precision(x0.device):
        loss = denoising_loss(network, schedule, x0, noise, timesteps).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if gradient_clip is not None:
        nn.utils.clip_grad_norm_(network.parameters(), gradient_clip)
    optimizer.step()
    return loss.detach()


def learning_rate(config: ExperimentConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero over all rounds (arXiv:1608.03983, eq. 5 without restarts)."""
    training = config.training
    warm_up = min(1.0, (step + 1) / (training.warmup_steps + 1))
    return training.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * step / config.total_steps))


@torch.no_grad()
def held_out_loss(network: nn.Module, schedule: Schedule, cohort: Cohort, device: torch.device) -> float:
    """Denoising loss on the site's held-out patients.

    Images spread evenly over the patients, one timestep each, spread evenly over the schedule, and noise from a
    fixed seed: a low-variance figure that is comparable between rounds.
    """
    network.eval()
    rows = cohort.rows("held_out")
    rows = rows[np.linspace(0, len(rows) - 1, min(HELD_OUT_IMAGES, len(rows))).round().astype(int)]
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    x0 = torch.from_numpy(cohort.images[rows])
    noise = torch.randn(x0.shape, generator=generator)
    spread = (torch.arange(len(x0)) + 0.5) / len(x0)
    timesteps = (spread * schedule.config.timesteps).long()[torch.randperm(len(x0), generator=generator)]
    losses = [
        denoising_loss(network, schedule, *(tensor[first : first + 16].to(device) for tensor in (x0, noise, timesteps)))
        for first in range(0, len(x0), 16)
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
