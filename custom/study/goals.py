"""What a study is to show, as inequalities between its numbers, and whether it does.

A goal compares cases that share seeds, so that each seed gives one value of its own: fresh weights, and the partition
where the sites are as many and as skewed, are the same in both cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from custom.study.config import Figure, Goal
from custom.study.runner import Row, interval


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A goal against the results.

    Attributes:
        goal: which.
        values: one a seed that has all figures.
        mean: over them; nan without one.
        low: of the 95 % interval, and ``high``; None with one value.
        met: None if there is no value.
    """

    goal: Goal
    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None
    met: bool | None


def verdict(goal: Goal, rows: Sequence[Row]) -> Verdict:
    """Judge a goal by the rows of a study."""
    found: dict[tuple[Figure, int], float] = {}
    for row in rows:
        if row.suite == goal.suite:
            found[Figure(case=row.case, metric=row.metric), row.seed] = row.value
    seeds = sorted({seed for _, seed in found})
    complete = [seed for seed in seeds if all((figure, seed) in found for figure in goal.figures)]
    values = tuple(_value(goal, {figure: found[figure, seed] for figure in goal.figures}) for seed in complete)
    if not values:
        return Verdict(goal=goal, values=(), mean=math.nan, low=None, high=None, met=None)
    mean, low, high = interval(values)
    least, most = (low, high) if goal.significant and low is not None and high is not None else (mean, mean)
    met = least <= goal.at_most if goal.at_most is not None else most >= (goal.at_least or 0.0)
    return Verdict(goal=goal, values=values, mean=mean, low=low, high=high, met=met)


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts in Markdown."""
    lines = ["| goal | bound | measured | seeds | |", "|---|---:|---:|---:|---|"]
    for each in verdicts:
        goal = each.goal
        bound = f"≤ {goal.at_most:g}" if goal.at_most is not None else f"≥ {goal.at_least:g}"
        between = "" if each.low is None or each.high is None else f" ({each.low:.3f} to {each.high:.3f})"
        said = {None: "no result", True: "met", False: "missed"}[each.met]
        shown = "" if each.met is None else f"{each.mean:.3f}{between}"
        lines.append(f"| {goal.statement} | {bound} | {shown} | {len(each.values)} | {said} |")
    return "\n".join(lines) + "\n"


def _value(goal: Goal, found: Mapping[Figure, float]) -> float:
    this, other = found[goal.this], found[goal.other]
    if goal.form == "ratio":
        return this / other
    if goal.form == "difference" or goal.start is None:
        return this - other
    return (found[goal.start] - this) / (found[goal.start] - other)
