from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from custom.cli import main
from custom.config import ExperimentConfig
from custom.study import runner
from custom.study.config import Run


def stub(run: Run, home: Path) -> Mapping[str, float]:
    """In the place of a training."""
    if run.case.sites == 5:
        raise ValueError("no such luck")
    return {"test_loss": 0.1 * run.case.sites, "bytes_up": 1e6}


@pytest.fixture
def study(experiment: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "custom.study.federation", SimpleNamespace(run_case=stub))
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {
        "name": "remedies",
        "seeds": [0, 1],
        "suites": {
            "scans": {
                "dataset": {"kind": "embedded", "train": 20, "test": 4, "patients_per_hospital": 8, "slices": 2},
                "base": {"experiment": experiment.to_json(), "kind": "federated", "sites": 2},
                "cases": {"three sites": {"sites": 3}, "fails": {"sites": 5, "seeds": [0]}},
                "tables": {"main": ["base", "three sites"]},
            }
        },
    }
    (tmp_path / "study.json").write_text(json.dumps(values))
    return tmp_path / "study.json"


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["study", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--only SUITE[/CASE]", "--list", "--figures-only", "summary.csv"))


def test_a_study_is_listed_run_and_drawn(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(study), "--list"]) == 0
    said = capsys.readouterr().out
    assert said.count("to do  scans/") == 5
    assert "0 of 5 done, 5 to do; how long they take is known once one has finished" in said
    out = tmp_path / "runs" / "study" / "remedies"
    assert not out.exists()

    words = ["study", str(study), "--processes", "2"]
    assert main([*words, "--only", "scans/base", "--only", "scans/three sites"]) == 0
    said = capsys.readouterr().out
    assert "results.csv, summary.csv, tables.md and 2 figures" in said
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 2 * 2 * 2
    assert "three sites | 2 | 0.3000 | 1.00 |" in (out / "tables.md").read_text()
    assert main(["study", str(study), "--list"]) == 0
    assert "4 of 5 done, 1 to do; about" in capsys.readouterr().out

    assert main(words) == 1
    said = capsys.readouterr().err
    assert "fedct: scans/fails, seed 0 failed: ValueError: no such luck" in said
    assert ".error.txt" in said


def test_figures_only_runs_nothing(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", str(study), "--out", str(tmp_path / "out"), "--figures-only"]
    assert main(words) == 2
    assert "holds no result of this study" in capsys.readouterr().err
    assert main(["study", str(study), "--out", str(tmp_path / "out"), "--only", "scans/base", "--processes", "1"]) == 0
    (tmp_path / "out" / "figures" / "scans" / "main.png").unlink()
    assert main(words) == 0
    assert (tmp_path / "out" / "figures" / "scans" / "main.png").stat().st_size > 0


def test_when_all_runs_fail_there_is_nothing_to_report(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(study), "--only", "scans/fails", "--processes", "1"]) == 1
    assert "scans/fails, seed 0 failed" in capsys.readouterr().err


def test_ctrl_c_is_one_line(study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_study", interrupted)
    assert main(["study", str(study)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--only", "scans/nobody"],
            "--only = 'scans/nobody': no such case; known are ['base', 'three sites', 'fails']",
        ),
        (["--only", "nowhere"], "--only = 'nowhere': no such suite; known are ['scans']"),
        (["--processes", "0"], "--processes = 0: give at least 1"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    study: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["study", str(study), *words]) == 2
    assert capsys.readouterr().err == f"fedct: {said}\n"
