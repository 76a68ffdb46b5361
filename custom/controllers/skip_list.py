"""Sites that gave no answer in time, left out for a while so that a dead one does not cost a timeout in every round."""

from __future__ import annotations

from collections.abc import Collection, Iterable

LONGEST_PAUSE = 8


class SkipList:
    """After its first silence a site is left out for one round, then for 2, 4, 8, 8, …; an answer clears it."""

    def __init__(self) -> None:
        self._silences: dict[str, int] = {}
        self._back_at: dict[str, int] = {}

    def asked(self, sites: Iterable[str], *, turn: int, at_least: int) -> list[str]:
        """Those of the sites that are not left out in this round.

        Args:
            sites: who would be asked.
            turn: number of the round.
            at_least: as many are asked in any case, those first whose pause is the shortest.
        """
        ordered = sorted(sites, key=lambda site: (self._back_at.get(site, 0), site))
        present = [site for site in ordered if self._back_at.get(site, 0) <= turn]
        return sorted(present if len(present) >= at_least else ordered[:at_least])

    def note(self, *, answered: Collection[str], silent: Collection[str], turn: int) -> None:
        """Remember who answered in a round, and who did not."""
        for site in answered:
            self._silences.pop(site, None)
            self._back_at.pop(site, None)
        for site in silent:
            self._silences[site] = self._silences.get(site, 0) + 1
            pause = min(2 ** (self._silences[site] - 1), LONGEST_PAUSE)
            self._back_at[site] = turn + 1 + pause
