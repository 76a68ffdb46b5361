"""A whole audit on one machine, on small models of which the answer is known, and the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policies import policy_toml

from custom.audit import audit_model
from custom.audit_config import AuditConfig
from custom.audit_scores import Scorer, population_of, populations
from custom.audit_target import denoiser
from custom.audit_training import fit
from custom.canary_run import run_with_canaries
from custom.cli import main
from custom.config import ExperimentConfig
from custom.curious_server import watch
from custom.diffusion.networks import build_network
from custom.diffusion.schedule import build_schedule
from custom.latents import encoded
from custom.model_config import AutoencoderConfig
from custom.model_file import ModelFile, initial_model, load_model, save_model
from custom.stages import fresh_weights
from custom.strict import ConfigError
from medical_data.cohort import Cohort, DataLimits, EmbeddedSource, prepare_cohort
from medical_data.preprocess import PreprocessConfig
from privacy.audit.decision import DecisionRule, decide
from privacy.audit.errors import BrokenCommitment, Overlap
from privacy.audit.evidence import Evidence
from privacy.audit.population import Population, joined
from privacy.audit.report.document import load_audit

CPU = torch.device("cpu")
CONFIG = AuditConfig(
    noise_levels=(0.05, 0.2),
    images_per_patient=2,
    reference_steps=20,
    control_steps=150,
    gradient_levels=(0.1,),
    embedding_steps=30,
    samples=24,
)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inversions, which these tests look at for their form only."""
    monkeypatch.setattr("custom.curious_server.INVERSION_STEPS", 5)
    monkeypatch.setattr("custom.curious_server.STEPS", 10)


def phantoms(hospital: int, patients: int, home: Path, held_out: float = 0.5) -> Cohort:
    return prepare_cohort(
        source=EmbeddedSource(hospital=hospital, patients=patients, slices=2, matrix=64, seed=1),
        preprocess=PreprocessConfig(size=16, images_per_patient=2),
        limits=DataLimits(held_out_fraction=held_out),
        home=home,
    )


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cohort, Cohort]:
    home = tmp_path_factory.mktemp("homes")
    return phantoms(0, 40, home / "a"), phantoms(2, 40, home / "b")


def saved(experiment: ExperimentConfig, file: Path, on: Cohort | None) -> Path:
    """An untrained model, or one that knows the cohort's members by heart."""
    network = build_network(experiment.network, spatial_dims=2, seed=1)
    if on is not None:
        torch.manual_seed(0)
        images = np.asarray(on.images[on.rows("train")])
        fit(
            network,
            build_schedule(experiment.schedule),
            images,
            steps=1500,
            seed=0,
            device=CPU,
            label="",
            progress=False,
        )
    weights = dict(network.state_dict())
    save_model(file, ModelFile(experiment=experiment, rounds_done=0, weights=weights, ema=weights))
    return file


def audited(file: Path, cohorts: dict[str, Cohort], **changes: Any) -> Evidence:
    return audit_model(
        file, cohorts, replace(CONFIG, **changes), device=CPU, created="2026-01-01", command="fedct audit …"
    ).evidence


