"""The site's rules as NVFlare asks them: in a process of their own, with an answer that says no more than it must."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from policies import policy_toml

from custom.site_file import SITE_FILE_VARIABLE
from custom.validators import site_rules
from custom.validators.site_rules import SiteRules
from poc.kits import CLASSES

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SITE = "site-1"


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An application as it lies in a site's workspace, which has a space in its name."""
    monkeypatch.delenv(SITE_FILE_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)  # the process of the rules finds the packages all the same
    workspace = tmp_path / "a kit"
    local = workspace / "local"
    local.mkdir(parents=True)
    (local / "resources.json").write_text(json.dumps({"class_allow_list": list(CLASSES)}))
    demands(workspace, policy_toml())
    folder = workspace / "a-job" / f"app_{SITE}"
    shutil.copytree(JOBS / "ct_ddpm" / "app", folder, ignore=shutil.ignore_patterns(".__nvfl_*"))
    return folder


def demands(workspace: Path, policy: str) -> None:
    table = f'[sites.{SITE}]\nhome = "home"\ndata = {{ embedded = {{ hospital = 0 }} }}\n{policy}\n'
    (workspace / "local" / "fedct.toml").write_text(table)


def test_a_job_within_the_rules_passes_without_a_word(app: Path) -> None:
    assert SiteRules(SITE).validate(str(app)) == ("", {})


def test_a_refusal_names_the_site_the_rule_and_what_to_do(app: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demands(app.parents[1], policy_toml(required=True))
    said, details = SiteRules(SITE).validate(str(app))
    assert said.startswith(f"{SITE} refuses this job: required = ")
    assert "give the job its block for differential privacy" in said
    assert "\n" not in said
    assert details == {}
    assert capfd.readouterr().err == ""


def test_code_in_a_job_is_refused_by_the_files_name(app: Path) -> None:
    (app / "custom").mkdir()
    (app / "custom" / "evil.py").write_text("raise SystemExit(0)")
    said, _ = SiteRules(SITE).validate(str(app))
    assert "files = 'custom/evil.py'" in said


UNAPPLIED = f"{SITE} refuses this job: its rules could not be applied; see the site's log"


def test_without_a_site_file_nothing_passes(app: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (app.parents[1] / "local" / "fedct.toml").unlink()
    said, _ = SiteRules(SITE).validate(str(app))
    assert said == UNAPPLIED
    assert "site file = fedct.toml" in capfd.readouterr().err


def test_of_a_broken_site_file_nothing_is_told(app: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The answer goes to another house; what is wrong stands in the site's own log."""
    file = app.parents[1] / "local" / "fedct.toml"
    file.write_text(
        file.read_text().replace("[sites.", 'secret_study = "x"\n[sites.', 1) + '\nfolder = "/data/trial-7"\n'
    )
    said, _ = SiteRules(SITE).validate(str(app))
    assert said == UNAPPLIED
    assert "sites.site-1 = ['folder']" in capfd.readouterr().err


def test_of_what_else_the_site_does_nothing_is_told(app: Path) -> None:
    demands(app.parents[1], policy_toml() + '\njobs = ["another_study"]')
    said, _ = SiteRules(SITE).validate(str(app))
    assert said == f"{SITE} refuses this job: jobs = 'ct_ddpm': this site takes no part in it"


def test_rules_that_crash_let_nothing_pass_and_keep_the_traceback(app: Path, capfd: pytest.CaptureFixture[str]) -> None:
    resources = app.parents[1] / "local" / "resources.json"
    resources.unlink()
    assert SiteRules(SITE).validate(str(app)) == (UNAPPLIED, {})
    resources.write_text("{}")
    said, details = SiteRules(SITE).validate(str(app))
    assert said == UNAPPLIED
    assert details == {}
    assert "KeyError: 'class_allow_list'" in capfd.readouterr().err


def test_an_application_that_is_not_there_is_refused(app: Path) -> None:
    said, _ = SiteRules(SITE).validate(str(app.parent / "app_nobody"))
    assert said.startswith(f"{SITE} refuses this job: experiment.json")


def test_rules_that_take_too_long_let_nothing_pass(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_rules, "TIMEOUT_S", 0.05)
    began = time.monotonic()
    said, _ = SiteRules(SITE).validate(str(app))
    assert said == f"{SITE} refuses this job: its rules were not done in 0.05 s"
    assert time.monotonic() - began < 5
