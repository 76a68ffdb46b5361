"""The complete list of what may leave a site, and the refusal of everything else.

Under differential privacy nothing may leave but what was noised and charged: the weight difference and, if the job asks
for it, the mean image before training; beside them a weight of 1 and no metric.

Knows nothing of NVFlare: :class:`custom.filters.egress_gate.EgressGate` and the executor apply it to every reply.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from custom.round_parts import every_update
from privacy.policy import RULES

WEIGHT = "weight"
METRICS = "metrics"
MEAN_IMAGE = "mean_image"  # the one array of the release before training
AUDIT_COUNTS = "audit_counts"  # in a site's policy: the counts of a federated audit

# Beside NVFlare's own codes, what a site says when it refuses for privacy's sake: no more than which rule.
BUDGET_SPENT = "PRIVACY_BUDGET_SPENT"
SECAGG_REFUSED = "SECURE_AGGREGATION_REFUSED"
POLICY_CODES = {rule: f"SITE_POLICY_{rule.upper().replace('.', '_')}" for rule in RULES}

MOST_PATIENTS = 1_000_000  # no site has more; a larger weight would drown or overflow the others' sum
MOST_COUNTED = 10_000_000  # images or patients in one cell of an audit's counts

# Public bounds under secure aggregation: what lies beyond counts as much as the bound.
METRIC_BOUNDS: Mapping[str, float] = {
    "train_loss": 100.0,
    "held_out_loss": 100.0,
    "effnet_kid": 100.0,
    "effnet_kid_baseline": 100.0,
    "effnet_kid_untrained": 100.0,
    "personal_held_out_loss": 100.0,
    "local_held_out_loss": 100.0,
    "seconds": 1e6,
}

UPDATE_METRICS = frozenset({"train_loss", "held_out_loss", "seconds"})
EVALUATION_METRICS = frozenset(
    {"held_out_loss", "effnet_kid", "effnet_kid_untrained", "effnet_kid_baseline", "seconds"}
)
# Beside them from a job with personal models.
PERSONAL_METRICS = frozenset({"personal_held_out_loss", "local_held_out_loss"})


def update_metrics(config: ExperimentConfig) -> frozenset[str]:
    """Names of the metrics that must stand beside every update; a ring for a few bits has no room for them."""
    few_bits = config.updates is not None and config.updates.bits is not None
    silent = config.privacy is not None or (few_bits and config.secure_aggregation is not None)
    return frozenset() if silent else UPDATE_METRICS


def evaluation_metrics(config: ExperimentConfig) -> frozenset[str]:
    """Names of the metrics that may answer an evaluation."""
    if config.privacy is not None:
        return frozenset()
    return EVALUATION_METRICS | (PERSONAL_METRICS if config.personal is not None else frozenset())


def statistics_that_leave(config: ExperimentConfig) -> frozenset[str]:
    """Everything that the job would send about a site's patients without noise; the site's policy must allow each."""
    if config.audit is not None:
        return frozenset({AUDIT_COUNTS})
    counted = {WEIGHT} if config.federation.weighting == "patients" else set()
    return update_metrics(config) | evaluation_metrics(config) | counted


def mean_image_shape(config: ExperimentConfig) -> Shapes | None:
    """Name and shape of the release before training; None if the job asks for none."""
    if config.privacy is None or config.privacy.mean_image is None:
        return None
    return {MEAN_IMAGE: config.image_shape}


def released_shapes(config: ExperimentConfig) -> tuple[Shapes, ...]:
    """Names and shapes of every set of arrays that may leave: the mean image before training, each round's update."""
    image = mean_image_shape(config)
    return (*([] if image is None else [image]), *every_update(config).values())


class EgressRefused(Exception):
    """Something that is not on the list was about to leave; names what and why, never a value from a patient."""


def check_update(
    arrays: Mapping[str, Any], meta: Mapping[str, Any], *, shapes: Shapes, config: ExperimentConfig
) -> None:
    """Let a weight difference, or the mean image before training, pass, or raise.

    Args:
        arrays: what stands under the names of the model's tensors.
        meta: what is said beside them: ``weight`` and ``metrics``, nothing else.
        shapes: one of :func:`released_shapes`.
        config: the experiment; its ``max_update_norm`` bounds the L2 norm.

    Raises:
        EgressRefused: a missing, extra, misshapen, non-float32 or non-finite array, too long a difference, an unknown
            metric, a metric that is no finite number, or a weight outside what the experiment says.
    """
    check_arrays(arrays, shapes=shapes, max_norm=config.federation.max_update_norm)
    check_meta(meta, config=config, encrypted=False)