@pytest.fixture(scope="module")
def overfitted(
    experiment: ExperimentConfig, cohorts: tuple[Cohort, Cohort], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return saved(experiment, tmp_path_factory.mktemp("overfitted") / "model.safetensors", cohorts[0])


def test_a_model_that_knows_its_patients_by_heart_is_caught(overfitted: Path, cohorts: tuple[Cohort, Cohort]) -> None:
    evidence = audited(overfitted, {"a": cohorts[0]})
    strongest = evidence.attacks[evidence.strongest].outcome
    assert strongest.patient_auc.estimate > 0.9
    assert min(attack.adjusted_p for attack in evidence.attacks) < 0.01
    assert {attack.name for attack in evidence.attacks} >= {"loss", "pia", "rmia", "calibrated", "gradients", "stacked"}
    (site,) = evidence.sites
    assert site.patient_auc is not None
    assert (evidence.report_members, evidence.report_held_out) == (10, 10)
    for point in strongest.points:
        assert not point.resolvable
        assert "not resolvable with n=10" in point.note


def test_an_untrained_model_is_at_chance(
    experiment: ExperimentConfig, cohorts: tuple[Cohort, Cohort], tmp_path: Path
) -> None:
    file = saved(experiment, tmp_path / "model.safetensors", None)
    evidence = audited(file, {"a": cohorts[0]}, control_steps=5, samples=0)
    assert all(attack.adjusted_p > 0.05 for attack in evidence.attacks)
    assert {control.name: control.passed for control in evidence.controls}["untrained"]
    assert {control.name: control.passed for control in evidence.controls}["shuffled"]


def test_members_of_one_hospital_against_held_outs_of_another_are_invalid(
    overfitted: Path, cohorts: tuple[Cohort, Cohort]
) -> None:
    """Hospitals differ in their scanners: a blind classifier sees it, and nothing is said about the model."""
    one, other = cohorts
    mixed = Cohort(
        images=np.concatenate([one.images[one.rows("train")], other.images[other.rows("held_out")]]),
        patient=np.repeat(np.arange(40, dtype=np.int32), 2),
        pseudonyms=tuple(f"p{index}" for index in range(40)),
        held_out=np.arange(40) >= 20,
        manifest_sha256="0" * 64,
    )
    evidence = audited(overfitted, {"a": mixed}, samples=0, control_steps=5, reference_steps=0)
    assert evidence.blind is not None
    assert evidence.blind.confounded
    decision = decide(evidence, DecisionRule())
    assert decision.verdict == "INVALID"
    assert decision.reasons[0].test == "blind test"
    assert "confounded" in decision.sentence


def test_a_held_out_scan_that_was_trained_on_is_refused(overfitted: Path, cohorts: tuple[Cohort, Cohort]) -> None:
    one = cohorts[0]
    images = np.array(one.images)
    images[one.rows("held_out")[0]] = images[one.rows("train")[0]]
    with pytest.raises(Overlap, match="images of members equal images of held-outs"):
        audited(overfitted, {"a": replace(one, images=images)})


def test_few_patients_give_an_invalid_audit_and_no_number(
    experiment: ExperimentConfig, tmp_path: Path, overfitted: Path
) -> None:
    """Twenty patients, five of them held out: no positive control, no rate."""
    few = phantoms(0, 20, tmp_path, held_out=0.25)
    evidence = audited(overfitted, {"a": few}, samples=0)
    assert "overfitted" not in {control.name for control in evidence.controls}
    assert decide(evidence, DecisionRule()).verdict == "INVALID"
    for attack in evidence.attacks:
        for outcome in attack.seeds:
            assert all(point.tpr is None and "not resolvable" in point.note for point in outcome.points)


def test_the_control_s_patients_are_held_outs_that_nothing_was_trained_on(cohorts: tuple[Cohort, Cohort]) -> None:
    population = joined([population_of(c, name, CONFIG) for name, c in zip("ab", cohorts, strict=True)])
    control = populations(population, 0)["overfitted"]
    known = {key for key, member in zip(population.sites_and_keys, population.member, strict=True) if member}
    assert not known & set(control.sites_and_keys)
    assert control.member.sum() == (~control.member).sum() == 20


def test_a_v_prediction_is_queried_as_noise(experiment: ExperimentConfig) -> None:
    schedule = build_schedule(experiment.schedule)
    assert schedule.config.prediction == "v"
    x0, noise = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8)
    t = torch.tensor([0, 1, 100, 500, 990])

    class Perfect(torch.nn.Module):
        def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return schedule.target(x0, noise, timesteps)

    predicted = denoiser(Perfect(), schedule, CPU).epsilon(schedule.noised(x0, noise, t), t)
    torch.testing.assert_close(predicted, noise, atol=1e-4, rtol=1e-4)


def test_a_curious_server_and_the_sum(overfitted: Path, cohorts: tuple[Cohort, Cohort]) -> None:
    sites = dict(zip("ab", cohorts, strict=True))
    population = joined([population_of(cohort, site, CONFIG) for site, cohort in sites.items()])
    found = watch(load_model(overfitted), sites, population, CONFIG, device=CPU, progress=False)
    assert [scored.name for scored in found.scored] == ["site_update", "summed_update", "loss_slope"]
    own, summed, _ = found.scored
    assert own.scores.shape == (3, len(population.images), 1)
    assert not np.allclose(own.scores, summed.scores)
    assert [outcome.seen for outcome in found.inversions] == [
        "one site's update, of one step on one image",
        "the sum of 2 such updates",
    ]


