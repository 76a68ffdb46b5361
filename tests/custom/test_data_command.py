"""``fedct data`` says what is so, with its exit code too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from policies import policy_toml

from custom import cli
from custom.config import ExperimentConfig


def fedct(*words: object) -> int:
    return cli.main(["data", *(str(word) for word in words)])


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "hospital"
    words = ("phantom", folder, "--hospital", 1, "--patients", 3, "--slices", 10, "--matrix", 64, "--seed", 4)
    assert fedct(*words) == 0
    return folder


def test_inspect_prints_and_writes_the_report(
    hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedct("inspect", hospital, "--json", tmp_path / "report.json") == 0
    out, err = capsys.readouterr()
    assert out.count("accepted\n") == 3
    assert "PHANTOM" not in out
    assert err == ""  # no bars where nobody looks
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["counts"]["patients_accepted"] == 3
    assert report["counts"]["files_in_accepted_series"] == 30


def test_inspect_shows_pseudonyms_of_the_site(
    hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*words: object) -> str:
        assert fedct("inspect", hospital, *words) == 0
        return capsys.readouterr().out

    site = ("--home", tmp_path / "site")
    assert shown(*site) == shown(*site)
    assert shown() != shown()


def test_inspect_says_that_nothing_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("no scan")
    assert fedct("inspect", tmp_path) == 1
    assert "series accepted: 0" in capsys.readouterr().out


def test_inspect_honours_the_format(hospital: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedct("inspect", hospital, "--format", "nifti") == 1
    assert "OtherFormat" in capsys.readouterr().out


def test_inspect_of_no_folder_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedct("inspect", tmp_path / "nowhere") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedct: folder = not a folder: ")
    assert err.count("\n") == 1


@pytest.fixture
def words(hospital: Path, tmp_path: Path, experiment: ExperimentConfig) -> tuple[object, ...]:
    config = tmp_path / "job" / "app" / "config"
    config.mkdir(parents=True)
    (config / "experiment.json").write_text(json.dumps(experiment.to_json()))
    (tmp_path / "sites.toml").write_text(
        f'[sites.a]\nhome = "home"\n{policy_toml()}\ndata = {{ folder = "{hospital}" }}\n'
        "limits = { held_out_fraction = 0.4, max_images_per_patient = 3, min_patients = 3 }\n"
    )
    return ("prepare", tmp_path / "job", "--site-file", tmp_path / "sites.toml", "--site", "a")


def test_prepare_makes_the_cohort_once(
    words: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedct(*words) == 0
    first = capsys.readouterr().out
    assert first.startswith("patients: 3 (2 train, 1 held out)\nimages: 9 of 16x16 (6 train, 3 held out)\n")
    assert fedct(*words) == 0
    assert capsys.readouterr().out == first
    (cache,) = (p for p in (tmp_path / "home" / "cache").iterdir() if p.is_dir())
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["preprocess"]["window_hu"] == [-1000, 600]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("held_out_fraction = 0.4", "held_out_fraction = 1.5", "held_out_fraction = 1.5"),
        ("min_patients = 3", "min_patients = 4", "usable patients = 3"),
        ("data = {", 'data = { format = "nifti", ', "usable patients = 0"),
        ("[sites.a]", "[sites.b]", "--site = 'a'"),
    ],
)
def test_prepare_says_what_to_mend(
    words: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    file = tmp_path / "sites.toml"
    file.write_text(file.read_text().replace(old, new))
    assert fedct(*words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_phantom_refuses_what_it_cannot_write(
    hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedct("phantom", hospital, "--hospital", 0) == 2
    assert "exists already" in capsys.readouterr().err
    assert fedct("phantom", tmp_path / "new", "--hospital", -1) == 2
    assert capsys.readouterr().err.startswith("fedct: hospital = -1: ")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", [(), ("inspect",), ("prepare",), ("phantom",)])
def test_help_explains(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fedct(*words, "--help")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert len(out) > 300
    if words:
        assert "Exit code" in " ".join(out.split())


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fedct("inspect", ".", "--formt", "dicom", "--colour")
    assert end.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err
