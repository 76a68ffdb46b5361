"""The switches of an experiment in NVFlare's real simulator: sites that differ, dear rounds, and malicious sites."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policies import ALL_STATISTICS, policy_toml
from simulator import Run, simulate
from torch import Tensor

from custom.cli import main
from custom.client_sampling import grouped
from custom.config import ExperimentConfig
from custom.diffusion.split_denoiser import LOW_NOISE
from custom.federation_config import (
    AvailabilityConfig,
    FederationConfig,
    PersonalConfig,
    RobustConfig,
    ServerOptimizerConfig,
    UpdatesConfig,
)
from custom.model_config import NetworkConfig, SamplingConfig, TrainingConfig
from custom.model_file import initial_model, load_model
from custom.quantised import NUMBERS, SCALES, packed_bytes
from custom.round_parts import CONTROL, personal_shapes, round_parts, update_shapes
from custom.run_folder import check_receipt
from custom.secure_config import SecureAggregationConfig
from custom.site_file import load_site
from custom.site_state import SiteState
from custom.stages import model_shapes, stage_objective, stages
from custom.training import held_out_loss, section, train_round
from medical_data.cohort import Cohort, prepare_cohort

SITES = ["good-1", "good-2", "good-3"]
PERSONAL = ("up_blocks.1.*", "out.*")
# The last layers first: they begin at zero, and until they have moved no gradient passes them.
HALVES = (("middle_block.*", "up_blocks.*", "out.*"), ("conv_in.*", "time_embed.*", "down_blocks.*"))
NEW_FIGURES = {"personal_held_out_loss", "local_held_out_loss"}


@pytest.fixture(scope="module")
def tiny(experiment: ExperimentConfig) -> ExperimentConfig:
    """No EffNet-KID, which needs more samples and most of a small job's time."""
    return replace(experiment, sampling=SamplingConfig(steps=2, grid_every=0, grid_images=2, evaluation_images=2))


def records(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]


def left(run: Run, site: str) -> list[Any]:
    """The data of what went out behind the last filter, in order."""
    files = sorted((run.base / "left").glob(f"{site}.*"), key=lambda file: file.stat().st_mtime_ns)
    replies = [pickle.loads(file.read_bytes()) for file in files]  # noqa: S301 - our own
    return [reply["DXO"]["data"] for reply in replies if "DXO" in reply]


def updates(run: Run, site: str) -> list[dict[str, Any]]:
    """The updates among them, of a job without masks."""
    return [data for data in left(run, site) if "held_out_loss" not in data]


def weights(run: Run) -> dict[str, Tensor]:
    return load_model(run.folder / "model.safetensors").weights


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


def cohort_of(run: Run, site: str) -> Cohort:
    """A site's patients, as the run has prepared them."""
    config = load_site(run.base / "sites.toml", site)
    preprocess = run.experiment.preprocess
    return prepare_cohort(source=config.source, preprocess=preprocess, limits=config.limits, home=config.home)


def loss_of(run: Run, tensors: dict[str, Tensor], site: str) -> float:
    """Loss on a site's held-out patients."""
    device = torch.device("cpu")
    objective = stage_objective(run.experiment, stages(run.experiment)[-1], tensors, device)
    return held_out_loss(objective, cohort_of(run, site), device)


def own_model(run: Run, site: str, name: str) -> Path:
    folder = run.base / "sites" / site / "personal" / run.experiment.name / run.folder.name
    assert folder.stat().st_mode & 0o777 == 0o700
    return folder / f"{name}.safetensors"


def assert_audit_reads(run: Run, site: str, out: Path) -> None:
    """The smallest audit; what it says of a model of so few steps means nothing."""
    config = run.base / "audit.json"
    few = {"noise_levels": [0.1], "gradient_levels": [0.1], "images_per_patient": 1}
    config.write_text(json.dumps({**few, "reference_steps": 0, "control_steps": 1, "embedding_steps": 1, "samples": 0}))
    model, file = str(own_model(run, site, "personal")), str(run.base / "sites.toml")
    assert main(["audit", model, str(out), "--site-file", file, "--site", site, "--config", str(config)]) == 0
    assert (out / "audit.html").stat().st_size > 0


# ---- sites that differ, come and go, and keep a part of the model


