from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from custom.config import ExperimentConfig
from custom.federation_config import (
    AvailabilityConfig,
    FederationConfig,
    PersonalConfig,
    RobustConfig,
    ServerOptimizerConfig,
    UpdatesConfig,
)
from custom.strict import ConfigError
from privacy.errors import InvalidPlan

Values = dict[str, Any]

MASKS: Values = {"secure_aggregation": {}}
UNIFORM: Values = {"federation": {"weighting": "uniform"}}
ENCRYPTED: Values = {"encryption": "ckks"}
MEDIAN: Values = {"federation": {"min_responses": 3, "robust": {"rule": "median"}}}


def merged(values: Mapping[str, Any], *changes: Mapping[str, Any]) -> Values:
    """JSON with changes in it, block by block."""
    result = json.loads(json.dumps(values))
    for change in changes:
        for key, value in change.items():
            inside = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if inside else value
    return dict(result)


@pytest.fixture(scope="session")
def bases(
    experiment: ExperimentConfig, private_experiment: ExperimentConfig, latent_experiment: ExperimentConfig
) -> dict[str, Values]:
    private = private_experiment.to_json()
    central = {"privacy": {"dp": "central_secagg"}, "training": {"steps_per_round": 1}, **MASKS}
    latent_private = {"privacy": {"mean_image": None}, "autoencoder": latent_experiment.to_json()["autoencoder"]}
    no_batch = {"autoencoder": {"training": {"batch_size": None}}}
    return {
        "plain": experiment.to_json(),
        "latent": latent_experiment.to_json(),
        "private": private,
        "central": merged(private, central),
        "private latent": merged(private, latent_private, no_batch),
    }


def refused(values: Values, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^(experiment\.)?{re.escape(named)} = "):
        ExperimentConfig.from_json(values)


def test_the_bases_are_whole(bases: dict[str, Values]) -> None:
    for values in bases.values():
        ExperimentConfig.from_json(values)


# ---- the blocks by themselves


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ({"availability": {}}, "availability"),
        ({"availability": {"probability": 0.5, "schedule": [["a", "b"]]}}, "availability"),
        ({"availability": {"probability": 0.0}}, "availability.probability"),
        ({"availability": {"probability": 1.5}}, "availability.probability"),
        ({"availability": {"schedule": []}}, "availability.schedule"),
        ({"availability": {"schedule": [["a", "b"], []]}}, "availability.schedule"),
        ({"availability": {"schedule": [["a", "b"], ["a"]]}}, "availability.schedule"),
        ({"availability": {"schedule": [["a", "a"]]}}, "availability.schedule"),
        ({"server_optimizer": {"name": "sgd"}}, "server_optimizer.name"),
        ({"server_optimizer": {"name": "adam", "learning_rate": 0.0}}, "server_optimizer.learning_rate"),
        ({"server_optimizer": {"name": "adam", "epsilon": 0.0}}, "server_optimizer.epsilon"),
        ({"server_optimizer": {"name": "momentum", "momentum": 0.0}}, "server_optimizer.momentum"),
        ({"server_optimizer": {"name": "momentum", "momentum": 1.0}}, "server_optimizer.momentum"),
        ({"server_optimizer": {"name": "adam", "second_momentum": 1.0}}, "server_optimizer.second_momentum"),
        ({"robust": {}}, "robust"),
        ({"robust": {"rule": "mode"}}, "robust.rule"),
        ({"robust": {"rule": "median", "malicious": -1}}, "robust.malicious"),
        ({"robust": {"rule": "trimmed_mean"}}, "robust.malicious"),
        ({"robust": {"rule": "multi_krum", "malicious": 0}}, "robust.malicious"),
        ({"robust": {"clip_norm": 0.0}}, "robust.clip_norm"),
        ({"robust": {"clip_norm": 1.0, "groups": 1}}, "robust.groups"),
        ({"robust": {"rule": "median", "groups": 2}}, "robust.groups"),
        ({"robust": {"rule": "multi_krum", "malicious": 1, "groups": 4}}, "robust.groups"),
        ({"robust": {"reference": True, "reference_tolerance": 0.0}}, "robust.reference_tolerance"),
        ({"robust": {"rule": "median"}}, "min_responses"),  # two updates have no median
        ({"min_responses": 4, "robust": {"rule": "trimmed_mean", "malicious": 2}}, "min_responses"),
        ({"min_responses": 4, "robust": {"rule": "multi_krum", "malicious": 1}}, "min_responses"),
        ({"rounds": 0}, "rounds"),
        ({"min_responses": 0}, "min_responses"),
        ({"clients_per_round": 1}, "clients_per_round"),
        ({"round_timeout_s": 0}, "round_timeout_s"),
        ({"max_update_norm": 0.0}, "max_update_norm"),
        ({"server_ema": 1.0}, "server_ema"),
        ({"server_ema": -0.1}, "server_ema"),
        ({"control_variates": "yes"}, "control_variates"),
    ],
)
def test_a_federation_that_cannot_be_meant_is_refused_by_name(
    bases: dict[str, Values], block: Values, named: str
) -> None:
    refused(merged(bases["plain"], {"federation": block}), f"federation.{named}")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"updates": {}}, "updates"),
        ({"updates": {"bits": 3}}, "updates.bits"),
        ({"updates": {"parts": []}}, "updates.parts"),
        ({"updates": {"parts": [["out.*"], []]}}, "updates.parts"),
        ({"updates": {"parts": ["out.*"]}}, "updates.parts[0]"),
        ({"updates": {"bits": 8, "train": "all"}}, "updates.train"),
        ({"updates": {"train": "all"}}, "updates.train"),
        ({"updates": {"parts": [["out.*"]], "train": "some"}}, "updates.train"),
        ({"personal": {"parts": ["out.*"], "below_timestep": 100}}, "personal.below_timestep"),
        ({"personal": {"parts": []}}, "personal.parts"),
        ({"personal": {"below_timestep": 0}}, "personal.below_timestep"),
        ({"personal": {"shared_rounds": 0}}, "personal.shared_rounds"),
        ({"personal": {"fine_tune_steps": 0}}, "personal.fine_tune_steps"),
        ({"training": {"proximal": -0.1}}, "training.proximal"),
        ({"training": {"local_epochs": "all"}}, "training.local_epochs"),
    ],
)
def test_updates_and_personal_models_that_cannot_be_meant_are_refused_by_name(
    bases: dict[str, Values], change: Values, named: str
) -> None:
    refused(merged(bases["plain"], change), named.removesuffix("[0]"))


