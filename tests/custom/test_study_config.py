from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from custom.config import ExperimentConfig
from custom.strict import ConfigError
from custom.study.config import AttackConfig, StudyConfig, merged

DATASET = {"kind": "embedded", "train": 20, "test": 4, "patients_per_hospital": 8, "slices": 2}


@pytest.fixture
def study(experiment: ExperimentConfig) -> dict[str, Any]:
    """A study's JSON: a suite of four cases, and one of a base alone."""
    base = {"experiment": experiment.to_json(), "kind": "federated", "sites": 4, "alpha": 0.5, "attack": None}
    return {
        "name": "remedies",
        "seeds": [0, 1, 2],
        "suites": {
            "scans": {
                "dataset": DATASET,
                "base": base,
                "cases": {
                    "central": {"kind": "central", "alpha": None},
                    "8 sites, μ = 0.1": {"sites": 8, "experiment": {"training": {"proximal": 0.1}}},
                    "flipped": {"attack": {"kind": "sign_flip", "sites": 1, "scale": 3}, "seeds": [5]},
                },
                "tables": {"main": ["base", "central", "8 sites, μ = 0.1"], "attacks": ["base", "flipped"]},
            },
            "other": {"dataset": DATASET, "base": {**base, "images": 64}},
        },
    }


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    result = deepcopy(values)
    *parents, last = path.split(".")
    place = result
    for name in parents:
        place = place[name]
    place[last] = value
    return result


def keys(values: dict[str, Any], case: str = "base") -> list[str]:
    return [
        run.key for run in StudyConfig.from_json(values).runs() if (run.case.suite, run.case.name) == ("scans", case)
    ]


def test_a_case_is_the_base_with_what_it_names_changed(study: dict[str, Any], experiment: ExperimentConfig) -> None:
    suite = StudyConfig.from_json(study).suites[0]
    assert [case.name for case in suite.cases] == ["base", "central", "8 sites, μ = 0.1", "flipped"]
    base, central, more = suite.case("base"), suite.case("central"), suite.case("8 sites, μ = 0.1")
    assert (base.kind, base.sites, base.alpha, base.attack, base.images) == ("federated", 4, 0.5, None, 256)
    assert base.experiment == experiment
    assert (central.kind, central.sites, central.alpha) == ("central", 4, None)
    assert (more.sites, more.experiment.training.proximal) == (8, 0.1)
    assert more.experiment.training.steps_per_round == experiment.training.steps_per_round
    assert suite.case("flipped").attack == AttackConfig(kind="sign_flip", sites=1, scale=3.0)
    assert StudyConfig.from_json(study).suites[1].case("base").images == 64


def test_null_takes_the_place_of_an_object_and_objects_are_merged() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": {"f": 3}, "g": 4}
    assert merged(base, {"a": {"c": {"d": 5}}, "e": None, "g": {"h": 6}}) == {
        "a": {"b": 1, "c": {"d": 5}},
        "e": None,
        "g": {"h": 6},
    }
    assert base["a"] == {"b": 1, "c": {"d": 2}}


def test_every_case_gets_its_first_seed_before_any_gets_its_second(study: dict[str, Any]) -> None:
    runs = StudyConfig.from_json(study).runs()
    assert [(run.case.suite, run.case.name, run.seed) for run in runs[:6]] == [
        ("scans", "base", 0),
        ("scans", "central", 0),
        ("scans", "8 sites, μ = 0.1", 0),
        ("scans", "flipped", 5),
        ("other", "base", 0),
        ("scans", "base", 1),
    ]
    assert len(runs) == 4 * 3 + 1
    assert [run.experiment.seed for run in runs[3:6]] == [5, 0, 1]
    assert str(runs[0]) == "scans/base, seed 0"


def test_only_selects_suites_and_cases(study: dict[str, Any]) -> None:
    config = StudyConfig.from_json(study)
    assert config.select([]) == config.runs()
    assert {run.case.suite for run in config.select(["other"])} == {"other"}
    chosen = config.select(["other", "scans/central"])
    assert {(run.case.suite, run.case.name) for run in chosen} == {("other", "base"), ("scans", "central")}
    for unknown, named in (("nowhere", "no such suite"), ("scans/nobody", "no such case"), ("scans/", "no such case")):
        with pytest.raises(ConfigError, match=named):
            config.select([unknown])


def test_keys_depend_on_what_decides_the_numbers_and_on_no_name(study: dict[str, Any]) -> None:
    before = keys(study, "central")
    assert len(set(before)) == 3
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in before)
    renamed = deepcopy(study)
    cases = renamed["suites"]["scans"]["cases"]
    cases["pooled"] = cases.pop("central")
    renamed["suites"]["scans"]["tables"] = {}
    renamed["name"] = "another"
    assert keys(renamed, "pooled") == before
    assert keys(changed(study, "suites.scans.cases.twin", {}), "twin") == keys(study)
    for path, value in (
        ("suites.scans.base.sites", 3),
        ("suites.scans.base.alpha", 1),
        ("suites.scans.base.images", 10),
        ("suites.scans.base.experiment.training.learning_rate", 1e-3),
        ("suites.scans.dataset", {**DATASET, "test": 3}),
        ("suites.scans.cases.central", {"attack": {"kind": "nan", "sites": 1}}),
    ):
        name = "central" if path.endswith("central") else "base"
        assert not {*keys(changed(study, path, value), name)} & {*keys(study), *before}, path


