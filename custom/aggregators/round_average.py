"""What a round needs of whatever adds its updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class RoundAverage(Protocol):
    """One round's updates on their way to a mean."""

    accepted: dict[str, dict[str, float]]
    refused: dict[str, str]

    def add(self, site: str, arrays: Any, meta: Mapping[str, Any]) -> bool:
        """Add a reply, or refuse it by the site's name; whether it was added."""

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """The weighted mean of what was accepted, by name."""
