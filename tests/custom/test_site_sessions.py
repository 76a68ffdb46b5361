"""A site's part on its own disk, among three sites with simulated kits; the arithmetic against plain FedAvg."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from custom import tasks
from custom.aggregators.in_time_average import InTimeAverage
from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.egress import EVALUATION_METRICS, MEAN_IMAGE, UPDATE_METRICS
from custom.job_plan import privacy_plan
from custom.masked_vector import gradient_shapes, session_encoding, shared_noise_encoding, split_means
from custom.model_config import TrainingConfig
from custom.private_training import shared_gradient, shared_mean_image, trained_parameters
from custom.secure_config import SecureAggregationConfig
from custom.simulator_kits import make_kits
from custom.site_file import HardwareConfig, SiteConfig
from custom.site_sessions import SiteSessions, kit_root
from custom.stages import model_shapes, stage_of
from custom.strict import ConfigError
from medical_data.cohort import Cohort, EmbeddedSource
from privacy.accounting import SampledSkellam
from privacy.errors import InvalidPlan
from privacy.plan import GRID_UNITS_PER_CLIP_NORM
from privacy.policy import Budget, Budgets, PolicyRefused, PrivacyPolicy
from privacy.rng import SeededRandomnessForTests
from privacy.secagg.encoding import Vector
from privacy.secagg.errors import EncodingRefused, ProtocolViolation
from privacy.secagg.messages import Session
from privacy.secagg.rules import Floor, Rules
from privacy.secagg.server import Server

SITES = ("site-1", "site-2", "site-3")
RUN = "20260101-000000-abcd"
BUDGETS = Budgets(per_job=Budget(epsilon=8, delta=1e-2), total=Budget(epsilon=8, delta=1e-2))


@pytest.fixture(scope="module")
def masked(experiment: ExperimentConfig) -> ExperimentConfig:
    return replace(experiment, secure_aggregation=SecureAggregationConfig(update_bound=0.5, max_weight=10.0))


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("kits")
    make_kits(base / "server", {name: base / name for name in SITES})
    return base


def site(home: Path, kits: Path, name: str, floor: Floor | None) -> SiteConfig:
    return SiteConfig(
        home=home / name,
        kit=kits / name,
        source=EmbeddedSource(hospital=0, patients=3, seed=1),
        policy=PrivacyPolicy(required=False, budgets=BUDGETS, secure_aggregation=floor),
        hardware=HardwareConfig(),
    )


def all_sessions(home: Path, kits: Path, experiment: ExperimentConfig) -> dict[str, SiteSessions]:
    floor = Floor(peers=SITES, min_survivors=2)
    return {name: SiteSessions.of_run(site(home, kits, name, floor), name, experiment, RUN) for name in SITES}


def session(experiment: ExperimentConfig, task: str = tasks.TRAIN, nonce: str = "n1") -> Session:
    return Session(job=experiment.sha256, run=RUN, task=task, round_number=0, nonce=nonce)


class Sum:
    """One session of the three, with an honest server."""

    def __init__(self, home: Path, kits: Path, experiment: ExperimentConfig, of: Session) -> None:
        assert experiment.secure_aggregation is not None
        self.session, self.experiment = of, experiment
        self.sites = all_sessions(home, kits, experiment)
        self.server = Server(session=of, rules=experiment.secure_aggregation.rules, root=kit_root(kits / "server"))
        for name, own in self.sites.items():
            self.server.add_advert(name, own.open(of))
        self.encoding = session_encoding(experiment, of.task, of.round_number, parties=self.server.advertised)
        roster = self.server.roster(size=self.encoding.size)
        for name, own in self.sites.items():
            self.server.add_boxes(name, own.share(of, roster))
        boxes = self.server.boxes()
        self.maskings = {name: own.masking(of, boxes) for name, own in self.sites.items()}

    def finished(self, vectors: dict[str, Vector]) -> dict[str, np.ndarray]:
        for name, vector in vectors.items():
            self.server.add_masked(name, vector)
        survivors = self.server.close()
        for name in survivors.survived:
            self.server.add_signature(name, self.sites[name].confirm(self.session, survivors))
        signatures = self.server.signatures()
        for name in survivors.survived:
            self.server.add_revealed(name, self.sites[name].reveal(self.session, signatures))
        return self.encoding.decode(self.server.unmask())[0]


def test_the_mean_under_masks_is_plain_fedavg_s(masked: ExperimentConfig, kits: Path, tmp_path: Path) -> None:
    shapes = model_shapes(masked)
    rng = np.random.default_rng(0)
    total = Sum(tmp_path, kits, masked, session(masked))
    plain, vectors, losses = InTimeAverage(shapes, replace(masked, secure_aggregation=None)), {}, []
    for name, weight in zip(SITES, (3.0, 9.0, 5.0), strict=True):
        arrays = {key: rng.normal(0, 0.05, shape).astype(np.float32) for key, shape in shapes.items()}
        metrics = {metric: float(rng.uniform(0, 2)) for metric in UPDATE_METRICS}
        losses.append((weight, metrics["train_loss"]))
        assert plain.add(name, arrays, {"weight": weight, "metrics": metrics}), plain.refused
        vectors[name] = total.maskings[name].values(arrays, metrics, weight)
    arrays, metrics = split_means(total.finished(vectors))
    for name, wanted in plain.mean().items():
        np.testing.assert_allclose(arrays[name], wanted, atol=1e-6)
    assert set(metrics) == UPDATE_METRICS
    assert metrics["train_loss"] == pytest.approx(sum(w * v for w, v in losses) / 17, abs=1e-5)


def test_a_metric_that_a_site_lacks_counts_for_nothing(masked: ExperimentConfig, kits: Path, tmp_path: Path) -> None:
    total = Sum(tmp_path, kits, masked, session(masked, tasks.EVALUATE))
    figures = [{"held_out_loss": 0.5, "effnet_kid": 0.2}, {"held_out_loss": 0.7}, {"held_out_loss": 0.9}]
    vectors = {n: total.maskings[n].values({}, metrics, 1.0) for n, metrics in zip(SITES, figures, strict=True)}
    arrays, metrics = split_means(total.finished(vectors))
    assert arrays == {}
    assert metrics == {"held_out_loss": pytest.approx(0.7, abs=1e-5), "effnet_kid": pytest.approx(0.2, abs=1e-5)}
    assert set(metrics) < EVALUATION_METRICS


def test_a_session_is_opened_once_and_not_again_once_unmasked(
    masked: ExperimentConfig, kits: Path, tmp_path: Path
) -> None:
    one = all_sessions(tmp_path, kits, masked)["site-1"]
    one.open(session(masked))
    with pytest.raises(ProtocolViolation, match="opened before"):
        one.open(session(masked))
    one.open(session(masked, nonce="n2"))  # a retry before anything was revealed
    total = Sum(tmp_path, kits, masked, session(masked, tasks.EVALUATE, nonce="n3"))
    total.finished({name: masking.values({}, {}, 1.0) for name, masking in total.maskings.items()})
    with pytest.raises(ProtocolViolation, match="summed before"):
        one.open(session(masked, tasks.EVALUATE, nonce="n4"))


def test_two_attempts_at_one_sum_cannot_both_be_unmasked(masked: ExperimentConfig, kits: Path, tmp_path: Path) -> None:
    """A server that opens a second session before the first is over gets one of them: their difference is a site's."""
    first = Sum(tmp_path, kits, masked, session(masked, tasks.EVALUATE, nonce="n1"))
    vectors = {name: masking.values({}, {}, 1.0) for name, masking in first.maskings.items()}
    second = Sum(tmp_path, kits, masked, session(masked, tasks.EVALUATE, nonce="n2"))
    with pytest.raises(ProtocolViolation, match="start a new session"):
        first.finished(vectors)
    second.finished({name: masking.values({}, {}, 1.0) for name, masking in second.maskings.items()})


