"""What the privacy room refuses.

PrivacyError
├── InvalidPlan          a configuration or plan that cannot be meant (also a ValueError)
│   └── Unreachable      no amount of noise fits the target
├── UnknownEvent         a mechanism that the accountant has no theorem for
├── PlanExhausted        more steps than the plan accounts for
├── WrongDraws           a batch that is not [patients, K, …]
└── RandomnessReused     a copy of a secure random stream

``str(error)`` names argument, value and remedy, and holds no patient data.
"""

from __future__ import annotations


class PrivacyError(Exception):
    """Base of every refusal of this package.

    Args:
        argument: what was looked at.
        value: what was found; never patient data.
        remedy: what to do next.
    """

    def __init__(self, *, argument: str, value: object, remedy: str) -> None:
        super().__init__(f"{argument} = {value!r}: {remedy}")
        self.argument = argument
        self.value = value
        self.remedy = remedy


class InvalidPlan(PrivacyError, ValueError):
    """A configuration or a plan that cannot be meant."""


class Unreachable(InvalidPlan):
    """No amount of noise keeps what is asked for within the target."""


class UnknownEvent(PrivacyError):
    """A mechanism that the accountant has no theorem for."""


class PlanExhausted(PrivacyError):
    """More steps than the plan accounts for."""


class WrongDraws(PrivacyError):
    """A batch that is not [patients, K, …]."""


class RandomnessReused(PrivacyError):
    """A copy of a secure random stream, which would use the same noise twice."""


def require(condition: bool, *, argument: str, value: object, remedy: str) -> None:
    """Raise :class:`InvalidPlan` naming argument, value and remedy unless the condition holds."""
    if not condition:
        raise InvalidPlan(argument=argument, value=value, remedy=remedy)


def require_number(value: object, *, argument: str) -> None:
    """Raise :class:`InvalidPlan` unless the value is a finite int or float (a bool is neither)."""
    number = type(value) in (int, float)
    finite = number and abs(float(value)) < float("inf")  # type: ignore[arg-type]
    require(finite, argument=argument, value=value, remedy="give a finite number")


def require_count(value: object, *, argument: str) -> None:
    """Raise :class:`InvalidPlan` unless the value is an int of at least 1."""
    require(type(value) is int and value >= 1, argument=argument, value=value, remedy="give an integer of at least 1")
