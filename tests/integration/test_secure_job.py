"""Secure aggregation in NVFlare's real simulator: what leaves, what the server learns, and who may be missing."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policies import policy_toml
from safetensors.numpy import load_file
from simulator import Run, real_sites, simulate

from custom.config import ExperimentConfig
from custom.job_plan import privacy_plan
from custom.model_config import TrainingConfig
from custom.privacy_config import MeanImageConfig, PrivacyConfig
from custom.run_folder import check_receipt
from custom.secure_config import SecureAggregationConfig
from custom.site_ledger import open_ledger
from privacy.plan import RELEASE_BEFORE_TRAINING

SITES = ["good-1", "good-2", "good-3"]
BITS = 31  # of the ring, with a sign


@pytest.fixture(scope="module")
def plain(experiment: ExperimentConfig) -> ExperimentConfig:
    return replace(experiment, name="plain")


@pytest.fixture(scope="module")
def masked(plain: ExperimentConfig) -> ExperimentConfig:
    return replace(
        plain,
        name="masked",
        secure_aggregation=SecureAggregationConfig(update_bound=0.1, max_weight=20.0, stage_timeout_s=60),
    )


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory, masked: ExperimentConfig) -> Run:
    """Two rounds at sites that demand masks, by processes that last."""
    base = tmp_path_factory.mktemp("masked")
    policy = policy_toml(peers=SITES, masks_required=True)
    return simulate(base, masked, SITES, threads=3, recorded=base / "left", policy=policy)


def left(run: Run, site: str) -> list[dict[str, Any]]:
    """What went out behind the last filter, as it stands in NVFlare's messages, in order."""
    files = sorted((run.base / "left").glob(f"{site}.*"), key=lambda file: file.stat().st_mtime_ns)
    return [pickle.loads(file.read_bytes()) for file in files]  # noqa: S301 - our own


