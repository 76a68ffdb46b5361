"""The private job in NVFlare's real simulator: what leaves, what is charged, and what a crash changes."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policies import policy_toml
from safetensors.numpy import load_file
from simulator import REPOSITORY, Run, simulate

from custom.cli import main
from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.egress import MEAN_IMAGE
from custom.job_plan import privacy_plan
from custom.kept_release import KEPT_FILE
from custom.model_config import TrainingConfig
from custom.model_file import ModelFile, save_model
from custom.privacy_config import MeanImageConfig, PrivacyConfig
from custom.run_folder import check_receipt
from custom.site_ledger import open_ledger
from custom.stages import model_shapes
from privacy.accounting import MechanismEvent, epsilon
from privacy.ledger import Statement
from privacy.plan import RELEASE_BEFORE_TRAINING, DPPlan

SITES = ["good-1", "good-2", "late-3"]
DELTA = 1e-2


@pytest.fixture(scope="module")
def federation(experiment: ExperimentConfig) -> ExperimentConfig:
    return replace(
        experiment,
        name="private",
        training=TrainingConfig(steps_per_round=3, warmup_steps=0),
        federation=replace(experiment.federation, min_responses=3, weighting="uniform"),
        privacy=PrivacyConfig(
            patients=12,
            delta=DELTA,
            clip_norm=1.0,
            sampling_rate=0.5,
            draws_per_patient=2,
            noise_multiplier=1.5,
            mean_image=MeanImageConfig(clip_norm=13.0, noise_multiplier=4.0, warm_up_steps=5),
        ),
    )


@pytest.fixture(scope="module")
def plan(federation: ExperimentConfig) -> DPPlan:
    found = privacy_plan(federation)
    assert found is not None
    return found


def strict(epsilon: float) -> str:
    return policy_toml(required=True, per_job=epsilon, total=epsilon, delta=DELTA, may_leave=(), min_patients=12)


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory, federation: ExperimentConfig, plan: DPPlan) -> Run:
    """One run, from given weights, at sites whose budget it uses up; every task is a fresh process."""
    base = tmp_path_factory.mktemp("private")
    federation = replace(federation, start_from="phantom")
    network = build_network(federation.network, spatial_dims=2, seed=99)
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    model = ModelFile(experiment=federation, rounds_done=1, weights=weights, ema=weights)
    save_model(base / "models" / "phantom.safetensors", model)
    return simulate(base, federation, SITES, threads=1, recorded=base / "left", policy=strict(plan.epsilon + 1e-3))


def statement(run: Run, site: str) -> Statement:
    return open_ledger(run.base / "sites" / site).statement()


def released(statement: Statement) -> list[str]:
    return [charge.attempt.release for charge in statement.charges]


def replies(run: Run, site: str) -> list[dict[str, Any]]:
    return [pickle.loads(file.read_bytes()) for file in (run.base / "left").glob(f"{site}.*")]  # noqa: S301 - our own


def listed() -> set[str]:
    """What the threat model says may leave under differential privacy."""
    text = (REPOSITORY / "docs" / "threat_model.md").read_text(encoding="utf-8")
    section = text.split("### Under differential privacy", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| (.+?) \| leaves", section, flags=re.MULTILINE)
    return {row.replace("`", "") for row in rows}


# ---- a run that goes well


def test_it_completes_with_model_and_pictures(completed: Run, plan: DPPlan) -> None:
    assert completed.returncode == 0, completed.output
    receipt = check_receipt(completed.folder)
    assert receipt["reason"] is None
    assert "starting from the model phantom" in completed.output
    assert receipt["participants"] == {"0": SITES, "1": SITES}
    for name in ("samples.png", "mean_image.png", "model.safetensors"):
        assert (completed.folder / name).stat().st_size > 0
    assert f"({plan.epsilon:.3f}, {DELTA:g})" in completed.output, "the server prints the plan"
    for site in SITES:
        (picture,) = (completed.base / "sites" / site / "pictures").rglob("real_and_generated.png")
        assert picture.stat().st_size > 0


@pytest.mark.parametrize("site", SITES)
def test_every_release_was_charged_and_no_other(completed: Run, plan: DPPlan, site: str) -> None:
    account = statement(completed, site)
    assert released(account) == [RELEASE_BEFORE_TRAINING, "round-0000", "round-0001"]
    assert [charge.event for charge in account.charges] == list(plan.releases().values())
    assert account.total.spent == pytest.approx(plan.epsilon, abs=1e-6)
    assert account.open_runs == (), "what was set aside and not used is given back"
    assert account.exhausted


@pytest.mark.parametrize("site", SITES)
def test_all_that_leaves_is_on_the_list(completed: Run, federation: ExperimentConfig, site: str) -> None:
    """Every reply of the site, as it went to the network, against the list in docs/threat_model.md."""
    model = set(model_shapes(federation))
    left: set[str] = set()
    for reply in replies(completed, site):
        headers = reply.pop("__headers__")
        assert headers == {"__content_type__": "DXO"}
        dxo = reply.pop("DXO")
        assert not reply
        arrays, meta = dxo["data"], dict(dxo["meta"])
        if str(dxo["kind"].value) == "METRICS":
            left |= set(arrays) | set(meta)
            continue
        left |= {"weight difference"} if set(arrays) == model else set(arrays)
        left |= set(meta.pop("initial_metrics"))
        assert meta == {"weight": 1.0}
        left.add("weight")
    assert len(replies(completed, site)) == 4, "the mean image, two rounds, and the empty answer to the evaluation"
    assert left == listed() - {"return code"}
    assert left == {"weight difference", MEAN_IMAGE, "weight"}


def test_the_server_has_no_figure_of_a_site(completed: Run) -> None:
    for line in (completed.folder / "rounds.jsonl").read_text().splitlines():
        assert json.loads(line)["accepted"] == {site: {} for site in SITES}
    assert json.loads((completed.folder / "metrics.json").read_text()) == {
        "mean": {},
        "sites": {site: {} for site in SITES},
    }
    written = [file.read_bytes() for file in (completed.base / "workspace" / "server").rglob("*.txt")]
    written += [file.read_bytes() for file in completed.folder.rglob("*") if file.is_file()]
    assert not any(b"held_out_loss" in content or b"FEDCT-" in content for content in written)


def test_the_command_shows_it(completed: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ledger", "--site-file", str(completed.base / "sites.toml"), "--site", "good-1"]
    assert main(words) == 1, "exhausted: one more release would pass the total"
    assert "3 releases charged" in capsys.readouterr().out


def test_a_second_job_on_the_same_patients_is_refused_before_it_trains(
    completed: Run, federation: ExperimentConfig, plan: DPPlan
) -> None:
    before = statement(completed, "good-1")
    again = simulate(
        completed.base,
        replace(federation, name="another"),
        SITES,
        threads=3,
        policy=strict(plan.epsilon + 1e-3),
    )
    assert again.receipt["status"] == "failed"
    assert "PRIVACY_BUDGET_SPENT" in again.receipt["reason"]
    assert again.receipt["rounds_done"] == 0
    after = statement(completed, "good-1")
    assert released(after) == released(before)
    assert after.total.spent == before.total.spent


@pytest.mark.parametrize(
    ("private", "rule"), [(True, "SITE_POLICY_BUDGETS_PER_JOB_EPSILON"), (False, "SITE_POLICY_REQUIRED")]
)
def test_a_job_that_asks_for_less_privacy_is_refused_by_rule(
    federation: ExperimentConfig, experiment: ExperimentConfig, private: bool, rule: str, tmp_path: Path
) -> None:
    job = federation if private else replace(experiment, name="plain")
    refused = simulate(tmp_path, job, SITES, threads=3, policy=strict(0.1))
    assert refused.receipt["status"] == "failed"
    assert rule in refused.receipt["reason"]
    assert not list((tmp_path / "sites").rglob("ledger.sqlite"))
    assert not list((tmp_path / "sites").rglob("round_*.safetensors")), "it was refused before it trained"
    errors = [file.read_text() for file in (tmp_path / "workspace").rglob("error_log.txt")]
    assert not any("refused by this site" in text for text in errors), "kits may stream errors to the server"


# ---- a server, or a site, that dies in the middle of a round


def interrupted(base: Path, federation: ExperimentConfig, policy: str) -> Run:
    """The last site is killed in round 2, after it was charged and before its reply has left."""
    short = replace(federation, federation=replace(federation.federation, round_timeout_s=30))
    return simulate(base, short, SITES, threads=3, faulty={"error_round": 1}, policy=policy)


def children(process: int) -> list[int]:
    """All processes below one, the nearest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # gone in between
            continue
        if parent == process:
            found.append(int(stat.parent.name))
    return found + [below for child in found for below in children(child)]


