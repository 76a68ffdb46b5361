from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policies import policy_toml

from custom import preflight
from custom.cli import main
from custom.config import ExperimentConfig
from custom.federation_config import UpdatesConfig
from custom.he_contexts import new_context, tenseal
from custom.he_packing import packed_size
from custom.memory import LiveMemory
from custom.model_config import PRESETS, AutoencoderConfig
from custom.preflight import available_memory, estimate, first_fitting, levers, memory_bytes, step_bytes, upload_bytes
from custom.private_training import PatientDraws, patient_loss, training_patients
from custom.quantised import quantised
from custom.secure_config import SecureAggregationConfig
from custom.site_file import HardwareConfig
from custom.stages import fresh_weights, model_shapes, stage_objective, stage_shapes, stages
from custom.strict import ConfigError, build
from custom.training import training_step
from medical_data.cohort import Cohort
from privacy.dpsgd import PatientSGD
from privacy.plan import calibrate
from privacy.rng import SeededRandomnessForTests

CPU = torch.device("cpu")
GIB = 1 << 30
REPOSITORY = Path(__file__).resolve().parents[2]
HARDWARE = HardwareConfig(device="cpu", threads=1)


@pytest.fixture(autouse=True)
def _quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PROBE_FLOPS", 1e9)
    monkeypatch.setattr(preflight, "PROBE_SECONDS", 0.0)


def tensors(experiment: ExperimentConfig, hardware: HardwareConfig = HARDWARE, patients: int = 4) -> int:
    """Bytes of tensors that the preflight expects of the first stage."""
    return step_bytes(experiment, stages(experiment)[0], hardware, patients=patients) - preflight.WORKSPACE_BYTES


def parameters(experiment: ExperimentConfig) -> int:
    return sum(math.prod(shape) for shape in model_shapes(experiment).values())


def test_a_step_holds_as_many_tensors_as_expected(experiment: ExperimentConfig) -> None:
    (stage,) = stages(experiment)
    objective = stage_objective(experiment, stage, fresh_weights(experiment, seed=1), CPU)
    optimizer = torch.optim.AdamW(objective.network.parameters(), fused=True)
    x0 = torch.rand(stage.training.batch_size or 0, *experiment.image_shape)
    with LiveMemory() as memory:
        for _ in range(2):
            training_step(objective, optimizer, x0, torch.Generator(), gradient_clip=stage.training.gradient_clip)
    assert tensors(experiment) == pytest.approx(memory.peak + memory.convolution, rel=0.01)


@pytest.mark.parametrize("in_memory", [2, 8])
def test_a_private_step_holds_as_many_tensors_as_expected(
    private_experiment: ExperimentConfig, cohort: Cohort, in_memory: int
) -> None:
    """All of DP-SGD, clipping and noise too, with all patients sampled: in two chunks, or in one."""
    assert private_experiment.privacy is not None
    sampled = replace(private_experiment.privacy, sampling_rate=1.0, noise_multiplier=30.0)
    job = replace(private_experiment, privacy=replace(sampled, mean_image=None))
    config = job.dp_config()
    assert config is not None
    (stage,), patients = stages(job), len(training_patients(cohort))
    objective = stage_objective(job, stage, fresh_weights(job, seed=1), CPU)
    trained = dict(objective.network.named_parameters())
    plan = calibrate(config, patients=patients)
    sgd = PatientSGD(
        parameters=trained,
        optimizer=torch.optim.AdamW(trained.values()),
        loss=patient_loss(objective),
        plan=plan,
        patients=patients,
        chunk_size=in_memory,
        randomness=SeededRandomnessForTests(1),
    )
    draw = PatientDraws(cohort, plan, objective, torch.Generator(), CPU)
    with LiveMemory() as memory:
        for _ in range(2):
            sgd.step(draw)
    expected = tensors(job, replace(HARDWARE, patients_in_memory=in_memory), patients)
    assert expected == pytest.approx(memory.peak + memory.convolution, rel=0.15)


def volume_job(preset: str, size: int) -> ExperimentConfig:
    """jobs/ct_ddpm_3d with another network and size, an image at a time."""
    job = ExperimentConfig.of_job(REPOSITORY / "jobs" / "ct_ddpm_3d")
    return replace(
        job,
        preprocess=replace(job.preprocess, size=size),
        network=PRESETS[preset],
        training=replace(job.training, batch_size=1),
    )


def test_a_volume_takes_the_memory_that_was_expected() -> None:
    """Of the preset tiny at 48³, in a process of its own."""
    case = {"preset": "tiny", "size": 48, "setting": "float32", "threads": 1}
    command = [sys.executable, "tests/benchmarks/volume_memory.py", "--case", json.dumps(case)]
    measured = json.loads(subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE).stdout)
    job = volume_job("tiny", 48)
    expected = step_bytes(job, stages(job)[0], HARDWARE, patients=1)
    assert 0.75 < expected / measured["memory"] < 1.5


