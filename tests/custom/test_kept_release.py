"""A charged release that is asked for again, and the crashes around it, through the site's executor."""

from __future__ import annotations

import json
import pickle
import sqlite3
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import from_shareable
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from policies import policy_toml
from safetensors.torch import save

from custom import kept_release, tasks
from custom.codec import Arrays, TaskHeader, ToSite, task_model, to_numpy
from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.diffusion.schedule import build_schedule
from custom.egress import BUDGET_SPENT, MEAN_IMAGE, POLICY_CODES, EgressRefused
from custom.executors import diffusion_trainer
from custom.executors.diffusion_trainer import DiffusionTrainer
from custom.kept_release import KEPT_FILE, KeptRelease, Request, charged_release, drop, keep
from custom.secure_config import SecureAggregationConfig
from custom.site_file import SITE_FILE_VARIABLE, load_site
from custom.site_ledger import open_ledger, release_sha256
from custom.site_state import SiteState
from privacy.accounting import GaussianRelease
from privacy.ledger import LEDGER_FILE, Ledger, Run
from privacy.policy import Budget, Budgets
from privacy.rng import SeededRandomnessForTests

SITE = "site-1"
RUN_ID = "20260101-000000-abcd"
DATA = "data = { embedded = { hospital = 0, patients = 8, slices = 4, matrix = 32, seed = 1 } }"


class Killed(BaseException):
    """The process is gone: nothing behind this line runs."""


