"""Who takes part in a round. Seeded, so that a resumed run asks the same sites, and so that a study can be repeated."""

from __future__ import annotations

import random
from collections.abc import Collection

from custom.config import ExperimentConfig
from custom.federation_config import AvailabilityConfig


def drawn_sites(sites: list[str], experiment: ExperimentConfig, round_number: int) -> list[str]:
    """Who takes part in a round, sorted: of those that are there all, or a draw; (seed, round) determine both."""
    federation, there = experiment.federation, sorted(sites)
    if federation.availability is not None:
        there = _available(there, federation.availability, federation.min_responses, experiment.seed, round_number)
    count = federation.clients_per_round
    if count is None or count >= len(there):
        return there
    return sorted(random.Random(f"{experiment.seed} {round_number}").sample(there, count))  # noqa: S311


def grouped(sites: Collection[str], groups: int, *, seed: int, round_number: int) -> list[list[str]]:
    """The sites of a round in groups of sizes that differ by one at most, which (seed, round) determine."""
    order = sorted(sites)
    random.Random(f"{seed} {round_number} groups").shuffle(order)  # noqa: S311
    return [sorted(order[place::groups]) for place in range(groups)]


def _available(
    sites: list[str], availability: AvailabilityConfig, least: int, seed: int, round_number: int
) -> list[str]:
    if availability.schedule is not None:
        return [site for site in sites if site in availability.schedule[round_number % len(availability.schedule)]]
    draw = random.Random(f"{seed} {round_number} available")  # noqa: S311
    chances = {site: draw.random() for site in sites}
    there = [site for site in sites if chances[site] < (availability.probability or 0.0)]
    return there if len(there) >= least else sorted(sorted(sites, key=chances.__getitem__)[:least])
