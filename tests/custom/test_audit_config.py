"""What an audit is told to do, and what it must be told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from custom.audit_config import AuditConfig
from custom.config import ExperimentConfig
from custom.egress import AUDIT_COUNTS, statistics_that_leave
from custom.strict import ConfigError


@pytest.mark.parametrize(
    "values",
    [
        {"seeds": (0, 1)},
        {"seeds": (0, 1, 1)},
        {"noise_levels": ()},
        {"noise_levels": (0.2, 0.1)},
        {"noise_levels": (0.0, 0.1)},
        {"noise_levels": (0.95,)},
        {"gradient_levels": (0.1, 0.1)},
        {"patients": 3},
        {"images_per_patient": 0},
        {"reference_steps": -1},
        {"control_steps": 0},
        {"embedding_steps": 0},
        {"samples": -1},
    ],
)
def test_impossible_values_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"audit.{next(iter(values))}"):
        AuditConfig(**values)


def test_an_experiment_keeps_its_audit(experiment: ExperimentConfig) -> None:
    audited = replace(experiment, audit=AuditConfig(model="small"))
    assert ExperimentConfig.from_json(audited.to_json()) == audited
    assert statistics_that_leave(audited) == {AUDIT_COUNTS}


def test_an_audit_names_a_model(experiment: ExperimentConfig) -> None:
    for model in (None, "", "../elsewhere"):
        with pytest.raises(ConfigError, match=r"audit\.model"):
            replace(experiment, audit=AuditConfig(model=model))


def test_an_audit_trains_nothing(private_experiment: ExperimentConfig, experiment: ExperimentConfig) -> None:
    with pytest.raises(ConfigError, match="privacy"):
        replace(private_experiment, audit=AuditConfig(model="small"))
    with pytest.raises(ConfigError, match="start_from"):
        replace(experiment, audit=AuditConfig(model="small"), start_from="phantom")