def test_the_fewest_updates_of_each_rule() -> None:
    assert RobustConfig(clip_norm=1.0).fewest == 1
    assert [RobustConfig(rule="median", malicious=f).fewest for f in (0, 1, 2)] == [3, 3, 5]
    assert RobustConfig(rule="trimmed_mean", malicious=2).fewest == 5
    assert RobustConfig(rule="multi_krum", malicious=2).fewest == 7


def test_only_a_split_model_is_split() -> None:
    assert not PersonalConfig().split
    assert PersonalConfig(parts=("out.*",)).split
    assert PersonalConfig(below_timestep=10).split


# ---- what they ask of each other and of the rest

CLASHES = [
    ("private", {"training": {"proximal": 0.1}}, "training.proximal"),
    ("private", {"training": {"local_epochs": "auto"}}, "training.local_epochs"),
    ("private", {"federation": {"control_variates": True}}, "federation.control_variates"),
    ("private", {"updates": {"bits": 8}}, "updates"),
    ("private", {"personal": {"parts": ["out.*"]}}, "personal.parts"),
    ("private", {"personal": {"below_timestep": 100}}, "personal.below_timestep"),
    ("private", {"federation": {"robust": {"clip_norm": 1.0}}}, "federation.robust.clip_norm"),
    ("private latent", {"autoencoder": {"training": {"proximal": 0.1}}}, "autoencoder.training.proximal"),
    ("central", {"federation": {"min_responses": 6, "robust": {"rule": "median", "groups": 3}}}, "federation.robust"),
    ("central", {"federation": {"server_optimizer": {"name": "adam"}}}, "federation.server_optimizer"),
    ("plain", ENCRYPTED | MEDIAN, "federation.robust"),
    ("plain", ENCRYPTED | {"updates": {"bits": 4}}, "updates"),
    ("plain", ENCRYPTED | {"updates": {"parts": [["out.*"]]}}, "updates"),
    ("plain", ENCRYPTED | {"updates": {"parts": [["out.*"]], "train": "all"}}, "updates"),
    ("private", {"updates": {"parts": [["out.*"]], "train": "all"}}, "updates"),
    ("plain", ENCRYPTED | {"federation": {"control_variates": True}}, "federation.control_variates"),
    ("plain", {"federation": {"robust": {"rule": "median", "groups": 3}}}, "federation.robust.groups"),
    ("plain", MASKS | MEDIAN, "federation.robust.groups"),
    (
        "plain",
        MASKS | {"federation": {"weighting": "uniform", "robust": {"reference": True}}},
        "federation.robust.groups",
    ),
    ("plain", {"federation": {"robust": {"clip_norm": 1.0}}}, "federation.weighting"),
    (
        "plain",
        {"federation": {"clients_per_round": 2}, "updates": {"parts": [["*"]], "train": "all"}},
        "federation.clients_per_round",
    ),
    (
        "plain",
        {"federation": {"availability": {"probability": 0.5}}, "updates": {"parts": [["*"]], "train": "all"}},
        "federation.availability",
    ),
    ("private", {"federation": {"robust": {"reference": True}}}, "federation.robust.reference"),
    (
        "plain",
        {
            "federation": {"weighting": "uniform", "robust": {"reference": True}},
            "personal": {"below_timestep": 5, "shared_rounds": 1},
        },
        "federation.robust.reference",
    ),
    ("plain", {"training": {"local_epochs": "auto"}, "personal": {"parts": ["out.*"]}}, "training.local_epochs"),
    (
        "plain",
        MASKS | {"federation": {"min_responses": 5, "robust": {"rule": "median", "groups": 3}}},
        "federation.min_responses",
    ),
    (
        "plain",
        {"secure_aggregation": {"min_survivors": 3}}
        | {"federation": {"min_responses": 8, "robust": {"rule": "median", "groups": 3}}},
        "federation.min_responses",
    ),
    ("plain", {"secure_aggregation": {"ring_bits": 8}}, "secure_aggregation.ring_bits"),
    (
        "plain",
        {"secure_aggregation": {"ring_bits": 8}, "updates": {"bits": 8}} | UNIFORM,
        "secure_aggregation.ring_bits",
    ),
    ("plain", MASKS | {"updates": {"bits": 4}}, "federation.weighting"),
    ("plain", {"updates": {"bits": 8}, "federation": {"control_variates": True}}, "federation.control_variates"),
    (
        "plain",
        {"updates": {"parts": [["out.*"]], "train": "all"}, "federation": {"control_variates": True}},
        "federation.control_variates",
    ),
    ("latent", {"training": {"local_epochs": "auto"}}, "training.local_epochs"),
    ("latent", {"autoencoder": {"training": {"local_epochs": "auto"}}}, "autoencoder.training.local_epochs"),
    ("plain", {"personal": {"parts": ["out.*"], "shared_rounds": 2}}, "personal.shared_rounds"),
    ("latent", {"personal": {"below_timestep": 100, "shared_rounds": 1}}, "personal.shared_rounds"),
    ("plain", {"personal": {"below_timestep": 1000}}, "personal.below_timestep"),
    ("plain", {"audit": {"model": "small"}, "updates": {"bits": 8}}, "updates"),
    ("plain", {"audit": {"model": "small"}, "personal": {}}, "personal"),
]