def test_opening_ends_every_session_but_the_running_one(masked: ExperimentConfig, kits: Path, tmp_path: Path) -> None:
    """No secret of a session that failed stays on the disk."""
    one = all_sessions(tmp_path, kits, masked)["site-1"]
    failed, running = (replace(session(masked), round_number=number) for number in (0, 1))
    one.open(failed)
    one.open(running, running=failed)
    one.open(replace(running, nonce="n2"), running=running)  # another attempt at the same sum ends it, too
    one.open(replace(running, nonce="n3", round_number=2), running=replace(running, nonce="n2"))
    stages = {file.stem: json.loads(file.read_text())["stage"] for file in one.folder.glob("*.json")}
    assert stages == {
        "train-0000-n1": "aborted",
        "train-0001-n1": "aborted",
        "train-0001-n2": "advertised",
        "train-0002-n3": "advertised",
    }


def test_two_processes_at_once_mask_one_vector(masked: ExperimentConfig, kits: Path, tmp_path: Path) -> None:
    """Whoever comes second finds the stage over; two vectors under one mask would show their difference."""
    total = Sum(tmp_path, kits, masked, session(masked, tasks.EVALUATE))
    masking = total.maskings["site-1"]
    begun, go = threading.Event(), threading.Event()

    def slow(masks: Vector) -> None:
        begun.set()
        go.wait(10)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(masking.sessions.masked, total.session, masking.masks.copy(), slow)
        assert begun.wait(10)
        second = pool.submit(masking.sessions.masked, total.session, masking.masks.copy(), lambda masks: masks)
        time.sleep(0.3)
        assert not second.done(), "it waits for the first"
        go.set()
        first.result(timeout=10)
        with pytest.raises(ProtocolViolation, match="stage"):
            second.result(timeout=10)


