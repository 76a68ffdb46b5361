"""What happens to a federation when something breaks, and what must hold afterwards.

Each test writes what the fault cost to ``faults.jsonl`` in the folder that ``FEDCT_FAULTS`` names, if it is set.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from policies import policy_toml
from provisioned import SERVER, Running, federation
from simulator import write_job

from custom.config import ExperimentConfig
from custom.run_folder import RunFailed, RunFolder, check_receipt
from custom.site_ledger import open_ledger
from custom.strict import ConfigError
from poc import jobs, lifecycle
from poc.processes import start_node, stop

pytestmark = pytest.mark.slow

SITES = ["site-1", "site-2", "site-3"]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with federation(tmp_path_factory.mktemp("faults"), dict.fromkeys(SITES, policy_toml())) as running:
        yield running


@pytest.fixture
def long(private_experiment: ExperimentConfig) -> ExperimentConfig:
    """With differential privacy, and rounds that last long enough to be hit."""
    assert private_experiment.privacy is not None
    return replace(
        private_experiment,
        training=replace(private_experiment.training, steps_per_round=200),
        federation=replace(private_experiment.federation, rounds=4, round_timeout_s=60),
        privacy=replace(private_experiment.privacy, noise_multiplier=20.0),
    )


def charges(running: Running, site: str, experiment: str) -> list[str]:
    """Releases that a site has charged for an experiment, in order."""
    statement = open_ledger(running.federation.home(site)).statement()
    return [charge.attempt.release for charge in statement.charges if charge.attempt.run.job == experiment]


def releases(rounds: int) -> list[str]:
    """What a whole run charges once."""
    return ["before-training", *(f"round-{number:04d}" for number in range(rounds))]


def note(fault: str, what: str, folder: Path, **figures: float) -> None:
    """Write down what a fault cost."""
    where = os.environ.get("FEDCT_FAULTS")
    if where:
        seconds = [round(record.seconds, 1) for record in RunFolder(folder).records()]
        line = {"fault": fault, "what": what, "seconds_by_round": seconds, **figures}
        with (Path(where) / "faults.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def whole(folder: Path, rounds: int) -> dict[str, Any]:
    """The receipt of a run in which every site took part in every round."""
    receipt = check_receipt(folder)
    assert receipt["participants"] == {str(number): SITES for number in range(rounds)}
    assert receipt["silent"] == receipt["refused"] == {}
    return receipt


def test_a_job_s_process_is_killed_in_training(up: Running, long: ExperimentConfig, tmp_path: Path) -> None:
    """It is started anew and trains the round; no round is lost, and what never left was never charged."""
    experiment = replace(long, name="worker")
    job = up.submit(write_job(tmp_path, experiment, SITES))
    up.round_done("worker", 1)
    time.sleep(2)
    assert up.kill("site-2", jobs_only=True) == 1
    end = up.end(job)
    assert end.status == "FINISHED:COMPLETED"
    assert end.folder is not None
    whole(end.folder, 4)
    for site in SITES:
        assert charges(up, site, "worker") == releases(4)
    note("job process of a site killed (SIGKILL) in training", "started anew, round trained again", end.folder, lost=0)


def test_a_job_s_process_that_dies_again_and_again(up: Running, long: ExperimentConfig, tmp_path: Path) -> None:
    """After three starts its site is silent; the others complete the run, and the receipt says so."""
    experiment = replace(long, name="dying", federation=replace(long.federation, rounds=3, round_timeout_s=25))
    job = up.submit(write_job(tmp_path, experiment, SITES))
    up.round_done("dying", 1)
    killed = 0
    deadline = time.monotonic() + 60
    while killed < 4 and time.monotonic() < deadline:
        killed += up.kill("site-2", jobs_only=True)
        time.sleep(0.5)
    assert killed == 4
    end = up.end(job)
    assert end.folder is not None
    receipt = check_receipt(end.folder)
    assert receipt["rounds_done"] == 3
    assert receipt["participants"]["2"] == ["site-1", "site-3"]
    assert receipt["silent"] == {"1": ["site-2"]}
    note("job process of a site killed four times", "the site is left out", end.folder, lost=0)


def test_a_whole_site_is_killed_and_comes_back(up: Running, long: ExperimentConfig, tmp_path: Path) -> None:
    """Its start script starts it, it carries on its jobs, and is in the round that was going on."""
    experiment = replace(long, name="site")
    job = up.submit(write_job(tmp_path, experiment, SITES))
    up.round_done("site", 1)
    time.sleep(2)
    killed = time.monotonic()
    assert up.kill("site-2") == 2
    up.wait(lambda: "site-2" not in _gone(up), timeout=60, what="site-2")
    back = time.monotonic() - killed
    end = up.end(job)
    assert end.folder is not None
    whole(end.folder, 4)
    for site in SITES:
        assert charges(up, site, "site") == releases(4)
    note("a whole site killed", "back, in the same round", end.folder, lost=0, seconds_until_back=round(back, 1))


def test_the_server_is_killed(up: Running, long: ExperimentConfig, tmp_path: Path) -> None:
    """No receipt, no model; resumed, it repeats the round that was going on, and no site is charged twice for any."""
    experiment = replace(long, name="server")
    folder = write_job(tmp_path, experiment, SITES)
    job = up.submit(folder)
    run = up.round_done("server", 2)
    time.sleep(2)
    killed = time.monotonic()
    assert up.kill(SERVER) == 2
    with pytest.raises(RunFailed, match="no receipt"):
        check_receipt(run)
    done = len(RunFolder(run).records())
    up.wait(lambda: not _gone(up) and _ready(up), timeout=120, what="server and sites")
    back = time.monotonic() - killed
    with jobs.session(up.federation) as session:
        assert jobs.end_running(session, RunFolder(run)) == []
        assert session.get_job_status(job) == "FINISHED:ABANDONED"
    with jobs.resuming(folder, jobs.unfinished_run(up.federation, experiment).run_id) as copy:
        end = up.end(up.submit(copy))
    assert end.folder == run
    receipt = whole(run, 4)
    assert receipt["rounds_done"] == 4
    for site in SITES:
        assert charges(up, site, "server") == releases(4)
    what = "resumed with fedct poc resume; the ledger charged each round once"
    note("the server killed", what, run, rounds_before=done, lost=1, seconds_until_back=round(back, 1))


def test_a_run_on_which_a_job_still_works_is_taken_over(up: Running, long: ExperimentConfig, tmp_path: Path) -> None:
    """Resuming ends that job first, whatever the job folder is called; no round is charged twice."""
    experiment = replace(long, name="taken")
    folder = write_job(tmp_path, experiment, SITES)
    job = up.submit(folder)
    up.round_done("taken", 1)
    run = jobs.unfinished_run(up.federation, experiment)
    with jobs.session(up.federation) as session:
        assert jobs.end_running(session, run) == [job]
        assert session.get_job_status(job) == "FINISHED:ABORTED"
    with jobs.resuming(folder, run.run_id) as copy:
        end = up.end(up.submit(copy))
    assert end.folder == run.path
    whole(run.path, 4)
    for site in SITES:
        assert charges(up, site, "taken") == releases(4)


def _gone(up: Running) -> set[str]:
    return {node.name for node in lifecycle.seen(up.federation).nodes if node.status == "gone"}


def _ready(up: Running) -> bool:
    return all(node.status == "ready" for node in lifecycle.seen(up.federation).nodes)


class Wire:
    """A piece of network between a site and the server that can be cut: nothing passes, nothing is closed."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.to = 0
        self._whole = threading.Event()
        self._whole.set()
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def cut(self) -> Iterator[None]:
        self._whole.clear()
        try:
            yield
        finally:
            self._whole.set()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    self._whole.wait()
                    far = socket.create_connection(("127.0.0.1", self.to))
                except OSError:
                    near.close()
                    continue
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._whole.wait()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def test_the_network_is_cut_for_half_a_minute(
    long: ExperimentConfig, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In a round; the reply comes when the network is back, and all sites are in all rounds."""
    wire = Wire()
    experiment = replace(long, name="network", federation=replace(long.federation, round_timeout_s=120))
    base = tmp_path_factory.mktemp("network")
    policies = dict.fromkeys(SITES, policy_toml())
    with federation(base, policies, connect_to={"site-3": wire.port}, start=False) as up:
        wire.to = up.federation.members.ports[0]
        lifecycle.start(up.federation, timeout_s=120, say=lambda _: None)
        job = up.submit(write_job(tmp_path, experiment, SITES))
        up.round_done("network", 1)
        time.sleep(1)
        with wire.cut():
            time.sleep(30)
        end = up.end(job)
        assert end.folder is not None
        whole(end.folder, 4)
        assert max(record.seconds for record in RunFolder(end.folder).records()) > 25, "nothing was cut"
        for site in SITES:
            assert charges(up, site, "network") == releases(4)
        note("network of one site cut for 30 s", "the round waits for it", end.folder, lost=0)
    wire.close()


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of 24 MB."""
    place = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a small disk here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_the_disk_of_a_site_is_full(
    long: ExperimentConfig, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, small_disk: Path
) -> None:
    """Nothing leaves that could not be charged; once there is room the site is in the next round."""
    experiment = replace(long, name="disk")
    base = tmp_path_factory.mktemp("full")
    with federation(base, dict.fromkeys(SITES, policy_toml()), start=False) as up:
        home = up.federation.home("site-3")
        home.parent.mkdir(parents=True, exist_ok=True)
        home.symlink_to(small_disk, target_is_directory=True)
        lifecycle.start(up.federation, timeout_s=120, say=lambda _: None)
        job = up.submit(write_job(tmp_path, experiment, SITES))
        run = up.round_done("disk", 1)
        filler = small_disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        before = len(RunFolder(run).records())
        up.round_done("disk", before + 1)
        filler.unlink()
        end = up.end(job)
        assert end.folder is not None
        receipt = check_receipt(end.folder)
        refused = receipt["refused"]
        assert refused
        assert all(set(sites) == {"site-3"} for sites in refused.values())
        assert receipt["participants"]["3"] == SITES
        took_part = [
            f"round-{int(number):04d}" for number, sites in receipt["participants"].items() if "site-3" in sites
        ]
        assert charges(up, "site-3", "disk") == ["before-training", *took_part]
        for site in SITES[:2]:
            assert charges(up, site, "disk") == releases(4)
        note("disk of a site full", "refuses, the others go on; back once there is room", end.folder, lost=len(refused))


def _faketime() -> str:
    for place in ("x86_64-linux-gnu", "aarch64-linux-gnu"):
        library = Path("/usr/lib") / place / "faketime" / "libfaketimeMT.so.1"
        if library.is_file():
            return str(library)
    pytest.skip("no libfaketime; apt-get install faketime")


@contextmanager
def clock(shift: str) -> Iterator[None]:
    """What is started meanwhile has another time of day."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", _faketime())
        patch.setenv("FAKETIME", shift)
        yield


@pytest.mark.parametrize(("shift", "joins"), [("+90m", True), ("+800d", False), ("-2d", False)])
def test_the_clock_of_a_site_is_wrong(
    up: Running, long: ExperimentConfig, tmp_path: Path, shift: str, joins: bool
) -> None:
    """Wrong by an hour and a half it takes part as ever; where its certificates do not hold it joins nothing."""
    made = up.federation
    stop(made.folder, ["site-3"])
    try:
        with clock(shift):
            start_node(made.folder, "site-3", made.kit("site-3"), made.log("site-3"))
        name = "clock" + "".join(character for character in shift if character.isalnum())
        if joins:
            up.wait(lambda: _ready(up), timeout=90, what="site-3")
        else:
            with pytest.raises(ConfigError, match="not ready: site-3; the others are"):
                lifecycle.start(made, timeout_s=25, say=lambda _: None)
        end = up.end(up.submit(write_job(tmp_path, replace(long, name=name), SITES)))
        assert end.folder is not None
        receipt = check_receipt(end.folder)
        taking_part = SITES if joins else SITES[:2]
        assert receipt["participants"] == {str(number): taking_part for number in range(4)}
        for site in taking_part:
            assert charges(up, site, name) == releases(4)
        what = "takes part" if joins else "does not join; the others go on"
        note(f"clock of a site wrong by {shift}", what, end.folder, lost=0)
    finally:
        stop(made.folder, ["site-3"])
        lifecycle.start(made, timeout_s=120, say=lambda _: None)


def test_no_log_of_a_site_is_at_the_server(up: Running) -> None:
    """After all that: what the sites' executors said of their cohorts is in their own logs and nowhere else."""
    said = b"DiffusionTrainer"
    assert any(said in file.read_bytes() for file in up.federation.kit("site-2").rglob("*log*") if file.is_file())
    assert not [
        file for file in up.federation.kit(SERVER).rglob("*log*") if file.is_file() and said in file.read_bytes()
    ]