@pytest.mark.parametrize(("base", "change", "named"), CLASHES, ids=[f"{base}-{name}" for base, _, name in CLASHES])
def test_switches_that_clash_are_refused_by_name(
    bases: dict[str, Values], base: str, change: Values, named: str
) -> None:
    refused(merged(bases[base], change), named)


TOGETHER = [
    ("plain", {"training": {"proximal": 0.1, "local_epochs": "auto"}}),
    ("plain", {"federation": {"control_variates": True, "server_optimizer": {"name": "nesterov"}}}),
    ("plain", MASKS | {"federation": {"control_variates": True}}),
    ("plain", MASKS | {"training": {"local_epochs": "auto"}}),
    ("plain", ENCRYPTED | {"training": {"proximal": 0.1, "local_epochs": "auto"}}),
    ("plain", ENCRYPTED | {"federation": {"server_optimizer": {"name": "adam"}}}),
    ("plain", {"federation": {"availability": {"probability": 1.0}, "clients_per_round": 2}}),
    ("plain", {"federation": {"availability": {"schedule": [["a", "b"], ["b", "c"]]}}}),
    ("plain", MEDIAN),
    ("plain", MASKS | {"federation": {"weighting": "uniform", "robust": {"clip_norm": 1.0}}}),
    ("plain", MASKS | {"federation": {"min_responses": 6, "robust": {"rule": "median", "groups": 3}}}),
    (
        "plain",
        MASKS
        | {"federation": {"weighting": "uniform", "min_responses": 4, "robust": {"reference": True, "groups": 2}}},
    ),
    ("plain", {"updates": {"bits": 4, "parts": [["down_blocks.*"], ["up_blocks.*", "out.*"]]}}),
    ("plain", {"secure_aggregation": {"ring_bits": 8}, "updates": {"bits": 4}} | UNIFORM),
    ("plain", {"secure_aggregation": {"ring_bits": 16}, "updates": {"bits": 8}} | UNIFORM),
    ("plain", MASKS | {"updates": {"bits": 8}, "training": {"local_epochs": "auto"}} | UNIFORM),
    ("plain", {"updates": {"parts": [["down_blocks.*"], ["*"]], "train": "all"}}),
    ("plain", {"updates": {"parts": [["out.*"]], "train": "sent"}, "federation": {"control_variates": True}}),
    ("plain", MASKS | UNIFORM | {"updates": {"parts": [["out.*"], ["*"]], "bits": 4, "train": "all"}}),
    ("plain", {"updates": {"parts": [["*"]], "train": "all"}, "personal": {"parts": ["out.*"]}}),
    ("latent", {"updates": {"parts": [["out.*"], ["*"]], "train": "all"}}),
    ("plain", {"personal": {"parts": ["out.*"]}, "updates": {"bits": 8}}),
    ("plain", MASKS | {"personal": {"below_timestep": 999}}),
    ("plain", {"personal": {"shared_rounds": 2}}),  # of an unsplit model it means nothing and is not heeded
    ("latent", {"personal": {"fine_tune_steps": 5}, "federation": {"control_variates": True}}),
    ("latent", {"federation": {"rounds": 3}, "personal": {"parts": ["out.*"]}}),
    ("private", {"personal": {}}),
    ("private", {"federation": {"min_responses": 3, "robust": {"rule": "median"}}}),
    ("private", {"federation": {"server_optimizer": {"name": "momentum"}, "availability": {"probability": 0.5}}}),
    ("central", {"federation": {"availability": {"probability": 0.5}}}),
]


