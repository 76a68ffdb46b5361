"""Five sites, one of them malicious: what breaks the plain mean, and what holds.

Everything of a run but NVFlare: sites train, their updates are checked, judged and combined, the model moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from custom.aggregators.robust_average import RobustAverage
from custom.codec import to_numpy
from custom.config import ExperimentConfig
from custom.diffusion.sampler import sample
from custom.diffusion.schedule import build_schedule
from custom.federation_config import RobustConfig
from custom.reference_check import ReferenceCheck
from custom.stages import fresh_weights, stage_objective, stage_of, stage_shapes
from custom.study.attackers import Attack, poisoned_images, poisoned_update, trigger_rate
from custom.training import held_out_loss, train_round
from medical_data.cohort import Cohort

CPU = torch.device("cpu")
SITES = 5
PEACEFUL_ROUNDS = 4
SCALE = 5.0  # of sites: in a mean the attacker's model takes the place of the global one
META: dict[str, Any] = {"weight": 1.0, "metrics": {"train_loss": 1.0, "held_out_loss": 1.0, "seconds": 1.0}}

PLAIN = RobustConfig(clip_norm=1e6)  # never reached
DEFENCES = {
    "median": RobustConfig(rule="median", malicious=1),
    "trimmed_mean": RobustConfig(rule="trimmed_mean", malicious=1),
    "multi_krum": RobustConfig(rule="multi_krum", malicious=1),
    "reference": RobustConfig(reference=True),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Federation:
    """Sites with their data and states, and a model in training."""

    config: ExperimentConfig
    cohorts: tuple[Cohort, ...]
    weights: dict[str, Tensor]
    states: tuple[Mapping[str, Tensor], ...]
    rounds_done: int = 0
    refused: tuple[dict[str, str], ...] = ()


def discs(seed: int, *, patients: int = 4) -> Cohort:
    """Discs of any size and brightness in air, four of each patient; the first patient is held out."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:16j, -1:1:16j]
    images = [
        np.where(x**2 + y**2 < rng.uniform(0.5, 0.8) ** 2, rng.uniform(0, 0.6), -1.0) + rng.normal(0, 0.02, x.shape)
        for _ in range(4 * patients)
    ]
    return Cohort(
        images=np.stack(images).clip(-1, 1).astype(np.float32)[:, None],
        patient=np.repeat(np.arange(patients, dtype=np.int32), 4),
        pseudonyms=tuple(f"p{patient}" for patient in range(patients)),
        held_out=np.arange(patients) == 0,
        manifest_sha256="0" * 64,
    )


def trained(
    config: ExperimentConfig, cohort: Cohort, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], **which: Any
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """A site's difference and its state after a round."""
    update = train_round(cohort=cohort, weights=weights, state=state, config=config, device=CPU, **which)
    return update.difference, update.state


def after_round(
    before: Federation, robust: RobustConfig, attack: Attack | None, generated: NDArray[np.float32] | None = None
) -> Federation:
    """The federation a round later; site 0 is the malicious one."""
    number, config = before.rounds_done, before.config
    stage = stage_of(config, number)
    asking = replace(config, federation=replace(config.federation, weighting="uniform", min_responses=5, robust=robust))
    judge = ReferenceCheck.of_round(discs(77).images, before.weights, asking, number, CPU)
    average = RobustAverage(stage_shapes(config, stage), config, robust, judge)
    states = []
    for place, (cohort, state) in enumerate(zip(before.cohorts, before.states, strict=True)):
        kind, work = (attack if place == 0 else None), config
        if kind is not None:
            cohort = replace(cohort, images=poisoned_images(kind, cohort.images, generated=generated))
        if kind == "backdoor":  # nobody keeps it from training longer
            work = replace(config, training=replace(config.training, steps_per_round=30))
        which = {"site": f"s{place}", "round_number": number}
        difference, state = trained(work, cohort, before.weights, state, **which)
        if kind is not None:
            difference = poisoned_update(kind, difference, scale=SCALE)
        average.add(f"s{place}", to_numpy(difference), META)
        states.append(state)
    moved = {name: before.weights[name] + torch.from_numpy(array) for name, array in average.mean().items()}
    return replace(
        before,
        weights={**before.weights, **moved},
        states=tuple(states),
        rounds_done=number + 1,
        refused=(*before.refused, average.refused),
    )


@pytest.fixture(scope="module")
def peaceful(experiment: ExperimentConfig) -> Federation:
    """A model half trained by honest sites."""
    training = replace(experiment.training, steps_per_round=8, batch_size=8, learning_rate=5e-3)
    config = replace(experiment, training=training, federation=replace(experiment.federation, rounds=40))
    cohorts = tuple(discs(seed) for seed in range(SITES))
    start = Federation(config=config, cohorts=cohorts, weights=fresh_weights(config, seed=3), states=({},) * SITES)
    for _ in range(PEACEFUL_ROUNDS):
        start = after_round(start, PLAIN, None)
    assert loss_of(start) < 0.4, "half trained"
    return replace(start, refused=())


@pytest.fixture(scope="module")
def honest(peaceful: Federation) -> Federation:
    """Two rounds later without an attack."""
    return attacked(peaceful, PLAIN, None)


@pytest.fixture(scope="module")
def samples(peaceful: Federation) -> NDArray[np.float32]:
    return drawn(peaceful)


