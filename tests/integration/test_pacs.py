"""Pulls from a real Orthanc: what is in the folder is what the PACS stores, however often a pull was killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import requests

from custom.strict import ConfigError
from medical_data.deidentify import Pseudonymizer
from medical_data.dicomweb import Query, pull
from medical_data.dicomweb_server import AccessDenied, Server, Unreachable
from medical_data.inspection import iter_volumes
from medical_data.phantom import PhantomConfig, write_cohort
from poc import pacs as pacs_module
from poc.pacs import Pacs, start_pacs

MARKER = {"FEDCT_TEST_PACS": "yes"}
PHANTOMS = PhantomConfig(hospital=1, patients=5, slices=6, matrix=64, seed=2)  # the last has two series
REAL = ("STS_002", "STS_025", "TCGA-17-Z013")

try:
    pacs_module._program()
    pacs_module._plugin()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pacs]:
    with start_pacs(tmp_path_factory.mktemp("a hospital") / "its pacs", marker=MARKER) as running:
        yield running


@pytest.fixture(scope="module")
def phantoms(pacs: Pacs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was loaded of the embedded cohort."""
    folder = tmp_path_factory.mktemp("phantoms") / "hospital"
    write_cohort(PHANTOMS, folder, progress=False)
    assert pacs.load(folder) == 36
    return folder


