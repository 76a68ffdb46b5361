"""What a round's updates have in common, though some of them may be malicious."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from custom.egress import WEIGHT, EgressRefused
from custom.federation_config import RobustConfig
from custom.robust import clipped, combined
from custom.update_form import acceptable

Judge = Callable[[Mapping[str, NDArray[np.float32]]], "str | None"]


class RobustAverage:
    """One round's updates, combined by a rule of :mod:`custom.robust`.

    Holds all of them: memory grows with the number of sites, as it must for a median. Their order of arrival changes
    nothing.

    Args:
        shapes: names and shapes of the model's tensors.
        config: the experiment, which says what an acceptable update is.
        robust: clipping and rule.
        judge: says why an update, clipped, is to be refused; None if it is not. Called for one update at a time.
    """

    def __init__(
        self, shapes: Shapes, config: ExperimentConfig, robust: RobustConfig, judge: Judge | None = None
    ) -> None:
        self._shapes = shapes
        self._config = config
        self._robust = robust
        self._judge = judge
        self._lock = threading.Lock()
        self._updates: dict[str, tuple[dict[str, NDArray[np.float32]], float]] = {}  # with their weights
        self.accepted: dict[str, dict[str, float]] = {}
        self.refused: dict[str, str] = {}
        self.metrics: dict[str, float] = {}  # each site's are known

    def add(self, site: str, arrays: Any, meta: Mapping[str, Any]) -> bool:
        """Hold a reply against the list of what may be sent, clip and judge it; keep it, or refuse it by name.

        Args:
            site: who sent it, as NVFlare authenticated it.
            arrays: weight difference by name.
            meta: ``weight`` and ``metrics``.

        Returns:
            Whether it was kept. A second reply of the same site is refused.
        """
        with self._lock:
            try:
                if site in self.accepted:
                    raise EgressRefused("a second reply in one round")
                update = acceptable(arrays, meta, shapes=self._shapes, config=self._config)
                update = self._judged(update)
            except EgressRefused as error:
                self.refused[site] = str(error)
                return False
            self._updates[site] = update, float(meta[WEIGHT])
            self.accepted[site] = {name: float(value) for name, value in meta["metrics"].items()}
            return True

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """What the rule makes of the accepted updates, by name.

        Raises:
            ValueError: fewer than the rule needs.
        """
        updates, weights = [], []
        for site in sorted(self._updates):
            update, weight = self._updates[site]
            updates.append(update)
            weights.append(weight)
        return combined(updates, weights, self._robust)

    def _judged(self, arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        norm = self._robust.clip_norm
        update = dict(arrays) if norm is None else clipped(arrays, norm=norm)
        reason = None if self._judge is None else self._judge(update)
        if reason is not None:
            raise EgressRefused(reason)
        return update
