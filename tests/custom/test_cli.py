from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest
from PIL import Image
from policies import policy_toml

from custom import volume_evaluation
from custom.cli import main
from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.model_file import ModelFile, save_model
from medical_data.preprocess import PreprocessConfig

SITES = """
[sites.{name}]
home = "home"
{policy}
data = {{ embedded = {{ hospital = 0, patients = 12, slices = 8, matrix = 64, seed = 1 }} }}
limits = {{ held_out_fraction = 0.5 }}
"""


@pytest.fixture
def model(tmp_path: Path, experiment: ExperimentConfig) -> Path:
    weights = dict(build_network(experiment.network, spatial_dims=2, seed=1).state_dict())
    save_model(
        tmp_path / "model.safetensors", ModelFile(experiment=experiment, rounds_done=2, weights=weights, ema=weights)
    )
    return tmp_path / "model.safetensors"


@pytest.fixture
def model_of_volumes(tmp_path: Path, experiment: ExperimentConfig) -> Path:
    preprocess = PreprocessConfig(spatial_dims=3, size=16, spacing_mm=(12, 24, 25), images_per_patient=1)
    solid = replace(experiment, preprocess=preprocess)
    weights = dict(build_network(solid.network, spatial_dims=3, seed=1).state_dict())
    save_model(tmp_path / "solid.safetensors", ModelFile(experiment=solid, rounds_done=2, weights=weights, ema=weights))
    return tmp_path / "solid.safetensors"


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["data"],
        ["data", "inspect"],
        ["data", "prepare"],
        ["data", "phantom"],
        ["simulator-keys"],
        ["sample"],
        ["preflight"],
        ["evaluate"],
        ["receipt"],
        ["ledger"],
        ["plan"],
        ["pretrain"],
    ],
)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert len(capsys.readouterr().out) > 200


@pytest.mark.parametrize("kind", ["png", "nifti", "dicom"])
def test_sample_writes_the_same_images_for_the_same_seed(model: Path, tmp_path: Path, kind: str) -> None:
    def draw(out: str, seed: int) -> list[bytes]:
        arguments = ["sample", model, tmp_path / out, "--count", 2, "--format", kind, "--steps", 3, "--seed", seed]
        assert main([str(argument) for argument in arguments]) == 0
        assert (tmp_path / out / "grid.png").stat().st_size > 0
        return [file.read_bytes() for file in sorted((tmp_path / out).rglob("*")) if file.suffix in (".dcm", ".png")]

    assert draw("a", 1) == draw("b", 1) != draw("c", 2)


def test_evaluate_prints_the_table(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sites.toml").write_text(SITES.format(name="a", policy=policy_toml()))
    arguments = ["evaluate", model, "--site-file", tmp_path / "sites.toml", "--site", "a", "--count", 20]
    arguments += ["--json", tmp_path / "e.json", "--picture", tmp_path / "e.png"]
    assert main([str(argument) for argument in arguments]) == 0
    assert "EffNet-KID" in capsys.readouterr().out
    assert (tmp_path / "e.json").stat().st_size > 0
    assert (tmp_path / "e.png").stat().st_size > 0


@pytest.mark.parametrize(("kind", "files"), [("png", 2), ("nifti", 2), ("dicom", 32)])
def test_sample_writes_volumes_with_the_voxel_size_of_training(
    model_of_volumes: Path, tmp_path: Path, kind: str, files: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", model_of_volumes, tmp_path / "out", "--count", 2, "--format", kind, "--steps", 2]
    assert main([str(argument) for argument in arguments]) == 0
    assert f"{files} {kind} files" in capsys.readouterr().out
    assert (tmp_path / "out" / "grid.png").stat().st_size > 0
    if kind == "dicom":
        header = pydicom.dcmread(tmp_path / "out" / "sample_0001" / "IM0016.dcm")
        assert (header.SpacingBetweenSlices, *header.PixelSpacing) == (12, 24, 25)


def test_slices_have_a_nominal_pixel_size_and_volumes_a_true_one(
    model: Path, model_of_volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, given, wanted in (("default", [], 6), ("given", ["--pixel-mm", "2.5"], 2.5)):
        words = [
            "sample",
            str(model),
            str(tmp_path / name),
            "--count",
            "1",
            "--format",
            "dicom",
            "--steps",
            "2",
            *given,
        ]
        assert main(words) == 0
        header = pydicom.dcmread(tmp_path / name / "sample_0000" / "IM0001.dcm")
        assert (header.SliceThickness, *header.PixelSpacing) == (wanted, wanted, wanted)
    assert main(["sample", str(model_of_volumes), str(tmp_path / "out"), "--pixel-mm", "6"]) == 2
    remedy = "--pixel-mm = 6.0: leave it out: the model's volumes have voxels of (12.0, 24.0, 25.0) mm"
    assert remedy in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluate_judges_volumes(
    model_of_volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_evaluation, "SLICES_PER_PLANE", 2)
    (tmp_path / "sites.toml").write_text(SITES.format(name="a", policy=policy_toml()))
    arguments = ["evaluate", model_of_volumes, "--site-file", tmp_path / "sites.toml", "--site", "a", "--count", 6]
    arguments += ["--json", tmp_path / "e.json", "--picture", tmp_path / "e.png"]
    assert main([str(argument) for argument in arguments]) == 0
    assert "slice-to-slice correlation" in capsys.readouterr().out
    assert json.loads((tmp_path / "e.json").read_text())["image_size"] == [16, 16, 16]
    with Image.open(tmp_path / "e.png") as picture:
        assert picture.width > picture.height


def test_what_a_user_can_mend_is_one_line_and_exit_code_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert main(["receipt", "ct_ddpm", "--runs", str(tmp_path)]) == 2
    assert main(["sample", str(model), str(tmp_path / "out"), "--steps", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("fedct: ") for line in lines)
