"""The plan of differential privacy that sites, server and ``fedct plan`` derive from the same experiment."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from custom.config import ExperimentConfig
from custom.masked_vector import gradient_shapes
from custom.stages import stages
from privacy.plan import DPPlan, SharedNoise, calibrate


@lru_cache(maxsize=8)
def privacy_plan(experiment: ExperimentConfig) -> DPPlan | None:
    """The calibrated plan; None for an experiment without privacy.

    Raises:
        InvalidPlan: δ ≥ 1/patients, or a target that no noise can keep.
    """
    wanted, privacy, masks = experiment.dp_config(), experiment.privacy, experiment.secure_aggregation
    if wanted is None or privacy is None:
        return None
    if privacy.dp == "central_secagg" and masks is not None:
        shared = SharedNoise(
            honest_sites=masks.min_survivors - masks.colluding_sites,
            # Of the stage with the most: the bound grows with them.
            dimensions=max(
                sum(math.prod(shape) for shape in gradient_shapes(experiment, stage).values())
                for stage in stages(experiment)
            ),
            release_dimensions=None if privacy.mean_image is None else math.prod(experiment.image_shape),
        )
        wanted = replace(wanted, shared_noise=shared)
    return calibrate(wanted, patients=privacy.patients)
