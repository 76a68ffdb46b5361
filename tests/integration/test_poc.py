"""``fedct poc`` as a user types it, and what the sites of a federation have a say in."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from policies import policy_toml
from provisioned import SERVER, Running, federation
from simulator import EMBEDDED, write_job

from custom.config import ExperimentConfig
from custom.run_folder import check_receipt
from custom.secure_config import SecureAggregationConfig
from custom.strict import ConfigError
from poc.processes import running

SITES = ["site-1", "site-2", "site-3"]


def fedct(*arguments: str | Path, cwd: Path, fails: bool = False) -> str:
    """Run the command; gives what it printed."""
    done = subprocess.run(
        [Path(sys.executable).parent / "fedct", *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert (done.returncode != 0) == fails, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_from_nothing_to_a_result_twice_and_beside_another(experiment: ExperimentConfig, tmp_path: Path) -> None:
    """In a folder with a space in its name, beside another federation, again after everything of it was killed."""
    home = tmp_path / "with a space"
    home.mkdir()
    tables = "\n".join(
        f"[sites.{name}]\n{policy_toml()}\nhardware = {{ threads = 1 }}\n{EMBEDDED.format(number=number)}\n"
        for number, name in enumerate(SITES)
    )
    (home / "sites.toml").write_text(tables)
    here, other = (home / "federation").resolve(), (tmp_path / "other").resolve()
    try:
        said = fedct("poc", "up", "--site-file", "sites.toml", cwd=home)
        assert "ready: server, site-1, site-2, site-3" in said
        job = write_job(tmp_path, experiment, SITES)
        said = fedct("poc", "submit", job, cwd=home)
        assert re.search(
            r"round 2/2 done in \d+ s, train loss [\d.]+, held-out loss before it [\d.]+, 3 of 3 sites", said
        )
        assert "completed: 2 of 2 rounds" in said
        (receipt,) = (here / "results").rglob("receipt.json")
        assert check_receipt(receipt.parent)["participants"] == {"0": SITES, "1": SITES}
        first = {name: {one.pid for one in some} for name, some in running(here).items()}

        assert "provisioning" in fedct("poc", "up", "--folder", other, "--sites", "site-1", cwd=tmp_path)
        assert fedct("poc", "up", "--site-file", "sites.toml", cwd=home).splitlines()[-1].startswith("ready")
        stopped = fedct("poc", "down", "--folder", other, cwd=tmp_path)
        assert re.fullmatch(r"stopped [1-9]\d* processes\n", stopped)
        assert not running(other)
        nodes = {name: {one.pid for one in some} for name, some in running(here).items()}
        assert set(first) == {SERVER, *SITES}
        assert all(pids & nodes[name] for name, pids in first.items()), "not those that were started first"

        for some in running(here).values():  # a crash
            for one in some:
                os.kill(one.pid, signal.SIGKILL)
        gone = fedct("poc", "status", "--html", "status.html", cwd=home)
        assert len(re.findall(r"^(?:server|site-\d) +stopped$", gone, re.MULTILINE)) == 4
        assert "fedct" in (home / "status.html").read_text()
        certificate = (
            home / "federation" / "kits" / "fedct" / "prod_00" / "server" / "startup" / "rootCA.pem"
        ).read_text()
        fedct("poc", "up", "--site-file", "sites.toml", cwd=home)
        assert certificate in {file.read_text() for file in (here / "kits").rglob("server/startup/rootCA.pem")}
        again = fedct("poc", "status", cwd=home)
        assert len(re.findall(r"^(?:server|site-\d) +ready +\d+ MiB", again, re.MULTILINE)) == 4
        assert "FINISHED:COMPLETED" in again
        assert "nothing to resume" in fedct("poc", "resume", job, cwd=home, fails=True)
    finally:
        fedct("poc", "down", cwd=home)
        fedct("poc", "down", "--folder", other, cwd=tmp_path)
    assert not running(here)
    assert "stopped 0 processes" in fedct("poc", "down", cwd=home)
    assert "is it up?" in fedct("poc", "submit", job, cwd=home, fails=True)


@pytest.fixture(scope="module")
def sovereign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Site 1 demands differential privacy, site 2 masks, site 3 takes part in two experiments only."""
    policies = {
        "site-1": policy_toml(required=True, per_job=2.0, total=2.0),
        "site-2": policy_toml(peers=SITES, masks_required=True),
        "site-3": policy_toml() + '\njobs = ["chosen", "careless"]',
    }
    with federation(tmp_path_factory.mktemp("sovereign"), policies, start=False) as running_:
        # So that it is the sites which refuse code, and not the server for them.
        file = running_.federation.kit(SERVER) / "local" / "authorization.json"
        policy = json.loads(file.read_text())
        policy["permissions"]["lead"]["byoc"] = "any"
        file.write_text(json.dumps(policy))
        from poc import lifecycle

        lifecycle.start(running_.federation, timeout_s=120, say=lambda _: None)
        yield running_