@pytest.mark.parametrize(("base", "change"), TOGETHER)
def test_switches_that_go_together_build_and_come_back_from_json(
    bases: dict[str, Values], base: str, change: Values
) -> None:
    experiment = ExperimentConfig.from_json(merged(bases[base], change))
    again = ExperimentConfig.from_json(json.loads(json.dumps(experiment.to_json())))
    assert again == experiment
    assert hash(again) == hash(experiment)  # rounds are looked up by it
    assert again.sha256 == experiment.sha256
    assert experiment != ExperimentConfig.from_json(bases[base])


def test_defaults_change_nothing(experiment: ExperimentConfig, bases: dict[str, Values]) -> None:
    old = merged(bases["plain"])
    for name in ("updates", "personal"):
        assert old.pop(name) is None
    for name in ("availability", "server_optimizer", "robust"):
        assert old["federation"].pop(name) is None
    assert old["federation"].pop("control_variates") is False
    assert (old["training"].pop("proximal"), old["training"].pop("local_epochs")) == (0.0, None)
    assert ExperimentConfig.from_json(old) == experiment


def test_blocks_in_python_are_those_of_json(experiment: ExperimentConfig, bases: dict[str, Values]) -> None:
    said = replace(
        experiment,
        federation=FederationConfig(
            rounds=2,
            round_timeout_s=120,
            availability=AvailabilityConfig(schedule=(("a", "b"),)),
            server_optimizer=ServerOptimizerConfig(name="adam", learning_rate=0.1),
        ),
        updates=UpdatesConfig(parts=(("out.*",), ("*",)), bits=8),
        personal=PersonalConfig(parts=("out.*",)),
    )
    change = {
        "federation": {
            "availability": {"schedule": [["a", "b"]]},
            "server_optimizer": {"name": "adam", "learning_rate": 0.1},
        },
        "updates": {"parts": [["out.*"], ["*"]], "bits": 8},
        "personal": {"parts": ["out.*"]},
    }
    assert ExperimentConfig.from_json(merged(bases["plain"], change)) == said


def test_a_central_plan_is_never_made_of_a_plain_step(bases: dict[str, Values]) -> None:
    with pytest.raises((ConfigError, InvalidPlan), match="steps_per_round"):
        ExperimentConfig.from_json(merged(bases["central"], {"training": {"steps_per_round": 3}}))