def killed(base: Path, federation: ExperimentConfig, policy: str) -> Run:
    """Server and sites are killed in round 2, when every site was charged and the server still waits for the last."""
    before = set(children(os.getpid()))
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(simulate, base, federation, SITES, threads=3, faulty={"error_round": 1}, policy=policy)
        while not all(any((base / "sites" / site).rglob("round_0001.safetensors")) for site in SITES):
            assert not run.done(), run.result().output
            time.sleep(0.2)
        for process in set(children(os.getpid())) - before:
            with suppress(ProcessLookupError):  # one of them has ended by itself
                os.kill(process, signal.SIGKILL)
        return run.result()


def carried_on(run: Run, policy: str) -> Run:
    """The same run, resumed, with a site that is honest now."""
    return simulate(
        run.base,
        run.experiment,
        SITES,
        threads=3,
        faulty={"error_round": 99},
        resume_run=run.folder.name,
        policy=policy,
    )


def spent(events: list[MechanismEvent]) -> float:
    return epsilon(events, DELTA).epsilon


def forget(run: Run) -> None:
    """The sites lose what they kept of their last release."""
    for site in SITES:
        (kept,) = (run.base / "sites" / site).rglob(KEPT_FILE)
        kept.unlink()


def test_a_killed_server_resumes_and_every_round_is_charged_once(
    federation: ExperimentConfig, plan: DPPlan, tmp_path: Path
) -> None:
    """At sites whose budget has no room for a second attempt at any of them."""
    tight = strict(plan.epsilon + 1e-3)
    first = killed(tmp_path, federation, tight)
    assert first.returncode != 0
    assert not (first.folder / "receipt.json").exists()
    before = {site: statement(first, site).charges for site in SITES}

    resumed = carried_on(first, tight)
    receipt = check_receipt(resumed.folder)
    assert receipt["reason"] is None
    assert receipt["participants"] == {"0": SITES, "1": SITES}
    for site in SITES:
        account = statement(resumed, site)
        assert released(account) == [RELEASE_BEFORE_TRAINING, "round-0000", "round-0001"]
        assert account.charges == before[site]
        assert account.total.spent == pytest.approx(plan.epsilon, abs=1e-6)
        assert not list((tmp_path / "sites" / site).rglob(KEPT_FILE)), "the run is over"