WriteJob = Callable[[ExperimentConfig], Path]


@pytest.fixture
def job(tmp_path: Path) -> WriteJob:
    return lambda experiment: write_job(tmp_path, experiment, SITES)


def test_every_site_refuses_by_its_own_rule(sovereign: Running, experiment: ExperimentConfig, job: WriteJob) -> None:
    """Each answers with the rule; nothing was trained, and NVFlare says that the job did not run."""
    end = sovereign.end(sovereign.submit(job(experiment)))
    assert end.folder is None
    assert end.status == "FINISHED:FAILED_TO_RUN"
    assert "required = 'no differential privacy'" in end.refused["site-1"]
    assert "secure_aggregation.required = 'no secure aggregation'" in end.refused["site-2"]
    assert "jobs = 'small'" in end.refused["site-3"]


def test_a_job_above_the_ceiling(sovereign: Running, private_experiment: ExperimentConfig, job: WriteJob) -> None:
    end = sovereign.end(sovereign.submit(job(private_experiment)))
    assert end.folder is None
    assert re.search(r"budgets\.per_job\.epsilon = [\d.]+: the site's policy is at most 2", end.refused["site-1"])


def test_a_job_that_brings_code(sovereign: Running, experiment: ExperimentConfig, job: WriteJob) -> None:
    folder = job(replace(experiment, name="chosen"))
    (folder / "app" / "custom").mkdir()
    (folder / "app" / "custom" / "mine.py").write_text("print('here')\n")
    end = sovereign.end(sovereign.submit(folder))
    assert end.folder is None
    assert all("files = 'custom/mine.py'" in end.refused[site] for site in SITES)


def test_a_job_that_names_another_class(sovereign: Running, experiment: ExperimentConfig, job: WriteJob) -> None:
    folder = job(replace(experiment, name="chosen"))
    file = folder / "app" / "config" / "config_fed_client.json"
    client = json.loads(file.read_text())
    client["executors"][0]["executor"]["path"] = "nvflare.app_common.executors.client_api_launcher_executor.X"
    file.write_text(json.dumps(client))
    end = sovereign.end(sovereign.submit(folder))
    assert end.folder is None
    assert all("class_allow_list = 'nvflare.app_common" in end.refused[site] for site in SITES)


def test_a_job_of_a_scope_that_no_site_has(sovereign: Running, experiment: ExperimentConfig, job: WriteJob) -> None:
    """It would leave the filters of the site's own scope behind."""
    folder = job(replace(experiment, name="chosen"))
    file = folder / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scope": "mine"}))
    end = sovereign.end(sovereign.submit(folder))
    assert end.folder is None
    assert all("privacy scope 'mine' is not allowed" in end.refused[site] for site in SITES)


def test_a_user_without_the_right(sovereign: Running, experiment: ExperimentConfig, job: WriteJob) -> None:
    viewer = sovereign.federation.user("member")
    with pytest.raises(ConfigError, match="may not submit jobs"):
        sovereign.submit(job(experiment), viewer)


