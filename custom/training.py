"""One local round: a site's cohort and the global weights become a weight difference and what may be reported."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from custom.config import ExperimentConfig
from custom.device import images_at_once, mixed_precision
from custom.diffusion.checkpointing import checkpointed
from custom.diffusion.objective import Objective
from custom.round_parts import CONTROL, own_tensors, round_parts
from custom.site_file import HardwareConfig, Precision
from custom.stages import Stage, stage_objective, stage_of
from medical_data.cohort import Cohort

HELD_OUT_IMAGES = 64
HELD_OUT_BATCH = 16
HELD_OUT_SEED = 20_201_219  # the same noise in every round and at every site, so that losses can be compared

Progress = Callable[[int, float], None]
Section = Literal["own", "control", "lost"]
SECTIONS: tuple[Section, ...] = ("own", "control", "lost")


class TrainingDiverged(RuntimeError):
    """The loss is not finite any more; nothing leaves the site."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalUpdate:
    """Result of one local round.

    Attributes:
        difference: local minus global weights of what the round shares, float32 on the CPU, by name; beside them with
            SCAFFOLD the changes of the site's variates, in units of weights.
        state: for the site's own state: see :func:`section`.
        metrics: ``train_loss`` (mean over the round), ``held_out_loss`` (of the global weights that came in, on the
            site's held-out patients) and ``seconds``.
    """

    difference: dict[str, Tensor]
    state: dict[str, Tensor]
    metrics: dict[str, float]


def section(state: Mapping[str, Tensor], name: Section) -> dict[str, Tensor]:
    """A part of a site's state by the names of the model's tensors.

    Args:
        state: what a site keeps between rounds: AdamW's moments as ``<tensor>/<moment>`` and these parts as
            ``<part>/<tensor>``.
        name: ``own``: the tensors of its personal model; ``control``: SCAFFOLD's variates; ``lost``: what updates of
            few bits have not said yet.
    """
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in state.items() if key.startswith(f"{name}/")}


def as_section(tensors: Mapping[str, Tensor], name: Section) -> dict[str, Tensor]:
    """The inverse of :func:`section`."""
    return {f"{name}/{key}": tensor for key, tensor in tensors.items()}


