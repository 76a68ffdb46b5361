"""Goals of a study: hand-made rows against numbers by hand."""

from __future__ import annotations

import math

import pytest

from custom.strict import ConfigError
from custom.study.config import Figure, Goal
from custom.study.goals import table, verdict
from custom.study.runner import Row

LOSS, THIS, OTHER = "test_loss", Figure(case="this", metric="test_loss"), Figure(case="other", metric="test_loss")


def rows(**cases: list[float]) -> list[Row]:
    return [
        Row(suite="s", case=case, seed=seed, metric=LOSS, value=value)
        for case, values in cases.items()
        for seed, value in enumerate(values)
    ]


def goal(form: str, **options: object) -> Goal:
    return Goal(statement="x", suite="s", form=form, this=THIS, other=OTHER, **options)  # type: ignore[arg-type]


def test_each_seed_is_compared_with_itself() -> None:
    found = verdict(goal("ratio", at_most=1.1), rows(this=[1.1, 2.0], other=[1.0, 2.0, 9.0]))
    assert found.values == pytest.approx((1.1, 1.0))  # the third seed has no partner
    assert found.mean == pytest.approx(1.05)
    assert found.met is True
    half = 12.7062 * math.sqrt(0.005) / math.sqrt(2)  # Student's t with one degree of freedom
    assert (found.low, found.high) == pytest.approx((1.05 - half, 1.05 + half), rel=1e-4)


def test_how_much_of_a_gap_is_closed() -> None:
    closed = goal("closed", start=Figure(case="start", metric=LOSS), at_least=0.5)
    data = rows(start=[3.0], this=[2.0], other=[1.0])
    assert verdict(closed, data).mean == pytest.approx(0.5)
    assert verdict(closed, data).met is True
    assert verdict(closed, rows(start=[3.0], this=[2.1], other=[1.0])).met is False


def test_a_significant_goal_is_missed_only_beyond_the_interval() -> None:
    worse = rows(this=[1.0, 1.3, 1.2], other=[1.0, 1.1, 1.3])
    assert verdict(goal("difference", at_most=0.0), worse).met is False
    assert verdict(goal("difference", at_most=0.0, significant=True), worse).met is True
    surely = rows(this=[2.0, 2.1, 2.2], other=[1.0, 1.1, 1.3])
    assert verdict(goal("difference", at_most=0.0, significant=True), surely).met is False
    assert verdict(goal("difference", at_least=2.0, significant=True), surely).met is False


def test_no_result_is_no_success() -> None:
    found = verdict(goal("ratio", at_most=1.0), rows(this=[1.0]))
    assert found.met is None
    assert "no result" in table([found])
    assert "| x | ≤ 1 | 0.500 | 1 | met |" in table(
        [verdict(goal("ratio", at_most=1.0), rows(this=[1.0], other=[2.0]))]
    )


@pytest.mark.parametrize(
    ("form", "options", "argument"),
    [
        ("ratio", {}, "at_most"),
        ("ratio", {"at_most": 1.0, "at_least": 1.0}, "at_most"),
        ("closed", {"at_least": 0.5}, "start"),
        ("ratio", {"at_most": 1.0, "start": THIS}, "start"),
    ],
)
def test_impossible_goals_are_refused(form: str, options: dict[str, object], argument: str) -> None:
    with pytest.raises(ConfigError, match=argument):
        goal(form, **options)