def test_sites_that_stay_away_do_not_stop_the_others(
    experiment: ExperimentConfig, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """``min_clients`` is 2: the job runs at the two that take part, and no round waits for the third."""
    away = policy_toml() + "\njobs = []"
    policies = {"site-1": policy_toml(), "site-2": policy_toml(), "site-3": away}
    with federation(tmp_path_factory.mktemp("away"), policies) as opted:
        end = opted.end(opted.submit(write_job(tmp_path, experiment, SITES)))
        assert end.status == "FINISHED:COMPLETED"
        assert end.folder is not None
        assert "takes no part in it" in end.refused["site-3"]
        receipt = check_receipt(end.folder)
        assert receipt["participants"] == {"0": SITES[:2], "1": SITES[:2]}
        assert receipt["silent"] == {}
        assert not (opted.federation.home("site-3") / "cache").exists()


def test_a_kit_that_was_changed_starts_nowhere(tmp_path: Path) -> None:
    """Neither with our check nor, where that is passed over, with NVFlare's own at the start of the process."""
    with federation(tmp_path / "kits", {"site-1": policy_toml()}, start=False) as made:
        kit = made.federation.kit("site-1")
        file = kit / "startup" / "fed_client.json"
        file.write_text(file.read_text().replace("localhost", "127.0.0.1"))
        done = subprocess.run(
            ["bash", str(kit / "startup" / "sub_start.sh"), "--once"],
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode != 0
        assert "not secure content" in done.stdout + done.stderr
        sites = shutil.copy(made.base / "sites.toml", tmp_path / "sites.toml")
        said = fedct("poc", "up", "--folder", made.base, "--site-file", sites, cwd=tmp_path, fails=True)
        assert "not what the coordinator signed" in said
        assert not running(made.base)


def test_masks_where_they_are_required(sovereign: Running, experiment: ExperimentConfig, job: WriteJob) -> None:
    """The same job passes at the site that demands masks once it has them, and nowhere else."""
    masked = replace(
        experiment, secure_aggregation=SecureAggregationConfig(update_bound=0.1, max_weight=20.0, stage_timeout_s=60)
    )
    end = sovereign.end(sovereign.submit(job(masked)))
    assert "site-2" not in end.refused
    assert set(end.refused) == {"site-1", "site-3"}


@pytest.mark.slow
def test_an_encrypted_job_with_the_contexts_of_the_kits(
    experiment: ExperimentConfig, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The builder that the project file has in a comment is all that it takes."""
    pytest.importorskip("tenseal")
    encrypted = replace(experiment, encryption="ckks")
    base = tmp_path_factory.mktemp("encrypted")
    with federation(base, dict.fromkeys(SITES, policy_toml()), encryption=True) as up:
        end = up.end(up.submit(write_job(tmp_path, encrypted, SITES)))
        assert end.refused == {}
        assert end.folder is not None
        assert check_receipt(end.folder)["participants"] == {"0": SITES, "1": SITES}


def test_a_pacs_for_a_hospital_is_stopped_with_the_rest(tmp_path: Path) -> None:
    """Orthanc, loaded and asked with the commands that a user types; it needs no running node."""
    if shutil.which("Orthanc", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("no Orthanc; apt-get install orthanc orthanc-dicomweb")
    folder = tmp_path / "a federation"
    with federation(folder, {"site-1": policy_toml()}, start=False) as made:
        fedct(
            "data",
            "phantom",
            "scans",
            "--hospital",
            "0",
            "--patients",
            "3",
            "--slices",
            "6",
            "--matrix",
            "64",
            cwd=tmp_path,
        )
        said = fedct("poc", "pacs", "site-1", "--load", "scans", "--folder", folder, cwd=tmp_path)
        assert "18 images stored" in said
        (url,) = re.findall(r"^PACS of site-1: (\S+)$", said, re.MULTILINE)
        credentials = made.base / "pacs" / "site-1" / "credentials"
        pulled = fedct("data", "pull", url, "cohort", "--credentials-file", credentials, "--limit", "2", cwd=tmp_path)
        assert "images: 12 fetched" in pulled
        assert "patients accepted: 2" in fedct("data", "inspect", "cohort", cwd=tmp_path)
        assert "stopped 1 processes" in fedct("poc", "down", "--folder", folder, cwd=tmp_path)
        assert not running(made.base)
