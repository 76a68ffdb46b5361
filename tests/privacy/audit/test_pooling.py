"""Counts that sites send: exact under addition, and no fewer patients behind them than a site allows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.audit.errors import Unattackable
from privacy.audit.pooling import (
    COARSE_CELLS,
    FINE_BINS,
    FINE_CELLS,
    PooledCounts,
    Range,
    agreed_range,
    auc_of_counts,
    choose_pooled,
    coarse_cells,
    counted,
    hidden_share,
    pooled_outcome,
    threshold_cell,
)
from privacy.audit.protocol import TRIMS
from privacy.audit.statistics import auc

GRID = Range(low=-3.0, high=3.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), max_size=40), st.integers(1, 5))
def test_a_count_stands_for_enough_patients_and_the_total_is_kept(pairs: list[tuple[int, int]], least: int) -> None:
    cells = np.array([cell for cell, _ in pairs], dtype=np.int64)
    patient = np.array([p for _, p in pairs], dtype=np.int64)
    counts, moved = counted(cells, patient, size=10, least=least)
    exact = np.bincount(cells, minlength=10)
    patients = len(set(patient.tolist()))
    assert counts.sum() == (len(pairs) if patients >= least else 0)
    assert (moved == 0) == bool(np.array_equal(counts, exact))
    # Between two non-empty merged cells lie the values that were merged into the upper one.
    start = 0
    filled = np.flatnonzero(counts)
    for place, cell in enumerate(filled):
        stop = 10 if place == len(filled) - 1 else cell + 1
        behind = patient[(cells >= start) & (cells < stop)]
        assert len(behind) == counts[cell]
        assert len(set(behind.tolist())) >= least
        start = stop


def test_without_a_minimum_nothing_is_merged() -> None:
    counts, moved = counted(np.array([0, 5, 5]), np.array([0, 1, 1]), size=6, least=1)
    assert counts.tolist() == [1, 0, 0, 0, 0, 2]
    assert moved == 0


def test_one_patient_with_many_images_is_one_patient() -> None:
    counts, moved = counted(np.zeros(9, dtype=np.int64), np.zeros(9, dtype=np.int64), size=4, least=2)
    assert counts.sum() == 0
    assert moved == 9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_sums_over_sites_are_the_counts_of_all(seed: int, sites: int) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=rng.integers(1, 30)) for _ in range(sites)]
    each = [counted(GRID.cells(v), np.arange(len(v)), size=FINE_CELLS, least=1)[0] for v in values]
    together = np.concatenate(values)
    assert np.array_equal(
        sum(each), counted(GRID.cells(together), np.arange(len(together)), size=FINE_CELLS, least=1)[0]
    )


def test_cells_cover_the_line_in_order() -> None:
    values = np.array([-1e300, -3.1, -3.0, 0.0, 2.99999, 3.0, 1e300])
    cells = GRID.cells(values)
    assert cells[:2].tolist() == [0, 0]
    assert cells[2] == 1
    assert cells[-2:].tolist() == [FINE_BINS + 1] * 2
    assert np.all(np.diff(cells) >= 0)
    assert GRID.lower_edge(1) == -3.0
    assert GRID.lower_edge(FINE_BINS + 1) == pytest.approx(3.0)
    coarse = coarse_cells(np.sort(np.concatenate([values, [-1e-12, 1e-12, 5.0]])))
    assert np.all(np.diff(coarse) >= 0)
    assert (coarse[0], coarse[-1]) == (0, COARSE_CELLS - 1)


def test_the_agreed_range_holds_the_values() -> None:
    values = np.random.default_rng(0).lognormal(2, 0.1, 500)
    grid = agreed_range(np.bincount(coarse_cells(values), minlength=COARSE_CELLS))
    assert np.mean((values >= grid.low) & (values < grid.high)) > 0.98
    assert grid.high / grid.low < 7


@pytest.mark.parametrize("values", [[], [1e12] * 5, [-1e12] * 5])
def test_no_range_without_values_or_beyond_all_bounds(values: list[float]) -> None:
    counts = np.bincount(coarse_cells(np.array(values)), minlength=COARSE_CELLS)
    with pytest.raises(Unattackable):
        agreed_range(counts)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_an_impossible_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(Unattackable, match="range"):
        Range(low=low, high=high)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=FINE_CELLS, max_size=FINE_CELLS), st.integers(0, 100))
def test_auc_of_counts_is_that_of_the_cells(others: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    members, rest = rng.integers(0, 4, FINE_CELLS) + (np.arange(FINE_CELLS) == 3), np.array(others)
    rest[7] += 1
    cells = np.concatenate([np.repeat(np.arange(FINE_CELLS), members), np.repeat(np.arange(FINE_CELLS), rest)])
    is_member = np.repeat([True, False], [members.sum(), rest.sum()])
    assert auc_of_counts(members, rest) == pytest.approx(auc(cells.astype(float), is_member))


def table(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    cells = GRID.cells(values)
    return np.stack([np.bincount(cells[member == kind], minlength=FINE_CELLS) for kind in (False, True)])


@pytest.mark.parametrize("sign", [1, -1])
def test_outcomes_are_those_of_the_cells(sign: int) -> None:
    """A separated population: the choice finds the sign, the threshold and the rates."""
    rng = np.random.default_rng(1)
    member = np.arange(800) < 100
    halves = [sign * (rng.normal(size=800) * 0.3 + 2.0 * member - 1.0) for _ in range(2)]
    tuning = np.stack([table(halves[0], member)] * len(TRIMS))[None]
    choice, area = choose_pooled(tuning)
    assert choice.sign == sign
    assert area > 0.99
    counts = PooledCounts(tuning=tuning[0, 0], patients=table(halves[1], member), slices=table(halves[1], member))
    found = pooled_outcome(counts, choice, seed=0, setting="t=1", grid=GRID, tuning_auc=area)
    assert found.patient_auc.estimate == pytest.approx(auc(sign * GRID.cells(halves[1]).astype(float), member))
    assert found.slice_auc.estimate == pytest.approx(found.patient_auc.estimate)
    assert found.slice_auc.low < found.slice_auc.estimate <= found.slice_auc.high
    point = found.points[1]
    assert point.tpr is not None
    assert point.fpr is not None
    assert point.threshold is not None
    called = sign * halves[1] >= point.threshold - 1e-9
    assert point.tpr.estimate == pytest.approx(called[member].mean(), abs=0.02)
    assert point.fpr.estimate == pytest.approx(called[~member].mean(), abs=0.02)
    above, share = hidden_share(counts.patients, sign)
    assert above > 80
    assert share < 0.01


@pytest.mark.parametrize("sign", [1, -1])
def test_the_threshold_cell_keeps_the_false_positive_rate(sign: int) -> None:
    rng = np.random.default_rng(2)
    member = np.arange(400) < 200
    counts = table(sign * rng.normal(size=400), member)
    cell = threshold_cell(counts, sign)
    cells = np.arange(FINE_CELLS)
    called = counts[0][sign * cells >= sign * cell].sum() / counts[0].sum()
    assert called <= 0.1
    looser = cell - sign
    assert counts[0][sign * cells >= sign * looser].sum() / counts[0].sum() >= called


def test_too_few_patients_are_refused() -> None:
    empty = np.zeros((2, FINE_CELLS), dtype=np.int64)
    counts = PooledCounts(tuning=empty, patients=empty, slices=empty)
    choice, area = choose_pooled(np.zeros((1, len(TRIMS), 2, FINE_CELLS), dtype=np.int64))
    with pytest.raises(Unattackable, match="min_count"):
        pooled_outcome(counts, choice, seed=0, setting="t=1", grid=GRID, tuning_auc=area)
