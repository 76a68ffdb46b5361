from __future__ import annotations

import itertools

from custom.controllers.skip_list import LONGEST_PAUSE, SkipList

SITES = ["a", "b", "c"]


def asked_in(rounds: int, alive: set[str], at_least: int = 2) -> list[list[str]]:
    skipped, asked = SkipList(), []
    for turn in range(rounds):
        asked.append(skipped.asked(SITES, turn=turn, at_least=at_least))
        silent = set(asked[-1]) - alive
        skipped.note(answered=set(asked[-1]) - silent, silent=silent, turn=turn)
    return asked


def test_a_dead_site_costs_fewer_and_fewer_timeouts() -> None:
    times = [turn for turn, asked in enumerate(asked_in(40, {"a", "b"})) if "c" in asked]
    assert times[:4] == [0, 2, 5, 10]
    assert max(after - before for before, after in itertools.pairwise(times)) == LONGEST_PAUSE + 1


def test_an_answer_brings_it_back_at_once() -> None:
    skipped = SkipList()
    skipped.note(answered=["a", "b"], silent=["c"], turn=0)
    assert skipped.asked(SITES, turn=1, at_least=1) == ["a", "b"]
    skipped.note(answered=["c"], silent=[], turn=2)
    assert skipped.asked(SITES, turn=3, at_least=1) == SITES


def test_as_many_as_are_needed_are_asked_in_any_case() -> None:
    assert all(len(asked) >= 2 for asked in asked_in(10, set()))
    assert all(len(asked) == 3 for asked in asked_in(10, {"a", "b"}, at_least=3))