def test_a_large_volume_is_estimated_in_little_memory() -> None:
    job = volume_job("base", 96)
    plain = step_bytes(job, stages(job)[0], HARDWARE, patients=1)
    less = step_bytes(job, stages(job)[0], replace(HARDWARE, checkpointing=True), patients=1)
    assert 14 * GIB < plain < 18 * GIB
    assert less < 0.6 * plain


def test_every_lever_needs_less(experiment: ExperimentConfig, private_experiment: ExperimentConfig) -> None:
    wide = replace(experiment, preprocess=replace(experiment.preprocess, size=32))
    job = replace(wide, training=replace(wide.training, batch_size=64))
    full = tensors(job)
    assert tensors(job, replace(HARDWARE, checkpointing=True)) < 0.7 * full
    assert tensors(job, replace(HARDWARE, precision="bfloat16")) < 0.8 * full
    assert tensors(replace(job, training=replace(job.training, batch_size=8))) < 0.3 * full
    two, four = (tensors(private_experiment, replace(HARDWARE, patients_in_memory=n)) for n in (1, 4))
    assert two < four


def test_every_stage_of_a_job_is_estimated(experiment: ExperimentConfig) -> None:
    latent = replace(
        experiment,
        autoencoder=AutoencoderConfig(channels=(8, 16), latent_channels=2, norm_groups=4, rounds=1),
    )
    found = estimate(latent, HARDWARE, patients=4)
    assert [(stage.name, stage.rounds) for stage in found.stages] == [("autoencoder", 1), ("denoiser", 1)]
    first, second = found.stages
    assert first.upload_bytes == first.download_bytes == 4 * first.parameters
    assert second.download_bytes == first.download_bytes + second.upload_bytes, "it encodes with the other one"
    assert found.memory_bytes == max(first.memory_bytes, second.memory_bytes)
    assert found.memory_bytes == memory_bytes(latent, HARDWARE, patients=4)
    assert found.run_seconds == pytest.approx(first.round_seconds + second.round_seconds)
    assert all(0 < stage.step_seconds < stage.round_seconds < 60 for stage in found.stages)


