"""What a server could do with the updates of a few more rounds, and what the sum over sites takes away from it.

The rounds are run here, from the finished model on, by the code that sites train with. A server under secure
aggregation sees the sum of the same updates and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from custom.audit_config import AuditConfig
from custom.audit_scores import Description, timesteps
from custom.audit_target import denoiser, loss_function, require_images
from custom.config import ExperimentConfig
from custom.job_plan import privacy_plan
from custom.model_file import ModelFile
from custom.private_training import train_private_round
from custom.training import train_round
from medical_data.cohort import Cohort
from privacy.audit.attacks import grey_box_scores
from privacy.audit.evidence import InversionOutcome
from privacy.audit.gradients import evaluations_per_image, image_gradients
from privacy.audit.population import Population
from privacy.audit.protocol import Scored
from privacy.audit.queries import shared_noise
from privacy.audit.updates import gradient_cosine, invert_update, loss_slope, rdlv

ROUNDS, STEPS = 3, 60
LATE = 0.1  # of the peak learning rate: rounds late in a training
LEVELS = (0.05, 0.2)  # timesteps of target gradients, as shares of the schedule
INVERSION_LEVEL = 0.5  # timestep of the batch that is redrawn: there the gradient depends on the image most
INVERSION_STEPS = 300
TOTAL_VARIATIONS = (1e-4, 1e-3)  # both are tried, and the better picture counts
BATCH = 16

DESCRIPTIONS = {
    "site_update": Description(
        "gradient cosine, one site's update",
        "in the manner of Li et al. 2023 (ICLR)",
        "updates",
        "How far the site's updates point along the image's own gradient.",
    ),
    "summed_update": Description(
        "gradient cosine, sum over sites",
        "in the manner of Li et al. 2023 (ICLR)",
        "updates",
        "The same with the sum of all sites' updates, which is what secure aggregation lets a server see.",
    ),
    "loss_slope": Description(
        "loss slope over rounds",
        "in the manner of Zhu et al. 2024, arXiv:2402.06289",
        "updates",
        "How fast the image's denoising loss falls from one round's global model to the next.",
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class CuriousFindings:
    """What a server finds that watches.

    Attributes:
        scored: its attacks on membership, for every image of the population.
        inversions: what it redraws of one image from an update, and from a sum.
    """

    scored: tuple[Scored, ...]
    inversions: tuple[InversionOutcome, ...]


def watch(
    model: ModelFile,
    cohorts: Mapping[str, Cohort],
    population: Population,
    config: AuditConfig,
    *,
    device: torch.device,
    progress: bool,
) -> CuriousFindings:
    """Run a few more rounds at the sites and attack them by their updates.

    Args:
        model: finished.
        cohorts: by site; their training patients train.
        population: their joined population, whose images are the targets.
        config: of the audit.
        device: where to compute.
        progress: show a bar on stderr.
    """
    require_images(model.experiment, "--updates")
    starts, by_site, models = _rounds(model, cohorts, device, progress)
    network, schedule = model.sampling_network()
    loss = loss_function(network.to(device), schedule)
    levels = timesteps(LEVELS, schedule)
    summed = [_mean([updates[site] for site in cohorts]) for updates in by_site]
    own = np.empty(len(population.images))
    pooled = np.empty(len(population.images))
    for index, site in enumerate(population.sites):
        rows = population.site[population.patient] == index
        for scores, updates in ((own, [updates[site] for updates in by_site]), (pooled, summed)):
            scores[rows] = gradient_cosine(
                loss,
                starts,
                updates,
                population.images[rows],
                timesteps=levels,
                seed=0,
                batch_size=BATCH,
                progress=progress,
            )
    slopes = _slopes(model, models, population, config, device)
    cost = evaluations_per_image(levels) * ROUNDS
    return CuriousFindings(
        scored=(
            _scored("site_update", np.repeat(own[None, :, None], len(config.seeds), axis=0), cost),
            _scored("summed_update", np.repeat(pooled[None, :, None], len(config.seeds), axis=0), cost),
            _scored("loss_slope", slopes[:, :, None], float(2 * len(levels) * len(models))),
        ),
        inversions=_redrawn(model, population, device),
    )


def _rounds(
    model: ModelFile, cohorts: Mapping[str, Cohort], device: torch.device, progress: bool
) -> tuple[list[Mapping[str, Tensor]], list[dict[str, dict[str, Tensor]]], list[Mapping[str, Tensor]]]:
    """Weights before each round, every site's update in it, and all global models with the last."""
    experiment = _late(model.experiment)
    plan = privacy_plan(experiment)
    weights: Mapping[str, Tensor] = model.ema
    starts: list[Mapping[str, Tensor]] = []
    by_site: list[dict[str, dict[str, Tensor]]] = []
    models: list[Mapping[str, Tensor]] = [weights]
    states: dict[str, Mapping[str, Tensor]] = {site: {} for site in cohorts}
    for number in tqdm(range(ROUNDS), desc="rounds that are watched", unit="round", disable=not progress):
        updates = {}
        for site, cohort in cohorts.items():
            if plan is None:
                local = train_round(
                    cohort=cohort,
                    weights=weights,
                    state=states[site],
                    config=experiment,
                    site=site,
                    round_number=number,
                    device=device,
                )
                updates[site], states[site] = local.difference, local.state
            else:
                private = train_private_round(
                    cohort=cohort,
                    weights=weights,
                    state=states[site],
                    config=experiment,
                    plan=plan,
                    round_number=number,
                    device=device,
                    patients_in_memory=BATCH,
                )
                updates[site], states[site] = private.difference, private.state
        starts.append({name: tensor.to(device) for name, tensor in weights.items()})
        by_site.append({site: {n: t.to(device) for n, t in update.items()} for site, update in updates.items()})
        mean = _mean(list(updates.values()))
        weights = {name: tensor + mean[name] for name, tensor in weights.items()}
        models.append(weights)
    return starts, by_site, models


