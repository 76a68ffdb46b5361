"""How updates become one when some of them may be malicious.

Updates are finite float32 arrays under the same names: :mod:`custom.egress` refuses others. Of one tensor at a time all
sites' are copied. The rules but ``mean`` leave weights out, because a malicious site says what it likes of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from custom.federation_config import RobustConfig

Update = Mapping[str, NDArray[np.float32]]
Updates = Sequence[Update]


def clipped(update: Update, *, norm: float) -> dict[str, NDArray[np.float32]]:
    """An update scaled down to an L2 norm over all of its tensors; a shorter one as it is.

    Args:
        update: difference by name.
        norm: that it may have at most.
    """
    length = math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in update.values()))
    if length <= norm:
        return dict(update)
    return {name: np.asarray(array * (norm / length), np.float32) for name, array in update.items()}


def mean(updates: Updates, weights: Sequence[float]) -> dict[str, NDArray[np.float32]]:
    """The weighted mean (arXiv:1602.05629, alg. 1): a single malicious update moves it anywhere.

    Args:
        updates: at least one.
        weights: of each, positive.

    Raises:
        ValueError: no update.
    """
    _enough(updates, 1, "mean")
    return _by_tensor(updates, lambda stacked: np.average(stacked, axis=0, weights=np.asarray(weights, np.float64)))


def median(updates: Updates) -> dict[str, NDArray[np.float32]]:
    """The median of every coordinate (arXiv:1803.01498, def. 1), of an even number the middle two's mean.

    Within the honest updates' range as long as less than half are malicious.

    Raises:
        ValueError: no update.
    """
    _enough(updates, 1, "median")
    return _by_tensor(updates, lambda stacked: np.median(stacked, axis=0))


def trimmed_mean(updates: Updates, *, malicious: int) -> dict[str, NDArray[np.float32]]:
    """The mean of every coordinate without its f largest and its f smallest values (arXiv:1803.01498, def. 2).

    Args:
        updates: n > 2f.
        malicious: f.

    Raises:
        ValueError: fewer updates.
    """
    _enough(updates, 2 * malicious + 1, "trimmed_mean")
    last = len(updates) - malicious

    def trimmed(stacked: NDArray[np.float32]) -> NDArray[np.float64]:
        kept: NDArray[np.float64] = np.sort(stacked, axis=0)[malicious:last].mean(axis=0, dtype=np.float64)
        return kept

    return _by_tensor(updates, trimmed)


def multi_krum(updates: Updates, *, malicious: int) -> tuple[dict[str, NDArray[np.float32]], tuple[int, ...]]:
    """The mean of the n - f updates closest to their neighbours (Blanchard et al., NeurIPS 2017, sec. 4 and 5).

    An update's score is the sum of the squared distances to its n - f - 2 nearest others. What is far from the honest
    ones is left out; what a malicious site hides among them is not.

    Args:
        updates: n ≥ 2f + 3.
        malicious: f.

    Returns:
        The mean, and the places of the chosen updates in ascending order.

    Raises:
        ValueError: fewer updates.
    """
    _enough(updates, 2 * malicious + 3, "multi_krum")
    count = len(updates)
    distances = np.sort(_squared_distances(updates), axis=1)  # the first of each row is the update's own, 0
    scores = distances[:, 1 : count - malicious - 1].sum(axis=1)
    chosen = tuple(sorted(np.argsort(scores, kind="stable")[: count - malicious].tolist()))
    return mean([updates[place] for place in chosen], [1.0] * len(chosen)), chosen


def combined(updates: Updates, weights: Sequence[float], config: RobustConfig) -> dict[str, NDArray[np.float32]]:
    """The updates as one, by the rule of the configuration.

    Args:
        updates: of sites, or of groups of sites.
        weights: of each, positive; only ``mean`` heeds them.
        config: the rule and f.

    Raises:
        ValueError: fewer updates than the rule needs.
    """
    _enough(updates, config.fewest, config.rule)
    if config.rule == "mean":
        return mean(updates, weights)
    if config.rule == "median":
        return median(updates)
    if config.rule == "trimmed_mean":
        return trimmed_mean(updates, malicious=config.malicious)
    return multi_krum(updates, malicious=config.malicious)[0]


def _enough(updates: Updates, fewest: int, rule: str) -> None:
    if len(updates) < fewest:
        raise ValueError(
            f"updates = {len(updates)}: {rule} needs at least {fewest} with this federation.robust.malicious; "
            "raise federation.min_responses to that, or see the refusals of the round"
        )


def _by_tensor(
    updates: Updates, rule: Callable[[NDArray[np.float32]], NDArray[np.floating]]
) -> dict[str, NDArray[np.float32]]:
    return {name: np.asarray(rule(_stacked(updates, name)), np.float32) for name in updates[0]}


def _stacked(updates: Updates, name: str) -> NDArray[np.float32]:
    return np.stack([update[name] for update in updates])


def _squared_distances(updates: Updates) -> NDArray[np.float64]:
    """Between any two updates, over all tensors, [n, n]."""
    total = np.zeros((len(updates), len(updates)))
    for name in updates[0]:
        stacked = _stacked(updates, name).reshape(len(updates), -1)
        for place, row in enumerate(stacked):
            apart = np.square(np.subtract(stacked[place + 1 :], row, dtype=np.float64)).sum(axis=1)
            total[place, place + 1 :] += apart
    mirrored: NDArray[np.float64] = total + total.T
    return mirrored