def test_time_under_differential_privacy_is_that_of_the_expected_patients(
    private_experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_speed", lambda work, clock: preflight._Speed(per_flop=1 / 1e9))
    hardware = replace(HARDWARE, patients_in_memory=2)
    (few,), (many,) = (estimate(private_experiment, hardware, patients=n).stages for n in (10, 40))
    assert many.step_seconds == pytest.approx(4 * few.step_seconds, rel=0.05)


@pytest.mark.parametrize("bits", [16, 32])
def test_bytes_of_a_masked_update(experiment: ExperimentConfig, bits: Any) -> None:
    masked = replace(experiment, secure_aggregation=SecureAggregationConfig(ring_bits=bits))
    (stage,) = stages(masked)
    metrics_and_weight = 2 * 3 + 1
    assert upload_bytes(masked, stage) == (parameters(masked) + metrics_and_weight) * bits // 8


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_of_an_update_of_few_bits(experiment: ExperimentConfig, bits: Any) -> None:
    few = replace(experiment, updates=UpdatesConfig(bits=bits))
    (stage,) = stages(few)
    arrays = {name: np.ones(shape, np.float32) for name, shape in stage_shapes(few, stage).items()}
    assert upload_bytes(few, stage) == sum(array.nbytes for array in quantised(arrays, bits=bits).values())


def test_bytes_of_an_update_with_shared_noise(private_experiment: ExperimentConfig) -> None:
    assert private_experiment.privacy is not None
    shared = replace(
        private_experiment,
        training=replace(private_experiment.training, steps_per_round=1),
        privacy=replace(private_experiment.privacy, dp="central_secagg"),
        secure_aggregation=SecureAggregationConfig(),
    )
    assert upload_bytes(shared, stages(shared)[0]) == 4 * (parameters(shared) + 1)


def test_bytes_of_an_encrypted_update(experiment: ExperimentConfig) -> None:
    pytest.importorskip("tenseal")
    encrypted = replace(experiment, encryption="ckks")
    (stage,) = stages(encrypted)
    size = packed_size(stage_shapes(encrypted, stage))
    sent = len(tenseal().ckks_vector(new_context(), np.linspace(-1, 1, size)).serialize())
    assert upload_bytes(encrypted, stage) == pytest.approx(sent, rel=0.02)


@pytest.mark.parametrize(("values", "most"), [([9, 7, 5, 3, 1], n) for n in range(11)])
def test_the_mildest_value_that_fits(values: list[int], most: int) -> None:
    assert first_fitting(values, lambda value: value <= most) == next((v for v in values if v <= most), 1)


def test_a_control_groups_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(preflight, "CGROUP_LIMITS", (limit, tmp_path / "none"))
    for text, expected in (("1048576\n", 1 << 20), ("max\n", None)):
        limit.write_text(text)
        assert (available_memory(CPU) == expected) if expected else available_memory(CPU) > 1 << 20


def test_what_is_no_training_has_no_estimate(experiment: ExperimentConfig) -> None:
    audit = ExperimentConfig.of_job(REPOSITORY / "jobs" / "ct_audit")
    with pytest.raises(ConfigError, match="trains"):
        estimate(audit, HARDWARE, patients=1)
    with pytest.raises(ConfigError, match="patients"):
        estimate(experiment, HARDWARE, patients=0)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA"):
            estimate(experiment, build(HardwareConfig, {"device": "cuda"}, "hardware"), patients=1)


@pytest.fixture
def job(tmp_path: Path, experiment: ExperimentConfig) -> Path:
    """A small job of volumes, in which a step's activations are most of its tensors."""
    volumes = replace(
        experiment,
        preprocess=replace(experiment.preprocess, spatial_dims=3, size=24, spacing_mm=(2.0, 2.0, 2.0)),
        training=replace(experiment.training, batch_size=24),
    )
    return written(tmp_path, volumes)


def written(folder: Path, experiment: ExperimentConfig) -> Path:
    config = folder / "job" / "app" / "config"
    config.mkdir(parents=True)
    (config / "experiment.json").write_text(json.dumps(experiment.to_json()))
    return folder / "job"


def test_a_job_that_fits(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", str(job), "--memory-gib", "64", "--json", str(tmp_path / "out.json")]) == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    for said in ("64.0 GiB available", "denoiser", "it fits"):
        assert said in out
    assert found["experiment"] == "small"
    assert found["levers"] == []
    assert found["stages"][0]["upload_bytes"] == 4 * found["stages"][0]["parameters"]


def test_a_job_that_does_not_fit_is_refused_with_what_would(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_speed", lambda work, clock: preflight._Speed(per_flop=1 / 1e12))
    experiment = ExperimentConfig.of_job(job)
    available = (memory_bytes(experiment, HardwareConfig(), patients=1) * 0.97) / GIB
    assert main(["preflight", str(job), "--memory-gib", str(available), "--json", str(tmp_path / "out.json")]) == 1
    out, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())["levers"]
    assert "does not fit" in out
    assert {lever["setting"].split(" = ")[0] for lever in found} >= {
        "hardware.checkpointing",
        "training.batch_size",
        "preprocess.size",
    }
    fitting = [lever for lever in found if lever["memory_bytes"] <= available * GIB]
    assert len(fitting) >= 2
    for lever in found:
        fits = "fits" if lever in fitting else "not enough"
        assert f"{lever['setting']}: {lever['memory_bytes'] / GIB:.1f} GiB, {fits}" in out


def test_what_is_advised_does_what_was_said(experiment: ExperimentConfig) -> None:
    wide = replace(experiment, preprocess=replace(experiment.preprocess, size=64))
    job = replace(wide, training=replace(wide.training, batch_size=32))
    available = int(0.95 * memory_bytes(job, HARDWARE, patients=1))
    found = levers(job, HARDWARE, patients=1, available_bytes=available)
    batch = next(lever.setting for lever in found if lever.setting.startswith("training.batch_size"))
    fewer = int(batch.split(" = ")[1])
    for count, fits in ((fewer, True), (fewer + 1, False)):
        smaller = replace(job, training=replace(job.training, batch_size=count))
        assert (memory_bytes(smaller, HARDWARE, patients=1) <= available) == fits


def test_a_private_jobs_lever_is_its_patients_in_memory(private_experiment: ExperimentConfig) -> None:
    found = [lever.setting for lever in levers(private_experiment, HARDWARE, patients=4, available_bytes=1)]
    assert found == ["hardware.patients_in_memory = 1", "preprocess.size = 8"]


def test_rounds_that_are_too_slow_are_refused(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_speed", lambda work, clock: preflight._Speed(per_flop=1 / 1e8))
    assert main(["preflight", str(job), "--memory-gib", "64"]) == 1
    out = capsys.readouterr().out
    assert "too slow" in out
    assert "federation.round_timeout_s = 120" in out
    assert "it fits" not in out


def test_a_sites_hardware_and_policy_count(
    tmp_path: Path,
    private_experiment: ExperimentConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "_speed", lambda work, clock: preflight._Speed(per_flop=1 / 1e12))
    private, file = written(tmp_path, private_experiment), tmp_path / "sites.toml"
    table = '[sites.a]\nhome = "h"\ndata = {{ folder = "s" }}\nhardware = {{ threads = 1 }}\n{}\n'
    command = ["preflight", str(private), "--site-file", str(file), "--site", "a", "--memory-gib", "64"]
    file.write_text(table.format(policy_toml(required=True, may_leave=(), min_patients=7)))
    assert main(command) == 0
    assert "1 threads, 7 patients" in capsys.readouterr().out
    assert main([*command, "--patients", "5"]) == 0
    assert "5 patients" in capsys.readouterr().out
    file.write_text(table.format(policy_toml(required=True, per_job=0.1)))
    assert main(command) == 1
    assert "a refuses it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"), [(["--site", "a"], "--site-file"), (["--memory-gib", "-1"], "--memory-gib")]
)
def test_what_cannot_be_asked(job: Path, options: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", str(job), *options]) == 2
    assert named in capsys.readouterr().err
