"""What stands in the one vector that a site sends under its masks: its update, its metrics and its weight."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from custom import tasks
from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from custom.egress import METRIC_BOUNDS, evaluation_metrics, mean_image_shape, update_metrics
from custom.round_parts import every_update, update_shapes
from custom.stages import Stage, stage_of, stage_shapes
from custom.update_form import few_bits
from privacy.errors import InvalidPlan
from privacy.plan import GRID_UNITS_PER_CLIP_NORM
from privacy.secagg.encoding import Block, Encoding, IntegerEncoding, QuantisedEncoding, RingBits

Schema = Encoding | IntegerEncoding | QuantisedEncoding

# A metric is summed as value × weight beside weight, so that a site may lack it.
_METRIC, _PRESENT = "metric {}", "metric {} is there"


def gradient_shapes(experiment: ExperimentConfig, stage: Stage) -> Shapes:
    """Names and shapes of a stage's trained tensors, in its order: what is summed in a step with shared noise."""
    patterns = ("*",) if experiment.privacy is None else experiment.privacy.trained
    shapes = stage_shapes(experiment, stage)
    return {name: s for name, s in shapes.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def shared_noise_encoding(experiment: ExperimentConfig, task: str, round_number: int) -> IntegerEncoding | None:
    """The schema of integers that carry a share of one noise; None where a site's vector has none of it.

    What is decoded is a mean over the sites: of gradients, divided by qN, or of mean images, divided by N.
    """
    privacy, image = experiment.privacy, mean_image_shape(experiment)
    if privacy is None or privacy.dp != "central_secagg":
        return None
    if task == tasks.TRAIN:
        shapes, clip_norm = gradient_shapes(experiment, stage_of(experiment, round_number)), privacy.clip_norm
        patients = privacy.sampling_rate * privacy.patients
    elif task == tasks.RELEASE and image is not None and privacy.mean_image is not None:
        shapes, clip_norm, patients = image, privacy.mean_image.clip_norm, float(privacy.patients)
    else:
        return None
    return IntegerEncoding(shapes=tuple(shapes.items()), unit=clip_norm / GRID_UNITS_PER_CLIP_NORM / patients)


def audit_encoding(experiment: ExperimentConfig, task: str) -> IntegerEncoding | None:
    """The schema of an audit's counts, which are summed as they are; None outside an audit."""
    if experiment.audit is None:
        return None
    from custom.audit_counts import AUDIT_TASKS, audit_shapes

    if task not in AUDIT_TASKS:
        return None
    return IntegerEncoding(shapes=tuple(sorted(audit_shapes(experiment, task).items())), unit=1.0)


def session_encoding(
    experiment: ExperimentConfig,
    task: str,
    round_number: int,
    *,
    parties: int,
    bounds: NDArray[np.float32] | None = None,
) -> Schema:
    """The schema of what the sites sum in a task of a round.

    Args:
        experiment, task, round_number: of which.
        parties: on the roster.
        bounds: the task's, with an update of few bits; None where only the size is asked for.

    Raises:
        InvalidPlan: a task that sums nothing, or too many parties for the ring.
    """
    integers = audit_encoding(experiment, task) or shared_noise_encoding(experiment, task, round_number)
    if integers is not None:
        return integers
    asked = experiment.secure_aggregation
    assert asked is not None  # noqa: S101 - whoever calls this runs a job that has the block
    shapes, metrics = _content(experiment, task, round_number)
    if task == tasks.TRAIN and experiment.updates is not None and experiment.updates.bits is not None:
        return few_bits(shapes, experiment, bounds, parties=parties)
    bound = _mean_image_bound(experiment) if task == tasks.RELEASE else asked.update_bound
    blocks = [Block(name=name, shape=shape, bound=bound) for name, shape in sorted(shapes.items())]
    for name in sorted(metrics):
        blocks.append(Block(name=_METRIC.format(name), shape=(), bound=METRIC_BOUNDS[name]))
        blocks.append(Block(name=_PRESENT.format(name), shape=(), bound=1.0))
    weighted = experiment.federation.weighting == "patients" and bool(shapes)
    return Encoding(
        blocks=tuple(blocks),
        parties=parties,
        max_weight=asked.max_weight if weighted else 1.0,
        ring_bits=session_ring(experiment, task),
    )


def session_ring(experiment: ExperimentConfig, task: str) -> RingBits:
    """Bits of the ring of a task's sum: counts, and figures in a job with few bits, need 32."""
    asked = experiment.secure_aggregation
    assert asked is not None  # noqa: S101 - whoever calls this runs a job that has the block
    few = experiment.updates is not None and experiment.updates.bits is not None
    whole = experiment.audit is not None or (few and task != tasks.TRAIN)
    return 32 if whole else asked.ring_bits


def vector_forms(experiment: ExperimentConfig) -> frozenset[tuple[int, RingBits]]:
    """Coordinates and bits of every vector that the experiment sums."""
    summed = [(tasks.TRAIN, number) for number in every_update(experiment)] + [(tasks.EVALUATE, 0)]
    if mean_image_shape(experiment) is not None:
        summed.append((tasks.RELEASE, 0))
    if experiment.audit is not None:
        summed = [(task, 0) for task in (tasks.AUDIT_RANGE, tasks.AUDIT_TUNE, tasks.AUDIT_REPORT, tasks.AUDIT_COPIES)]
    return frozenset(
        (session_encoding(experiment, *each, parties=2).size, session_ring(experiment, each[0])) for each in summed
    )


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


def _mean_image_bound(experiment: ExperimentConfig) -> float:
    """Public bound on a pixel of a site's noisy mean image.

    Air is 0 and the window's top 2, summed over the site's patients and divided by the announced number of them: for up
    to twice as many as announced, and ten σ of noise.
    """
    privacy = experiment.privacy
    assert privacy is not None  # noqa: S101 - there is no such release otherwise
    assert privacy.mean_image is not None  # noqa: S101
    return 4.0 + 10 * privacy.mean_image.noise_multiplier * privacy.mean_image.clip_norm / privacy.patients


def _content(experiment: ExperimentConfig, task: str, round_number: int) -> tuple[Shapes, frozenset[str]]:
    image = mean_image_shape(experiment)
    if task == tasks.TRAIN:
        return update_shapes(experiment, round_number), update_metrics(experiment)
    if task == tasks.EVALUATE:
        return {}, evaluation_metrics(experiment)
    if task == tasks.RELEASE and image is not None:
        return image, frozenset()
    raise InvalidPlan(argument="task", value=task, remedy="nothing is summed in it")
