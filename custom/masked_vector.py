"""What stands in the one vector that a site sends under its masks: its update, its metrics and its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from custom import tasks
from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes, parameter_shapes
from custom.egress import METRIC_BOUNDS, evaluation_metrics, mean_image_shape, update_metrics
from privacy.errors import InvalidPlan
from privacy.secagg.encoding import Block, Encoding

# A metric is summed as value × weight beside weight, so that a site may lack it.
_METRIC, _PRESENT = "metric {}", "metric {} is there"


def session_encoding(experiment: ExperimentConfig, task: str, *, parties: int) -> Encoding:
    """The schema of what the sites sum in a task, for a roster of so many sites.

    Raises:
        InvalidPlan: a task that sums nothing, or too many parties for the ring.
    """
    asked = experiment.secure_aggregation
    assert asked is not None  # noqa: S101 - whoever calls this runs a job that has the block
    shapes, metrics = _content(experiment, task)
    blocks = [Block(name=name, shape=shape, bound=asked.update_bound) for name, shape in sorted(shapes.items())]
    for name in sorted(metrics):
        blocks.append(Block(name=_METRIC.format(name), shape=(), bound=METRIC_BOUNDS[name]))
        blocks.append(Block(name=_PRESENT.format(name), shape=(), bound=1.0))
    weighted = experiment.federation.weighting == "patients" and bool(shapes)
    return Encoding(
        blocks=tuple(blocks),
        parties=parties,
        max_weight=asked.max_weight if weighted else 1.0,
        ring_bits=asked.ring_bits,
    )


def vector_sizes(experiment: ExperimentConfig) -> frozenset[int]:
    """Coordinates of every vector that the experiment sums."""
    summed = [tasks.TRAIN, tasks.EVALUATE] + ([] if mean_image_shape(experiment) is None else [tasks.RELEASE])
    return frozenset(session_encoding(experiment, task, parties=2).size for task in summed)


def values_of(
    schema: Encoding, arrays: Mapping[str, NDArray[Any]], metrics: Mapping[str, float]
) -> dict[str, NDArray[Any]]:
    """What :meth:`Encoding.encode` takes; a metric that a site lacks counts for nothing."""
    values = dict(arrays)
    for name in METRIC_BOUNDS:
        if any(block.name == _METRIC.format(name) for block in schema.blocks):
            values[_METRIC.format(name)] = np.array(metrics.get(name, 0.0))
            values[_PRESENT.format(name)] = np.array(float(name in metrics))
    return values


def split_means(means: Mapping[str, NDArray[np.float64]]) -> tuple[dict[str, NDArray[np.float32]], dict[str, float]]:
    """The decoded means, as arrays and as metrics (those that at least one site had)."""
    arrays, metrics = {}, {}
    of_metrics = {_METRIC.format(name): name for name in METRIC_BOUNDS}
    present = {_PRESENT.format(name) for name in METRIC_BOUNDS}
    for name, mean in means.items():
        if name in of_metrics:
            share = float(means[_PRESENT.format(of_metrics[name])])
            if share > 1e-3:
                metrics[of_metrics[name]] = float(mean) / share
        elif name not in present:
            arrays[name] = mean.astype(np.float32)
    return arrays, metrics


def _content(experiment: ExperimentConfig, task: str) -> tuple[Shapes, frozenset[str]]:
    image = mean_image_shape(experiment)
    if task == tasks.TRAIN:
        return parameter_shapes(experiment.network, experiment.preprocess.spatial_dims), update_metrics(experiment)
    if task == tasks.EVALUATE:
        return {}, evaluation_metrics(experiment)
    if task == tasks.RELEASE and image is not None:
        return image, frozenset()
    raise InvalidPlan(argument="task", value=task, remedy="nothing is summed in it")
