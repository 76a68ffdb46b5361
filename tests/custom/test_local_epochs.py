from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from custom.config import ExperimentConfig
from custom.local_epochs import MOST_EPOCHS, check_span, next_epochs, next_span
from custom.run_folder import RoundRecord
from custom.stages import Span, Stage, stages
from custom.strict import ConfigError

STEPS = 3


@pytest.fixture
def planned(experiment: ExperimentConfig) -> Stage:
    return stages(experiment)[0]


@pytest.fixture
def auto(experiment: ExperimentConfig) -> Stage:
    """Forty local epochs of three steps in all."""
    return stages(of_rounds(experiment, 40))[0]


def of_rounds(experiment: ExperimentConfig, rounds: int) -> ExperimentConfig:
    return replace(
        experiment,
        training=replace(experiment.training, steps_per_round=STEPS, local_epochs="auto"),
        federation=replace(experiment.federation, rounds=rounds),
    )


def record(number: int, metrics: dict[str, float] | dict[str, dict[str, float]], steps: int = STEPS) -> RoundRecord:
    by_site = {name: value for name, value in metrics.items() if isinstance(value, dict)}
    mean = {name: value for name, value in metrics.items() if isinstance(value, float)}
    return RoundRecord(
        round_number=number,
        asked=["a", "b"],
        accepted=by_site or {"a": {}, "b": {}},
        refused={},
        silent=[],
        seconds=1.0,
        mean=mean,
        steps=steps,
    )


def both(train: float, held_out: float = 1.0) -> dict[str, float]:
    return {"train_loss": train, "held_out_loss": held_out}


def test_the_rule_by_hand() -> None:
    """F₀ = 1 and E₀ = 10: ⌈10 √F⌉ where it is less than the last E, ⌈E/2⌉ where not, never below 1."""
    losses = [1.0, 0.8, 0.8, 0.5, 0.04, 0.01, 0.01, 9.0]
    #        E₀=10  ⌈8.94⌉=9  9≥9: ⌈4.5⌉=5  8≥5: 3  2<3: 2  1<2: 1  1  1
    expected = [10, 9, 5, 3, 2, 1, 1, 1]
    said = [next_epochs(losses[: count + 1] if count else [], total=100, done=0) for count in range(len(losses))]
    assert said == expected


@pytest.mark.parametrize(
    ("total", "first"), [(1, 1), (3, 1), (4, 1), (8, 2), (20, 5), (40, MOST_EPOCHS), (500, MOST_EPOCHS)]
)
def test_the_first_round_is_a_quarter_of_the_run_or_ten(total: int, first: int) -> None:
    assert next_epochs([], total=total, done=0) == first


def test_no_more_than_is_left() -> None:
    assert next_epochs([], total=40, done=37) == 3
    assert next_epochs([1.0, 0.9], total=40, done=38) == 2
    assert next_epochs([1.0, 0.9], total=40, done=40) == 0


@given(
    rounds=st.integers(1, 60),
    losses=st.lists(st.floats(1e-6, 1e6), min_size=61, max_size=61),
    masked=st.booleans(),
)
def test_every_run_ends_at_its_planned_steps_and_every_span_passes(
    experiment: ExperimentConfig, rounds: int, losses: list[float], masked: bool
) -> None:
    stage = stages(of_rounds(experiment, rounds))[0]
    finished: list[RoundRecord] = []
    epochs: list[int] = []
    for number in range(rounds):
        span = next_span(stage, number, finished)
        if not span.steps:
            break
        check_span(stage, number, span)
        assert span.first == STEPS * sum(epochs)
        epochs.append(span.steps // STEPS)
        said = both(losses[number + 1], losses[0])
        finished.append(record(number, said if masked else {"a": said, "b": said}, steps=span.steps))
    assert STEPS * sum(epochs) == stage.total_steps == STEPS * rounds
    assert all(later <= earlier for earlier, later in pairwise(epochs)), "it never grows again"
    assert next_span(stage, len(epochs), finished).steps == 0


def test_the_mean_over_the_sites_is_what_counts(auto: Stage) -> None:
    of_sites = record(0, {"a": both(0.6, 2.0), "b": both(0.4, 0.0)}, steps=30)
    masked = record(0, both(0.5), steps=30)
    assert next_span(auto, 1, [of_sites]) == next_span(auto, 1, [masked]) == Span(first=30, steps=STEPS * 8)


def test_a_held_out_loss_counts_of_the_first_round_only(auto: Stage) -> None:
    first, second = record(0, both(0.5), steps=30), record(1, both(0.25, held_out=1e-9), steps=24)
    assert next_span(auto, 2, [first, second]) == Span(first=54, steps=STEPS * math.ceil(10 * math.sqrt(0.25)))


def test_without_auto_every_round_is_the_planned_one(planned: Stage) -> None:
    for number in (0, 1):
        span = next_span(planned, number, [record(0, {})] * number)
        assert span == planned.planned(number) == Span(first=number * STEPS, steps=STEPS)
        check_span(planned, number, span)


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"train_loss": 0.5},
        {"held_out_loss": 0.5},
        both(0.0),
        both(0.5, held_out=0.0),
        both(0.5, held_out=-1.0),
        both(-0.5),
        both(math.nan),
        both(math.inf),
        both(0.5, held_out=math.inf),
    ],
)
def test_an_automatic_choice_without_losses_is_refused(auto: Stage, metrics: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"training\.local_epochs"):
        next_span(auto, 1, [record(0, metrics)])


def test_a_round_without_a_loss_among_others_is_refused(auto: Stage) -> None:
    with pytest.raises(ConfigError, match=r"training\.local_epochs"):
        next_span(auto, 2, [record(0, both(0.5)), record(1, {})])


@pytest.mark.parametrize(
    "span",
    [
        Span(first=0, steps=2 * STEPS),
        Span(first=0, steps=0),
        Span(first=STEPS, steps=STEPS),
        Span(first=1, steps=STEPS),
        Span(first=-STEPS, steps=STEPS),
    ],
)
def test_a_site_makes_no_other_steps_than_every_round_s(planned: Stage, span: Span) -> None:
    with pytest.raises(ConfigError, match=r"^steps = "):
        check_span(planned, 0, span)


@pytest.mark.parametrize(
    "span",
    [
        Span(first=0, steps=0),
        Span(first=0, steps=-STEPS),
        Span(first=-STEPS, steps=STEPS),
        Span(first=1, steps=STEPS),
        Span(first=0, steps=STEPS + 1),
        Span(first=0, steps=(MOST_EPOCHS + 1) * STEPS),
        Span(first=39 * STEPS, steps=2 * STEPS),
        Span(first=40 * STEPS, steps=STEPS),
    ],
)
def test_with_auto_a_site_makes_whole_epochs_within_the_run(auto: Stage, span: Span) -> None:
    with pytest.raises(ConfigError, match=r"^steps = "):
        check_span(auto, 0, span)


def test_with_auto_the_edges_pass(auto: Stage) -> None:
    check_span(auto, 0, Span(first=0, steps=MOST_EPOCHS * STEPS))
    check_span(auto, 39, Span(first=39 * STEPS, steps=STEPS))
