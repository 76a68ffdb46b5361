"""The encrypted job in NVFlare's real simulator: what leaves a site, and that the model is the plain job's."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from simulator import EMBEDDED, Run, simulate, write_job

from custom.config import ExperimentConfig
from custom.he_packing import packed_size
from custom.model_config import TrainingConfig
from custom.privacy_config import MeanImageConfig, PrivacyConfig
from custom.run_folder import check_receipt
from custom.stages import model_shapes

# The first of them that is asked to open a sum errs once. Their numbers of patients, and so their weights, differ.
SITES = {f"shy-{n}": EMBEDDED.format(number=n).replace("patients = 16", f"patients = {12 + 4 * n}") for n in (1, 2, 3)}

# Two rounds of noise FLOOD_STD / Σ w, which a few steps of training magnify beside the last bits of a sum.
MODEL_TOLERANCE = 1e-5

# 4096 numbers a ciphertext of 2 polynomials, 8192 coefficients, 2 primes, 8 bytes; the last one is not full.
BYTES_PER_CIPHERTEXT = 2 * 8192 * 2 * 8


@pytest.fixture(scope="module")
def federation(experiment: ExperimentConfig) -> ExperimentConfig:
    return replace(experiment, name="encrypted", federation=replace(experiment.federation, min_responses=3))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, federation: ExperimentConfig) -> Run:
    return simulate(tmp_path_factory.mktemp("plain"), federation, SITES, threads=3)


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory, federation: ExperimentConfig) -> Run:
    base = tmp_path_factory.mktemp("encrypted")
    return simulate(
        base,
        replace(federation, encryption="ckks"),
        SITES,
        threads=3,
        faulty={"error_round": 99, "asked": str(base / "asked")},
        recorded=base / "left",
    )


def replies(run: Run, site: str) -> list[dict[str, Any]]:
    """What the site sent, but for the one error."""
    left = [pickle.loads(file.read_bytes()) for file in (run.base / "left").glob(f"{site}.*")]  # noqa: S301 - our own
    return [reply["DXO"] for reply in left if "DXO" in reply]


def test_it_completes_though_the_first_site_asked_does_not_open_the_sum(encrypted: Run) -> None:
    assert encrypted.returncode == 0, encrypted.output
    receipt = check_receipt(encrypted.folder)
    assert receipt["participants"] == {"0": list(SITES), "1": list(SITES)}
    assert receipt["refused"] == receipt["silent"] == {}
    shy = (encrypted.base / "asked").read_text()
    assert f"{shy} did not open the sum: answered EXECUTION_EXCEPTION" in encrypted.output
    for name in ("samples.png", "metrics.json", "model.safetensors"):
        assert (encrypted.folder / name).stat().st_size > 0


def test_it_gives_the_model_of_the_plain_job(encrypted: Run, plain: Run) -> None:
    """Sites of different weights, whose number of patients the server of the encrypted job never sees."""
    assert plain.experiment.federation.weighting == encrypted.experiment.federation.weighting == "patients"
    check_receipt(plain.folder)
    a, b = (load_file(run.folder / "model.safetensors") for run in (encrypted, plain))
    assert a.keys() == b.keys()
    furthest = max(float(np.abs(a[name] - b[name]).max()) for name in a)
    print(f"furthest parameter: {furthest:.2e}")
    assert 0 < furthest < MODEL_TOLERANCE


@pytest.mark.parametrize("site", SITES)
def test_no_update_leaves_a_site_in_the_clear(encrypted: Run, site: str) -> None:
    """Every reply of the site, as it went to the network."""
    shapes = model_shapes(encrypted.experiment)
    updates = figures = 0
    for dxo in replies(encrypted, site):
        data, meta = dxo["data"], dxo["meta"]
        if str(dxo["kind"].value) == "METRICS":
            figures += 1
        elif not meta:
            assert {name: array.shape for name, array in data.items()} == shapes
        else:
            updates += 1
            assert set(meta) == {"weight", "initial_metrics"}
            assert meta["weight"] == 1.0
            assert set(data) == {"update"}
            assert type(data["update"]) is bytes
            ciphertexts = -(-packed_size(shapes) // 4096)
            assert len(data["update"]) == pytest.approx(ciphertexts * BYTES_PER_CIPHERTEXT, rel=0.01)
    assert (updates, figures) == (2, 1)


def test_each_sum_was_opened_once(encrypted: Run) -> None:
    left = [dxo for site in SITES for dxo in replies(encrypted, site)]
    means = [dxo for dxo in left if str(dxo["kind"].value) == "WEIGHT_DIFF" and not dxo["meta"]]
    assert len(means) == encrypted.experiment.federation.rounds


def test_no_log_names_the_range_of_a_plain_update(encrypted: Run) -> None:
    texts = [encrypted.output, *(file.read_text() for file in (encrypted.base / "workspace").rglob("*.txt"))]
    assert not any("encrypted value range" in text for text in texts)
    assert any("open the sum" in text for text in texts)


def test_a_job_that_says_it_encrypts_and_does_not_trains_nothing(
    federation: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its author left the encryptor and what stands behind it out of the client's configuration."""

    def without_encryptor(*arguments: Any, **options: Any) -> Path:
        job = write_job(*arguments, **options)
        file = job / "app" / "config" / "config_fed_client.json"
        client = json.loads(file.read_text())
        filters = client["task_result_filters"][0]["filters"]
        assert [item["path"].rpartition(".")[2] for item in filters][:2] == ["EgressGate", "PackUpdate"]
        client["task_result_filters"][0]["filters"] = [filters[0], filters[-1]]  # the gate, and what records
        file.write_text(json.dumps(client))
        return job

    monkeypatch.setattr("simulator.write_job", without_encryptor)
    config = replace(federation, name="not-encrypted", encryption="ckks")
    run = simulate(tmp_path, config, SITES, threads=3, recorded=tmp_path / "left")
    assert run.receipt["status"] == "failed"
    assert run.receipt["reason"].count("answered EXECUTION_EXCEPTION") == len(SITES)
    for site in SITES:
        assert replies(run, site) == []
        assert list((tmp_path / "left").glob(f"{site}.*")), "an error left, and nothing else"
        assert not list((tmp_path / "sites" / site).rglob("manifest.json")), "no scan was read for it"


@pytest.mark.slow
def test_privacy_and_encryption_in_one_job(federation: ExperimentConfig, tmp_path: Path) -> None:
    """The mean image before training goes the same way as the updates, and no metric leaves."""
    config = replace(
        federation,
        name="both",
        encryption="ckks",
        training=TrainingConfig(steps_per_round=3, warmup_steps=0),
        federation=replace(federation.federation, weighting="uniform"),
        privacy=PrivacyConfig(
            patients=8,
            delta=1e-2,
            clip_norm=1.0,
            sampling_rate=0.5,
            noise_multiplier=1.5,
            mean_image=MeanImageConfig(clip_norm=13.0, noise_multiplier=4.0, warm_up_steps=5),
        ),
    )
    run = simulate(tmp_path, config, SITES, threads=3, recorded=tmp_path / "left")
    assert check_receipt(run.folder)["participants"] == {"0": list(SITES), "1": list(SITES)}
    assert (run.folder / "mean_image.png").stat().st_size > 0
    for site in SITES:
        sealed = [dxo for dxo in replies(run, site) if dxo["meta"]]
        assert sorted(name for dxo in sealed for name in dxo["data"]) == ["mean_image", "update", "update"]
        for dxo in sealed:
            assert dxo["meta"] == {"weight": 1.0, "initial_metrics": {}}
            assert all(type(value) is bytes for value in dxo["data"].values())
