from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.model_file import ModelFile, load_model, save_checkpoint, save_model
from custom.run_folder import KEPT_CHECKPOINTS, RoundRecord, RunFailed, RunFolder, check_receipt, newest_run
from custom.strict import ConfigError


@pytest.fixture
def model(experiment: ExperimentConfig) -> ModelFile:
    weights = dict(build_network(experiment.network, spatial_dims=2, seed=1).state_dict())
    ema = {name: tensor + 1 for name, tensor in weights.items()}
    return ModelFile(experiment=experiment, rounds_done=1, weights=weights, ema=ema)


@pytest.fixture
def completed(tmp_path: Path, experiment: ExperimentConfig, model: ModelFile) -> RunFolder:
    folder = RunFolder.create(tmp_path, experiment)
    folder.save_round(model)
    folder.record(record(0))
    save_model(folder.path / "model.safetensors", model)
    folder.complete({"mean": {}})
    return folder


def record(number: int) -> RoundRecord:
    return RoundRecord(
        round_number=number,
        asked=["a", "b", "c"],
        accepted={"a": {"train_loss": 0.5}},
        refused={"b": "NaN"},
        silent=["c"],
        seconds=1.0,
    )


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- model files


def test_checkpoint_keeps_both_and_model_keeps_the_average(tmp_path: Path, model: ModelFile) -> None:
    save_checkpoint(tmp_path / "c.safetensors", model)
    again = load_model(tmp_path / "c.safetensors")
    assert same(again.weights, model.weights)
    assert same(again.ema, model.ema)
    assert (again.experiment, again.rounds_done) == (model.experiment, 1)
    save_model(tmp_path / "m.safetensors", model)
    assert same(load_model(tmp_path / "m.safetensors").weights, model.ema)
    assert same(dict(load_model(tmp_path / "m.safetensors").sampling_network()[0].state_dict()), model.ema)


def test_a_model_that_does_not_fit_its_own_words_is_refused(tmp_path: Path, model: ModelFile) -> None:
    file = tmp_path / "m.safetensors"
    with pytest.raises(ConfigError, match="model ="):
        load_model(file)
    save_model(file, model)
    tensors = load_file(file)
    metadata = {
        "experiment": json.dumps(model.experiment.to_json()),
        "rounds_done": "1",
        "schedule_sha256": "0" * 64,
    }
    save_file(tensors, file, metadata)
    with pytest.raises(ConfigError, match="schedule"):
        load_model(file)
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="no experiment"):
        load_model(file)
    smaller = dict(list(model.ema.items())[1:])
    save_model(file, replace(model, ema=smaller))
    with pytest.raises(ConfigError, match="tensors"):
        load_model(file)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="model ="):
        load_model(file)


# ---- run folders


def test_receipt_of_a_completed_run_vouches_for_the_model(completed: RunFolder) -> None:
    receipt = check_receipt(completed.path)
    assert receipt["rounds_done"] == 1
    assert receipt["participants"] == {"0": ["a"]}
    assert receipt["refused"] == {"0": {"b": "NaN"}}
    assert receipt["silent"] == {"0": ["c"]}
    with (completed.path / "model.safetensors").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(RunFailed, match="not the one"):
        check_receipt(completed.path)


def test_failed_killed_and_mangled_runs_are_no_success(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = RunFolder.create(tmp_path, experiment)
    with pytest.raises(RunFailed, match="no receipt"):
        check_receipt(folder.path)
    folder.fail("RoundVoid: too few")
    with pytest.raises(RunFailed, match="too few"):
        check_receipt(folder.path)
    (folder.path / "receipt.json").write_text("{")
    with pytest.raises(RunFailed, match="JSON"):
        check_receipt(folder.path)


def test_checkpoints_rotate_and_the_newest_is_found(
    tmp_path: Path, experiment: ExperimentConfig, model: ModelFile
) -> None:
    folder = RunFolder.create(tmp_path, experiment)
    assert folder.last_round() is None
    for done in range(1, 6):
        folder.save_round(replace(model, rounds_done=done))
    last = folder.last_round()
    assert last is not None
    assert last.rounds_done == 5
    assert len(list((folder.path / "checkpoints").iterdir())) == KEPT_CHECKPOINTS


def test_a_repeated_round_counts_once(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folder = RunFolder.create(tmp_path, experiment)
    for number in (0, 1, 1):
        folder.record(record(number))
    assert [entry.round_number for entry in folder.records()] == [0, 1]
    with (folder.path / "rounds.jsonl").open("a") as stream:
        stream.write('{"round_number": 2, "asked"')  # as somebody may read it while it is written
    assert [entry.round_number for entry in folder.records()] == [0, 1]


def test_tensorboard_reads_the_metrics(completed: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(completed.path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("train_loss/a")
    assert (event.step, event.value) == (0, 0.5)


def test_runs_never_share_a_folder_and_the_newest_is_named(tmp_path: Path, experiment: ExperimentConfig) -> None:
    folders = [RunFolder.create(tmp_path, experiment) for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    later = tmp_path / experiment.name / "29990101-000000-0000"
    later.mkdir()
    assert newest_run(tmp_path, experiment.name) == later
    with pytest.raises(ConfigError, match="nvflare simulator"):
        newest_run(tmp_path, "other")
