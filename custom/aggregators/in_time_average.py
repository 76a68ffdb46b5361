"""Weighted average of updates, each added as it arrives."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from custom.egress import WEIGHT, EgressRefused
from custom.update_form import acceptable


class InTimeAverage:
    """FedAvg's weighted mean (arXiv:1602.05629, alg. 1) of one round, holding one sum whatever the number of sites.

    Sums in float64, so that the order of arrival moves the float32 result by no more than its last digit.

    Args:
        shapes: names and shapes of the model's tensors.
        config: the experiment, which says what an acceptable update is.
    """

    def __init__(self, shapes: Shapes, config: ExperimentConfig) -> None:
        self._shapes = shapes
        self._config = config
        self._lock = threading.Lock()
        self._sums = {name: np.zeros(shape, np.float64) for name, shape in shapes.items()}
        self._total = 0.0
        self.accepted: dict[str, dict[str, float]] = {}
        self.refused: dict[str, str] = {}
        self.metrics: dict[str, float] = {}  # each site's are known

    def add(self, site: str, arrays: Any, meta: Mapping[str, Any]) -> bool:
        """Hold a reply against the list of what may be sent; add it, or refuse it by the site's name.

        Args:
            site: who sent it, as NVFlare authenticated it.
            arrays: weight difference by name.
            meta: ``weight`` and ``metrics``.

        Returns:
            Whether it was added. A second reply of the same site is refused.
        """
        with self._lock:
            try:
                if site in self.accepted:
                    raise EgressRefused("a second reply in one round")
                update = acceptable(arrays, meta, shapes=self._shapes, config=self._config)
            except EgressRefused as error:
                self.refused[site] = str(error)
                return False
            weight = float(meta[WEIGHT])
            for name, array in update.items():
                self._sums[name] += weight * array.astype(np.float64)
            self._total += weight
            self.accepted[site] = {name: float(value) for name, value in meta["metrics"].items()}
            return True

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """The weighted mean of what was accepted, by name.

        Raises:
            ValueError: nothing was.
        """
        if not self.accepted:
            raise ValueError("accepted = 0: no update to average; see the refusals of the round")
        return {name: (total / self._total).astype(np.float32) for name, total in self._sums.items()}