STRICT = "strict-4"
SCHEDULE = (("good-1", "good-2"), ("good-2", "good-3", STRICT), ("good-1", "good-3"))


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory: pytest.TempPathFactory, tiny: ExperimentConfig) -> Run:
    """SCAFFOLD, FedProx, Nesterov's server and personal tensors at once; two at a time, and a strict one."""
    experiment = replace(
        tiny,
        name="scheduled",
        training=replace(tiny.training, proximal=0.1),
        federation=FederationConfig(
            rounds=3,
            round_timeout_s=120,
            availability=AvailabilityConfig(schedule=SCHEDULE),
            server_optimizer=ServerOptimizerConfig(name="nesterov", learning_rate=0.7, momentum=0.5),
            control_variates=True,
        ),
        personal=PersonalConfig(parts=PERSONAL, shared_rounds=1, fine_tune_steps=3),
    )
    base = tmp_path_factory.mktemp("scheduled")
    less = policy_toml(may_leave=tuple(name for name in ALL_STATISTICS if name != "personal_held_out_loss"))
    return simulate(base, experiment, [*SITES, STRICT], threads=4, recorded=base / "left", policies={STRICT: less})


def test_sites_are_asked_by_schedule(scheduled: Run) -> None:
    assert scheduled.returncode == 0, scheduled.output
    receipt = check_receipt(scheduled.folder)
    assert [record["asked"] for record in records(scheduled)] == [list(names) for names in SCHEDULE]
    there = {str(number): [name for name in names if name != STRICT] for number, names in enumerate(SCHEDULE)}
    assert receipt["participants"] == there
    assert receipt["silent"] == {}


def test_a_site_whose_policy_lacks_a_figure_of_personal_models_refuses(scheduled: Run) -> None:
    assert scheduled.receipt["refused"] == {"1": {STRICT: "answered SITE_POLICY_MAY_LEAVE"}}
    assert left(scheduled, STRICT) == []
    assert not (scheduled.base / "sites" / STRICT / "personal").exists()


@pytest.mark.parametrize("site", SITES)
def test_no_personal_tensor_leaves_after_the_shared_rounds(scheduled: Run, site: str) -> None:
    rounds = [number for number, names in enumerate(SCHEDULE) if site in names]
    sent = updates(scheduled, site)
    assert len(sent) == len(rounds) == 2
    for number, update in zip(rounds, sent, strict=True):
        assert list(update) == list(update_shapes(scheduled.experiment, number))
        plain = {name.removeprefix(CONTROL) for name in update}
        own = {name for name in plain if any(fnmatchcase(name, pattern) for pattern in PERSONAL)}
        assert bool(own) == (number == 0)
        assert all(np.abs(update[CONTROL + name]).max() > 0 for name in plain)


def test_checkpoints_hold_what_the_server_remembers(scheduled: Run) -> None:
    model = load_model(scheduled.folder / "checkpoints" / "round_0003.safetensors")
    names = set(model_shapes(scheduled.experiment))
    kinds = {CONTROL + name for name in names} | {f"{name}/momentum_buffer" for name in names}
    assert set(model.optimizer) == kinds


@pytest.mark.parametrize("site", SITES)
def test_every_site_has_a_model_of_its_own_at_the_end(scheduled: Run, site: str) -> None:
    """Also the one that the last round did without."""
    models = {name: load_model(own_model(scheduled, site, name)).weights for name in ("personal", "local")}
    shared = weights(scheduled)
    for tensors in models.values():
        assert {name: tuple(t.shape) for name, t in tensors.items()} == model_shapes(scheduled.experiment)
        assert distance(tensors, shared) > 0
    metrics = json.loads((scheduled.folder / "metrics.json").read_text())
    for name, tensors in models.items():
        said = metrics["sites"][site][f"{name}_held_out_loss"]
        assert said == pytest.approx(loss_of(scheduled, tensors, site), rel=1e-4)
    assert set(metrics["mean"]) >= NEW_FIGURES


def test_a_personal_model_has_the_site_s_own_tensors(scheduled: Run) -> None:
    """Fine-tuning of three small steps moves all tensors alike; the rounds before moved the site's own ones further."""
    shared, personal = weights(scheduled), load_model(own_model(scheduled, "good-3", "personal")).weights
    apart = {name: float((personal[name] - shared[name]).abs().mean()) for name in shared}
    own = set(round_parts(scheduled.experiment, 2).own)
    least = np.median([apart[name] for name in own])
    assert least > 2 * np.median([apart[name] for name in set(apart) - own])