def test_a_refused_stage_stays_refused_on_disk(masked: ExperimentConfig, kits: Path, tmp_path: Path) -> None:
    total = Sum(tmp_path, kits, masked, session(masked, tasks.EVALUATE))
    own, masking = total.sites["site-1"], total.maskings["site-1"]
    masking.values({}, {}, 1.0)
    with pytest.raises(ProtocolViolation, match="stage"):
        masking.values({}, {}, 1.0)
    (file,) = own.folder.glob("*.json")
    assert json.loads(file.read_text()) == {"stage": "aborted", "session": vars(total.session)}
    assert file.stat().st_mode & 0o077 == 0, "for the site's own eyes"
    with pytest.raises(ProtocolViolation, match="start a new session"):
        own.reveal(total.session, ())


def test_what_cannot_be_encoded_ends_the_part(masked: ExperimentConfig, kits: Path, tmp_path: Path) -> None:
    total = Sum(tmp_path, kits, masked, session(masked, tasks.EVALUATE))
    with pytest.raises(EncodingRefused, match="NaN"):
        total.maskings["site-1"].values({}, {"held_out_loss": float("nan")}, 1.0)
    with pytest.raises(EncodingRefused, match="carry none"):
        total.maskings["site-2"].integers(np.zeros(3, np.int64))
    with pytest.raises(ProtocolViolation, match="start a new session"):
        total.maskings["site-1"].values({}, {}, 1.0)


