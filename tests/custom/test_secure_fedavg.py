"""What the server makes of groups' sums, without NVFlare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from custom import tasks
from custom.codec import TaskHeader
from custom.config import ExperimentConfig
from custom.controllers.diffusion_fedavg import RoundVoid
from custom.controllers.secure_fedavg import MaskedAverage, SecureFedAvg
from custom.egress import EgressRefused
from custom.federation_config import RobustConfig
from custom.secure_config import SecureAggregationConfig

HEADER = TaskHeader(run_id="run", round_number=0, config_sha256="0", schedule_sha256="0")
SITES = [f"site-{number}" for number in range(8)]


@pytest.fixture
def grouped_experiment(experiment: ExperimentConfig) -> ExperimentConfig:
    """Four groups of two, with a median over the three that it needs."""
    robust = RobustConfig(rule="median", malicious=1, groups=4)
    federation = replace(experiment.federation, min_responses=8, robust=robust)
    return replace(experiment, federation=federation, secure_aggregation=SecureAggregationConfig())


class Sums(SecureFedAvg):
    """Each group's sum is a one; those of some sites fail.

    Args:
        failures: by site, what its group's sum raises.
    """

    def __init__(self, failures: dict[str, Exception]) -> None:
        super().__init__()
        self._failures = failures

    def info(self, *_: Any, **__: Any) -> None:
        """No NVFlare, no log."""

    def _summed_once(self, task: str, arrays: Any, header: TaskHeader, asked: list[str], *_: Any) -> MaskedAverage:
        for site in asked:
            if site in self._failures:
                raise self._failures[site]
        ones = {"a": np.ones(2, np.float32)}
        return MaskedAverage(arrays=ones, metrics={}, accepted={site: {} for site in asked}, refused={})


@pytest.mark.parametrize("failure", [EgressRefused("update norm"), RoundVoid("too few")], ids=["too long", "too few"])
def test_a_group_without_an_acceptable_sum_leaves_the_round_to_the_others(
    grouped_experiment: ExperimentConfig, failure: Exception
) -> None:
    average = Sums({"site-3": failure})._ask(tasks.TRAIN, {}, HEADER, SITES, {"a": (2,)}, grouped_experiment)
    assert average.mean()["a"].tolist() == [1.0, 1.0]
    assert len(average.accepted) == 6
    assert len(average.refused) == 2
    assert average.refused["site-3"] == "its group gave no sum"


def test_fewer_groups_than_the_rule_needs_are_no_round(grouped_experiment: ExperimentConfig) -> None:
    failures: dict[str, Exception] = {site: EgressRefused("update norm") for site in SITES[:4]}
    with pytest.raises(RoundVoid, match=r"groups gave a sum; federation\.robust\.rule needs 3"):
        Sums(failures)._ask(tasks.TRAIN, {}, HEADER, SITES, {"a": (2,)}, grouped_experiment)


def test_groups_means_are_clipped_and_judged_like_updates(grouped_experiment: ExperimentConfig) -> None:
    federation = grouped_experiment.federation
    robust = replace(federation.robust, clip_norm=0.5, reference=True)  # type: ignore[type-var]
    strict = replace(grouped_experiment, federation=replace(federation, robust=robust))

    class Judged(Sums):
        def _judge(self, *_: Any) -> Any:
            reasons = iter(["loss", None, None, None])  # of the first group
            return lambda update: next(reasons)

    average = Judged({})._ask(tasks.TRAIN, {}, HEADER, SITES, {"a": (2,)}, strict)
    np.testing.assert_allclose(average.mean()["a"], 0.5 / np.sqrt(2), rtol=1e-6)
    assert sorted(average.refused.values()) == ["loss", "loss"]
    assert not set(average.refused) & set(average.accepted)