@pytest.fixture(scope="module")
def real(pacs: Pacs, shared_ct: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was loaded of real scans, and beside it a scout and a screen of text, which are no slices."""
    folder = tmp_path_factory.mktemp("real") / "scans"
    folder.mkdir()
    for name in REAL:
        (folder / name).symlink_to(shared_ct / name)
    assert pacs.load(folder) == 48 + 47 + 1
    assert pacs.load(shared_ct / "edge_cases" / "localizer_and_burned_in") == 2
    return folder


def server(pacs: Pacs, url: str | None = None) -> Server:
    return Server(url=url or pacs.url, credentials=pacs.credentials)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def volumes(folder: Path) -> list[tuple[str | None, bool, bytes]]:
    """Pseudonym, whether accepted, and voxels of every series of DICOM."""
    found = iter_volumes(folder, format="dicom", pseudonymizer=Pseudonymizer(bytes(32)), progress=False)
    return sorted(
        (row.pseudonym, row.accepted, b"" if volume is None else np.ascontiguousarray(volume.hu).tobytes())
        for row, volume in found
        if row.format == "dicom"
    )


def wait_for(folder: Path, *, images: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.rglob("*.dcm"))) < images and time.monotonic() < deadline:
        time.sleep(0.01)


def fedct(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, check=False, env=environment(), timeout=120)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "custom.cli", "data", *(str(word) for word in words)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_what_is_pulled_is_read_like_the_original(pacs: Pacs, real: Path, tmp_path: Path) -> None:
    report = pull(server(pacs), Query(filters={"PatientID": "STS*"}), tmp_path / "ct", progress=False)
    assert (report.patients, report.series, report.fetched, report.failed) == (2, 2, 95, {})
    report = pull(server(pacs), Query(filters={"PatientID": "TCGA*"}), tmp_path / "ct", progress=False)
    assert (report.patients, report.fetched) == (1, 1)
    assert volumes(tmp_path / "ct") == volumes(real)
    assert sum(accepted for _, accepted, _ in volumes(real)) == 3


def test_the_command_pulls_what_inspect_accepts(pacs: Pacs, real: Path, phantoms: Path, tmp_path: Path) -> None:
    folder = tmp_path / "our scans"
    words = ("pull", pacs.url, folder, "--credentials-file", pacs.credentials_file)
    done = fedct(*words, "--query", "BodyPartExamined=EXTREMITY", "--query", "StudyDate=20030101-20101231")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("patients: 1\nseries: 1\nimages: 48 fetched, 0 there already\nbytes: ")
    again = fedct(*words, "--query", "StudyDescription=*IBSI*")
    assert again.stdout.startswith("patients: 2\nseries: 2\nimages: 47 fetched, 48 there already\nbytes: ")
    assert "STS" not in done.stdout + again.stdout
    inspected = fedct("inspect", folder)
    assert inspected.returncode == 0
    assert "series accepted: 2" in inspected.stdout
    assert "files not images: 0" in inspected.stdout


def test_the_files_are_those_of_the_pacs(pacs: Pacs, phantoms: Path, real: Path, tmp_path: Path) -> None:
    report = pull(server(pacs), Query(), tmp_path / "ct", progress=False)
    stored = {file.read_bytes() for file in (pacs.folder / "storage").rglob("*") if file.is_file()}
    pulled = contents(tmp_path / "ct")
    assert set(pulled.values()) <= stored
    assert len(pulled) == report.fetched == 36 + 96 + 1  # the scout is a CT image by its class; the reader refuses it
    assert report.skipped == {"images of another class than CT": 1}
    for name in pulled:
        assert re.fullmatch(r"[0-9a-f]{32}/[0-9a-f]{32}\.dcm", name)


def test_the_limit_counts_patients(pacs: Pacs, phantoms: Path, tmp_path: Path) -> None:
    query = Query(filters={"PatientID": "PHANTOM*"}, max_patients=2)
    report = pull(server(pacs), query, tmp_path, progress=False)
    assert report.patients == 2
    assert report.series in (2, 3)
    first = contents(tmp_path)
    assert pull(server(pacs), query, tmp_path, progress=False).fetched == 0
    report = pull(server(pacs), Query(filters={"PatientID": "PHANTOM*"}), tmp_path, progress=False)
    assert (report.patients, report.series, report.present + report.fetched) == (5, 6, 36)
    assert first.items() <= contents(tmp_path).items()


@dataclass
class Gateway:
    """Between ``fedct`` and the PACS: counts the images that came through, and can hold one back."""

    delivered: Counter[str] = field(default_factory=Counter)
    hold_after: int | None = None
    held: threading.Event = field(default_factory=threading.Event)
    url: str = ""


@contextmanager
def gateway(pacs: Pacs) -> Iterator[Gateway]:
    passing = Gateway()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            image = re.search(r"/instances/([^?]+)$", self.path)
            if image and passing.hold_after == sum(passing.delivered.values()):
                passing.held.set()
                time.sleep(60)  # until the client is killed
                return
            there = pacs.url.removesuffix("/dicom-web") + self.path
            headers = {name: self.headers[name] for name in ("Accept", "Authorization") if name in self.headers}
            answer = requests.get(there, headers=headers, timeout=60)
            body = answer.content
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            if image:
                passing.delivered[image[1]] += 1

        def log_message(self, format: str, *args: object) -> None:
            """Not to the console."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that was killed."""

    with Quiet(("127.0.0.1", 0), Handler) as between:
        thread = threading.Thread(target=between.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        passing.url = f"http://127.0.0.1:{between.server_port}/dicom-web"
        yield passing
        between.shutdown()
        thread.join()


def test_a_pull_killed_twice_is_completed_and_fetches_nothing_twice(
    pacs: Pacs, phantoms: Path, real: Path, tmp_path: Path
) -> None:
    folder, words = tmp_path / "ct", ("--credentials-file", pacs.credentials_file, "--query", "StudyDate=19900101-")
    with gateway(pacs) as passing:
        for images in (7, 60):
            passing.hold_after = images
            passing.held.clear()
            process = subprocess.Popen(
                command("pull", passing.url, folder, *words), env=environment(), stdout=subprocess.DEVNULL
            )
            assert passing.held.wait(120)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            there = contents(folder)
            assert len(there) == images
            assert all(name.endswith(".dcm") for name in there)
        passing.hold_after = None
        done = fedct("pull", passing.url, folder, *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert "60 there already" in done.stdout
        assert set(passing.delivered.values()) == {1}
    whole = tmp_path / "whole"
    pull(server(pacs), Query(filters={"StudyDate": "19900101-"}), whole, progress=False)
    assert contents(folder) == contents(whole)
    assert len(contents(whole)) == sum(passing.delivered.values())


def test_a_pull_killed_at_any_moment_leaves_whole_images(
    pacs: Pacs, phantoms: Path, real: Path, tmp_path: Path
) -> None:
    stored = {file.read_bytes() for file in (pacs.folder / "storage").rglob("*") if file.is_file()}
    words = ("pull", pacs.url, tmp_path / "ct", "--credentials-file", pacs.credentials_file)
    process = subprocess.Popen(command(*words), env=environment(), stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "ct", images=20)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = list((tmp_path / "ct").rglob("*.dcm"))
    assert 20 <= len(left) < 133
    assert all(file.read_bytes() in stored for file in left)
    assert fedct(*words).returncode == 0
    assert len(list((tmp_path / "ct").rglob("*"))) == 133 + len(list((tmp_path / "ct").iterdir()))
    assert not list((tmp_path / "ct").rglob("*.part"))


def test_a_wrong_password_is_refused(pacs: Pacs, phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(AccessDenied, match="HTTP 401"):
        pull(Server(url=pacs.url, credentials="fedct:wrong"), Query(), tmp_path / "a", progress=False)
    secret = tmp_path / "wrong"
    secret.write_text("fedct:wrong\n")
    secret.chmod(0o600)
    done = fedct("pull", pacs.url, tmp_path / "b", "--credentials-file", secret)
    assert done.returncode == 2
    assert done.stderr == "fedct: server = HTTP 401: give a token or credentials that may search and retrieve\n"
    assert "wrong" not in done.stderr + done.stdout
    assert not contents(tmp_path / "b")


def test_a_pacs_that_is_stopped_midway(phantoms: Path, real: Path, tmp_path: Path) -> None:
    home, folder = tmp_path / "pacs", tmp_path / "ct"
    with start_pacs(home, marker=MARKER) as stopped:
        assert stopped.load(real) == stopped.load(real) == 96  # the second time they are there already
        process = subprocess.Popen(
            command("pull", stopped.url, folder, "--credentials-file", stopped.credentials_file),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(folder, images=10)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == ("fedct: server = ConnectionError: check address and network, call again: what was fetched stays\n")
    there = contents(folder)
    assert 10 <= len(there) < 96
    with start_pacs(home, marker=MARKER) as again:  # what it stored is there, at another address
        assert again.credentials != stopped.credentials
        report = pull(server(again), Query(), folder, progress=False)
    assert (report.present, report.fetched) == (len(there), 96 - len(there))
    with pytest.raises(Unreachable):
        pull(server(again), Query(), folder, progress=False)


def test_it_is_for_this_machine_and_its_password_only(pacs: Pacs) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+/dicom-web", pacs.url)
    assert requests.get(f"{pacs.url}/studies?limit=1", timeout=60).status_code == 401
    assert stat.S_IMODE(pacs.credentials_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(pacs.folder.stat().st_mode) == 0o700
    assert pacs.credentials not in repr(pacs)
    told = Path(f"/proc/{pacs.process.pid}/environ").read_bytes().split(b"\0")
    assert b"FEDCT_TEST_PACS=yes" in told
    assert pacs.credentials.split(":")[1].encode() not in Path(f"/proc/{pacs.process.pid}/cmdline").read_bytes()


def test_without_orthanc_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacs_module, "PLUGIN_FOLDERS", ())
    with pytest.raises(ConfigError, match="run apt-get install orthanc orthanc-dicomweb"):
        start_pacs(tmp_path, marker={})
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(ConfigError, match="Orthanc = None: not installed; run apt-get install"):
        start_pacs(tmp_path, marker={})


def test_one_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacs_module, "_program", lambda: shutil.which("false"))
    with pytest.raises(ConfigError, match="does not start; look into"):
        start_pacs(tmp_path, marker={})


def test_a_port_that_was_taken_meanwhile_is_given_up(
    tmp_path: Path, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = int(pacs.url.split(":")[2].split("/")[0])
    free = pacs_module._free_port
    ports = iter([taken, free()])
    monkeypatch.setattr(pacs_module, "_free_port", lambda: next(ports))
    with start_pacs(tmp_path / "second", marker=MARKER) as second:
        assert second.url != pacs.url
    assert second.process.returncode is not None


def test_no_folder_to_load_is_told(pacs: Pacs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        pacs.load(tmp_path / "nowhere")