def assert_same_model(one: Run, other: Run, tolerance: float) -> None:
    a, b = (load_file(run.folder / "model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=tolerance, rtol=0)


# ---- a run that goes well


def test_a_run_leaves_what_the_plain_job_leaves_but_no_site_s_figures(completed: Run) -> None:
    assert completed.returncode == 0, completed.output
    receipt = check_receipt(completed.folder)
    assert receipt["participants"] == {"0": SITES, "1": SITES}
    assert receipt["refused"] == receipt["silent"] == {}
    metrics = json.loads((completed.folder / "metrics.json").read_text())
    assert metrics["sites"] == {}
    assert {"held_out_loss", "effnet_kid", "effnet_kid_baseline"} <= set(metrics["mean"])
    records = [json.loads(line) for line in (completed.folder / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        assert record["accepted"] == {site: {} for site in SITES}
        assert set(record["mean"]) == {"train_loss", "held_out_loss", "seconds"}
        assert 0.1 < record["mean"]["held_out_loss"] < 2


@pytest.mark.parametrize("site", SITES)
def test_three_tasks_a_round_and_none_without_a_mask(completed: Run, site: str) -> None:
    """Two to open the first session; then work, signature and shares, twice in training and once in the evaluation."""
    kinds = []
    for reply in left(completed, site):
        assert set(reply) == {"DXO", "__headers__"}
        assert reply["__headers__"] == {"__content_type__": "DXO"}
        dxo = reply["DXO"]
        assert not dxo["meta"]
        if set(dxo["data"]) == {"masked"}:
            assert dxo["data"]["masked"].dtype == np.uint32
            kinds.append("work")
        else:
            kinds.append("+".join(name for name, value in dxo["data"].items() if value is not None))
    opening, following = ["advert", "boxes"], ["work", "advert+signed", "boxes+revealed"]
    assert kinds == [*opening, *following, *following, "work", "signed", "revealed"]


def test_what_leaves_says_nothing_about_the_update(
    completed: Run, plain: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same first round without masks gives each site's update in the clear; no upload correlates with any."""
    base = tmp_path_factory.mktemp("clear")
    clear = simulate(base, plain, SITES, threads=3, recorded=base / "left")
    updates = {}
    for site in SITES:
        update = next(reply["DXO"]["data"] for reply in left(clear, site) if reply["DXO"]["meta"])
        updates[site] = np.concatenate([update[name].ravel() for name in sorted(update)])
    replies = {site: [reply["DXO"]["data"] for reply in left(completed, site)] for site in SITES}
    uploads = {site: [data["masked"] for data in replies[site] if "masked" in data] for site in SITES}
    total = np.sum([uploads[site][0] for site in SITES], axis=0, dtype=np.uint32)
    for update in updates.values():
        size, most = len(update), 5.5 / np.sqrt(len(update))  # exceeded by chance once in 10⁷
        for vector in [total, *(upload for site in SITES for upload in uploads[site][:2])]:
            assert abs(np.corrcoef(vector.view(np.int32)[:size], update)[0, 1]) < most
        # The same test sees an update in its own encoding, or under a hundred times its own noise.
        noise = np.random.default_rng(0).normal(0, 10 * update.std(), size)
        assert abs(np.corrcoef(update + noise, update)[0, 1]) > most
    for site in SITES:
        content = b"".join(pickle.dumps(reply) for reply in left(completed, site))
        assert updates[site][:64].tobytes() not in content
        for words in (uploads[site][0].view(np.uint8), uploads[site][1].view(np.uint8)):
            assert np.bincount(words, minlength=256).std() < 1.5 * np.sqrt(len(words) / 256)
    assert_first_round_is_the_mean(completed, clear, updates)


def assert_first_round_is_the_mean(masked: Run, clear: Run, updates: dict[str, np.ndarray]) -> None:
    """The sum that came out from under the masks is plain FedAvg's."""
    checkpoint = load_file(masked.folder / "checkpoints" / "round_0001.safetensors")
    wanted = load_file(clear.folder / "checkpoints" / "round_0001.safetensors")
    assert max(np.abs(update).max() for update in updates.values()) < 0.1, "nothing was clipped"
    for name, array in wanted.items():
        np.testing.assert_allclose(checkpoint[name], array, atol=1e-6, rtol=0)


def test_no_secret_of_a_session_is_left_on_the_site_s_disk(completed: Run) -> None:
    for site in SITES:
        files = list((completed.base / "sites" / site / "secagg").rglob("*.json"))
        assert len(files) == 3
        for file in files:
            assert set(json.loads(file.read_text())) == {"stage", "session"}
            assert json.loads(file.read_text())["stage"] == "done"


# ---- sites that are missing


def test_one_killed_after_sharing_leaves_the_plain_mean_of_the_others(
    plain: ExperimentConfig, masked: ExperimentConfig, tmp_path: Path
) -> None:
    """Its shares are dealt, its vector never comes: its masks are taken off, and it costs one timeout, not three."""
    sites = ["good-1", "good-2", "killed-3"]
    short = replace(masked, federation=replace(masked.federation, round_timeout_s=30))
    run = simulate(tmp_path / "masked", short, sites, threads=3, faulty={})
    receipt = check_receipt(run.folder)
    assert receipt["participants"] == {"0": sites[:2], "1": sites[:2]}
    assert receipt["silent"] == {"0": ["killed-3"]}
    clear = simulate(tmp_path / "plain", plain, sites[:2], threads=2)
    assert_same_model(run, clear, 1e-5)


def test_a_site_that_errs_is_back_in_the_next_session_but_one(masked: ExperimentConfig, tmp_path: Path) -> None:
    sites = ["error-3", "good-1", "good-2"]
    three = replace(masked, federation=replace(masked.federation, rounds=3))
    run = simulate(tmp_path, three, sites, threads=3, faulty={"error_round": 1})
    receipt = check_receipt(run.folder)
    assert receipt["participants"] == {"0": sites, "1": sites[1:], "2": sites}
    assert "EXECUTION_EXCEPTION" in receipt["refused"]["1"]["error-3"]


def test_too_few_are_no_success(masked: ExperimentConfig, tmp_path: Path) -> None:
    short = replace(masked, federation=replace(masked.federation, rounds=1, round_timeout_s=20))
    run = simulate(tmp_path, short, ["good-1", "killed-2", "killed-3"], threads=3, faulty={})
    assert run.receipt["status"] == "failed"
    assert "RoundVoid" in run.receipt["reason"]
    assert not (run.folder / "model.safetensors").exists()


# ---- sites that demand more than the job gives


def test_a_site_that_requires_masks_refuses_a_job_without(plain: ExperimentConfig, tmp_path: Path) -> None:
    policy = policy_toml(peers=SITES, masks_required=True)
    run = simulate(tmp_path, plain, SITES, threads=3, recorded=tmp_path / "left", policy=policy)
    assert run.receipt["status"] == "failed"
    assert "SITE_POLICY_SECURE_AGGREGATION_REQUIRED" in run.receipt["reason"]
    for site in SITES:
        assert all("DXO" not in reply for reply in left(run, site))


def test_real_scans_under_masks(masked: ExperimentConfig, shared_ct: Path, tmp_path: Path) -> None:
    """DICOM and NIfTI mixed, at sites that require masks."""
    sites = real_sites(shared_ct, tmp_path)
    short = replace(masked, name="real", federation=replace(masked.federation, rounds=1))
    policy = policy_toml(peers=sites, masks_required=True)
    run = simulate(tmp_path, short, sites, threads=3, recorded=tmp_path / "left", policy=policy)
    receipt = check_receipt(run.folder)
    assert receipt["participants"] == {"0": sorted(sites)}
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics["sites"] == {}
    assert 0.1 < metrics["mean"]["held_out_loss"] < 2
    written = [*run.folder.rglob("*.json*"), *(run.base / "workspace" / "server").rglob("*.txt")]
    for content in [*(file.read_bytes() for file in written), *(pickle.dumps(left(run, site)) for site in sites)]:
        assert b"STS_" not in content
        assert b"TCGA-" not in content


# ---- with differential privacy: one noise over all sites


def test_one_noise_for_all_sites(masked: ExperimentConfig, tmp_path: Path) -> None:
    """The mean image and two steps, each charged as the noise of the sum; the optimiser is the server's."""
    private = replace(
        masked,
        name="shared",
        training=TrainingConfig(steps_per_round=1, warmup_steps=0),
        federation=replace(masked.federation, weighting="uniform"),
        privacy=PrivacyConfig(
            dp="central_secagg",
            patients=12,
            delta=1e-2,
            clip_norm=1.0,
            sampling_rate=0.5,
            noise_multiplier=1.5,
            mean_image=MeanImageConfig(clip_norm=13.0, noise_multiplier=4.0, warm_up_steps=5),
        ),
    )
    plan = privacy_plan(private)
    assert plan is not None
    policy = policy_toml(required=True, peers=SITES, masks_required=True, may_leave=(), shared_noise="true")
    run = simulate(tmp_path, private, SITES, threads=3, recorded=tmp_path / "left", policy=policy)
    assert check_receipt(run.folder)["participants"] == {"0": SITES, "1": SITES}
    assert "noise of 2 sites in each sum" in run.output
    for site in SITES:
        statement = open_ledger(tmp_path / "sites" / site).statement()
        released = [charge.attempt.release for charge in statement.charges]
        assert released == [RELEASE_BEFORE_TRAINING, "round-0000", "round-0001"]
        assert [charge.event for charge in statement.charges] == list(plan.releases().values())
        assert statement.total.spent == pytest.approx(plan.epsilon)
        assert statement.open_runs == ()
        for reply in left(run, site):
            assert set(reply["DXO"]["data"]) in ({"masked"}, {"advert", "boxes", "signed", "revealed"})
    assert (run.folder / "mean_image.png").is_file()
    checkpoint = load_file(run.folder / "checkpoints" / "round_0001.safetensors")
    assert any(name.startswith("optimizer/") for name in checkpoint)
