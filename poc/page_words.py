"""Numbers, times and names as the status page says them."""

from __future__ import annotations

import math
from datetime import datetime

from privacy.ledger import Account


def budget_said(account: Account) -> str:
    """ε that was spent, beside its ceiling."""
    return f"ε = {epsilon_said(account.spent)} of {account.budget.epsilon:g}"


def epsilon_said(epsilon: float) -> str:
    """Two digits, rounded up: what was spent is not less than what is written."""
    if not math.isfinite(epsilon):
        return "without bound"
    return f"{math.ceil(100 * epsilon) / 100:.2f}"


def delta_said(delta: float) -> str:
    """δ, short."""
    return f"{delta:.0e}".replace("e-0", "e-") if delta < 0.01 else f"{delta:g}"


def memory_said(size: int) -> str:
    """Bytes, in the unit that people read."""
    return f"{size / 2**30:.1f}\u00a0GiB" if size >= 2**30 else f"{size / 2**20:.0f}\u00a0MiB"


def span_said(seconds: float) -> str:
    """A time to two digits or so."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole}\u00a0s"
    if whole < 7200:
        return f"{round(whole / 60)}\u00a0min"
    days, hours = divmod(round(whole / 3600), 24)
    return f"{days}\u00a0d {hours}\u00a0h" if days else f"{hours}\u00a0h"


def time_said(moment: datetime) -> str:
    """A moment, which is UTC."""
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def count_said(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def capitalised(text: str) -> str:
    """A text as it begins a sentence."""
    return text[:1].upper() + text[1:]


def shortened(name: str) -> str:
    """A name that fits beside a curve."""
    return name if len(name) <= 24 else f"{name[:23]}…"
