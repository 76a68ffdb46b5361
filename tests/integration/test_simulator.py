"""The main job in NVFlare's real simulator: real processes, real DICOM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from simulator import Run, real_sites, simulate

from custom.cli import main
from custom.config import ExperimentConfig
from custom.run_folder import check_receipt

SITES = ["error-3", "good-1", "good-2"]  # names decide the draws; the first one errs where a test asks it to

# Threads and the order of arrival change the last bits of a sum, and a few steps of training magnify them.
MODEL_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def federation(experiment: ExperimentConfig) -> ExperimentConfig:
    return replace(experiment, name="simulated", federation=replace(experiment.federation, min_responses=3))


@pytest.fixture(scope="module")
def one_thread(tmp_path_factory: pytest.TempPathFactory, federation: ExperimentConfig) -> Run:
    """The simulator's default: every task is a fresh process."""
    return simulate(tmp_path_factory.mktemp("one"), federation, SITES, threads=1)


def assert_same_model(one: Run, other: Run) -> None:
    a, b = (load_file(run.folder / "model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=MODEL_TOLERANCE, rtol=0)


def resumed_records(run: Run) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]


def test_a_run_leaves_model_pictures_numbers_and_receipt(one_thread: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert one_thread.returncode == 0, one_thread.output
    receipt = check_receipt(one_thread.folder)
    assert receipt["participants"] == {"0": SITES, "1": SITES}
    assert receipt["refused"] == receipt["silent"] == {}
    for name in ("samples.png", "samples/round_0001.png", "metrics.json", "rounds.jsonl", "experiment.json"):
        assert (one_thread.folder / name).stat().st_size > 0
    metrics = json.loads((one_thread.folder / "metrics.json").read_text())
    assert set(metrics["sites"]) == set(SITES)
    assert {"held_out_loss", "effnet_kid", "effnet_kid_baseline", "effnet_kid_untrained"} <= set(metrics["mean"])
    for site in SITES:
        (picture,) = (one_thread.base / "sites" / site / "pictures").rglob("real_and_generated.png")
        assert picture.stat().st_size > 0
    assert main(["receipt", "simulated", "--runs", str(one_thread.base / "runs")]) == 0
    assert "samples.png" in capsys.readouterr().out


def test_nothing_of_a_patient_leaves_the_site(one_thread: Run) -> None:
    """Neither identifier nor pseudonym stands in what the server has written or printed."""
    pseudonyms = {
        entry["pseudonym"]
        for manifest in (one_thread.base / "sites").rglob("manifest.json")
        for entry in json.loads(manifest.read_text())["patients"]
    }
    assert len(pseudonyms) == 48
    written = [file.read_bytes() for file in one_thread.folder.rglob("*") if file.is_file()]
    written += [one_thread.output.encode()]
    written += [file.read_bytes() for file in (one_thread.base / "workspace" / "server").rglob("*.txt")]
    for content in written:
        assert b"FEDCT-" not in content
        assert not any(pseudonym.encode() in content for pseudonym in pseudonyms)


def test_lasting_processes_give_the_same_model(one_thread: Run, federation: ExperimentConfig, tmp_path: Path) -> None:
    run = simulate(tmp_path, federation, SITES, threads=3)
    check_receipt(run.folder)
    assert_same_model(one_thread, run)


def test_an_interrupted_run_says_so_and_resumes_to_the_same_model(
    one_thread: Run, federation: ExperimentConfig, tmp_path: Path
) -> None:
    """A site fails in round 2 of a run that needs all three; then the run is carried on."""
    failed = simulate(tmp_path, federation, SITES, threads=3, faulty={"error_round": 1})
    assert failed.receipt["status"] == "failed"
    assert "RoundVoid" in failed.receipt["reason"]
    assert failed.receipt["rounds_done"] == 1
    assert not (failed.folder / "model.safetensors").exists()
    assert main(["receipt", str(failed.folder)]) == 2

    resumed = simulate(
        tmp_path, federation, SITES, threads=3, faulty={"error_round": 99}, resume_run=failed.folder.name
    )
    assert resumed.folder == failed.folder
    assert check_receipt(resumed.folder)["rounds_done"] == 2
    assert [record["round_number"] for record in resumed_records(resumed)] == [0, 1]
    assert_same_model(one_thread, resumed)


def test_bad_silent_and_killed_sites_do_not_stop_the_others(experiment: ExperimentConfig, tmp_path: Path) -> None:
    faults = {
        "nan": "NaN",
        "shape": "shape",
        "extra": "beyond the list",
        "huge": "norm",
        "full": "no weight difference",
        "mute": "metrics",
    }
    sites = ["good-1", "good-2", *faults, "silent", "killed"]
    patient = replace(
        experiment,
        name="faults",
        federation=replace(experiment.federation, rounds=1, min_responses=2, round_timeout_s=90),
    )
    run = simulate(tmp_path, patient, sites, threads=len(sites), faulty={})
    receipt = check_receipt(run.folder)
    assert receipt["participants"] == {"0": ["good-1", "good-2"]}
    assert set(receipt["refused"]["0"]) == set(faults)
    for site, reason in faults.items():
        assert reason in receipt["refused"]["0"][site]
    assert receipt["silent"] == {"0": ["killed", "silent"]}
    assert all(np.isfinite(array).all() for array in load_file(run.folder / "model.safetensors").values())


def test_a_worker_killed_in_the_default_mode_is_no_success(experiment: ExperimentConfig, tmp_path: Path) -> None:
    """NVFlare's exit code may be 0; the receipt, or its absence, tells."""
    short = replace(experiment, name="killed", federation=replace(experiment.federation, rounds=1, round_timeout_s=60))
    run = simulate(tmp_path, short, ["killed-1", "killed-2", "good-3"], threads=1, faulty={})
    assert main(["receipt", "killed", "--runs", str(run.base / "runs")]) == 2


def test_real_scans_train_through_the_same_job(experiment: ExperimentConfig, shared_ct: Path, tmp_path: Path) -> None:
    """DICOM and NIfTI mixed, patients split among three sites."""
    sites = real_sites(shared_ct, tmp_path)
    short = replace(experiment, name="real", federation=replace(experiment.federation, rounds=1))
    run = simulate(tmp_path, short, sites, threads=3)
    receipt = check_receipt(run.folder)
    assert receipt["participants"] == {"0": sorted(sites)}
    for file in [*run.folder.rglob("*.json*"), *(run.base / "workspace" / "server").rglob("*.txt")]:
        assert "STS_" not in file.read_text()
        assert "TCGA-" not in file.read_text()