class Site:
    """One site with a home of its own, asked task by task."""

    def __init__(self, base: Path, experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base, self.experiment, self.monkeypatch = base, experiment, monkeypatch
        self.home = base / "home"
        self.run = Run(job=experiment.name, run_id=RUN_ID)
        config = base / "config"
        config.mkdir()
        (config / "experiment.json").write_text(json.dumps(experiment.to_json()))
        monkeypatch.setenv(SITE_FILE_VARIABLE, str(base / "sites.toml"))
        self.policy(policy_toml(peers=["site-1", "site-2", "site-3"], shared_noise="true"))

    def policy(self, line: str) -> None:
        """Put a policy into the site file."""
        hardware = "hardware = { threads = 1 }"
        (self.base / "sites.toml").write_text(f'[sites.{SITE}]\nhome = "home"\n{line}\n{hardware}\n{DATA}\n')

    @property
    def ledger(self) -> Ledger:
        return open_ledger(self.home)

    @property
    def folder(self) -> Path:
        return SiteState.of_run(self.home, self.experiment.name, RUN_ID, private=True).folder

    def header(self, round_number: int) -> TaskHeader:
        return TaskHeader(
            run_id=RUN_ID,
            round_number=round_number,
            config_sha256=self.experiment.sha256,
            schedule_sha256=build_schedule(self.experiment.schedule).sha256,
        )

    def answer(self, task: str, arrays: Arrays, round_number: int = 0) -> Shareable:
        """A fresh executor's reply."""
        workspace = SimpleNamespace(
            get_app_config_dir=lambda _: str(self.base / "config"), get_root_dir=lambda: str(self.base)
        )
        context = FLContext()
        for name, value in (
            (ReservedKey.ENGINE, SimpleNamespace(get_workspace=lambda: workspace, fire_event=lambda *_: None)),
            (ReservedKey.IDENTITY_NAME, SITE),
            (FLContextKey.CURRENT_RUN, "job"),
        ):
            context.set_prop(name, value, private=True, sticky=False)
        model = FLModelUtils.to_shareable(task_model(arrays, self.header(round_number)))
        return DiffusionTrainer().execute(task, model, context, Signal())

    def train(self, round_number: int = 0, weights: Arrays | None = None) -> dict[str, np.ndarray]:
        """The update of a round, which must leave."""
        reply = self.answer(tasks.TRAIN, self.weights(round_number) if weights is None else weights, round_number)
        assert reply.get_return_code() == ReturnCode.OK
        return from_shareable(reply).data

    def weights(self, seed: int) -> Arrays:
        network = build_network(self.experiment.network, spatial_dims=2, seed=seed)
        return to_numpy(network.state_dict())

    def charges(self) -> list[str]:
        return [charge.attempt.release for charge in self.ledger.statement().charges]

    def entries(self) -> int:
        """Lines of the ledger: an attempt that is begun is one, too."""
        with closing(sqlite3.connect(self.home / LEDGER_FILE)) as database:
            return int(database.execute("SELECT count(*) FROM entries").fetchone()[0])

    def killed_at(self, owner: Any, name: str, ask: Any) -> None:
        """Ask with a process that dies where it would call this."""

        def dies(*_: Any, **__: Any) -> None:
            raise Killed

        with self.monkeypatch.context() as patch:
            patch.setattr(owner, name, dies)
            with pytest.raises(Killed):
                ask()

    def seeded(self) -> None:
        """From now on a round's noise and draws are a function of its number, so that runs can be compared."""
        real = diffusion_trainer.train_private_round

        def seeded(**values: Any) -> Any:
            seed = values["round_number"]
            return real(**values, randomness=SeededRandomnessForTests(seed), draws_seed=seed)

        self.monkeypatch.setattr(diffusion_trainer, "train_private_round", seeded)


@pytest.fixture
def site(private_experiment: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, private_experiment, monkeypatch)


def asked_of(site: Site) -> diffusion_trainer._Site:
    """As the executor makes it for a task."""
    return diffusion_trainer._Site(
        name=SITE,
        config=load_site(site.base / "sites.toml", SITE),
        experiment=site.experiment,
        device=torch.device("cpu"),
        abort=Signal(),
    )


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# ---- asked for again


def test_the_same_request_gets_the_same_bytes_for_one_charge(site: Site) -> None:
    first = site.answer(tasks.TRAIN, site.weights(0))
    entries = site.entries()
    again = site.answer(tasks.TRAIN, site.weights(0))
    assert pickle.dumps(dict(again)) == pickle.dumps(dict(first))
    assert site.charges() == ["round-0000"]
    assert site.entries() == entries, "no attempt was begun"
    assert site.ledger.begin(site.run, "round-0000", budgets=budgets(100.0)).number == 2


def test_the_same_numbers_go_under_the_masks_of_another_session(
    private_experiment: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each site's noise is enough by itself, so whatever sums they stand in, they are one release."""
    masked = replace(private_experiment, secure_aggregation=SecureAggregationConfig(update_bound=0.5, max_weight=1.0))
    site = Site(tmp_path, masked, monkeypatch)
    asked, under = asked_of(site), []
    for sites in (3, 2):
        masking = SimpleNamespace(
            sites=sites, values=lambda arrays, *_, **__: under.append(arrays) or np.zeros(1, np.uint32)
        )
        monkeypatch.setattr(diffusion_trainer, "_masking", lambda *_, masking=masking: masking)
        diffusion_trainer._masked_work(asked, tasks.TRAIN, site.weights(0), site.header(0), ToSite())
    assert same(*under)
    assert site.charges() == ["round-0000"]


def test_the_mean_image_before_training_is_sent_again_until_a_round_follows(site: Site) -> None:
    first, again = (from_shareable(site.answer(tasks.RELEASE, {})).data for _ in range(2))
    assert set(first) == {MEAN_IMAGE}
    assert same(first, again)
    site.train(0)
    assert not same(first, from_shareable(site.answer(tasks.RELEASE, {})).data), "only the newest release is kept"
    assert site.charges() == ["before-training", "round-0000", "before-training"]


def test_other_weights_get_fresh_noise_and_are_charged(site: Site) -> None:
    first, other = site.train(0), site.train(0, site.weights(99))
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    assert site.charges() == ["round-0000", "round-0000"]
    assert same(other, site.train(0, site.weights(99))), "the newest is kept"
    assert not same(first, site.train(0)), "the one before is not"
    assert len(site.charges()) == 3


def test_a_weight_that_differs_in_one_bit_is_another_request(site: Site) -> None:
    first, weights = site.train(0), {name: array.copy() for name, array in site.weights(0).items()}
    name = next(iter(weights))
    weights[name].flat[0] = np.nextafter(weights[name].flat[0], np.float32(np.inf))
    assert not same(first, site.train(0, weights))
    assert len(site.charges()) == 2


def test_another_round_is_another_request(site: Site) -> None:
    weights = site.weights(0)
    assert not same(site.train(0, weights), site.train(1, weights))
    assert site.charges() == ["round-0000", "round-0001"]


def test_it_is_dropped_when_the_run_is_over(site: Site) -> None:
    site.train(0)
    assert (site.folder / KEPT_FILE).is_file()
    samples = np.zeros((24, 1, 16, 16), dtype=np.uint8)
    arrays = {**site.weights(0), tasks.SAMPLES: samples, tasks.UNTRAINED_SAMPLES: samples}
    assert site.answer(tasks.EVALUATE, arrays, 2).get_return_code() == ReturnCode.OK
    assert not (site.folder / KEPT_FILE).exists()


# ---- what is not sent


def flipped(part: str) -> Any:
    """One bit of the first tensor with this prefix."""

    def spoil(file: Path) -> None:
        content = bytearray(file.read_bytes())
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        start = min(entry["data_offsets"][0] for name, entry in header.items() if name.startswith(part))
        content[8 + size + start] ^= 1
        file.write_bytes(content)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda file: file.unlink(), id="missing"),
        pytest.param(lambda file: file.write_bytes(b""), id="empty"),
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-8]), id="cut"),
        pytest.param(lambda file: file.write_bytes(pickle.dumps({"release/w": torch.ones(1)})), id="pickle"),
        pytest.param(lambda file: file.write_bytes(save({"release/w": torch.ones(1)})), id="no request"),
        pytest.param(
            lambda file: file.write_bytes(save({"w": torch.ones(1)}, {"request": "[]", "state_sha256": ""})),
            id="no release",
        ),
        pytest.param(flipped("release/"), id="another release"),
        pytest.param(flipped("state/"), id="another state"),
    ],
)
def test_what_is_not_what_was_charged_is_not_sent(site: Site, spoil: Any) -> None:
    first = site.train(0)
    spoil(site.folder / KEPT_FILE)
    again = site.train(0)
    assert not any(np.array_equal(first[name], again[name]) for name in first)
    assert site.charges() == ["round-0000", "round-0000"]