def _late(experiment: ExperimentConfig) -> ExperimentConfig:
    """Rounds late in the training: a small step size; without differential privacy, few steps."""
    training = replace(experiment.training, learning_rate=experiment.training.learning_rate * LATE, warmup_steps=0)
    if experiment.privacy is None:
        training = replace(training, steps_per_round=STEPS)
    rounds = max(ROUNDS, experiment.federation.rounds)
    return replace(experiment, training=training, federation=replace(experiment.federation, rounds=rounds))


def _mean(updates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([update[name] for update in updates]).mean(0) for name in updates[0]}


def _slopes(
    model: ModelFile,
    models: Sequence[Mapping[str, Tensor]],
    population: Population,
    config: AuditConfig,
    device: torch.device,
) -> NDArray[np.float64]:
    """Of the loss, averaged over timesteps, under each seed, [seeds, N]."""
    network, schedule = model.sampling_network()
    losses = []
    for weights in models:
        network.load_state_dict(dict(weights))
        found = grey_box_scores(
            denoiser(network, schedule, device),
            population.images,
            timesteps=timesteps(LEVELS, schedule),
            seeds=config.seeds,
            attacks=("loss",),
            batch_size=64,
        )
        losses.append(found.scores["loss"].mean(axis=2))
    stacked = np.stack(losses)  # [R, seeds, N]
    return np.stack([loss_slope(stacked[:, row]) for row in range(len(config.seeds))])


def _redrawn(model: ModelFile, population: Population, device: torch.device) -> tuple[InversionOutcome, ...]:
    """One image of each site, one step on each: from a site's update, and from the sum, with the noise known.

    Where there is one site only, three of its patients stand for three sites.
    """
    network, schedule = model.sampling_network()
    loss = loss_function(network.to(device), schedule)
    parameters = {name: tensor.detach() for name, tensor in network.named_parameters()}
    (t,) = timesteps((INVERSION_LEVEL,), schedule)
    batch = population.images[_one_of_each(population)]
    gradients = [
        {name: -tensor[0] for name, tensor in found.items()}
        for _, found in image_gradients(loss, parameters, batch, timesteps=(t,), seed=0, batch_size=1)
    ]
    noise = shared_noise(0, t, 0, batch.shape[1:]).to(device)
    prior = population.images[~population.member[population.patient]].mean(axis=0)
    outcomes = []
    for seen, update, images in (
        ("one site's update, of one step on one image", gradients[0], batch[:1]),
        (f"the sum of {len(batch)} such updates", _mean(gradients), batch),
    ):
        tried = []
        for total_variation in TOTAL_VARIATIONS:
            found = invert_update(
                loss,
                parameters,
                update,
                image_shape=batch.shape[1:],
                timesteps=(t,) * len(images),
                noise=noise.expand(len(images), *noise.shape[1:]),
                steps=INVERSION_STEPS,
                total_variation=total_variation,
                seed=0,
            )
            leaked = rdlv(images, found.images, prior)
            tried.append(InversionOutcome(seen=seen, rdlv=leaked.rdlv, ssim=leaked.ssim, cosine=found.cosine))
        outcomes.append(max(tried, key=lambda outcome: outcome.rdlv))
    return tuple(outcomes)


def _one_of_each(population: Population) -> list[int]:
    """Rows: the first member's middle image at each site, or those of three members of the only one."""
    members = np.flatnonzero(population.member)
    if len(population.sites) > 1:
        chosen = [members[population.site[members] == index][0] for index in range(len(population.sites))]
    else:
        chosen = members[:3].tolist()
    rows = [np.flatnonzero(population.patient == patient) for patient in chosen]
    return [int(own[len(own) // 2]) for own in rows]


def _scored(name: str, scores: NDArray[np.float64], evaluations: float) -> Scored:
    setting = ("all rounds",)
    return Scored(
        name=name,
        **DESCRIPTIONS[name]._asdict(),
        evaluations_per_image=evaluations,
        settings=setting,
        scores=scores,
    )
