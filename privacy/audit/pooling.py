"""The same audit from counts: what sites may send, and what the server makes of their sums.

A site scores its own patients and sends how many of them fall into each cell of an agreed grid, never a score. Three
times: over a grid that fits every statistic, so that the server can agree on a finer one; then for the tuning half,
so that it can choose; then for the report half, of what was chosen. Cells are exact under addition: the sum over sites
is what one machine with all images would count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privacy.audit.errors import Unattackable
from privacy.audit.evidence import Roc, SeedOutcome
from privacy.audit.protocol import RESAMPLES, TARGET_FPRS, TRIMS
from privacy.audit.statistics import (
    Interval,
    OperatingPoint,
    clustered_auc_interval,
    mann_whitney_p,
    operating_point,
    roc_band,
)

# The first grid: four cells to a decade from 1e-9 to 1e9, either sign, and what is smaller or larger.
_DECADES = np.power(10.0, np.arange(-36, 37) / 4)
COARSE_EDGES: NDArray[np.float64] = np.concatenate([-_DECADES[::-1], _DECADES])
COARSE_CELLS = len(COARSE_EDGES) + 1
# The second grid: equal cells over the agreed range, and one beyond each end.
FINE_BINS = 128
FINE_CELLS = FINE_BINS + 2
# Share of the tuning half that may lie beyond each end of the agreed range.
BEYOND = 0.005

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Of the second grid.

    Attributes:
        low: lower end.
        high: upper end, above it.

    Raises:
        Unattackable: ends that are not finite or not in order.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        fits = math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high
        if not fits:
            raise Unattackable(argument="range", value=(self.low, self.high), remedy="give finite low < high")

    def cells(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Cell of each value: 0 below the range, 1 … FINE_BINS within, FINE_BINS + 1 from its upper end on."""
        share = (values - self.low) / (self.high - self.low)
        cells: NDArray[np.int64] = np.clip(np.floor(share * FINE_BINS) + 1, 0, FINE_CELLS - 1).astype(np.int64)
        return cells

    def lower_edge(self, cell: int) -> float:
        """The least value in a cell from 1 on."""
        return self.low + (cell - 1) * (self.high - self.low) / FINE_BINS