def test_a_personal_model_can_be_audited(scheduled: Run, tmp_path: Path) -> None:
    assert_audit_reads(scheduled, "good-1", tmp_path / "audit")


# ---- rounds that get longer, of parts that are trained while they wait


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory, tiny: ExperimentConfig) -> Run:
    experiment = replace(
        tiny,
        name="longer",
        training=replace(tiny.training, steps_per_round=2, local_epochs="auto"),
        federation=replace(tiny.federation, rounds=8),
        updates=UpdatesConfig(parts=HALVES, bits=8, train="all"),
        personal=PersonalConfig(fine_tune_steps=2),
    )
    base = tmp_path_factory.mktemp("longer")
    return simulate(base, experiment, SITES[:2], threads=2, recorded=base / "left")


def test_a_run_ends_when_all_of_its_steps_are_done(longer: Run) -> None:
    assert longer.returncode == 0, longer.output
    receipt, (stage,) = check_receipt(longer.folder), stages(longer.experiment)
    steps = [steps for number in range(stage.rounds) if (steps := stage.span(number).steps)]
    assert steps == [2, 2, 2, 4, 6]
    assert [record["round_number"] for record in records(longer)] == list(range(5))
    assert receipt["rounds_done"] == 5 < receipt["rounds_asked"] == 8
    assert load_model(longer.folder / "model.safetensors").rounds_done == 5
    before = initial_model(longer.experiment).weights
    assert all(float((tensor - before[name]).abs().max()) > 0 for name, tensor in weights(longer).items())


@pytest.mark.parametrize("site", SITES[:2])
def test_halves_leave_in_turn_and_wait_at_the_site(longer: Run, site: str) -> None:
    sent = updates(longer, site)
    assert len(sent) == len(records(longer))
    for number, update in enumerate(sent):
        shapes = update_shapes(longer.experiment, number)
        assert {name: array.size for name, array in update.items()} == {
            NUMBERS: packed_bytes(shapes, bits=8),
            SCALES: len(shapes),
        }
    folder = longer.base / "sites" / site / "state" / longer.experiment.name / longer.folder.name
    kept = SiteState(folder).before(5)
    assert set(section(kept, "own")) == set(round_parts(longer.experiment, 4).waiting)
    assert {float(tensor) for name, tensor in kept.items() if name.endswith("/step")} == {16.0}, "all, in every round"
    personal = load_model(own_model(longer, site, "personal"))
    assert {name: tuple(t.shape) for name, t in personal.weights.items()} == model_shapes(longer.experiment)
    metrics = json.loads((longer.folder / "metrics.json").read_text())
    said = metrics["sites"][site]["personal_held_out_loss"]
    assert said == pytest.approx(loss_of(longer, personal.weights, site), rel=1e-4)


# ---- a denoiser for low noise that stays at the site


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, tiny: ExperimentConfig) -> Run:
    experiment = replace(
        tiny,
        name="split",
        federation=replace(tiny.federation, rounds=3),
        personal=PersonalConfig(below_timestep=400, fine_tune_steps=2),
    )
    base = tmp_path_factory.mktemp("split")
    return simulate(base, experiment, SITES[:2], threads=2, recorded=base / "left")


@pytest.mark.parametrize("site", SITES[:2])
def test_the_low_noise_denoiser_stays_at_the_site(split: Run, site: str) -> None:
    assert split.returncode == 0, split.output
    sent = updates(split, site)
    assert len(sent) == len(records(split)) == 3
    for update in sent:
        assert set(update) == set(model_shapes(split.experiment))
    assert not any(name.startswith(LOW_NOISE) for name in weights(split))
    personal = load_model(own_model(split, site, "personal"))
    assert {name: tuple(t.shape) for name, t in personal.weights.items()} == personal_shapes(split.experiment)
    low = {name: personal.weights[LOW_NOISE + name] for name in weights(split)}
    assert distance(low, {name: personal.weights[name] for name in low}) > 0
    assert personal.rounds_done == len(sent)
    metrics = json.loads((split.folder / "metrics.json").read_text())
    said = metrics["sites"][site]["personal_held_out_loss"]
    assert said == pytest.approx(loss_of(split, personal.weights, site), rel=1e-4)