def test_canaries_are_committed_to_and_bound_epsilon(
    private_experiment: ExperimentConfig, cohorts: tuple[Cohort, Cohort], tmp_path: Path
) -> None:
    experiment = replace(private_experiment, privacy=replace(private_experiment.privacy, patients=30))
    arguments: dict[str, Any] = {"device": CPU, "patients_in_memory": 16, "progress": False}
    found = run_with_canaries(experiment, cohorts[0], count=24, folder=tmp_path / "canaries", **arguments)
    assert {bound.confidence for bound in found.bounds} == {0.975}
    assert all(0 <= bound.epsilon < 5 for bound in found.bounds)
    assert len(found.commitment) == 64
    assert (tmp_path / "canaries" / "secret.json").stat().st_mode & 0o077 == 0
    with pytest.raises(BrokenCommitment):
        run_with_canaries(experiment, cohorts[0], count=24, folder=tmp_path / "canaries", **arguments)


def test_canaries_need_a_plan(experiment: ExperimentConfig, cohorts: tuple[Cohort, Cohort], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="canaries"):
        run_with_canaries(
            experiment, cohorts[0], count=24, folder=tmp_path, device=CPU, patients_in_memory=4, progress=False
        )


def test_scores_do_not_depend_on_the_run(experiment: ExperimentConfig, cohorts: tuple[Cohort, Cohort]) -> None:
    weights = dict(build_network(experiment.network, spatial_dims=2, seed=1).state_dict())
    model = ModelFile(experiment=experiment, rounds_done=0, weights=weights, ema=weights)
    config = replace(CONFIG, control_steps=5, noise_levels=(0.1,))
    population = population_of(cohorts[0], "a", config)
    once, again = (
        Scorer(model, config, device=CPU, progress=False).scoreboard(population).groups["target"] for _ in range(2)
    )
    for one, other in zip(once.scored, again.scored, strict=True):
        assert np.array_equal(one.scores, other.scores), one.name


