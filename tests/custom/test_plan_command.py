from __future__ import annotations

import json
from pathlib import Path

import pytest
from policies import policy_toml

from custom.cli import main
from privacy.plan import DPPlan

REPOSITORY = Path(__file__).resolve().parents[2]
PRIVATE, PLAIN = REPOSITORY / "jobs" / "ct_ddpm_dp", REPOSITORY / "jobs" / "ct_ddpm"


def site_file(folder: Path, policy: str) -> Path:
    file = folder / "sites.toml"
    file.write_text(f'[sites.a]\nhome = "home"\ndata = {{ folder = "scans" }}\n{policy}\n')
    return file


def test_it_prints_what_a_reader_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(PRIVATE), "--json", str(tmp_path / "plan.json")]) == 0
    plan = DPPlan.from_json(json.loads((tmp_path / "plan.json").read_text()))
    out = capsys.readouterr().out
    for said in (
        f"(ε, δ) = ({plan.epsilon:.3f}, {plan.config.delta:g})",
        f"{plan.noise_multiplier:.4f}",
        f"{plan.total_steps} in total",
        f"{plan.epsilon_by_round[0]:.3f}",
        "add or remove one patient",
        "at FPR 1 %, AUC ≤",
        "a patient scanned at two sites",
    ):
        assert said in out


@pytest.mark.parametrize(
    ("job", "policy", "code", "said"),
    [
        (PRIVATE, policy_toml(required=True, delta=1e-3, may_leave=()), 0, "lets it pass"),
        (PRIVATE, policy_toml(required=True, delta=1e-3, per_job=2.0), 1, "budgets.per_job.epsilon"),
        (PRIVATE, policy_toml(required=True, delta=1e-3, max_rounds=1), 1, "max_rounds"),
        (PLAIN, policy_toml(required=True), 1, "differential privacy is required"),
        (PLAIN, policy_toml(), 0, "lets it pass"),
        (PLAIN, policy_toml(may_leave=("weight",)), 1, "may_leave"),
    ],
)
def test_a_sites_policy_answers(
    job: Path, policy: str, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = site_file(tmp_path, policy)
    assert main(["plan", str(job), "--site-file", str(file), "--site", "a"]) == code
    assert said in capsys.readouterr().out


def test_a_site_without_its_file_and_a_folder_without_a_job_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(PRIVATE), "--site", "a"]) == 2
    assert "--site-file" in capsys.readouterr().err
    assert main(["plan", str(PLAIN), "--json", str(tmp_path / "plan.json")]) == 2
    assert "no plan" in capsys.readouterr().err
    assert main(["plan", str(tmp_path)]) == 2
    assert "experiment.json" in capsys.readouterr().err