@pytest.mark.parametrize(
    "changes",
    [{"job": "0" * 64}, {"run": "other"}, {"task": "../x"}, {"nonce": "a/b"}, {"nonce": ""}, {"round_number": -1}],
)
def test_a_session_that_is_not_this_run_s_or_leads_elsewhere_is_refused(
    masked: ExperimentConfig, kits: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    one = all_sessions(tmp_path, kits, masked)["site-1"]
    with pytest.raises(ProtocolViolation, match="not of this job and run"):
        one.open(replace(session(masked), **changes))  # type: ignore[arg-type]
    with pytest.raises(ProtocolViolation, match="not opened"):
        one.reveal(session(masked), ())


def test_without_kit_or_peers_a_site_takes_no_part(masked: ExperimentConfig, kits: Path, tmp_path: Path) -> None:
    floor = Floor(peers=SITES, min_survivors=2)
    with pytest.raises(ConfigError, match="simulator-keys"):
        SiteSessions.of_run(site(tmp_path, tmp_path, "site-1", floor), "site-1", masked, RUN)
    with pytest.raises(ProtocolViolation, match="names no peers"):
        SiteSessions.of_run(site(tmp_path, kits, "site-1", None), "site-1", masked, RUN)
    with pytest.raises(ProtocolViolation, match="site-1"):
        SiteSessions.of_run(site(tmp_path, kits, "site-2", floor), "site-1", masked, RUN)  # another site's kit
    with pytest.raises(ConfigError, match="run_id"):
        SiteSessions.of_run(site(tmp_path, kits, "site-1", floor), "site-1", masked, "../..")


def test_a_mean_image_with_each_site_s_own_noise_is_not_clipped_by_the_updates_bound(
    private_experiment: ExperimentConfig, kits: Path, tmp_path: Path
) -> None:
    private = replace(private_experiment, secure_aggregation=SecureAggregationConfig(update_bound=0.01))
    total = Sum(tmp_path, kits, private, session(private, tasks.RELEASE))
    rng = np.random.default_rng(0)
    images = {name: rng.uniform(-0.5, 2.5, private.image_shape).astype(np.float32) for name in SITES}
    vectors = {name: total.maskings[name].values({MEAN_IMAGE: images[name]}, {}, 1.0) for name in SITES}
    arrays, _ = split_means(total.finished(vectors))
    np.testing.assert_allclose(arrays[MEAN_IMAGE], np.mean(list(images.values()), axis=0), atol=1e-5)


# ---- one noise for all sites


@pytest.fixture(scope="module")
def shared(private_experiment: ExperimentConfig, masked: ExperimentConfig) -> ExperimentConfig:
    assert private_experiment.privacy is not None
    return replace(
        private_experiment,
        secure_aggregation=masked.secure_aggregation,
        training=TrainingConfig(steps_per_round=1, warmup_steps=0),
        privacy=replace(private_experiment.privacy, dp="central_secagg"),
    )


def test_the_plan_counts_the_sum_s_noise(shared: ExperimentConfig) -> None:
    plan = privacy_plan(shared)
    assert plan is not None
    assert plan.config.shared_noise is not None
    assert plan.config.shared_noise.honest_sites == 2
    event = plan.round_event
    assert isinstance(event, SampledSkellam)
    assert event.dimensions == sum(int(np.prod(shape)) for shape in model_shapes(shared).values())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"secure_aggregation": None}, "secure_aggregation"),
        ({"secure_aggregation": SecureAggregationConfig(ring_bits=16)}, "ring_bits"),
        ({"training": TrainingConfig(steps_per_round=2)}, "steps_per_round"),
    ],
)
def test_shared_noise_without_what_it_rests_on_is_refused(
    shared: ExperimentConfig, changes: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        replace(shared, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", [tasks.TRAIN, tasks.RELEASE])
def test_shares_add_up_under_masks_to_the_mean_with_the_plan_s_noise(
    shared: ExperimentConfig, kits: Path, tmp_path: Path, cohort: Cohort, task: str
) -> None:
    """Against the same shares added in the clear, as integers and then as what the server makes of them."""
    plan, privacy = privacy_plan(shared), shared.privacy
    assert plan is not None
    assert privacy is not None
    assert privacy.mean_image is not None
    total = Sum(tmp_path, kits, shared, session(shared, task))
    weights = {k: v.detach() for k, v in build_network(shared.network, spatial_dims=2, seed=1).state_dict().items()}
    integers = {}
    for number, name in enumerate(SITES):
        randomness = SeededRandomnessForTests(number)
        if task == tasks.RELEASE:
            integers[name] = shared_mean_image(cohort, privacy.mean_image, plan, sites=3, randomness=randomness)
        else:
            integers[name] = shared_gradient(
                cohort=cohort,
                weights=weights,
                config=shared,
                plan=plan,
                round_number=0,
                device=torch.device("cpu"),
                patients_in_memory=4,
                sites=3,
                randomness=randomness,
                draws_seed=1,
            )
    means = total.finished({name: total.maskings[name].integers(integers[name]) for name in SITES})
    clip_norm = privacy.mean_image.clip_norm if task == tasks.RELEASE else privacy.clip_norm
    patients = privacy.patients * (1 if task == tasks.RELEASE else privacy.sampling_rate)
    unit = clip_norm / GRID_UNITS_PER_CLIP_NORM / patients
    wanted = sum(integers.values()) * unit / 3
    np.testing.assert_allclose(np.concatenate([mean.ravel() for mean in means.values()]), wanted, rtol=1e-9)
    with pytest.raises(EncodingRefused, match="shared noise"):
        total.maskings["site-1"].values({}, {}, 1.0)


def test_figures_are_not_under_shared_noise(shared: ExperimentConfig, masked: ExperimentConfig) -> None:
    assert shared.privacy is not None
    assert shared_noise_encoding(shared, tasks.EVALUATE, 0) is None
    with pytest.raises(InvalidPlan, match="nothing is summed"):
        session_encoding(masked, "decrypt", 0, parties=3)
    for experiment in (shared, replace(shared, privacy=replace(shared.privacy, mean_image=None))):
        for task in (tasks.DECRYPT, tasks.SECAGG) if experiment is shared else (tasks.RELEASE,):
            with pytest.raises(InvalidPlan, match="nothing is summed"):
                session_encoding(experiment, task, 0, parties=3)


def test_gradients_are_summed_in_the_order_of_the_parameters(shared: ExperimentConfig) -> None:
    assert shared.privacy is not None
    for patterns in (("*",), ("*norm*", "out.*")):
        experiment = replace(shared, privacy=replace(shared.privacy, trained=patterns))
        network = build_network(experiment.network, spatial_dims=2)
        trained = {name: tuple(p.shape) for name, p in trained_parameters(network, patterns).items()}
        assert list(gradient_shapes(experiment, stage_of(experiment, 0)).items()) == list(trained.items())


def test_a_policy_lets_masks_pass_on_its_own_terms_only(shared: ExperimentConfig) -> None:
    plan = privacy_plan(shared)
    open_to_all = PrivacyPolicy(
        required=False, budgets=Budgets(per_job=Budget(epsilon=99, delta=0.1), total=Budget(epsilon=99, delta=0.1))
    )
    floor = Floor(peers=SITES, required=True, min_survivors=2)
    strict = replace(open_to_all, secure_aggregation=floor, shared_noise=True)
    rules = Rules(min_survivors=2)
    demands = {"patients": 4, "rounds": 2, "leaves": ()}
    strict.check(plan, secure_aggregation=rules, **demands)  # type: ignore[arg-type]
    for policy, asked, rule in (
        (strict, None, "secure_aggregation.required"),
        (open_to_all, rules, "secure_aggregation.peers"),
        (
            replace(strict, secure_aggregation=replace(floor, min_survivors=3)),
            rules,
            "secure_aggregation.min_survivors",
        ),
        (
            replace(strict, secure_aggregation=replace(floor, min_survivors=3, colluding_sites=1)),
            Rules(min_survivors=3),
            "secure_aggregation.colluding_sites",
        ),
        (replace(strict, shared_noise=False), rules, "shared_noise"),
    ):
        with pytest.raises(PolicyRefused, match="the site's policy is") as refusal:
            policy.check(plan, secure_aggregation=asked, **demands)  # type: ignore[arg-type]
        assert refusal.value.rule == rule