def test_the_command_writes_every_report(overfitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    data = "data = { embedded = { hospital = 0, patients = 40, slices = 2, matrix = 64, seed = 1 } }"
    limits = "limits = { held_out_fraction = 0.5 }"
    (tmp_path / "sites.toml").write_text(f'[sites.a]\nhome = "home"\n{data}\n{limits}\n{policy_toml()}\n')
    settings = {
        "noise_levels": [0.05, 0.2],
        "reference_steps": 0,
        "control_steps": 20,
        "gradient_levels": [],
        "embedding_steps": 5,
        "samples": 12,
        "images_per_patient": 1,
    }
    (tmp_path / "audit_config.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    words = ["audit", str(overfitted), str(out), "--site-file", str(tmp_path / "sites.toml"), "--site", "a"]
    assert main([*words, "--config", str(tmp_path / "audit_config.json"), "--updates"]) == 0
    audit = load_audit(out / "audit.json")
    assert audit.decision.sentence in capsys.readouterr().out
    assert {"site_update", "summed_update"} <= {attack.name for attack in audit.evidence.attacks}
    assert len(audit.evidence.inversions) == 2
    for name in ("audit.html", "audit.pdf", "site_copy.html"):
        assert (out / name).stat().st_size > 10_000
    assert "data:image" in (out / "site_copy.html").read_text()
    assert "data:image" not in (out / "audit.html").read_text()
    assert main([*words, "--canaries", "30"]) == 2
    assert "new" in capsys.readouterr().err


# ---- volumes and latents


@pytest.mark.parametrize("latent", [False, True], ids=["volumes", "latents"])
def test_a_model_of_volumes_that_knows_its_patients_by_heart_is_caught(
    experiment: ExperimentConfig, tmp_path: Path, latent: bool
) -> None:
    """Every attack, control and screen of the audit on volumes, also where the network sees only their latents."""
    volumes = PreprocessConfig(spatial_dims=3, size=8, images_per_patient=1, spacing_mm=(24.0, 25.0, 25.0))
    experiment = replace(experiment, preprocess=volumes)
    if latent:
        experiment = replace(
            experiment, autoencoder=AutoencoderConfig(channels=(8, 8), latent_channels=2, frozen="public")
        )
    cohort = prepare_cohort(
        source=EmbeddedSource(hospital=0, patients=40, slices=16, matrix=64, seed=1),
        preprocess=volumes,
        limits=DataLimits(held_out_fraction=0.5),
        home=tmp_path / "a",
    )
    model = initial_model(experiment)
    images = np.asarray(cohort.images[cohort.rows("train")])
    network, schedule = model.sampling_network()
    autoencoder = model.autoencoder()
    known = images if autoencoder is None else encoded(autoencoder, images, CPU)
    torch.manual_seed(0)
    fit(network, schedule, known, steps=1200, seed=0, device=CPU, label="", progress=False)
    weights = {**model.weights, **network.state_dict()}
    save_model(tmp_path / "model.safetensors", replace(model, weights=weights, ema=weights))
    evidence = audited(
        tmp_path / "model.safetensors", {"a": cohort}, images_per_patient=1, samples=12, control_steps=50
    )
    assert max(attack.outcome.patient_auc.estimate for attack in evidence.attacks) > 0.85
    assert min(attack.adjusted_p for attack in evidence.attacks) < 0.05
    assert {attack.name for attack in evidence.attacks} >= {"loss", "secmi", "band_pass", "gradients", "stacked"}
    assert latent == ("reconstruction" in {attack.name for attack in evidence.attacks})
    assert {screen.samples for screen in evidence.copies} == {12}
    assert {control.name for control in evidence.controls} == {"overfitted", "untrained", "shuffled"}
    assert evidence.blind is not None


def test_the_untrained_control_has_an_untrained_autoencoder(experiment: ExperimentConfig) -> None:
    """One that has seen the patients could tell them apart, and a leak would pass for an invalid audit."""
    latent = replace(experiment, autoencoder=AutoencoderConfig(channels=(8, 8), latent_channels=2, frozen="public"))
    rng = np.random.default_rng(0)
    population = Population(
        images=rng.uniform(-1, 1, (16, 1, 16, 16)).astype(np.float32),
        patient=np.arange(16),
        member=np.arange(16) < 8,
        site=np.zeros(16, dtype=np.int64),
        sites=("a",),
        keys=tuple(f"p{index}" for index in range(16)),
    )
    fast = replace(CONFIG, reference_steps=0, gradient_levels=(), control_steps=1)
    found = []
    for seed in (1, 2):
        model = initial_model(latent)
        trained = {**model.weights, **fresh_weights(latent, seed=seed)}
        board = Scorer(replace(model, weights=trained, ema=trained), fast, device=CPU, progress=False)
        found.append(board.scoreboard(population).groups)
    one, other = ({s.name: s.scores for s in groups["untrained"].scored} for groups in found)
    assert all(np.array_equal(one[name], other[name]) for name in one), "whatever the model has learnt"
    one, other = ({s.name: s.scores for s in groups["target"].scored} for groups in found)
    assert not np.array_equal(one["reconstruction"], other["reconstruction"])


def test_attacks_by_updates_and_canaries_are_of_images_not_of_latents(
    experiment: ExperimentConfig, cohorts: tuple[Cohort, Cohort], tmp_path: Path
) -> None:
    latent = replace(experiment, autoencoder=AutoencoderConfig(channels=(8, 8), frozen="public"))
    model = initial_model(latent)
    population = population_of(cohorts[0], "a", CONFIG)
    with pytest.raises(ConfigError, match="--updates"):
        watch(model, {"a": cohorts[0]}, population, CONFIG, device=CPU, progress=False)
    with pytest.raises(ConfigError, match="--canaries"):
        run_with_canaries(
            latent, cohorts[0], count=4, folder=tmp_path, device=CPU, patients_in_memory=4, progress=False
        )
