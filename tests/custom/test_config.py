from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

from custom.config import ExperimentConfig
from custom.federation_config import FederationConfig
from custom.job_plan import privacy_plan
from custom.model_config import PRESETS, TrainingConfig
from custom.strict import ConfigError


def changed(experiment: ExperimentConfig, path: str, value: object) -> dict[str, object]:
    values = experiment.to_json()
    place = values
    *parents, last = path.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = value
    return values


def test_json_round_trip_gives_an_equal_configuration_and_hash(experiment: ExperimentConfig) -> None:
    again = ExperimentConfig.from_json(json.loads(json.dumps(experiment.to_json())))
    assert again == experiment
    assert again.sha256 == experiment.sha256


def test_hash_changes_with_any_value(experiment: ExperimentConfig) -> None:
    assert replace(experiment, seed=4).sha256 != experiment.sha256


def test_network_may_be_a_preset(experiment: ExperimentConfig) -> None:
    assert ExperimentConfig.from_json(changed(experiment, "network", "base")).network == PRESETS["base"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.lerning_rate", 0.1),
        ("unknown", 1),
        ("training.batch_size", "16"),
        ("training.batch_size", True),
        ("training.batch_size", 0),
        ("training.learning_rate", float("nan")),
        ("training", None),
        ("network", "huge"),
        ("network.channels", [8]),
        ("network.channels", [9, 16]),
        ("network.attention", [True]),
        ("network.head_channels", 7),
        ("schedule.noise", "linear"),
        ("schedule.timesteps", 1),
        ("federation.rounds", 0),
        ("federation.clients_per_round", 1),
        ("federation.max_update_norm", 0.0),
        ("federation.server_ema", 1.0),
        ("sampling.steps", 5000),
        ("sampling.evaluation_images", 1),
        ("preprocess.size", 17),
        ("preprocess.window_hu", [1]),
        ("preprocess.window_hu", [400, -1000]),
        ("name", "../elsewhere"),
        ("seed", -1),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(experiment: ExperimentConfig, path: str, value: object) -> None:
    with pytest.raises(ConfigError, match=path.rpartition(".")[2]):
        ExperimentConfig.from_json(changed(experiment, path, value))


def test_missing_value_is_named(experiment: ExperimentConfig) -> None:
    values = experiment.to_json()
    del values["training"]["steps_per_round"]
    with pytest.raises(ConfigError, match=r"training\.steps_per_round.*missing"):
        ExperimentConfig.from_json(values)


PRIVACY = {
    "patients": 100,
    "delta": 1e-3,
    "clip_norm": 1.0,
    "sampling_rate": 0.1,
    "noise_multiplier": 1.5,
    "mean_image": {"clip_norm": 20.0, "noise_multiplier": 4.0},
}


def private(experiment: ExperimentConfig) -> dict[str, object]:
    base = replace(
        experiment,
        training=replace(experiment.training, batch_size=4),
        federation=FederationConfig(rounds=3, weighting="uniform"),
    )
    return {
        **base.to_json(),
        "training": {"steps_per_round": 5},
        "privacy": copy.deepcopy(PRIVACY),
    }


def test_the_plan_is_that_of_the_experiment(experiment: ExperimentConfig) -> None:
    config = ExperimentConfig.from_json(private(experiment))
    plan = privacy_plan(config)
    assert plan is not None
    assert (plan.patients, plan.config.rounds, plan.config.steps_per_round) == (100, 3, 5)
    assert (plan.noise_multiplier, plan.config.release_noise_multiplier) == (1.5, 4.0)
    assert list(plan.releases()) == ["before-training", "round-0000", "round-0001", "round-0002"]
    assert ExperimentConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert privacy_plan(experiment) is None


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("training.batch_size", 16, "batch_size"),
        ("training.gradient_clip", 1.0, "gradient_clip"),
        ("federation.weighting", "patients", "weighting"),
        ("privacy.delta", 0.0, "delta"),
        ("privacy.sampling_rate", 1.5, "sampling_rate"),
        ("privacy.clip_norm", -1.0, "clip_norm"),
        ("privacy.target_epsilon", 8.0, "target_epsilon, noise_multiplier"),
        ("privacy.noise_multiplier", None, "target_epsilon, noise_multiplier"),
        ("privacy.patients", 0, "patients"),
        ("privacy.trained", [], "trained"),
        ("privacy.epsilon", 8.0, "epsilon"),
        ("privacy.mean_image.noise_multiplier", 0.0, "noise_multiplier"),
        ("privacy.adaptive_clipping", {"target_quantile": 0.5}, "adaptive_clipping"),
        ("start_from", "../models/a", "start_from"),
    ],
)
def test_a_private_job_that_would_leak_or_means_nothing_is_refused_by_name(
    experiment: ExperimentConfig, path: str, value: object, named: str
) -> None:
    values = private(experiment)
    place = values
    *parents, last = path.split(".")
    for parent in parents:
        place = place[parent]  # type: ignore[assignment]
    place[last] = value
    with pytest.raises(ConfigError, match=named):
        ExperimentConfig.from_json(values)


def test_without_privacy_there_is_a_batch_size(experiment: ExperimentConfig) -> None:
    with pytest.raises(ConfigError, match=r"training\.batch_size"):
        replace(experiment, training=TrainingConfig(steps_per_round=1))
