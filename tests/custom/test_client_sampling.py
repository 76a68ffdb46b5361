"""Who is there in a round; plain draws are tested beside the controller that makes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from custom.client_sampling import drawn_sites, grouped
from custom.config import ExperimentConfig
from custom.federation_config import AvailabilityConfig

SITES = [f"s{number}" for number in range(10)]
ROUNDS = 2000


def federation(
    experiment: ExperimentConfig,
    *,
    probability: float | None = None,
    schedule: tuple[tuple[str, ...], ...] | None = None,
    least: int = 2,
    count: int | None = None,
    seed: int = 3,
) -> ExperimentConfig:
    there = AvailabilityConfig(probability=probability, schedule=schedule)
    changed = replace(experiment.federation, availability=there, min_responses=least, clients_per_round=count)
    return replace(experiment, seed=seed, federation=changed)


@pytest.mark.parametrize("probability", [0.3, 0.5, 0.9])
def test_each_site_is_there_with_the_probability(experiment: ExperimentConfig, probability: float) -> None:
    config = federation(experiment, probability=probability, least=1)
    draws = [drawn_sites(SITES, config, number) for number in range(ROUNDS)]
    tolerance = 5 * (probability * (1 - probability) / ROUNDS) ** 0.5  # σ of a share
    for site in SITES:
        assert abs(sum(site in draw for draw in draws) / ROUNDS - probability) < tolerance + (1 - probability) ** 10
    together = sum("s0" in draw and "s1" in draw for draw in draws) / ROUNDS
    assert abs(together - probability**2) < 0.05, "sites come and go by themselves"


def test_draws_are_of_seed_and_round_whatever_the_order(experiment: ExperimentConfig) -> None:
    config = federation(experiment, probability=0.5)
    draws = [drawn_sites(SITES, config, number) for number in range(50)]
    assert draws == [drawn_sites(SITES[::-1], config, number) for number in range(50)]
    assert draws != [drawn_sites(SITES, replace(config, seed=4), number) for number in range(50)]
    assert len({tuple(draw) for draw in draws}) > 40
    assert all(draw == sorted(draw) for draw in draws)


@given(probability=st.floats(0.001, 1.0), least=st.integers(1, 10), number=st.integers(0, 1000))
def test_enough_are_always_there(experiment: ExperimentConfig, probability: float, least: int, number: int) -> None:
    """Whoever is there by chance, and then the next ones in the same draw."""
    here = drawn_sites(SITES, federation(experiment, probability=probability, least=least), number)
    assert len(here) == len(set(here)) >= least
    by_chance = drawn_sites(SITES, federation(experiment, probability=probability, least=1), number)
    likelier = drawn_sites(SITES, federation(experiment, probability=1.0, least=least), number)
    assert likelier == SITES
    assert set(by_chance) <= set(here)
    if len(by_chance) >= least:
        assert here == by_chance
    else:
        assert len(here) == least


def test_a_schedule_begins_again_after_its_end(experiment: ExperimentConfig) -> None:
    config = federation(experiment, schedule=(("s1", "s0"), ("s2", "s3", "elsewhere")))
    for number in range(6):
        assert drawn_sites(SITES, config, number) == (["s0", "s1"] if number % 2 == 0 else ["s2", "s3"])


def test_the_draw_is_among_those_who_are_there(experiment: ExperimentConfig) -> None:
    config = federation(experiment, probability=0.6, least=2, count=3)
    everyone = federation(experiment, probability=0.6, least=2)
    counts = dict.fromkeys(SITES, 0)
    for number in range(300):
        drawn, there = drawn_sites(SITES, config, number), drawn_sites(SITES, everyone, number)
        assert set(drawn) <= set(there)
        assert len(drawn) == min(3, len(there))
        for site in drawn:
            counts[site] += 1
    assert min(counts.values()) > 50  # 90 expected of each
    scheduled = federation(experiment, schedule=(("s0", "s1", "s2"), ("s3", "s4")), count=2)
    assert set(drawn_sites(SITES, scheduled, 0)) < {"s0", "s1", "s2"}
    assert drawn_sites(SITES, scheduled, 1) == ["s3", "s4"]


@given(sites=st.integers(2, 40), groups=st.integers(1, 10), seed=st.integers(0, 2**32 - 1), number=st.integers(0, 99))
def test_groups_share_the_sites_evenly(sites: int, groups: int, seed: int, number: int) -> None:
    names = [f"site {place}" for place in range(sites)]
    found = grouped(names, groups, seed=seed, round_number=number)
    assert len(found) == groups
    assert sorted(name for group in found for name in group) == sorted(names)
    sizes = [len(group) for group in found]
    assert max(sizes) - min(sizes) <= 1
    assert found == grouped(set(names), groups, seed=seed, round_number=number)


def test_groups_change_by_round_and_seed_so_that_all_meet() -> None:
    rounds = [grouped(SITES, 3, seed=3, round_number=number) for number in range(60)]
    assert len({str(groups) for groups in rounds}) > 50
    assert grouped(SITES, 3, seed=4, round_number=0) != rounds[0]
    met = {pair for groups in rounds for group in groups for pair in ((a, b) for a in group for b in group if a < b)}
    assert len(met) == 45
