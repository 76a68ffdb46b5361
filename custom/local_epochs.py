"""How many local epochs the next round has, where the job says ``auto``: AdaComm (Wang and Joshi, arXiv:1810.08313).

Averaging costs bytes and undoes some of what the sites have learnt apart; both matter little while the loss is high and
much at the end. With F_0 the loss of the first model, F_r the loss of round r and γ = ½ the rule (their eqs. 17 and 18)
is

    E ← ⌈E_0 √(F_r / F_0)⌉, or ⌈γE⌉ if that is not less than the last E, and at least 1.

E_0 is a quarter of the run, 10 at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from custom.run_folder import RoundRecord
from custom.stages import Span, Stage
from custom.strict import require

MOST_EPOCHS = 10
FIRST_SHARE = 0.25  # of the run, that its first round may take
SHRINK = 0.5


def next_epochs(losses: Sequence[float], *, total: int, done: int) -> int:
    """Epochs of the round that comes next, of which there are ``total - done`` left.

    Args:
        losses: the held-out loss of the first model, then the mean training loss of each finished round; empty before
            the first one.
        total: epochs in the run.
        done: epochs in the finished rounds.
    """
    first = epochs = max(1, min(MOST_EPOCHS, int(FIRST_SHARE * total)))
    for loss in losses[1:]:
        fresh = math.ceil(first * math.sqrt(max(loss, 0.0) / losses[0]))
        epochs = max(1, fresh if fresh < epochs else math.ceil(SHRINK * epochs))
    return min(epochs, total - done)


def next_span(stage: Stage, round_number: int, finished: Sequence[RoundRecord]) -> Span:
    """The steps of a round; none once all of the run's are done.

    Args:
        stage: of the round.
        round_number: of the run.
        finished: records of all rounds before it.

    Raises:
        ConfigError: an automatic choice without the losses that it is made from.
    """
    if stage.training.local_epochs is None:
        return stage.planned(round_number)
    steps, done = stage.training.steps_per_round, sum(record.steps for record in finished)
    losses = [record.metric("train_loss") for record in finished]
    said = [*(record.metric("held_out_loss") for record in finished[:1]), *losses]
    known = [loss for loss in said if loss is not None and 0 < loss < math.inf]
    remedy = "no finite positive loss was sent with a round; give a number of steps, and leave local_epochs out"
    require(len(known) == len(said), argument="training.local_epochs", value="auto", remedy=remedy)
    return Span(first=done, steps=steps * next_epochs(known, total=stage.rounds, done=done // steps))


def check_span(stage: Stage, round_number: int, span: Span) -> None:
    """Refuse steps that a job does not plan.

    Raises:
        ConfigError: other steps than every round's, or with ``auto`` no whole epochs within the run.
    """
    steps, argument = stage.training.steps_per_round, "steps"
    if stage.training.local_epochs is None:
        planned = span == stage.planned(round_number)
        require(planned, argument=argument, value=str(span), remedy=f"must be {stage.planned(round_number)}")
        return
    whole = span.first >= 0 and span.first % steps == 0 and span.steps % steps == 0
    within = 0 < span.steps <= MOST_EPOCHS * steps and span.first + span.steps <= stage.total_steps
    remedy = f"must be whole epochs of {steps}, {MOST_EPOCHS} at most, of {stage.total_steps} in all"
    require(whole and within, argument=argument, value=str(span), remedy=remedy)
