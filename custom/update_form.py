"""What a site makes of its weight difference before it leaves, and what the server reads from it.

First the norm is bounded, if the job says so. Then, in a job with ``updates.bits``, numbers are rounded to few bits;
what is lost stays at the site for its next update. Under secure aggregation all sites need one scale: the server says a
bound for each tensor, made from what it has learnt of earlier rounds, which is public.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from custom.egress import EgressRefused, check_update
from custom.quantised import NUMBERS, SCALES, dequantised, fed_back, lost, packed_bytes, quantised
from custom.robust import clipped
from custom.stages import Span, Stage
from privacy.secagg.encoding import Block, QuantisedEncoding

BOUNDS = "bounds"  # in a task: float32 [tensors], in the sorted order of names
# Bound of a tensor: so many times the last mean difference's root mean square. What lies beyond waits for later rounds.
BOUND_IN_RMS = 4.0
# Before there is one: this share of the sum of the learning rates, which AdamW hardly moves a weight beyond.
FIRST_SHARE = 0.1
LEAST_BOUND = 1e-8

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Formed:
    """A site's update as it leaves.

    Attributes:
        arrays: by name; under secure aggregation float32 that a ring of few bits holds exactly.
        lost: what the site owes from now on, by name.
    """

    arrays: dict[str, NDArray[Any]]
    lost: dict[str, Tensor]


def formed(
    difference: Mapping[str, Tensor],
    owed: Mapping[str, Tensor],
    config: ExperimentConfig,
    bounds: NDArray[np.float32] | None = None,
) -> Formed:
    """A weight difference as it leaves a site.

    Args:
        difference: of a round, by name.
        owed: what earlier updates lost, by name.
        config: the experiment.
        bounds: the task's, under secure aggregation with few bits.

    Raises:
        EgressRefused: NaN or infinity in an update of few bits, or bounds that are none.
        EncodingRefused: NaN or infinity in one under masks.
    """
    arrays: dict[str, NDArray[Any]] = {name: tensor.numpy() for name, tensor in difference.items()}
    norm = None if config.federation.robust is None else config.federation.robust.clip_norm
    updates = config.updates
    if updates is None or updates.bits is None:
        return Formed(arrays=arrays if norm is None else clipped(arrays, norm=norm), lost={})
    # What a site owes counts towards the bound on its norm, and what that bound takes away is gone.
    wanted = fed_back(arrays, {name: tensor.numpy() for name, tensor in owed.items()})
    wanted = wanted if norm is None else clipped(wanted, norm=norm)
    shapes = {name: array.shape for name, array in wanted.items()}
    if config.secure_aggregation is None:
        leaves = quantised(wanted, bits=updates.bits)
        sent = dequantised(leaves, shapes=shapes, bits=updates.bits)
    else:
        if bounds is None:
            raise EgressRefused(f"{BOUNDS}: missing; the server must say one for each tensor")
        schema = few_bits(shapes, config, bounds, parties=1)
        leaves = sent = schema.values(schema.integers(wanted))
    left = {name: torch.from_numpy(array) for name, array in lost(wanted, sent).items()}
    return Formed(arrays=dict(leaves), lost={**owed, **left})


def read(arrays: Arrays, *, shapes: Shapes, config: ExperimentConfig) -> Arrays:
    """The float32 arrays that an update stands for; one that was not rounded is returned as it came.

    Raises:
        EgressRefused: an update of few bits that cannot be one.
    """
    bits = None if config.updates is None else config.updates.bits
    if bits is None or config.secure_aggregation is not None:
        return arrays
    return dequantised(arrays, shapes=shapes, bits=bits)


def may_stand_for(arrays: Arrays, shapes: Shapes, config: ExperimentConfig) -> bool:
    """Whether these are the names of a set of tensors, or of few bits the number of them."""
    if set(arrays) == {NUMBERS, SCALES} and config.updates is not None and config.updates.bits is not None:
        sizes = np.size(arrays[NUMBERS]), np.size(arrays[SCALES])
        return sizes == (packed_bytes(shapes, bits=config.updates.bits), len(shapes))
    return set(arrays) == set(shapes)


def acceptable(arrays: Any, meta: Mapping[str, Any], *, shapes: Shapes, config: ExperimentConfig) -> Arrays:
    """The float32 arrays of a reply that may go into a mean.

    Args:
        arrays: weight difference by name, as it came.
        meta: ``weight`` and ``metrics``.
        shapes: names and shapes that the round's update has.
        config: the experiment.

    Raises:
        EgressRefused: as :func:`custom.egress.check_update`, or no weight difference at all.
    """
    if not isinstance(arrays, Mapping):
        raise EgressRefused("no weight difference in it")
    update = read(arrays, shapes=shapes, config=config)
    check_update(update, meta, shapes=shapes, config=config)
    return update


def few_bits(
    shapes: Shapes, config: ExperimentConfig, bounds: NDArray[np.float32] | None, *, parties: int
) -> QuantisedEncoding:
    """The schema of an update of few bits under masks.

    Args:
        shapes: of its tensors.
        config: the experiment.
        bounds: of each tensor in the sorted order of names; None where only the size is asked for.
        parties: on the roster.

    Raises:
        EgressRefused: bounds that are none.
        InvalidPlan: too many parties for the ring.
    """
    assert config.updates is not None  # noqa: S101 - whoever calls this has looked
    assert config.updates.bits is not None  # noqa: S101
    assert config.secure_aggregation is not None  # noqa: S101
    limits = np.ones(len(shapes), np.float32) if bounds is None else bounds
    valid = type(limits) is np.ndarray and limits.dtype == np.float32 and limits.shape == (len(shapes),)
    if not valid or not np.isfinite(limits).all() or not (limits > 0).all():
        raise EgressRefused(f"{BOUNDS}: must be {len(shapes)} positive float32 numbers from the server")
    return QuantisedEncoding(
        blocks=tuple(
            Block(name=name, shape=shapes[name], bound=float(limit))
            for name, limit in zip(sorted(shapes), limits, strict=True)
        ),
        bits=config.updates.bits,
        parties=parties,
        ring_bits=config.secure_aggregation.ring_bits,
    )


def first_bounds(shapes: Shapes, stage: Stage, span: Span) -> dict[str, Tensor]:
    """Bounds before there is a mean difference of the tensors, by name."""
    rates = sum(stage.learning_rate(span.first + step) for step in range(span.steps))
    return {name: torch.tensor(FIRST_SHARE * rates) for name in shapes}


def next_bounds(mean: Mapping[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    """Bounds of the next update of the same tensors, by name."""
    return {
        name: torch.tensor(max(BOUND_IN_RMS * float(np.sqrt(np.square(array, dtype=np.float64).mean())), LEAST_BOUND))
        for name, array in mean.items()
    }