def test_what_the_ledger_does_not_know_is_never_sent(site: Site) -> None:
    """Killed between the file and the charge."""
    site.killed_at(Ledger, "charge", lambda: site.train(0))
    assert (site.folder / KEPT_FILE).is_file()
    assert not list(site.folder.glob("round_*"))
    kept = kept_release._read(site.folder / KEPT_FILE)
    assert kept is not None
    assert charged_release(site.folder, site.ledger, site.run) is None
    fresh = site.train(0)
    assert not any(np.array_equal(kept.arrays[name].numpy(), fresh[name]) for name in fresh)
    assert site.charges() == ["round-0000"]
    assert site.ledger.statement().charges[0].attempt.number == 2


def test_a_crash_before_a_second_charge_does_not_bring_the_first_release_back(site: Site) -> None:
    site.train(0)
    site.killed_at(Ledger, "charge", lambda: site.train(0, site.weights(99)))
    assert charged_release(site.folder, site.ledger, site.run) is None
    site.train(0)
    assert site.charges() == ["round-0000", "round-0000"]


STRICTER = {
    "patients": (policy_toml(min_patients="100"), POLICY_CODES["min_patients"]),
    "rounds": (policy_toml(max_rounds="1"), POLICY_CODES["max_rounds"]),
    "clip norm": (policy_toml(max_clip_norm="0.5"), POLICY_CODES["max_clip_norm"]),
    "masks": (policy_toml(peers=["a", "b"], masks_required=True), POLICY_CODES["secure_aggregation.required"]),
}


@pytest.mark.parametrize("stricter", STRICTER)
def test_a_policy_that_has_become_stricter_refuses(site: Site, stricter: str) -> None:
    site.train(0)
    line, code = STRICTER[stricter]
    site.policy(line)
    assert site.answer(tasks.TRAIN, site.weights(0)).get_return_code() == code


def test_a_budget_that_was_lowered_refuses(site: Site) -> None:
    """The job by itself still fits into the site's total; with what another job has spent it does not."""
    site.train(0)
    plan = diffusion_trainer.privacy_plan(site.experiment)
    assert plan is not None
    other, room = Run(job="other", run_id="r"), budgets(100.0)
    site.ledger.reserve(other, plan.releases(), budgets=room)
    site.policy(policy_toml(per_job=plan.epsilon + 1e-3, total=plan.epsilon + 1e-3))
    assert site.answer(tasks.TRAIN, site.weights(0)).get_return_code() == BUDGET_SPENT


def test_the_gate_is_asked_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.train(0)

    def shut(*_: Any) -> None:
        raise EgressRefused("shut")

    monkeypatch.setattr(diffusion_trainer, "checked", shut)
    assert site.answer(tasks.TRAIN, site.weights(0)).get_return_code() == ReturnCode.EXECUTION_EXCEPTION


