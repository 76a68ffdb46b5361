"""Partitions keep patients whole, lose none and leave no site empty."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from medical_data.partition import (
    Assignment,
    PartitionRefused,
    by_quantity,
    dirichlet,
    iid,
    natural,
    power_law,
)

seeds = st.integers(0, 2**32 - 1)


def sizes(assignment: Assignment, patients: int, sites: int) -> list[int]:
    """Patients of each site, after checking that every patient is at one site and every site has one."""
    assert assignment.shape == (patients,)
    assert assignment.dtype == np.int64
    assert set(assignment.tolist()) == set(range(sites))
    return np.bincount(assignment, minlength=sites).tolist()


@given(st.lists(st.sampled_from(["north", "south", "east"]), min_size=1, max_size=50))
def test_natural_keeps_origins_together(origins: list[str]) -> None:
    assignment = natural(origins)
    sizes(assignment, len(origins), len(set(origins)))
    assert len(set(zip(origins, assignment.tolist(), strict=True))) == len(set(origins))


@given(st.integers(1, 8), st.integers(0, 60), seeds)
def test_iid_is_balanced_and_seeded(sites: int, more: int, seed: int) -> None:
    patients = sites + more
    counts = sizes(iid(patients, sites=sites, seed=seed), patients, sites)
    assert max(counts) - min(counts) <= 1
    assert np.array_equal(iid(patients, sites=sites, seed=seed), iid(patients, sites=sites, seed=seed))


def test_iid_depends_on_the_seed_and_not_on_the_order() -> None:
    first, second = (iid(300, sites=3, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first, second)
    # 100 of 300 each; the first 150 patients hold 50 of each site, give or take 6 standard deviations of 4.1.
    assert all(25 < n < 75 for n in np.bincount(first[:150]))


@given(st.integers(1, 5), st.lists(st.integers(0, 3), min_size=5, max_size=80), st.floats(0.05, 100), seeds)
def test_dirichlet_assigns_every_patient_or_refuses(sites: int, labels: list[int], alpha: float, seed: int) -> None:
    try:
        assignment = dirichlet(labels, sites=sites, alpha=alpha, seed=seed)
    except PartitionRefused:
        assume(False)  # a small alpha and few patients; what it says is checked below
    sizes(assignment, len(labels), sites)
    assert np.array_equal(assignment, dirichlet(labels, sites=sites, alpha=alpha, seed=seed))


def test_dirichlet_skews_labels_the_more_the_smaller_alpha_is() -> None:
    labels = [0, 1] * 300

    def skew(alpha: float) -> float:
        gaps = []
        for seed in range(20):
            at = dirichlet(labels, sites=2, alpha=alpha, seed=seed)
            ones = np.array(labels) == 1
            gaps.append(abs((at[ones] == 0).mean() - (at[~ones] == 0).mean()))
        return float(np.mean(gaps))

    assert skew(0.1) > 0.4 > 0.2 > skew(100.0)


def test_dirichlet_follows_the_drawn_proportions() -> None:
    # One label and one site share p ~ Beta(alpha, alpha): mean 1/2, standard deviation 1 / (2 sqrt(2 alpha + 1)).
    alpha, draws = 2.0, 400
    shares = [float((dirichlet([0] * 100, sites=2, alpha=alpha, seed=s) == 0).mean()) for s in range(draws)]
    deviation = 0.5 / np.sqrt(2 * alpha + 1)
    assert abs(np.mean(shares) - 0.5) < 4 * deviation / np.sqrt(draws)
    assert 0.85 * deviation < np.std(shares) < 1.15 * deviation


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), st.integers(0, 200), seeds)
def test_quantities_follow_the_fractions(fractions: list[float], more: int, seed: int) -> None:
    patients = len(fractions) + more
    counts = sizes(by_quantity(patients, fractions=fractions, seed=seed), patients, len(fractions))
    exact = np.array(fractions) / sum(fractions) * patients
    assert [a for _, a in sorted(zip(exact, counts, strict=True))] == sorted(counts)
    if exact.min() >= 1:
        assert np.abs(np.array(counts) - exact).max() < 1 + 1e-6


def test_power_law_shares() -> None:
    assert power_law(4, exponent=0.0) == pytest.approx([0.25] * 4)
    shares = power_law(3, exponent=1.0)
    assert shares == pytest.approx(np.array([6, 3, 2]) / 11)
    assert np.bincount(by_quantity(110, fractions=list(shares), seed=0)).tolist() == [60, 30, 20]


@pytest.mark.parametrize(
    ("call", "attribute"),
    [
        (lambda: iid(2, sites=3, seed=0), "patients"),
        (lambda: iid(2, sites=0, seed=0), "sites"),
        (lambda: natural([]), "patients"),
        (lambda: dirichlet([0, 1], sites=3, alpha=1.0, seed=0), "patients"),
        (lambda: dirichlet([0, 1, 0], sites=2, alpha=0.0, seed=0), "alpha"),
        (lambda: dirichlet([0, 1, 0], sites=2, alpha=float("nan"), seed=0), "alpha"),
        (lambda: dirichlet([0] * 12, sites=12, alpha=1e-3, seed=0), "alpha"),
        (lambda: by_quantity(1, fractions=[0.5, 0.5], seed=0), "patients"),
        (lambda: by_quantity(5, fractions=[0.5, 0.0], seed=0), "fractions"),
        (lambda: power_law(3, exponent=-1.0), "exponent"),
    ],
)
def test_impossible_partitions_are_refused(call: object, attribute: str) -> None:
    with pytest.raises(PartitionRefused) as refusal:
        call()  # type: ignore[operator]
    assert refusal.value.attribute == attribute