def test_a_split_personal_model_can_be_audited(split: Run, tmp_path: Path) -> None:
    assert_audit_reads(split, "good-1", tmp_path / "audit")


# ---- rounds that cost fewer bytes


def metered(base: Path, experiment: ExperimentConfig) -> tuple[Run, int]:
    """A run, and the bytes that its sites' processes gave to TCP sockets."""
    run = simulate(base, experiment, SITES[:2], threads=2, recorded=base / "left", metered=base / "sent")
    assert run.returncode == 0, run.output
    check_receipt(run.folder)
    meters = list((base / "sent").iterdir())
    assert len(meters) == 2, "a process a site"
    return run, sum(int(line) for file in meters for line in file.read_text().split())


def test_few_bits_and_parts_cost_an_eighth_on_the_wire(tiny: ExperimentConfig, tmp_path: Path) -> None:
    """Bytes are counted where NVFlare hands a frame to a site's TCP socket, headers, polling and all.

    Only what leaves a site counts there: the model that it downloads, the same in both jobs, does not. Each half of
    the tensors is sent in one of two rounds at a quarter of the bytes: an eighth, and what every job says besides,
    which the network is large enough to outweigh.
    """
    plain = replace(
        tiny,
        name="every_bit",
        network=NetworkConfig(channels=(32, 64), attention=(False, False)),
        training=replace(tiny.training, steps_per_round=1),
        federation=replace(tiny.federation, weighting="uniform"),
    )
    few = replace(plain, name="few_bits", updates=UpdatesConfig(parts=HALVES, bits=8))
    parameters = sum(math.prod(shape) for shape in model_shapes(plain).values())
    _, sent = metered(tmp_path / "plain", plain)
    assert sent > 2 * 2 * 4 * parameters, "two sites, two rounds, four bytes a number"
    parts, sent_few = metered(tmp_path / "few", few)
    assert sent_few > 2 * parameters
    assert sent_few < sent / 6, (sent, sent_few)
    for site in SITES[:2]:
        for number, update in enumerate(updates(parts, site)):
            assert {name: array.dtype for name, array in update.items()} == {NUMBERS: np.uint8, SCALES: np.float32}
            assert update[NUMBERS].size == packed_bytes(update_shapes(few, number), bits=8)
    before, after = initial_model(few).weights, weights(parts)
    for number in range(2):
        sent_then = round_parts(few, number).shared
        assert distance({name: after[name] for name in sent_then}, before) > 0


def test_few_bits_under_masks_go_into_a_ring_of_bytes(tiny: ExperimentConfig, tmp_path: Path) -> None:
    """The third site is not there in the last round; the evaluation asks it all the same."""
    there = (*(tuple(SITES),) * 3, tuple(SITES[:2]))
    experiment = replace(
        tiny,
        name="bytes",
        training=replace(tiny.training, steps_per_round=16, learning_rate=5e-3),
        federation=FederationConfig(
            rounds=4, weighting="uniform", round_timeout_s=120, availability=AvailabilityConfig(schedule=there)
        ),
        secure_aggregation=SecureAggregationConfig(ring_bits=8, stage_timeout_s=60),
        updates=UpdatesConfig(parts=HALVES, bits=4),
    )
    policy = policy_toml(peers=SITES, masks_required=True)
    run = simulate(tmp_path, experiment, SITES, threads=3, recorded=tmp_path / "left", policy=policy)
    assert run.returncode == 0, run.output
    participants = {str(number): list(names) for number, names in enumerate(there)}
    assert check_receipt(run.folder)["participants"] == participants
    assert "evaluation: asking good-1, good-2, good-3" in run.output
    sizes = [1 + sum(math.prod(shape) for shape in update_shapes(experiment, number).values()) for number in range(4)]
    for site in SITES:
        *trained, evaluated = (data["masked"] for data in left(run, site) if "masked" in data)
        assert {vector.dtype for vector in trained} == {np.dtype(np.uint8)}
        assert [vector.size for vector in trained] == sizes[: 4 if site in there[-1] else 3]
        assert evaluated.dtype == np.uint32
    assert [record["mean"] for record in records(run)] == [{}] * 4
    assert "held_out_loss" in json.loads((run.folder / "metrics.json").read_text())["mean"]
    before = initial_model(experiment).weights
    assert all(float((tensor - before[name]).abs().max()) > 0 for name, tensor in weights(run).items())
    for site in SITES:
        assert loss_of(run, weights(run), site) < 0.9 * loss_of(run, before, site)


