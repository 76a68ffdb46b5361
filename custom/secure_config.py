"""The block of an experiment that asks for secure aggregation."""

from __future__ import annotations

from dataclasses import dataclass

from custom.strict import require
from privacy.secagg.encoding import RingBits
from privacy.secagg.rules import Rules


@dataclass(frozen=True, kw_only=True)
class SecureAggregationConfig:
    """The server sees the sum of the sites' masked vectors only (:mod:`privacy.secagg`).

    Attributes:
        update_bound: public bound on each coordinate of a site's update; what lies beyond is clipped to it.
        max_weight: public bound on a site's aggregation weight; a site with more patients weighs no more.
        min_survivors: sites without which nothing is decoded.
        colluding_sites: how many sites may work for the server.
        ring_bits: 32, or 16 for up to ten sites: half the bytes, 65534/n levels. 8: for updates.bits = 4 and up to 18
            sites; with updates.bits = 8, 16 holds up to 258.
        stage_timeout_s: seconds that a site has for each stage of the protocol beside its work.
    """

    update_bound: float = 1.0
    max_weight: float = 1000.0
    min_survivors: int = 2
    colluding_sites: int = 0
    ring_bits: RingBits = 32
    stage_timeout_s: int = 300

    def __post_init__(self) -> None:
        for name in ("update_bound", "max_weight", "stage_timeout_s"):
            value, remedy = getattr(self, name), "give a positive number"
            require(value > 0, argument=f"secure_aggregation.{name}", value=value, remedy=remedy)
        _ = self.rules  # refuses impossible numbers

    @property
    def rules(self) -> Rules:
        """How many must survive."""
        return Rules(min_survivors=self.min_survivors, colluding_sites=self.colluding_sites)
