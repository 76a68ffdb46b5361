"""A training run of one site with canaries among its patients, to test what its plan claims about each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from custom.audit_target import loss_function, require_images
from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.diffusion.schedule import build_schedule
from custom.job_plan import privacy_plan
from custom.private_training import train_private_round
from custom.strict import require
from medical_data.cohort import Cohort
from privacy.audit.bounds import EpsilonBound, fdp_epsilon, guess_grid, one_run_epsilon
from privacy.audit.canaries import CanarySet, draw_canaries, random_canaries
from privacy.audit.updates import gradient_cosine
from privacy.rng import SecureRandomness

CONFIDENCE = 0.95  # of all bounds together
LEVELS = (0.1, 0.3, 0.5, 0.7)  # of the timesteps at which a canary's gradient is held against an update, as shares


@dataclass(frozen=True, kw_only=True)
class CanaryFindings:
    """What a run with canaries found.

    Attributes:
        bounds: lower bounds on ε, which hold together.
        commitment: hash of canaries and coins, from before training.
    """

    bounds: tuple[EpsilonBound, ...]
    commitment: str


def run_with_canaries(
    experiment: ExperimentConfig,
    cohort: Cohort,
    *,
    count: int,
    folder: Path,
    device: torch.device,
    patients_in_memory: int,
    progress: bool,
) -> CanaryFindings:
    """Train one site by the experiment's plan, from fresh weights, with every canary in or out by a fair coin.

    Canaries are patients of one image each. The coins are committed to in ``folder`` before training. A canary's score
    is the mean cosine of its gradient with the rounds' updates, which is what a curious server can compute. The model
    that is audited is another one: this run tests the plan and the code that both share. The release of the mean image
    is not part of it, so the bound is on no more than the plan claims.

    Args:
        experiment: with differential privacy.
        cohort: of one site.
        count: of canaries, half of which are trained on.
        folder: new; holds canaries, commitment and, readable by the owner only, the coins.
        device: where to compute.
        patients_in_memory: patients whose gradients are held at once.
        progress: show a bar on stderr.

    Raises:
        ConfigError: an experiment without differential privacy or on latents, or too few canaries.
        BrokenCommitment: the folder holds canaries already, or they changed during training.
    """
    require_images(experiment, "--canaries")
    plan = privacy_plan(experiment)
    require(plan is not None, argument="canaries", value=count, remedy="a model without differential privacy has none")
    assert plan is not None  # noqa: S101 - required above
    require(count >= 20, argument="canaries", value=count, remedy="give at least 20: fewer show nothing")
    images = random_canaries(count, experiment.image_shape[1:], seed=experiment.seed)
    canaries = draw_canaries(images, randomness=SecureRandomness())
    canaries.save(folder)
    commitment = canaries.commitment()

    spatial_dims = experiment.preprocess.spatial_dims
    network = build_network(experiment.network, spatial_dims=spatial_dims, seed=experiment.seed).to(device)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    state: Mapping[str, Tensor] = {}
    starts, updates = [], []
    with_canaries = _joined(cohort, canaries)
    rounds = range(plan.config.rounds)
    for round_number in tqdm(rounds, desc="training with canaries", unit="round", disable=not progress):
        update = train_private_round(
            cohort=with_canaries,
            weights=weights,
            state=state,
            config=experiment,
            plan=plan,
            round_number=round_number,
            device=device,
            patients_in_memory=patients_in_memory,
        )
        starts.append(weights)
        updates.append(update.difference)
        weights = {name: tensor + update.difference[name] for name, tensor in weights.items()}
        state = update.state
    canaries.check(commitment)

    steps = experiment.schedule.timesteps
    scores = gradient_cosine(
        loss_function(network, build_schedule(experiment.schedule)),
        starts,
        updates,
        canaries.images,
        timesteps=tuple(round(level * steps) for level in LEVELS),
        seed=experiment.seed,
        batch_size=16,
        progress=progress,
    )
    each = 1 - (1 - CONFIDENCE) / 2  # two bounds that hold together
    delta, guesses = plan.config.delta, guess_grid(count)
    included = canaries.included
    bounds = (
        one_run_epsilon(scores, included, delta=delta, confidence=each, guesses=guesses),
        fdp_epsilon(scores, included, delta=delta, confidence=each, guesses=guesses, trade_off="approximate"),
    )
    return CanaryFindings(bounds=bounds, commitment=commitment)


def _joined(cohort: Cohort, canaries: CanarySet) -> Cohort:
    """The cohort with the included canaries as training patients of one image each."""
    included = canaries.images[canaries.included]
    first = len(cohort.pseudonyms)
    return Cohort(
        images=np.concatenate([cohort.images, included]),
        patient=np.concatenate([cohort.patient, np.arange(first, first + len(included), dtype=np.int32)]),
        pseudonyms=(*cohort.pseudonyms, *(f"canary-{index}" for index in np.flatnonzero(canaries.included))),
        held_out=np.concatenate([cohort.held_out, np.zeros(len(included), dtype=np.bool_)]),
        manifest_sha256=cohort.manifest_sha256,
    )
