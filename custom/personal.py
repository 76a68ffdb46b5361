"""A site's own model after the last round, and what the site would have come to alone. Neither leaves the site."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from custom.config import ExperimentConfig
from custom.federation_config import FederationConfig
from custom.round_parts import round_parts
from custom.site_file import HardwareConfig
from custom.stages import PREFIX, fresh_weights, stage_objective, stages
from custom.training import PatientSampler, Progress, named_tensors, section, train_round, training_step
from medical_data.cohort import Cohort

# Of the run's peak learning rate: the model is nearly there.
FINE_TUNE_RATE = 0.1
# Images per step where the job has none, because differential privacy samples its own.
BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteModels:
    """Weights by name.

    Attributes:
        personal: the global model with the site's own tensors in it, fine-tuned on the site's patients.
        local: fresh weights after as many steps on the site's patients alone as the personal model has seen of a site
            that takes part in every round.
    """

    personal: dict[str, Tensor]
    local: dict[str, Tensor]


def without_guarantee(config: ExperimentConfig) -> ExperimentConfig:
    """What a site's own model says of how it was trained: its last steps had no noise, whatever the job's had.

    A model file's differential privacy is what audits, model cards and releases claim of it.
    """
    if config.privacy is None:
        return config
    autoencoder = config.autoencoder
    if autoencoder is not None and autoencoder.training is not None:
        autoencoder = replace(autoencoder, training=replace(autoencoder.training, batch_size=BATCH_SIZE))
    training = replace(config.training, batch_size=BATCH_SIZE)
    return replace(config, privacy=None, training=training, autoencoder=autoencoder)


def site_models(
    *,
    cohort: Cohort,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    config: ExperimentConfig,
    site: str,
    device: torch.device,
    hardware: HardwareConfig,
    progress: Callable[[str, int], Progress] | None = None,
) -> SiteModels:
    """Fine-tune the finished model on one site's training patients, and train another from nothing.

    Args:
        cohort: the site's images, or their latents where these are denoised.
        weights: of the finished global model by name.
        state: what the site has kept of its last round.
        config: the experiment, with a personal block.
        site: the site's name.
        device: where to compute.
        hardware: the site's.
        progress: gives, from what is trained and its number of steps, what is called after each step.
    """
    assert config.personal is not None  # noqa: S101 - whoever calls this has looked
    tune_steps, last = config.personal.fine_tune_steps, config.federation.rounds - 1
    own = {name: t for name, t in section(state, "own").items() if name in round_parts(config, last).personal}
    alone_steps = stages(config)[-1].total_steps + tune_steps
    alone = _alone(config, alone_steps)
    autoencoder = {name: tensor for name, tensor in weights.items() if name.startswith(PREFIX)}
    start = {**fresh_weights(alone, seed=config.seed), **autoencoder}
    update = train_round(
        cohort=cohort,
        weights=start,
        state={},
        config=alone,
        site=site,
        round_number=0,
        device=device,
        hardware=hardware,
        progress=None if progress is None else progress("model of this site alone", alone_steps),
    )
    return SiteModels(
        personal=fine_tuned(
            cohort=cohort,
            weights={**weights, **own},
            config=config,
            steps=tune_steps,
            device=device,
            hardware=hardware,
            progress=None if progress is None else progress("personal model", tune_steps),
        ),
        local={**start, **{name: start[name] + delta for name, delta in update.difference.items()}},
    )


def fine_tuned(
    *,
    cohort: Cohort,
    weights: Mapping[str, Tensor],
    config: ExperimentConfig,
    steps: int,
    device: torch.device,
    hardware: HardwareConfig,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The denoiser trained on with a learning rate that falls as a cosine from a tenth of the run's peak.

    Args:
        cohort: the site's images, or their latents where these are denoised.
        weights: to begin with, by name; a split denoiser's with the names of both.
        config: the experiment.
        steps: gradient steps.
        device: where to compute.
        hardware: the site's.
        progress: called with (steps done, mean loss so far) after each step.
    """
    stage = stages(config)[-1]
    training = stage.training
    objective = stage_objective(config, stage, weights, device)
    named = named_tensors(objective.network.train(), stage)
    optimizer = torch.optim.AdamW(named.values(), weight_decay=training.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    draw = PatientSampler(cohort, generator)
    size = BATCH_SIZE if training.batch_size is None else training.batch_size
    total = torch.zeros((), device=device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * FINE_TUNE_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        total += training_step(
            objective,
            optimizer,
            draw(size).to(device),
            generator,
            gradient_clip=training.gradient_clip,
            precision=hardware.precision,
        )
        if progress is not None:
            progress(step + 1, float(total) / (step + 1))
    return {**weights, **{name: parameter.detach().cpu() for name, parameter in named.items()}}


def _alone(config: ExperimentConfig, steps: int) -> ExperimentConfig:
    """One round of so many steps, with nothing in it of a federation."""
    config = without_guarantee(config)
    autoencoder = config.autoencoder
    if autoencoder is not None:
        autoencoder = replace(autoencoder, rounds=0, frozen="as-it-is", training=None)
    return replace(
        config,
        training=replace(config.training, steps_per_round=steps, proximal=0.0, local_epochs=None),
        federation=FederationConfig(rounds=1, min_responses=1),
        autoencoder=autoencoder,
        secure_aggregation=None,
        encryption=None,
        updates=None,
        personal=None,
    )
