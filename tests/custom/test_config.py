from __future__ import annotations

import json
from dataclasses import replace

import pytest

from custom.config import PRESETS, ExperimentConfig
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
