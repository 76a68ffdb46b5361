"""What the audit refuses.

AuditRefused (PrivacyError)
├── Overlap              a patient or an image on both sides of the split
├── Unattackable         scores, images or settings that an attack cannot work with
├── BrokenCommitment     canaries that are not those committed before training
└── BrokenReport         an audit.json that contradicts itself
"""

from __future__ import annotations

from privacy.errors import PrivacyError


class AuditRefused(PrivacyError):
    """Base of every refusal of this package."""


class Overlap(AuditRefused):
    """A patient or an image on both sides of the split."""


class Unattackable(AuditRefused):
    """Scores, images or settings that an attack cannot work with."""


class BrokenCommitment(AuditRefused):
    """Canaries that are not those that were committed before training."""


class BrokenReport(AuditRefused):
    """An audit.json that cannot be read, or whose verdict does not follow from what stands in it."""


def require(condition: bool, argument: str, value: object, remedy: str) -> None:
    """Raise :class:`Unattackable` naming argument, value and remedy unless the condition holds."""
    if not condition:
        raise Unattackable(argument=argument, value=value, remedy=remedy)
