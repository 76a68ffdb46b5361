from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from custom.config import ExperimentConfig
from custom.study.config import Case, Run, StudyConfig, Suite
from custom.study.datasets import DatasetConfig
from custom.study.figures import METRICS, draw_figures, markdown_table, write_tables
from custom.study.runner import (
    Row,
    collect,
    interval,
    read_result,
    remaining_seconds,
    result_file,
    run_study,
    summarize,
    write_csv,
    write_summary,
)

CASES = ("base", "central", "fails", "dies", "diverges")


def stub(run: Run, home: Path) -> Mapping[str, float]:
    """In the place of a training: numbers from the seed, and a line in a file for each time it is called."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "calls").open("a") as stream:
        stream.write(f"{run.case.images} {run.seed} {torch.get_num_threads()}\n")
    if run.case.images == 102:
        raise ValueError("no such luck")
    if run.case.images == 103:
        os._exit(9)
    loss = math.nan if run.case.images == 104 else 0.25 + 0.01 * run.seed
    return {"test_loss": loss, "bytes_up": 2e6}


def slow(run: Run, home: Path) -> Mapping[str, float]:
    """The first seeds at once, the others never."""
    if run.seed > 0:
        (home / f"waits-{os.getpid()}").touch()
        time.sleep(600)
    return stub(run, home)


def study_of(experiment: ExperimentConfig, *names: str, seeds: tuple[int, ...] = (0, 1)) -> StudyConfig:
    dataset = DatasetConfig(kind="embedded", train=20, test=4, patients_per_hospital=8, slices=2)
    cases = tuple(
        Case(
            suite="scans",
            name=name,
            kind="central" if name == "central" else "federated",
            sites=2,
            seeds=seeds,
            images=100 + CASES.index(name),
            experiment=experiment,
            dataset=dataset,
        )
        for name in names
    )
    return StudyConfig(name="s", suites=(Suite(name="scans", cases=cases, tables={"main": tuple(names)}),))


def calls(out: Path) -> list[str]:
    return sorted((out / "home" / "calls").read_text().splitlines())


def test_runs_once_each_and_resumes(
    experiment: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = study_of(experiment, "base", "central")
    twin = replace(config.suites[0].cases[0], name="twin")
    config = StudyConfig(name="s", suites=(replace(config.suites[0], cases=(*config.suites[0].cases, twin)),))
    assert run_study(config, tmp_path, processes=2, run_one=stub) == ()
    assert calls(tmp_path) == ["100 0 1", "100 1 1", "101 0 1", "101 1 1"]  # identical cases share, one thread each
    assert "scans/" in capsys.readouterr().err
    rows = collect(config, tmp_path)
    assert len(rows) == 3 * 2 * 2
    assert Row(suite="scans", case="twin", seed=1, metric="test_loss", value=0.26) in rows
    record = json.loads(result_file(config.runs()[0], tmp_path).read_text())
    assert record["case"] == config.runs()[0].case.to_json()
    assert record["seconds"] >= 0

    bad = result_file(config.runs()[1], tmp_path)
    bad.write_text(bad.read_text()[:-20])
    assert read_result(config.runs()[1], tmp_path) is None
    assert run_study(config, tmp_path, processes=1, run_one=stub) == ()
    assert calls(tmp_path) == ["100 0 1", "100 1 1", "101 0 1", "101 0 1", "101 1 1"]
    assert collect(config, tmp_path) == rows


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"format": 1}', '{"format": 0, "key": "KEY", "metrics": {}, "seconds": 1}']
)
def test_a_corrupt_result_is_none(experiment: ExperimentConfig, tmp_path: Path, content: str) -> None:
    (run,) = study_of(experiment, "base", seeds=(0,)).runs()
    result_file(run, tmp_path).parent.mkdir()
    result_file(run, tmp_path).write_text(content.replace("KEY", run.key))
    assert read_result(run, tmp_path) is None


def test_a_renamed_case_keeps_its_results(experiment: ExperimentConfig, tmp_path: Path) -> None:
    config = study_of(experiment, "base", seeds=(0,))
    run_study(config, tmp_path, processes=1, run_one=stub)
    case = replace(config.suites[0].cases[0], name="FedAvg")
    renamed = StudyConfig(name="s", suites=(replace(config.suites[0], cases=(case,), tables={}),))
    assert run_study(renamed, tmp_path, processes=1, run_one=stub) == ()
    assert calls(tmp_path) == ["100 0 1"]
    assert {row.case for row in collect(renamed, tmp_path)} == {"FedAvg"}


def test_failures_are_reported_and_stop_nobody(experiment: ExperimentConfig, tmp_path: Path) -> None:
    config = study_of(experiment, "fails", "dies", "base", "diverges", seeds=(0,))
    failures = {each.run.case.name: each for each in run_study(config, tmp_path, processes=2, run_one=stub)}
    assert set(failures) == {"fails", "dies"}
    assert failures["fails"].error == "ValueError: no such luck"
    text = failures["fails"].file.read_text()
    assert text.startswith("scans/fails, seed 0\n")
    assert "Traceback" in text
    assert failures["fails"].file == tmp_path / "runs" / f"{failures['fails'].run.key}.error.txt"
    assert "process died" in failures["dies"].error
    rows = {(row.case, row.metric): row.value for row in collect(config, tmp_path)}
    assert {case for case, _ in rows} == {"base", "diverges"}
    assert math.isnan(rows["diverges", "test_loss"])

    assert run_study(config, tmp_path, processes=2, run_one=_harmless) == ()
    assert not list((tmp_path / "runs").glob("*.error.txt"))


def _harmless(run: Run, home: Path) -> Mapping[str, float]:
    return {"test_loss": 1.0}


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_study_keeps_what_is_finished_and_goes_on(
    experiment: ExperimentConfig, tmp_path: Path, with_signal: signal.Signals
) -> None:
    config = study_of(experiment, "base", "central")
    code = "import sys, test_study_runner as t; from custom.config import ExperimentConfig; from pathlib import Path\n"
    code += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it\n"
    code += "if __name__ == '__main__':\n"
    code += " e = ExperimentConfig.load(Path(sys.argv[1])); c = t.study_of(e, 'base', 'central')\n"
    code += " t.run_study(c, Path(sys.argv[2]), processes=2, run_one=t.slow)\n"
    (tmp_path / "main.py").write_text(code)
    (tmp_path / "e.json").write_text(json.dumps(experiment.to_json()))
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "e.json"), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    try:
        workers = _until(lambda: [int(file.name.split("-")[1]) for file in out.glob("home/waits-*")], count=2)
        process.send_signal(with_signal)
        assert process.wait(timeout=120) != 0
    finally:
        process.kill()
    _until(lambda: [pid for pid in workers if not Path(f"/proc/{pid}").exists()], count=2)
    assert [run.seed for run in config.runs() if read_result(run, out) is not None] == [0, 0]
    assert run_study(config, out, processes=2, run_one=stub) == ()
    assert calls(out) == ["100 0 1", "100 1 1", "101 0 1", "101 1 1"]


def _until(look: Callable[[], list[int]], *, count: int) -> list[int]:
    for _ in range(1800):
        if len(found := look()) >= count:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{found} after three minutes")


def test_the_estimate_is_of_the_same_case_if_there_is_one(experiment: ExperimentConfig, tmp_path: Path) -> None:
    config = study_of(experiment, "base", "central", seeds=(0, 1, 2))
    runs = config.runs()
    assert remaining_seconds(runs, tmp_path, processes=2) is None
    for run, seconds in ((runs[0], 10.0), (runs[1], 30.0)):
        values = {"format": 1, "key": run.key, "metrics": {}, "seconds": seconds}
        result_file(run, tmp_path).parent.mkdir(exist_ok=True)
        result_file(run, tmp_path).write_text(json.dumps(values))
    assert remaining_seconds(runs, tmp_path, processes=2) == (2 * 10 + 2 * 30) / 2
    assert remaining_seconds(runs[:2], tmp_path, processes=2) == 0


def rows_of(config: StudyConfig) -> list[Row]:
    """Rows of every metric for every case, with some spread over the seeds."""
    rng = np.random.default_rng(0)
    rows = []
    for run in config.runs():
        place = 1 + CASES.index(run.case.name)
        values = {name: 0.1 * place + 0.01 * rng.random() for name in METRICS}
        values |= {f"test_loss_band_{band}": place * 0.5**band for band in range(1, 5)}
        values |= {"bytes_up": 4e6 * place**3, "effnet_kid_real": 0.05, "accuracy_real": 0.9}
        rows += [
            Row(suite="scans", case=run.case.name, seed=run.seed, metric=name, value=value)
            for name, value in values.items()
        ]
    return rows


def test_csv_and_summary_are_exact(tmp_path: Path) -> None:
    values = [0.1, 0.2, 0.4]
    rows = [Row(suite="s", case="a, b", seed=seed, metric="m", value=value) for seed, value in enumerate(values)]
    rows.append(Row(suite="s", case="c", seed=0, metric="m", value=2.5))
    write_csv(rows, tmp_path / "results.csv")
    write_summary(summarize(rows), tmp_path / "summary.csv")
    assert (tmp_path / "results.csv").read_text().splitlines() == [
        "suite,case,seed,metric,value",
        's,"a, b",0,m,0.1',
        's,"a, b",1,m,0.2',
        's,"a, b",2,m,0.4',
        "s,c,0,m,2.5",
    ]
    with (tmp_path / "summary.csv").open() as stream:
        first, second = csv.DictReader(stream)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (first["suite"], first["case"], first["metric"], first["n"]) == ("s", "a, b", "m", "3")
    assert [float(first[name]) for name in ("mean", "low", "high")] == pytest.approx([np.mean(values), low, high])
    assert second == {"suite": "s", "case": "c", "metric": "m", "n": "1", "mean": "2.5", "low": "", "high": ""}


def test_an_interval_needs_two_finite_values() -> None:
    assert interval([1.0]) == (1.0, None, None)
    mean, low, high = interval([1.0, math.nan])
    assert math.isnan(mean)
    assert low is high is None
    mean, low, high = interval([1.0, 3.0])
    assert (mean, low, high) == pytest.approx((2, 2 - 12.7062, 2 + 12.7062), abs=1e-4)


def test_figures_are_pictures(experiment: ExperimentConfig, tmp_path: Path) -> None:
    config = study_of(experiment, *CASES, seeds=(0, 1, 2))
    files = draw_figures(config, rows_of(config), tmp_path)
    folder = tmp_path / "figures" / "scans"
    assert files == [folder / "main.png", folder / "frontier.png", folder / "bands.png"]
    for file in files:
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert 500 < picture.width < 4000
            assert 300 < picture.height < 2000
            assert np.asarray(picture.convert("L")).std() > 5  # something is on it


def test_figures_take_what_is_there(experiment: ExperimentConfig, tmp_path: Path) -> None:
    config = study_of(experiment, "base", "central", seeds=(0,))
    assert draw_figures(config, [], tmp_path) == []
    rows = [
        Row(suite="scans", case="base", seed=0, metric="test_loss", value=0.3),
        Row(suite="scans", case="central", seed=0, metric="test_loss", value=math.nan),
    ]
    assert [file.name for file in draw_figures(config, rows, tmp_path)] == ["main.png"]


def test_markdown_tables(experiment: ExperimentConfig, tmp_path: Path) -> None:
    config = study_of(experiment, "base", "central", "diverges", seeds=(0, 1))
    numbers = {"base": (0.3, 0.302), "central": (0.2,), "diverges": (math.nan, 0.1)}
    rows = [
        Row(suite="scans", case=case, seed=seed, metric="test_loss", value=value)
        for case, values in numbers.items()
        for seed, value in enumerate(values)
    ]
    rows.append(Row(suite="scans", case="base", seed=0, metric="bytes_up", value=2_500_000.0))
    table = markdown_table(rows, config.suites[0], "main", ["test_loss", "recall", "bytes_up"])
    assert table.splitlines() == [
        "| case | seeds | test loss ↓ | MB sent up per site ↓ |",
        "| --- | ---: | ---: | ---: |",
        "| base | 2 | 0.3010 ± 0.0127 | 2.50 |",
        "| central | 1 | 0.2000 |  |",
        "| diverges | 2 | not finite |  |",
    ]
    write_tables(config, rows, tmp_path / "tables.md")
    assert "## scans: main\n\n| case |" in (tmp_path / "tables.md").read_text()