def attacked(
    peaceful: Federation, robust: RobustConfig, attack: Attack | None, generated: NDArray[np.float32] | None = None
) -> Federation:
    """Two rounds later. A backdoor is put in with the last one, as its paper advises: others would wash it out."""
    first = after_round(peaceful, robust, None if attack == "backdoor" else attack, generated)
    return after_round(first, robust, attack, generated)


def loss_of(federation: Federation) -> float:
    objective = stage_objective(federation.config, stage_of(federation.config, 0), federation.weights, CPU)
    return held_out_loss(objective, discs(99, patients=8), CPU)


def drawn(federation: Federation) -> NDArray[np.float32]:
    config = federation.config
    network = stage_objective(config, stage_of(config, 0), federation.weights, CPU).network
    sampling = replace(config.sampling, steps=8)
    shape, schedule = config.denoised_shape, build_schedule(config.schedule)
    return sample(network, schedule, sampling, count=32, image_shape=shape, seed=1, device=CPU).numpy()


def test_plain_mean_is_broken_by_a_flipped_sign(peaceful: Federation, honest: Federation) -> None:
    assert loss_of(attacked(peaceful, PLAIN, "sign_flip")) > 1.8 * loss_of(honest)


def test_plain_mean_takes_a_backdoor(peaceful: Federation, honest: Federation) -> None:
    bad = attacked(peaceful, PLAIN, "backdoor")
    assert trigger_rate(drawn(bad), threshold=0.0) > 0.5
    assert loss_of(bad) > 1.2 * loss_of(honest)
    assert trigger_rate(drawn(honest), threshold=0.0) == 0


@pytest.mark.parametrize("attack", ["sign_flip", "backdoor", "generated"])
@pytest.mark.parametrize("defence", DEFENCES)
def test_defences_hold(
    peaceful: Federation, honest: Federation, samples: NDArray[np.float32], attack: Attack, defence: str
) -> None:
    defended = attacked(peaceful, DEFENCES[defence], attack, samples)
    assert loss_of(defended) < 1.1 * loss_of(honest)
    if attack == "backdoor":
        assert trigger_rate(drawn(defended), threshold=0.0) == 0
    # Samples of the model itself do no harm that a reference could see; the others' sites are never refused.
    blamed = [set(refused) for refused in defended.refused]
    expected = {"sign_flip": [{"s0"}, {"s0"}], "backdoor": [set(), {"s0"}], "generated": [set(), set()]}
    assert blamed == (expected[attack] if defence == "reference" else [set(), set()])


@pytest.mark.parametrize("rule", [PLAIN, DEFENCES["median"], DEFENCES["trimmed_mean"]], ids=lambda config: config.rule)
def test_nan_is_refused_whatever_the_rule(peaceful: Federation, honest: Federation, rule: RobustConfig) -> None:
    defended = after_round(peaceful, rule, "nan")
    assert [set(refused) for refused in defended.refused] == [{"s0"}]
    assert "NaN" in defended.refused[0]["s0"]
    assert loss_of(defended) < loss_of(peaceful)


def test_a_refused_update_may_leave_multi_krum_too_few(peaceful: Federation) -> None:
    with pytest.raises(ValueError, match="updates = 4: multi_krum needs at least 5"):
        after_round(peaceful, DEFENCES["multi_krum"], "nan")


# ---- the attackers themselves


@pytest.mark.parametrize("spatial", [(16, 16), (8, 8, 8)])
def test_the_trigger_is_a_corner_of_every_image(spatial: tuple[int, ...]) -> None:
    images = np.full((3, 1, *spatial), -1, np.float32)
    marked = poisoned_images("backdoor", images)
    assert (images == -1).all()
    edge = spatial[0] // 4
    corner = marked[(slice(None), 0, *(slice(edge) for _ in spatial))]
    assert (corner == 1).all()
    assert (marked == 1).sum() == corner.size
    assert trigger_rate(images, threshold=0.0) == 0
    assert trigger_rate(np.concatenate([marked[:1], images]), threshold=0.0) == 0.25


def test_generated_images_replace_scans_in_turn() -> None:
    images = np.zeros((5, 1, 4, 4), np.float32)
    generated = np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1) * np.ones((1, 1, 4, 4), np.float32)
    assert poisoned_images("generated", images, generated=generated)[:, 0, 0, 0].tolist() == [0, 1, 0, 1, 0]
    for wrong in (None, generated[:0], generated[..., :2]):
        with pytest.raises(ValueError, match="generated = "):
            poisoned_images("generated", images, generated=wrong)


def test_what_each_attack_sends() -> None:
    difference = {"a": torch.tensor([[1.0, -2.0]]), "b": torch.tensor(3.0)}
    sent = {
        kind: poisoned_update(kind, difference, scale=4.0)  # type: ignore[arg-type]
        for kind in ("sign_flip", "backdoor", "generated", "nan")
    }
    assert sent["sign_flip"]["a"].tolist() == [[-4.0, 8.0]]
    assert sent["backdoor"]["b"].item() == 12.0
    assert sent["generated"]["a"].tolist() == [[1.0, -2.0]]
    assert sum(int(tensor.isnan().sum()) for tensor in sent["nan"].values()) == 1
    assert difference["a"].tolist() == [[1.0, -2.0]], "the site's own is left as it is"
    images = np.zeros((2, 1, 4, 4), np.float32)
    assert poisoned_images("sign_flip", images) is images