# ---- malicious sites


def trained_at(run: Run, site: str) -> dict[str, Tensor]:
    """A site's honest update of the first round, made here: it depends on the site's data and name only."""
    update = train_round(
        cohort=cohort_of(run, site),
        weights=initial_model(run.experiment).weights,
        state={},
        config=run.experiment,
        site=site,
        round_number=0,
        device=torch.device("cpu"),
    )
    return update.difference


def after_groups(start: dict[str, Tensor], groups: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The model after the median over groups' means."""
    means = [{name: torch.stack([update[name] for update in group]).mean(0) for name in start} for group in groups]
    return {name: start[name] + torch.stack([mean[name] for mean in means]).median(0).values for name in start}


def test_a_median_over_groups_holds_where_a_sum_does_not(tiny: ExperimentConfig, tmp_path: Path) -> None:
    """Under masks the server sees no site's update: the one with the malicious site in it is one of three groups'.

    What honest sites would have come to is computed here, and held against the run in the same way.
    """
    sites = ["flipped-6", *(f"good-{number}" for number in range(1, 6))]
    masks, scale = SecureAggregationConfig(stage_timeout_s=60), 20.0
    federation = replace(tiny.federation, rounds=1, min_responses=6, weighting="uniform")
    summed = replace(tiny, name="summed", federation=federation, secure_aggregation=masks)
    robust = RobustConfig(rule="median", malicious=1, groups=3)
    median = replace(summed, name="median", federation=replace(federation, robust=robust))
    one, other = (simulate(tmp_path / e.name, e, sites, threads=6, faulty={"scale": scale}) for e in (median, summed))
    for run in (one, other):
        assert run.returncode == 0, run.output
        assert check_receipt(run.folder)["participants"] == {"0": sites}

    start, updates_of = initial_model(median).weights, {site: trained_at(one, site) for site in sites}
    groups = grouped(sites, 3, seed=median.seed, round_number=0)
    honest = after_groups(start, [[updates_of[site] for site in group] for group in groups])
    bound = masks.update_bound
    flipped = {name: (-scale * tensor).clamp(-bound, bound) for name, tensor in updates_of["flipped-6"].items()}
    sent = {**updates_of, "flipped-6": flipped}
    expected = after_groups(start, [[sent[site] for site in group] for group in groups])
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)
    apart, apart_summed = (distance(weights(run), honest) / distance(honest, start) for run in (one, other))
    assert apart < 1 < 2 < apart_summed, (apart, apart_summed)
    losses = [loss_of(one, tensors, "good-1") for tensors in (honest, weights(one), start, weights(other))]
    assert losses == sorted(losses), losses
    assert losses[1] < 1.01 * losses[0]


def test_what_harms_the_reference_is_dropped_and_nan_refused(tiny: ExperimentConfig, tmp_path: Path) -> None:
    """Two of five are malicious; the trimmed mean is of the three that are left."""
    sites = ["flipped-4", *SITES, "nan-5"]
    robust = RobustConfig(rule="trimmed_mean", malicious=1, reference=True)
    experiment = replace(
        tiny,
        name="judged",
        training=TrainingConfig(steps_per_round=12, batch_size=8, warmup_steps=0, learning_rate=5e-3),
        federation=replace(tiny.federation, min_responses=3, robust=robust),
    )
    public = "reference = { embedded = { hospital = 9, patients = 8, slices = 8, matrix = 64, seed = 2 } }"
    run = simulate(tmp_path, experiment, sites, threads=5, faulty={"scale": 50.0}, server=public)
    assert run.returncode == 0, run.output
    receipt = check_receipt(run.folder)
    assert receipt["participants"] == {"0": SITES, "1": SITES}
    for number in ("0", "1"):
        assert set(receipt["refused"][number]) == {"flipped-4", "nan-5"}
        assert "reference loss" in receipt["refused"][number]["flipped-4"]
        assert "NaN" in receipt["refused"][number]["nan-5"]
    assert loss_of(run, weights(run), "good-1") < 0.9 * loss_of(run, initial_model(experiment).weights, "good-1")