def test_integers_with_a_share_of_the_noise_are_never_kept(
    private_experiment: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same integers in two sums would show a site under its own share alone: each time they are others, charged."""
    privacy = private_experiment.privacy
    assert privacy is not None
    shared = replace(
        private_experiment,
        training=replace(private_experiment.training, steps_per_round=1),
        privacy=replace(privacy, dp="central_secagg"),
        secure_aggregation=SecureAggregationConfig(update_bound=0.5, max_weight=1.0),
    )
    site = Site(tmp_path, shared, monkeypatch)
    plan = diffusion_trainer.privacy_plan(shared)
    assert plan is not None
    asked = asked_of(site)
    for task in (tasks.RELEASE, tasks.TRAIN):
        weights = site.weights(0) if task == tasks.TRAIN else {}
        once, again = (diffusion_trainer._share(asked, plan, task, weights, site.header(0), 3) for _ in range(2))
        assert not np.array_equal(once, again)
    assert site.charges() == ["before-training", "before-training", "round-0000", "round-0000"]
    assert not site.folder.exists()


# ---- the state of training


@pytest.mark.parametrize("asked_again", [True, False])
def test_a_crash_between_charge_and_state_changes_no_later_round(
    private_experiment: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_again: bool
) -> None:
    """Bit for bit, whether the server asks for the round again or goes on without this site's reply."""
    sites = []
    for name in ("whole", "crashed"):
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            site = Site(tmp_path / name, private_experiment, patch)
            site.seeded()
            if name == "whole":
                first = site.train(0)
            else:
                site.killed_at(SiteState, "save", partial(site.train, 0))
                assert not list(site.folder.glob("round_*"))
                if asked_again:
                    assert same(site.train(0), first)
            sites.append((site, site.train(1)))
    (whole, one), (crashed, other) = sites
    assert same(one, other)
    assert whole.charges() == crashed.charges() == ["round-0000", "round-0001"]
    for number in (1, 2):
        before = [SiteState(site.folder).before(number) for site in (whole, crashed)]
        assert before[0]
        assert same(*before)


def test_without_its_state_the_next_round_would_be_another(site: Site) -> None:
    """The test above can fail."""
    site.seeded()
    site.train(0)
    one = site.train(1)
    for file in site.folder.glob("*.safetensors"):
        file.unlink()
    assert not same(one, site.train(1))


def test_state_that_was_not_charged_is_not_used(site: Site) -> None:
    """Killed before the charge of round 1: round 1 again starts from the end of round 0."""
    site.seeded()
    site.train(0)
    before = SiteState(site.folder).before(1)
    site.killed_at(Ledger, "charge", lambda: site.train(1, site.weights(7)))
    site.answer(tasks.TRAIN, site.weights(1), 1)
    assert same(SiteState(site.folder).before(1), before)


# ---- the file alone


def budgets(epsilon: float) -> Budgets:
    budget = Budget(epsilon=epsilon, delta=1e-2)
    return Budgets(per_job=budget, total=budget)


def test_a_file_of_another_run_is_not_taken(tmp_path: Path) -> None:
    """Even if the ledger knows what it holds: its state belongs to the other run."""
    mine, other = Run(job="a", run_id="mine"), Run(job="a", run_id="other")
    event, allowed = GaussianRelease(noise_multiplier=4.0), budgets(100.0)
    ledger = open_ledger(tmp_path)
    request = Request(run=other, release="round-0000", round_number=0, arrays_sha256="0" * 64, config_sha256="0" * 64)
    kept = KeptRelease(request=request, arrays={"w": torch.arange(3.0)}, state={"m": torch.zeros(())})
    for run in (mine, other):
        ledger.reserve(run, {"round-0000": event}, budgets=allowed)
        attempt = ledger.begin(run, "round-0000", budgets=allowed)
        ledger.charge(attempt, event, sha256=release_sha256(kept.arrays), budgets=allowed)
    keep(tmp_path / "state", kept)
    assert charged_release(tmp_path / "state", ledger, mine) is None
    found = charged_release(tmp_path / "state", ledger, other)
    assert found is not None
    assert found.request == request
    assert torch.equal(found.arrays["w"], kept.arrays["w"])
    assert torch.equal(found.state["m"], kept.state["m"])
    drop(tmp_path / "state")
    drop(tmp_path / "state")
    assert charged_release(tmp_path / "state", ledger, other) is None
