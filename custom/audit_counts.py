"""What a federated audit sends: names and shapes of the counts, and the agreement between two of its tasks.

audit_range    sites count the tuning half in a grid that fits every statistic       → the server agrees on ranges
audit_tune     sites count the tuning half in the agreed ranges, by kind of patient  → the server chooses
audit_report   sites count the report half of what was chosen                        → the outcomes
audit_copies   sites say which samples are too close to one of their patients
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from custom import tasks
from custom.audit_config import AuditConfig
from custom.audit_scores import TARGET, layout
from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from privacy.audit.pooling import COARSE_CELLS, FINE_CELLS, PooledChoice, Range
from privacy.audit.protocol import TRIMS

AUDIT_TASKS = (tasks.AUDIT_RANGE, tasks.AUDIT_TUNE, tasks.AUDIT_REPORT, tasks.AUDIT_COPIES)

Counts = Mapping[str, NDArray[np.int64]]

# In a report: patients of the site, and whether its policy lets its own figures be shown.
PATIENTS, SHOWN, MOVED = "patients", "shown", "moved"
# How many images were scored and, without masks, the bytes of the hash of the site's manifest.
MANIFEST, IMAGES = "manifest_sha256", "images"
# Of the target's attacks: members flagged in every seed; and how many members are in how many report halves.
FLAGGED, APPEARANCES = "flagged", "appearances"
# In a copy screen, for both methods: which samples are too close; and, as whole numbers, copies on equal terms, the
# same of the control, and the p-value of the excess.
METHODS = ("embedding", "pixels")
CLOSE, MATCHED, CONTROL, P_VALUE = "close", "matched", "control", "p_value"
MATCHED_SCALE, P_VALUE_SCALE = 100, 1_000_000


def column_name(kind: str, group: str, attack: str) -> str:
    """Name of one attack's counts."""
    return f"{kind}/{group}/{attack}"


@dataclass(frozen=True, kw_only=True)
class AttackChoice:
    """What was chosen for one attack, by seed.

    Attributes:
        group: of the attack.
        attack: its name.
        by_seed: choice under each seed.
        thresholds: cell from which on (sign -1: up to which) a patient is called a member, under each seed.
    """

    group: str
    attack: str
    by_seed: tuple[PooledChoice, ...]
    thresholds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AttackRanges:
    """Second grid of every setting of one attack.

    Attributes:
        group: of the attack.
        attack: its name.
        ranges: one for each setting.
    """

    group: str
    attack: str
    ranges: tuple[Range, ...]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the server tells the sites beside a task of the audit.

    Attributes:
        ranges: after the first task.
        choices: after the second.
    """

    ranges: tuple[AttackRanges, ...] = ()
    choices: tuple[AttackChoice, ...] = ()


def audit_shapes(experiment: ExperimentConfig, task: str) -> Shapes:
    """Names and shapes of all counts that answer a task; nothing else may leave in it."""
    config = audit_of(experiment)
    groups = layout(config, experiment)
    seeds = len(config.seeds)
    shapes: dict[str, tuple[int, ...]] = {}
    if task == tasks.AUDIT_COPIES:
        for method in METHODS:
            shapes[f"{CLOSE}/{method}"] = (config.samples,)
            shapes |= {f"{name}/{method}": () for name in (MATCHED, CONTROL, P_VALUE)}
        return shapes
    for group, attacks in groups.items():
        for attack, settings in attacks.items():
            if task == tasks.AUDIT_RANGE:
                shapes[column_name("range", group, attack)] = (len(settings), COARSE_CELLS)
            elif task == tasks.AUDIT_TUNE:
                shape = (seeds, len(settings), len(TRIMS), 2, FINE_CELLS)
                shapes[column_name("tune", group, attack)] = shape
            else:
                for kind in ("patients", "slices"):
                    shapes[column_name(kind, group, attack)] = (seeds, 2, FINE_CELLS)
                if group == TARGET:
                    shapes[column_name(FLAGGED, group, attack)] = ()
    if task == tasks.AUDIT_REPORT:
        shapes |= {PATIENTS: (2,), IMAGES: (), SHOWN: (), MOVED: (), APPEARANCES: (seeds + 1,)}
        if experiment.secure_aggregation is None:
            shapes[MANIFEST] = (32,)
    return shapes


def audit_of(experiment: ExperimentConfig) -> AuditConfig:
    """The experiment's block; only audits ask."""
    assert experiment.audit is not None  # noqa: S101 - whoever calls this runs an audit
    return experiment.audit
