"""Rounds that get longer as the learning rate falls, and end with the planned steps."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from custom.config import ExperimentConfig
from custom.stages import MOST_EPOCHS, Span, Stage, stage_of, stages
from custom.study.federation import trained
from medical_data.cohort import Cohort

STEPS = 3
CPU = torch.device("cpu")


def automatic(experiment: ExperimentConfig, rounds: int, *, steps: int = STEPS, warmup: int = 0) -> ExperimentConfig:
    training = replace(experiment.training, steps_per_round=steps, warmup_steps=warmup, local_epochs="auto")
    return replace(experiment, training=training, federation=replace(experiment.federation, rounds=rounds))


def spans(stage: Stage) -> list[Span]:
    """Of all rounds until none has any."""
    found = [stage.span(stage.first + turn) for turn in range(stage.rounds)]
    return [span for span in found if span.steps]


def by_the_rule(stage: Stage) -> list[Span]:
    """The slow obvious reference: a round after the other, each of ⌊(η_peak / η)²⌋ epochs."""
    steps, found = stage.training.steps_per_round, list[Span]()
    done = 0
    while done < stage.total_steps:
        cosine = (1 + math.cos(math.pi * done / stage.total_steps)) / 2  # η / η_peak after the warm-up
        halfway = 2 * done == stage.total_steps
        epochs = 4 if halfway else max(1, min(MOST_EPOCHS, math.floor(1 / cosine**2)))
        found.append(Span(first=done, steps=min(epochs * steps, stage.total_steps - done)))
        done += found[-1].steps
    return found


@pytest.mark.parametrize(
    ("rounds", "epochs"),
    [
        (1, [1]),
        (2, [1, 1]),
        (3, [1, 1, 1]),
        (4, [1, 1, 2]),  # after two of four epochs the rate has halved: four would be due
        (20, [1] * 8 + [2, 4, 6]),  # after 8: (1 / 0.65)² = 2.3; after 10: 2² = 4; after 14: 23, and 6 are left
    ],
)
def test_the_rule_by_hand(experiment: ExperimentConfig, rounds: int, epochs: list[int]) -> None:
    for steps in (1, 3, 10, 37):
        (stage,) = stages(automatic(experiment, rounds, steps=steps))
        found = [stage.span(number).steps for number in range(rounds)]
        assert found == [steps * count for count in epochs] + [0] * (rounds - len(epochs))


@given(rounds=st.integers(1, 80), steps=st.integers(1, 7), warmup=st.integers(0, 50), rate=st.floats(1e-5, 0.9))
def test_every_run_makes_its_planned_steps_in_rounds_that_get_longer(
    experiment: ExperimentConfig, rounds: int, steps: int, warmup: int, rate: float
) -> None:
    config = automatic(experiment, rounds, steps=steps, warmup=warmup)
    (stage,) = stages(replace(config, training=replace(config.training, learning_rate=rate)))
    made = spans(stage)
    assert made[0].first == 0
    assert all(later.first == one.first + one.steps for one, later in pairwise(made))
    assert made[-1].first + made[-1].steps == stage.total_steps == rounds * steps
    assert all(span.steps % steps == 0 and span.steps <= MOST_EPOCHS * steps for span in made)
    assert all(one.steps <= later.steps for one, later in pairwise(made[:-1])), "but the last, which takes what is left"
    for number in range(len(made), rounds + 1):
        assert stage.span(number) == Span(first=stage.total_steps, steps=0)


@given(rounds=st.integers(1, 200), steps=st.integers(1, 50))
def test_the_epochs_are_those_of_the_rule_whatever_the_warm_up(
    experiment: ExperimentConfig, rounds: int, steps: int
) -> None:
    (stage,) = stages(automatic(experiment, rounds, steps=steps))
    assert spans(stage) == by_the_rule(stage)
    (warm,) = stages(automatic(experiment, rounds, steps=steps, warmup=rounds))
    assert spans(warm) == spans(stage), "a warm-up's low rates make no long rounds"


def test_long_runs_have_rounds_of_ten_epochs_and_fewer_rounds(experiment: ExperimentConfig) -> None:
    (stage,) = stages(automatic(experiment, 200))
    epochs = [span.steps // STEPS for span in spans(stage)]
    assert epochs[:50] == [1] * 50
    assert epochs.count(MOST_EPOCHS) >= 5
    assert len(epochs) < 130


def test_without_auto_every_round_is_one_epoch(experiment: ExperimentConfig) -> None:
    (stage,) = stages(experiment)
    assert [stage.span(number) for number in (0, 1)] == [Span(first=0, steps=3), Span(first=3, steps=3)]


def test_each_stage_counts_its_own_steps(latent_experiment: ExperimentConfig) -> None:
    assert latent_experiment.autoencoder is not None
    config = replace(
        latent_experiment,
        federation=replace(latent_experiment.federation, rounds=5),
        autoencoder=replace(latent_experiment.autoencoder, rounds=2),
    )
    assert [stage_of(config, number).span(number).first for number in range(5)] == [0, 3, 0, 3, 6]


def test_training_ends_when_all_of_its_steps_are_done(experiment: ExperimentConfig, cohort: Cohort) -> None:
    config = automatic(experiment, 8, steps=2)
    cohorts = {"a": cohort, "b": replace(cohort, images=np.ascontiguousarray(cohort.images[..., ::-1]))}
    found = trained(config, cohorts, CPU)
    planned = spans(stages(config)[0])
    assert len(found.records) == found.model.rounds_done == len(planned) < 8
    assert found.steps == 2 * 8 * 2, "of both sites together"
    for state in found.states.values():
        assert {float(tensor) for name, tensor in state.items() if name.endswith("/step")} == {8 * 2.0}
    plain = trained(replace(config, training=replace(config.training, local_epochs=None)), cohorts, CPU)
    assert plain.steps == found.steps
    assert found.bytes_up * 8 == plain.bytes_up * len(planned)