def moments(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AdamW's moments in a site's state."""
    return {key: tensor for key, tensor in state.items() if key.partition("/")[0] not in SECTIONS}


def train_round(
    *,
    cohort: Cohort,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
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
        weights: global weights by name, with SCAFFOLD beside them the server's variates.
        state: as :attr:`LocalUpdate.state` of the site's last round of this stage; empty in its first.
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
    stage, parts = stage_of(config, round_number), round_parts(config, round_number)
    span = stage.span(round_number)
    shared = {name: tensor for name, tensor in weights.items() if not name.startswith(CONTROL)}
    kept = {name: tensor for name, tensor in section(state, "own").items() if name in parts.resumed}
    own = {**own_tensors(config, shared, round_number), **kept}
    objective = stage_objective(config, stage, {**shared, **own}, device)
    whole = stage_objective(config, stage, shared, device) if own else objective
    held_out = held_out_loss(whole, cohort, device)

    network = objective.network.train()
    if hardware.checkpointing:
        checkpointed(network)
    training = stage.training
    assert training.batch_size is not None  # noqa: S101 - only a job with differential privacy has none
    named = named_tensors(network, stage)
    trained = {name: named[name] for name in (*parts.shared, *parts.own)}
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    before = moments(state)
    restore_optimizer(optimizer, trained, {k: t for k, t in before.items() if k.rpartition("/")[0] in trained})
    drift = _Drift(weights, state, {name: trained[name] for name in parts.shared}, config)
    anchors = [(trained[name], weights[name].to(device)) for name in parts.shared if training.proximal]
    generator = torch.Generator().manual_seed(_derived_seed(config.seed, site, round_number))
    draw = PatientSampler(cohort, generator)
    total = torch.zeros((), device=device)
    for step in range(span.steps):
        rate = stage.learning_rate(span.first + step)
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
            proximal=training.proximal,
            anchors=anchors,
        )
        drift.correct(rate)
        if progress is not None:
            progress(step + 1, float(total) / (step + 1))
    train_loss = float(total) / span.steps
    if not math.isfinite(train_loss):
        raise TrainingDiverged(f"train_loss = {train_loss}: lower training.learning_rate or training.gradient_clip")
    difference = {name: tensor for name, tensor in differences(named, weights).items() if name in parts.shared}
    variates, changes = drift.settled(difference)
    return LocalUpdate(
        difference=difference | {CONTROL + name: tensor for name, tensor in changes.items()},
        state={
            **before,
            **stored_optimizer(optimizer, trained),
            **as_section({n: named[n].detach().cpu() for n in parts.own}, "own"),
            **as_section({**section(state, "control"), **variates}, "control"),
            **as_section(section(state, "lost"), "lost"),
        },
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
    proximal: float = 0.0,
    anchors: Sequence[tuple[nn.Parameter, Tensor]] = (),
) -> Tensor:
    """One optimizer step on the mean loss of images [B, C, *spatial], with fresh noise and timesteps; returns the loss.

    Args:
        objective: its network is on the images' device.
        optimizer: of the network.
        x0: images in [-1, 1], or latents.
        generator: of noise and timesteps, on the CPU.
        gradient_clip: bound on the L2 norm of the gradient, or None.
        precision: of the arithmetic.
        proximal: μ of FedProx, whose term μ/2 ‖w - w_global‖² joins the loss (arXiv:1812.06127, eq. 2).
        anchors: parameters with their global weights.
    """
    network = objective.network
    noise = torch.randn((len(x0), *objective.noise_shape(x0.shape[1:])), generator=generator).to(x0.device)
    timesteps = torch.randint(objective.timesteps, (len(x0),), generator=generator).to(x0.device)
    with mixed_precision(x0.device, precision):
        loss = objective.loss(network, x0, noise, timesteps).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    for parameter, anchor in anchors:
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchor, alpha=proximal)
    if gradient_clip is not None:
        nn.utils.clip_grad_norm_(network.parameters(), gradient_clip)
    optimizer.step()
    return loss.detach()


class _Drift:
    """SCAFFOLD (arXiv:1910.06378, alg. 1, option II): each step is corrected by c - c_i, and c_i follows the drift.

    AdamW's steps, not gradients, are corrected and measured, so that both have one unit whatever the optimizer is;
    NVFlare's PTScaffoldHelper does likewise. Does nothing in a job without control variates.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        config: ExperimentConfig,
    ) -> None:
        self._parameters = parameters if config.federation.control_variates else {}
        own = section(state, "control")
        self._own = {name: own.get(name, torch.zeros_like(weights[name])) for name in self._parameters}
        self._corrections = {name: weights[CONTROL + name] - self._own[name] for name in self._parameters}
        self._rates = 0.0  # Σ η

    @torch.no_grad()
    def correct(self, rate: float) -> None:
        """After a step with a learning rate: w ← w - η (c - c_i)."""
        self._rates += rate
        for name, parameter in self._parameters.items():
            parameter.sub_(self._corrections[name].to(parameter.device), alpha=rate)

    def settled(self, difference: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """After the round: c_i⁺ = c_i - c - Δw / Σ η, and (c_i⁺ - c_i) Σ η, which is what leaves."""
        new = {n: -correction - difference[n] / self._rates for n, correction in self._corrections.items()}
        return new, {name: (variate - self._own[name]) * self._rates for name, variate in new.items()}


def named_tensors(network: nn.Module, stage: Stage) -> dict[str, nn.Parameter]:
    """A network's parameters, which are all that it has, by their names in messages."""
    return {stage.prefix + name: parameter for name, parameter in network.named_parameters()}


def differences(named: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained parameters minus the weights they began with, on the CPU; those without such weights are left out."""
    return {n: p.detach().cpu() - weights[n] for n, p in named.items() if n in weights}


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


class PatientSampler:
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
        """So many images, [count, C, *spatial]."""
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
