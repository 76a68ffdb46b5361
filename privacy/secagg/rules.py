"""How many sites must survive, and what a site demands before it takes part.

With t of n sites, c of them working for the server: two sets of survivors that t sites each have signed share at
least 2t - n signers. If 2t > n + c, one of them is honest, and an honest site signs one set only: a server that tells
different sites different survivors cannot unmask one of them (arXiv:1611.04482, sec. 6.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from privacy.errors import require, require_count
from privacy.secagg.errors import ProtocolViolation


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The job's, the same for all.

    Attributes:
        min_survivors: sites without which nothing is decoded.
        colluding_sites: c, how many sites may work for the server.

    Raises:
        InvalidPlan: fewer than two survivors, or none besides the colluding ones.
    """

    min_survivors: int
    colluding_sites: int = 0

    def __post_init__(self) -> None:
        require_count(self.min_survivors, argument="min_survivors")
        remedy = "give at least 2: the sum over one site is its vector"
        require(self.min_survivors >= 2, argument="min_survivors", value=self.min_survivors, remedy=remedy)
        whole = type(self.colluding_sites) is int and self.colluding_sites >= 0
        require(whole, argument="colluding_sites", value=self.colluding_sites, remedy="give 0 or more")
        remedy = f"give at least colluding_sites + 2 = {self.colluding_sites + 2}: they know their own part of the sum"
        enough = self.min_survivors >= self.colluding_sites + 2
        require(enough, argument="min_survivors", value=self.min_survivors, remedy=remedy)

    def threshold(self, parties: int) -> int:
        """t for a roster of n: at least ``min_survivors``, and 2t > n + c.

        Raises:
            ProtocolViolation: t > n.
        """
        t = max(self.min_survivors, (parties + self.colluding_sites) // 2 + 1)
        if t > parties:
            raise ProtocolViolation(argument="roster", value=f"{parties} sites", remedy=f"at least {t} must take part")
        return t


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The site's own, which no server and no job can change.

    Attributes:
        peers: names of all sites that this one sums with, itself among them. Certificates alone do not tell: server
            and users have some of the same root.
        required: nothing but masked vectors may leave.
        min_survivors: least ``Rules.min_survivors``. With two, either of them can subtract itself from the sum.
        colluding_sites: least ``Rules.colluding_sites``.

    Raises:
        InvalidPlan: as :class:`Rules`; or fewer than two peers.
    """

    peers: tuple[str, ...]
    required: bool = True
    min_survivors: int = 3
    colluding_sites: int = 0

    def __post_init__(self) -> None:
        Rules(min_survivors=self.min_survivors, colluding_sites=self.colluding_sites)
        names = type(self.peers) is tuple and all(type(name) is str and name for name in self.peers)
        several = names and len(set(self.peers)) == len(self.peers) >= 2
        require(several, argument="peers", value=self.peers, remedy="name each site of the federation once")
        require(type(self.required) is bool, argument="required", value=self.required, remedy="give true or false")
