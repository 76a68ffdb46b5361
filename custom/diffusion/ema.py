"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def updated_ema(ema: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """ema ← decay·ema + (1-decay)·weights, tensor by tensor.

    Args:
        ema: average so far, by name.
        weights: new weights, the same names and shapes.
        decay: in [0, 1); 0 follows the weights.
    """
    return {name: average.lerp(weights[name], 1 - decay) for name, average in ema.items()}