def check_meta(meta: Mapping[str, Any], *, config: ExperimentConfig, encrypted: bool) -> None:
    """Let what is said beside an update pass, or raise as :func:`check_update`; an encrypted one's weight is inside."""
    _refuse_unknown(set(meta), {WEIGHT, METRICS}, "meta")
    weight = meta.get(WEIGHT)
    if encrypted or config.federation.weighting == "uniform":
        if weight != 1.0:
            raise EgressRefused("weight: only 1.0 may leave with uniform weighting or beside an encrypted update")
    elif type(weight) is not float or not (1 <= weight <= MOST_PATIENTS and weight.is_integer()):
        raise EgressRefused(f"weight: must be a whole number of training patients up to {MOST_PATIENTS}, as a float")
    metrics: Any = meta.get(METRICS)
    wanted = update_metrics(config)
    check_metrics(metrics, allowed=wanted)
    if set(metrics) != wanted:
        raise EgressRefused(f"metrics: must be all of {sorted(wanted)}")


def check_masked(vector: Any, *, forms: Collection[tuple[int, int]]) -> None:
    """Let a masked vector pass, or raise: that it is masked, nobody but its sender can tell.

    Args:
        vector: what would leave.
        forms: coordinates and bits of the ring of the experiment's vectors.

    Raises:
        EgressRefused: anything but one flat array of that many unsigned integers of that ring.
    """
    flat = type(vector) is np.ndarray and vector.ndim == 1
    if not flat or all(vector.size != size or vector.dtype != np.dtype(f"uint{bits}") for size, bits in forms):
        said = ", ".join(f"{size} of {bits} bits" for size, bits in sorted(forms))
        raise EgressRefused(f"masked vector: must be unsigned integers of the ring, {said}")


def check_arrays(arrays: Mapping[str, Any], *, shapes: Shapes, max_norm: float) -> None:
    """Check names, types, shapes, finiteness and joint L2 norm; the server holds every reply against the same list.

    Raises:
        EgressRefused: as :func:`check_update`.
    """
    _refuse_unknown(set(arrays), set(shapes), "tensor")
    missing = set(shapes) - set(arrays)
    if missing:
        raise EgressRefused(f"tensor {min(missing)!r} and {len(missing) - 1} more: missing")
    square = 0.0
    for name, shape in shapes.items():
        array: NDArray[np.float32] = arrays[name]
        if type(array) is not np.ndarray or array.dtype != np.float32:
            raise EgressRefused(f"tensor {name!r}: must be a float32 array")
        if array.shape != shape:
            raise EgressRefused(f"tensor {name!r}: shape {array.shape}, must be {shape}")
        if not np.isfinite(array).all():
            raise EgressRefused(f"tensor {name!r}: holds NaN or infinity")
        square += float(np.square(array, dtype=np.float64).sum())
    if square > max_norm**2:
        raise EgressRefused(f"update norm {math.sqrt(square):.6g}: over federation.max_update_norm = {max_norm:g}")


def check_counts(arrays: Mapping[str, Any], *, shapes: Shapes) -> None:
    """Let the counts of an audit's task pass, or raise: integers under known names, and nothing beside them.

    Raises:
        EgressRefused: a missing, extra, misshapen or non-int64 array, or a count below 0 or beyond all bounds.
    """
    _refuse_unknown(set(arrays), set(shapes), "counts")
    missing = set(shapes) - set(arrays)
    if missing:
        raise EgressRefused(f"counts {min(missing)!r} and {len(missing) - 1} more: missing")
    for name, shape in shapes.items():
        array = arrays[name]
        if type(array) is not np.ndarray or array.dtype != np.int64 or array.shape != shape:
            raise EgressRefused(f"counts {name!r}: must be an int64 array of shape {shape}")
        if array.size and not 0 <= int(array.min()) <= int(array.max()) <= MOST_COUNTED:
            raise EgressRefused(f"counts {name!r}: must lie between 0 and {MOST_COUNTED}")


def check_metrics(metrics: Any, *, allowed: frozenset[str]) -> None:
    """Let a flat mapping of finite floats under known names pass, or raise :class:`EgressRefused`."""
    if not isinstance(metrics, Mapping):
        raise EgressRefused("metrics: must be a mapping from name to number")
    _refuse_unknown(set(metrics), set(allowed), "metric")
    for name, value in metrics.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            raise EgressRefused(f"metric {name!r}: must be a finite number")


def _refuse_unknown(found: set[Any], known: set[str], what: str) -> None:
    extra = found - known
    if extra:
        raise EgressRefused(f"{what}: {len(extra)} beyond the list of what may leave; remove what is not declared")