def test_a_preset_and_its_spelled_out_network_are_one_key_and_none_counts_as_absent(study: dict[str, Any]) -> None:
    preset = changed(study, "suites.scans.base.experiment.network", "tiny")
    network = StudyConfig.from_json(preset).suites[0].cases[0].experiment.to_json()["network"]
    assert keys(preset) == keys(changed(study, "suites.scans.base.experiment.network", network))
    short = deepcopy(study)
    del short["suites"]["scans"]["base"]["attack"]
    short["suites"]["scans"]["base"]["experiment"]["privacy"] = None
    assert keys(short) == keys(study)


def test_keys_are_the_same_in_another_process(study: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps(study))
    code = "import sys; from pathlib import Path; from custom.study.config import StudyConfig\n"
    code += "print(*(run.key for run in StudyConfig.load(Path(sys.argv[1])).runs()))"
    said = subprocess.run([sys.executable, "-c", code, str(file)], check=True, capture_output=True, text=True)
    assert said.stdout.split() == [run.key for run in StudyConfig.load(file).runs()]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("colour", 1, r"study\.colour = 1: unknown"),
        ("name", "a b", "name = 'a b'"),
        ("name", 3, r"study\.name = 3"),
        ("seeds", [], r"seeds = \[\]"),
        ("seeds", [1, 1], "each once"),
        ("seeds", [0.5], "give a int"),
        ("seeds", [-1], "give at least one in 0"),
        ("suites", {}, "at least one suite"),
        ("suites", [], "suites = .*JSON object"),
        ("suites.scans.colour", 1, r"suites\.scans\.colour"),
        ("suites.scans.cases.base", {}, "the base is a case"),
        ("suites.scans.cases.central", [], r"suites\.scans\.cases\.central"),
        ("suites.scans.cases.a|b", {}, r"without '\|'"),
        ("suites.scans.cases.central.colour", 1, r"scans/central: base\.colour = 1: unknown"),
        ("suites.scans.cases.central.experiment", None, "scans/central: experiment = None"),
        ("suites.scans.cases.central.experiment", {"rounds": 1}, r"scans/central: experiment\.rounds = 1: unknown"),
        ("suites.scans.cases.central.experiment", {"seed": -1}, "scans/central: .*seed = -1"),
        ("suites.scans.cases.central.kind", "swarm", r"scans/central: case\.kind = 'swarm'"),
        ("suites.scans.cases.central.sites", 11, "scans/central: sites = 11: give 1 to 10"),
        ("suites.scans.cases.central.attack", {"kind": "nan", "sites": 1}, "scans/central: attack = 'nan'"),
        ("suites.scans.base.sites", 1, "scans/base: sites = 1: give at least 2"),
        ("suites.scans.base.alpha", 0, "scans/base: alpha = 0"),
        ("suites.scans.base.images", 1, "scans/base: images = 1"),
        ("suites.scans.base.seeds", [], r"scans/base: seeds = \[\]"),
        ("suites.scans.base.kind", None, r"scans/base: case\.kind = None"),
        ("suites.scans.base.attack", {"kind": "nan", "sites": 4}, "fewer than the 4 sites"),
        ("suites.scans.base.attack", {"kind": "nan", "sites": 0}, r"attack\.sites = 0"),
        ("suites.scans.base.attack", {"kind": "nan", "sites": 1, "scale": 0}, r"attack\.scale = 0"),
        ("suites.scans.base.attack", {"kind": "rude", "sites": 1}, r"attack\.kind = 'rude'"),
        ("suites.scans.base.experiment.audit", {"model": "m"}, r"scans/base: .*audit"),
        ("suites.scans.dataset", {"kind": "embedded"}, r"scans/base: case\.dataset\.train"),
        ("suites.scans.tables.main", ["nobody"], r"scans\.tables\.main = 'nobody': unknown"),
        ("suites.scans.tables.main", ["base", "base"], "each once"),
        ("suites.scans.tables.main", [], "at least one case"),
        ("suites.scans.tables.main", "base", "JSON array"),
        ("suites.scans.tables.a b", ["base"], "letters, digits"),
        ("suites.scans.tables.frontier", ["base"], "give another name"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(study: dict[str, Any], path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudyConfig.from_json(changed(study, path, value))


@pytest.mark.parametrize("missing", ["name", "seeds", "suites", "suites.scans.base", "suites.scans.base.kind"])
def test_what_is_missing_is_named(study: dict[str, Any], missing: str) -> None:
    *parents, last = missing.split(".")
    place = study
    for name in parents:
        place = place[name]
    del place[last]
    with pytest.raises(ConfigError, match=rf"{last} = None: missing"):
        StudyConfig.from_json(study)


def test_files_that_are_none_and_names_that_come_twice_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    with pytest.raises(ConfigError, match="readable JSON"):
        StudyConfig.load(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="readable JSON"):
        StudyConfig.load(file)
    file.write_text('{"name": "a", "seeds": [0], "suites": {"s": {}, "s": {}}}')
    with pytest.raises(ConfigError, match=r"s = .*twice"):
        StudyConfig.load(file)