def test_a_round_that_repeats_is_charged_again_with_other_noise(
    federation: ExperimentConfig, plan: DPPlan, tmp_path: Path
) -> None:
    """Where what was charged is not there any more."""
    first = interrupted(tmp_path, federation, strict(50.0))
    assert first.receipt["status"] == "failed"
    assert first.receipt["rounds_done"] == 1
    once = [*plan.releases().values()]
    for site in SITES:
        assert statement(first, site).total.spent == pytest.approx(spent(once))

    forget(first)
    resumed = carried_on(first, strict(50.0))
    assert check_receipt(resumed.folder)["rounds_done"] == 2
    for site in SITES:
        account = statement(resumed, site)
        assert released(account) == [RELEASE_BEFORE_TRAINING, "round-0000", "round-0001", "round-0001"]
        assert len({charge.sha256 for charge in account.charges}) == 4
        assert account.total.spent == pytest.approx(spent([*once, plan.round_event]))


def test_a_job_that_reaches_the_budget_ends_with_the_model_it_has(
    federation: ExperimentConfig, plan: DPPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tight = strict(plan.epsilon + 1e-3)
    first = interrupted(tmp_path, federation, tight)
    assert first.receipt["rounds_done"] == 1
    forget(first)
    resumed = carried_on(first, tight)
    receipt = check_receipt(resumed.folder)
    assert receipt["rounds_done"] == 1
    assert "PRIVACY_BUDGET_SPENT" in receipt["reason"]
    assert all(np.isfinite(a).all() for a in load_file(resumed.folder / "model.safetensors").values())
    for site in SITES:
        assert statement(resumed, site).total.spent <= plan.epsilon + 1e-3
    assert main(["receipt", str(resumed.folder)]) == 0
    assert "ended early" in capsys.readouterr().out