def coarse_cells(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Cell of each value in the first grid."""
    return np.searchsorted(COARSE_EDGES, values, side="right").astype(np.int64)


def counted(cells: NDArray[np.int64], patient: NDArray[np.int64], *, size: int, least: int) -> tuple[Counts, int]:
    """How many values lie in each cell, after cells with too few patients were merged.

    From the lowest cell on, cells are merged into the next higher one until each stands for at least ``least``
    different patients; what is left at the top joins the cell below. The total is kept, unless there are fewer patients
    in all: then nothing is counted. ``least = 1`` merges nothing.

    Args:
        cells: int64 [N], in [0, size).
        patient: int64 [N], whose each value is.
        size: number of cells.
        least: patients that a count must stand for.

    Returns:
        int64 [size], and how many values were moved or dropped.
    """
    exact = np.bincount(cells, minlength=size).astype(np.int64)
    if least <= 1:
        return exact, 0
    merged = np.zeros(size, dtype=np.int64)
    last, pending, values = -1, set[int](), 0
    order = np.argsort(cells, kind="stable")
    bounds = np.flatnonzero(np.diff(cells[order])) + 1
    for group in np.split(order, bounds):
        if not len(group):
            continue
        pending |= set(patient[group].tolist())
        values += len(group)
        if len(pending) >= least:
            last = int(cells[group[0]])
            merged[last], pending, values = values, set(), 0
    if values and last >= 0:
        merged[last] += values
    moved = int(np.abs(exact - merged).sum() + abs(exact.sum() - merged.sum())) // 2
    return merged, moved


def agreed_range(counts: Counts) -> Range:
    """The range of the second grid, from counts in the first [COARSE_CELLS]: all but the outermost shares.

    Raises:
        Unattackable: nothing was counted, or it lies beyond the first grid.
    """
    total = int(counts.sum())
    if total <= 0:
        raise Unattackable(argument="counts", value=total, remedy="no site sent any: each has too few patients")
    cumulative = np.cumsum(counts)
    first = int(np.searchsorted(cumulative, BEYOND * total, side="right"))
    last = int(np.searchsorted(cumulative, (1 - BEYOND) * total, side="left"))
    if first == 0 or last >= COARSE_CELLS - 1:
        raise Unattackable(argument="scores", value="beyond ±1e9", remedy="leave out attacks whose scores overflow")
    return Range(low=float(COARSE_EDGES[first - 1]), high=float(COARSE_EDGES[last]))


def auc_of_counts(members: Counts, others: Counts) -> float:
    """Area under the ROC curve, ties counting half, of counts in ascending cells; 1/2 if one side is empty."""
    pairs = int(members.sum()) * int(others.sum())
    if not pairs:
        return 0.5
    below = np.cumsum(others) - others
    return float((members * (below + others / 2)).sum() / pairs)


@dataclass(frozen=True, kw_only=True)
class PooledChoice:
    """What the tuning halves of all sites decide for one attack and seed.

    Attributes:
        setting: index of the attack's setting.
        trim: index into :data:`privacy.audit.protocol.TRIMS`.
        sign: 1 if high statistics mean members, -1 if low ones do.
    """

    setting: int
    trim: int
    sign: int

    def __post_init__(self) -> None:
        known = self.setting >= 0 and 0 <= self.trim < len(TRIMS) and self.sign in (1, -1)
        if not known:
            value = (self.setting, self.trim, self.sign)
            raise Unattackable(argument="choice", value=value, remedy="give indices and a sign of 1 or -1")


def choose_pooled(tuning: Counts) -> tuple[PooledChoice, float]:
    """Setting, trim and sign with the highest AUC on the pooled tuning halves, and that AUC; the first of equals.

    Args:
        tuning: int64 [settings, trims, 2, FINE_CELLS], of held-outs (0) and members (1).
    """
    best, highest = PooledChoice(setting=0, trim=0, sign=1), -1.0
    for setting in range(tuning.shape[0]):
        for trim in range(tuning.shape[1]):
            area = auc_of_counts(tuning[setting, trim, 1], tuning[setting, trim, 0])
            if max(area, 1 - area) > highest:
                highest = max(area, 1 - area)
                best = PooledChoice(setting=setting, trim=trim, sign=1 if area >= 0.5 else -1)
    return best, highest


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledCounts:
    """All sites' counts of one attack under one seed, with what was chosen.

    Attributes:
        tuning: patients of the tuning halves, int64 [2, FINE_CELLS], held-outs (0) and members (1).
        patients: of the report halves.
        slices: images of the report halves.
    """

    tuning: Counts
    patients: Counts
    slices: Counts


def threshold_cell(tuning: Counts, sign: int) -> int:
    """The cell from which on (for sign -1: up to which) a patient is called a member, at the first target FPR.

    Beyond all cells, so that nobody is, if the tuning halves have one kind of patient only.

    Args:
        tuning: int64 [2, FINE_CELLS].
        sign: of the choice.
    """
    scores, member = _expanded(tuning, sign)
    if member.all() or not member.any():
        return FINE_CELLS if sign == 1 else -1
    point = operating_point(scores, member, scores, member, fpr=TARGET_FPRS[0])
    assert point.threshold is not None  # noqa: S101 - it always has one
    return sign * math.ceil(point.threshold)


def pooled_outcome(
    counts: PooledCounts, choice: PooledChoice, *, seed: int, setting: str, grid: Range, tuning_auc: float
) -> SeedOutcome:
    """The outcome of one attack under one seed, by the very functions that a central audit uses.

    Which images are one patient's is not known here, so the interval over images takes all images of a patient for
    one: as wide as patients alone would make it.

    Args:
        counts: of all sites.
        choice: made on the tuning halves.
        seed: of the split.
        setting: name of the chosen setting.
        grid: second grid of that setting.
        tuning_auc: reached on the tuning halves.

    Raises:
        Unattackable: fewer than two members or held-outs in a half.
    """
    scores, member = _expanded(counts.patients, choice.sign)
    _require_both(member, "patients of the report half")
    tuning_scores, tuning_member = _expanded(counts.tuning, choice.sign)
    _require_both(tuning_member, "patients of the tuning half")
    slices, slice_member = _expanded(counts.slices, choice.sign)
    # Thresholds come from patients of the tuning half; images of that half are not counted, so theirs are the same.
    points = [operating_point(tuning_scores, tuning_member, scores, member, fpr=fpr) for fpr in TARGET_FPRS]
    slice_points = [operating_point(tuning_scores, tuning_member, slices, slice_member, fpr=fpr) for fpr in TARGET_FPRS]
    rows = counts.slices[:, :: choice.sign]
    return SeedOutcome(
        seed=seed,
        setting=setting,
        sign=choice.sign,
        trim=TRIMS[choice.trim],
        tuning_auc=tuning_auc,
        patient_auc=pooled_interval(counts.patients, choice.sign, seed=seed),
        slice_auc=_as_patients(auc_of_counts(rows[1], rows[0]), int(member.sum()), int((~member).sum())),
        p_value=mann_whitney_p(scores, member),
        points=tuple(_in_units(point, choice.sign, grid) for point in points),
        slice_points=tuple(_in_units(point, choice.sign, grid) for point in slice_points),
    )


def pooled_interval(patients: Counts, sign: int, *, seed: int) -> Interval:
    """AUC over patients with its interval, from counts int64 [2, FINE_CELLS]; raises like :func:`pooled_outcome`."""
    scores, member = _expanded(patients, sign)
    _require_both(member, "patients")
    return clustered_auc_interval(scores, np.arange(len(scores)), member, resamples=RESAMPLES, seed=seed)


def pooled_roc(patients: Counts, sign: int, *, seed: int) -> Roc:
    """The curve over patients with its band, at the grid's edges."""
    scores, member = _expanded(patients, sign)
    least = 1 / int((~member).sum())
    grid = np.unique(np.concatenate([np.geomspace(least, 1, 40), TARGET_FPRS]).clip(least, 1))
    values = (grid, *roc_band(scores, member, grid, resamples=RESAMPLES, seed=seed))
    fpr, tpr, low, high = (tuple(map(float, each)) for each in values)
    return Roc(fpr=fpr, tpr=tpr, low=low, high=high)


def hidden_share(patients: Counts, sign: int) -> tuple[int, float]:
    """Members above every held-out patient, and the share of held-outs at or above the members' 95th percentile."""
    scores, member = _expanded(patients, sign)
    ours, others = scores[member], scores[~member]
    return int((ours > others.max()).sum()), float((others >= np.quantile(ours, 0.95)).mean())


def _expanded(counts: Counts, sign: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A score for everyone who was counted, which is the cell's number times the sign, and who is a member."""
    cells = sign * np.arange(counts.shape[1], dtype=np.float64)
    scores = np.concatenate([np.repeat(cells, counts[kind]) for kind in (0, 1)])
    member = np.repeat([False, True], counts.sum(axis=1))
    return scores, member


def _as_patients(estimate: float, members: int, others: int) -> Interval:
    """A 95 % interval of an AUC as though each patient had one image (Hanley & McNeil 1982)."""
    pairs_share, other_share = estimate / (2 - estimate), 2 * estimate**2 / (1 + estimate)
    variance = (
        estimate * (1 - estimate)
        + (members - 1) * (pairs_share - estimate**2)
        + (others - 1) * (other_share - estimate**2)
    ) / (members * others)
    margin = 1.96 * math.sqrt(max(variance, 0.0))
    separated = 0.025 ** (1 / min(members, others))  # no narrower than complete separation would be
    low, high = min(estimate - margin, separated), max(estimate + margin, 1 - separated)
    return Interval(estimate=estimate, low=max(low, 0.0), high=min(high, 1.0))


def _in_units(point: OperatingPoint, sign: int, grid: Range) -> OperatingPoint:
    """The threshold as a value of the statistic instead of a cell."""
    assert point.threshold is not None  # noqa: S101 - it always has one
    cell = math.ceil(point.threshold)
    value = grid.lower_edge(cell) if sign == 1 else -grid.lower_edge(1 - cell)
    return replace(point, threshold=value)


def _require_both(member: NDArray[np.bool_], what: str) -> None:
    counts: Sequence[int] = (int(member.sum()), int((~member).sum()))
    if min(counts) < 2:
        remedy = "the sites' counts hold too few of them; audit more patients, or lower the sites' audit.min_count"
        raise Unattackable(argument=f"{what}: members, held-outs", value=counts, remedy=remedy)
