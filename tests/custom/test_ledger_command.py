from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from policies import policy_toml

from custom.commands import ledger as command
from custom.strict import ConfigError
from medical_data.deidentify import site_secret
from privacy.accounting import GaussianRelease, SampledGaussian, epsilon
from privacy.errors import PrivacyError
from privacy.journal import JournalMissing, JournalTampered
from privacy.ledger import LEDGER_FILE, Ledger, Run
from privacy.policy import Budget, Budgets

SITES = f"""
[sites.a]
home = "home"
{policy_toml()}
data = {{ embedded = {{ hospital = 0, patients = 12, slices = 8, matrix = 64, seed = 1 }} }}
"""
BUDGETS = Budgets(per_job=Budget(epsilon=4.0, delta=1e-3), total=Budget(epsilon=6.0, delta=1e-3))
MEAN = GaussianRelease(noise_multiplier=4.0)
ROUND = SampledGaussian(sampling_rate=0.1, noise_multiplier=1.2, steps=20)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A site with two jobs: one is through, of the other one of two rounds is."""
    (tmp_path / "sites.toml").write_text(SITES)
    home = tmp_path / "home"
    ledger = Ledger(home / LEDGER_FILE, key=site_secret(home / "secret"), cost=epsilon)
    for job, planned, sent in (("warm", {"mean": MEAN}, 1), ("train", {"0": ROUND, "1": ROUND}, 1)):
        run = Run(job=job, run_id="r1")
        ledger.reserve(run, planned, budgets=BUDGETS)
        for release in list(planned)[:sent]:
            attempt = ledger.begin(run, release, budgets=BUDGETS)
            ledger.charge(attempt, planned[release], sha256="0" * 64, budgets=BUDGETS)
        if sent == len(planned):
            ledger.close(run)
    return home


def fedct_ledger(home: Path, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    named = ["ledger", "--site-file", home.parent / "sites.toml", "--site", "a", *arguments]
    options = parser.parse_args([str(argument) for argument in named])
    return int(options.func(options))


def test_it_shows_what_was_spent_and_what_is_left(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedct_ledger(home, "--json", tmp_path / "out" / "ledger.json") == 0
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "ledger.json").read_text())
    spent, total = epsilon([ROUND], 1e-3).epsilon, epsilon([MEAN, ROUND], 1e-3).epsilon
    assert written["jobs"]["train"]["epsilon_spent"] == spent
    assert written["jobs"]["train"]["epsilon_committed"] == epsilon([ROUND, ROUND], 1e-3).epsilon
    assert written["total"]["epsilon_spent"] == total
    assert written["total"]["epsilon_left"] == 6 - total
    assert written["open_runs"] == ["train/r1"]
    assert [charge["release"] for charge in written["charges"]] == ["mean", "0"]
    assert written["charges"][1]["event"] == ROUND.to_json()
    rows = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert f"{spent:.3f}" in rows["train"]
    assert f"{total:.3f}" in rows["all jobs"]
    assert f"{6 - total:.3f}" in rows["all jobs"]
    assert "open run: train/r1" in out


def test_an_abandoned_run_is_closed_by_hand(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedct_ledger(home, "--close", "train/r1") == 0
    assert "open run:" not in capsys.readouterr().out
    with pytest.raises(PrivacyError, match="unknown; the ledger has warm/r1, train/r1"):
        fedct_ledger(home, "--close", "train/r2")


def test_no_room_is_exit_code_1(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(home / LEDGER_FILE, key=site_secret(home / "secret"), cost=epsilon)
    total = Budget(epsilon=epsilon([MEAN, ROUND, ROUND], 1e-3).epsilon + 0.01, delta=1e-3)
    less = Budgets(per_job=total, total=total)
    attempt = ledger.begin(Run(job="train", run_id="r1"), "1", budgets=less)
    ledger.charge(attempt, ROUND, sha256="0" * 64, budgets=less)
    assert fedct_ledger(home) == 1
    assert "exhausted" in capsys.readouterr().out


def test_what_cannot_be_relied_on_is_an_error_and_nothing_is_printed(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = home / LEDGER_FILE
    kept = database.read_bytes()
    database.write_bytes(kept.replace(b'"noise_multiplier":1.2', b'"noise_multiplier":9.2'))
    with pytest.raises(JournalTampered):
        fedct_ledger(home)
    database.unlink()
    with pytest.raises(JournalMissing):
        fedct_ledger(home)
    (home / "secret").unlink()
    with pytest.raises(ConfigError, match="secret is gone"):
        fedct_ledger(home)
    assert not (home / "secret").exists()
    assert capsys.readouterr().out == ""


def test_a_site_without_a_ledger_is_told_so(home: Path) -> None:
    for name in (LEDGER_FILE, f"{LEDGER_FILE}.anchor"):
        (home / name).unlink()
    with pytest.raises(JournalMissing, match="nothing was ever written"):
        fedct_ledger(home)
    assert not (home / LEDGER_FILE).exists()


def test_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["ledger", "--help"])
    assert end.value.code == 0
    assert "Exit code" in capsys.readouterr().out
