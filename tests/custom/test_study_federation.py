"""The studies in the repository, and one run of a study from data to metrics."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from custom.config import ExperimentConfig
from custom.server_step import moved
from custom.stages import model_shapes
from custom.strict import ConfigError
from custom.study.config import StudyConfig
from custom.study.datasets import FASHION_MNIST, load
from custom.study.federation import REFERENCE_PATIENTS, _reference, run_case, trained
from custom.training import train_round
from medical_data.cohort import Cohort

CPU = torch.device("cpu")
STUDIES = Path(__file__).resolve().parents[2] / "docs" / "study"

fashion = pytest.mark.skipif(not Path(FASHION_MNIST).is_dir(), reason=f"no {FASHION_MNIST}: dataset-fashion-mnist")


@pytest.mark.parametrize("name", ["default", "paper"])
def test_the_studies_in_the_repository_are_valid(name: str) -> None:
    study = StudyConfig.load(STUDIES / f"{name}.json")
    assert study.name == name
    for run in study.runs():
        assert run.experiment.seed == run.seed


def test_at_equal_compute_the_steps_of_all_sites_together_are_the_same() -> None:
    for name in ("default", "paper"):
        for suite in StudyConfig.load(STUDIES / f"{name}.json").suites:
            totals = {}
            for case in suite.cases:
                federation, training = case.experiment.federation, case.experiment.training
                sites = 1 if case.kind == "central" else federation.clients_per_round or case.sites
                totals[case.name] = federation.rounds * training.steps_per_round * sites
                if federation.availability is not None:
                    totals[case.name] = round(totals[case.name] * (federation.availability.probability or 1.0))
                if case.kind == "central" and training.batch_size != suite.case("base").experiment.training.batch_size:
                    totals.pop(case.name)  # as many updates as a site makes, with as many images as all of them
            for case_name, total in totals.items():
                assert total == pytest.approx(totals["base"], rel=0.02), (name, suite.name, case_name)


def test_a_goal_names_a_case_of_the_study() -> None:
    values = json.loads((STUDIES / "default.json").read_text(encoding="utf-8"))
    values["goals"][0]["this"]["case"] = "nobody"
    with pytest.raises(ConfigError, match=r"goals\.case.*nobody"):
        StudyConfig.from_json(values)


def test_the_paper_has_its_network() -> None:
    for suite in StudyConfig.load(STUDIES / "paper.json").suites:
        assert sum(map(math.prod, model_shapes(suite.case("base").experiment).values())) == pytest.approx(
            23e6, rel=0.01
        )
        assert suite.case("base").experiment.federation.rounds == 300


@fashion
def test_the_papers_study_starts(tmp_path: Path) -> None:
    """Its network and data, with one step in place of 11 100."""
    study = StudyConfig.load(STUDIES / "paper.json")
    run = study.select(["fashion/base"])[0]
    experiment = run.case.experiment
    short = replace(
        experiment,
        training=replace(experiment.training, steps_per_round=1, batch_size=2),
        federation=replace(experiment.federation, rounds=1),
        sampling=replace(experiment.sampling, steps=2),
    )
    data = replace(run.case.dataset, train=40, test=20)
    case = replace(run.case, experiment=short, dataset=data, sites=2, images=12)
    found = run_case(replace(run, case=case), tmp_path)
    assert found["steps"] == 2
    assert all(math.isfinite(value) for value in found.values())


def test_a_federation_in_one_process_is_that_of_its_parts(experiment: ExperimentConfig, cohort: Cohort) -> None:
    """Against a loop over ``train_round`` and a mean by hand."""
    plain = replace(
        experiment, federation=replace(experiment.federation, rounds=2, weighting="uniform", server_ema=0.5)
    )
    cohorts = {"a": cohort, "b": replace(cohort, images=np.ascontiguousarray(cohort.images[..., ::-1]))}
    found = trained(plain, cohorts, CPU)
    model = found.model
    from custom.model_file import initial_model

    slow, states = initial_model(plain), {"a": {}, "b": {}}
    for number in range(2):
        updates = {}
        for site, images in cohorts.items():
            updates[site] = train_round(
                cohort=images,
                weights=slow.weights,
                state=states[site],
                config=plain,
                site=site,
                round_number=number,
                device=CPU,
            )
            states[site] = updates[site].state
        mean = {n: ((updates["a"].difference[n] + updates["b"].difference[n]) / 2).numpy() for n in slow.weights}
        slow = moved(slow, mean)
    for name, tensor in slow.ema.items():
        torch.testing.assert_close(model.ema[name], tensor, rtol=1e-4, atol=1e-6)
    assert found.steps == 2 * 2 * plain.training.steps_per_round
    assert found.bytes_up > 2 * 2 * 4 * sum(map(math.prod, model_shapes(plain).values()))


@fashion
def test_the_servers_public_images_are_at_no_site_and_not_tested(tmp_path: Path) -> None:
    case = StudyConfig.load(STUDIES / "default.json").select(["poison/sign flip, reference check"])[0].case
    case = replace(case, dataset=replace(case.dataset, train=40, test=20))
    data = load(case.dataset, case.experiment.preprocess, tmp_path)
    images = _reference(case, data, tmp_path)
    assert len(images) == REFERENCE_PATIENTS
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in data.images}
