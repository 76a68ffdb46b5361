"""What a site demands of an audit before a model that knows its patients may be released."""

from __future__ import annotations

from dataclasses import dataclass, field

from privacy.audit.decision import DecisionRule, Verdict
from privacy.errors import require, require_count


@dataclass(frozen=True, kw_only=True)
class AuditPolicy:
    """The site's demands.

    Attributes:
        accept: verdicts with which a model may be released; INVALID is never among them.
        rule: the cut-offs by which the verdict is reached.
        min_count: in a federated audit, the least patients that a count which leaves the site alone may stand for;
            cells with fewer are merged with their neighbours first.
        per_site_tables: let the server's report show this site's own figures.

    Raises:
        InvalidPlan: an impossible value (a ValueError).
    """

    accept: tuple[Verdict, ...] = ("GREEN",)
    rule: DecisionRule = field(default_factory=DecisionRule)
    min_count: int = 3
    per_site_tables: bool = False

    def __post_init__(self) -> None:
        known = {"GREEN", "AMBER", "RED"}
        remedy = f"give some of {sorted(known)}"
        require(set(self.accept) <= known, argument="accept", value=self.accept, remedy=remedy)
        require_count(self.min_count, argument="min_count")
