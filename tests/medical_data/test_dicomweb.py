"""A pull writes what was asked for, whole, once; and says without a patient's name why it could not."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pydicom
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from custom import cli
from medical_data import dicomweb, dicomweb_server
from medical_data.dicomweb import Query, hashed, pull
from medical_data.dicomweb_server import (
    AccessDenied,
    InsecureCredentials,
    MalformedAnswer,
    PullFailed,
    RequestRefused,
    Server,
    Unreachable,
    read_credentials,
)
from medical_data.discovery import find_series
from medical_data.errors import MedicalDataError
from medical_data.phantom import PhantomConfig, write_cohort

SLICES = 4
PATIENTS = 3

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class FakePacs:
    """A DICOMweb server over a folder of DICOM files, which notes what it is asked and can be told to misbehave."""

    files: dict[str, bytes] = field(default_factory=dict)  # SOPInstanceUID → bytes
    headers: dict[str, pydicom.Dataset] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    request_headers: list[dict[str, str]] = field(default_factory=list)
    spoil: Callable[[str, Answer], Answer | None] = lambda path, answer: answer
    url: str = ""

    @property
    def fetched(self) -> list[str]:
        return [path.rsplit("/", 1)[1] for path in self.asked if re.search(r"/instances/[^?]+$", path)]

    def answer(self, target: str) -> Answer:
        parts = urlsplit(target)
        words = parts.path.strip("/").split("/")
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if words[-2] == "instances":
            return multipart(self.files[words[-1]])
        rows = []
        seen = set()
        for header in self.headers.values():
            series = header.SeriesInstanceUID
            if words[-1] == "series":
                wanted = all(
                    str(header.get(key, "")) == query[key] for key in ("Modality", "PatientID") if key in query
                )
                if wanted and series not in seen:
                    seen.add(series)
                    keys = (
                        "StudyInstanceUID",
                        "SeriesInstanceUID",
                        "PatientID",
                        "Modality",
                        "StudyDate",
                        "PatientName",
                    )
                    rows.append(as_json(header, *keys))
            elif series == words[-2]:
                rows.append(as_json(header, "SOPInstanceUID", "SOPClassUID"))
        start = int(query.get("offset", 0))
        return json_answer(rows[start : start + int(query["limit"])])


def as_json(header: pydicom.Dataset, *keywords: str) -> dict[str, Any]:
    chosen = pydicom.Dataset()
    for keyword in keywords:
        if keyword in header:
            setattr(chosen, keyword, header[keyword].value)
    values: dict[str, Any] = chosen.to_json_dict()
    return values


def json_answer(rows: object) -> Answer:
    return 200, {"Content-Type": "application/dicom+json"}, json.dumps(rows).encode()


def multipart(*contents: bytes) -> Answer:
    parts = [b"--frontier\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n" for content in contents]
    kind = 'multipart/related; type="application/dicom"; boundary=frontier'
    return 200, {"Content-Type": kind}, b"".join(parts) + b"--frontier--"


@contextmanager
def serve(fake: FakePacs, context: ssl.SSLContext | None = None) -> Iterator[FakePacs]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # header and body are two packets

        def do_GET(self) -> None:
            fake.asked.append(self.path)
            fake.request_headers.append(dict(self.headers))
            answer = fake.spoil(self.path, fake.answer(self.path))
            if answer is None:  # the line breaks
                self.close_connection = True
                return
            status, headers, body = answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = "Content-Length" in headers

        def log_message(self, format: str, *args: object) -> None:
            """Not to the console."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that does not trust us."""

    with Quiet(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        fake.url = f"{'http' if context is None else 'https'}://127.0.0.1:{server.server_port}/dicom-web"
        yield fake
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("phantom") / "hospital"
    config = PhantomConfig(hospital=1, patients=PATIENTS, slices=SLICES, matrix=32, seed=4)
    write_cohort(config, folder, progress=False)
    return {
        str(pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID): file.read_bytes()
        for file in sorted(folder.rglob("*.dcm"))
    }


def fill(fake: FakePacs, scans: dict[str, bytes]) -> None:
    for uid, content in scans.items():
        fake.files[uid] = content
        fake.headers[uid] = pydicom.dcmread(pydicom.filebase.DicomBytesIO(content), stop_before_pixels=True)


@pytest.fixture
def pacs(scans: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePacs]:
    monkeypatch.setattr(dicomweb_server, "WAIT_MS", 1)
    fake = FakePacs()
    fill(fake, scans)
    with serve(fake):
        yield fake


def fetch(fake: FakePacs, folder: Path, **query: Any) -> dicomweb.PullReport:
    return pull(Server(url=fake.url), Query(**query), folder, progress=False)


def images(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def changed(content: bytes, **values: str) -> bytes:
    dataset = pydicom.dcmread(pydicom.filebase.DicomBytesIO(content))
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    buffer = pydicom.filebase.DicomBytesIO()
    dataset.save_as(buffer, enforce_file_format=False)
    written: bytes = buffer.getvalue()
    return written


def test_pull_writes_the_very_bytes_under_hashed_names(pacs: FakePacs, tmp_path: Path) -> None:
    folder = tmp_path / "my scans" / "ct"
    report = fetch(pacs, folder)
    assert images(folder) == {
        f"{hashed(pacs.headers[uid].SeriesInstanceUID)}/{hashed(uid)}.dcm": content
        for uid, content in pacs.files.items()
    }
    assert (report.patients, report.series, report.fetched, report.present) == (3, 3, 12, 0)
    assert report.fetched_bytes == sum(map(len, pacs.files.values()))
    assert not report.skipped
    assert not report.failed
    assert all(re.fullmatch(r"[0-9a-f]{32}(\.dcm)?", path.name) for path in folder.rglob("*"))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*.dcm")} == {0o600}


def test_any_transfer_syntax_is_asked_for(pacs: FakePacs, tmp_path: Path) -> None:
    fetch(pacs, tmp_path, max_patients=1)
    accepted = [headers["Accept"] for headers in pacs.request_headers if "multipart" in headers["Accept"]]
    assert accepted == ['multipart/related; type="application/dicom"; transfer-syntax=*'] * SLICES


def test_wildcards_go_unencoded(pacs: FakePacs, tmp_path: Path) -> None:
    fetch(pacs, tmp_path, filters={"PatientName": "A b*,?"})
    assert "PatientName=A%20b*,?" in pacs.asked[0]


def test_a_second_call_fetches_what_is_missing(pacs: FakePacs, tmp_path: Path) -> None:
    fetch(pacs, tmp_path)
    whole = images(tmp_path)
    lost = sorted(tmp_path.rglob("*.dcm"))[5]
    lost.unlink()
    draft = lost.with_suffix(".part")
    draft.write_bytes(b"half")
    pacs.asked.clear()
    report = fetch(pacs, tmp_path)
    assert [hashed(uid) for uid in pacs.fetched] == [lost.stem]
    assert (report.fetched, report.present, report.patients, report.series) == (1, 11, 3, 3)
    assert images(tmp_path) == whole
    fetch(pacs, tmp_path)
    assert len(pacs.fetched) == 1


KILLED = """
import os, resource, signal, sys
from pathlib import Path
from medical_data import dicomweb

content = Path(sys.argv[1]).read_bytes()
if sys.argv[3] == "half":  # the system ends the process when the file gets too large
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, len(content) // 2))
else:
    Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
dicomweb._write(Path(sys.argv[2]), content)
"""


@pytest.mark.parametrize("moment", ["half", "before the rename"])
def test_the_draft_of_a_killed_pull_is_no_image_until_it_is_whole(
    scans: dict[str, bytes], tmp_path: Path, moment: str
) -> None:
    source = tmp_path / "source"
    content = next(iter(scans.values()))
    source.write_bytes(content)
    folder = tmp_path / "scans"
    folder.mkdir()
    words = [sys.executable, "-c", KILLED, source, folder / "x.dcm", moment]
    assert subprocess.run(words, check=False).returncode < 0
    (draft,) = folder.iterdir()
    assert draft.name == "x.part"
    whole = int(moment != "half")
    assert len(draft.read_bytes()) == (len(content) if whole else len(content) // 2)
    contents = find_series(folder, "auto")
    assert (len(contents.series), len(contents.not_images)) == (whole, 1 - whole)


def test_a_full_disk_leaves_no_draft(pacs: FakePacs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fetch(pacs, tmp_path)
    assert not images(tmp_path)


def test_two_pulls_do_not_share_a_folder(pacs: FakePacs, tmp_path: Path) -> None:
    with dicomweb._locked(tmp_path), pytest.raises(MedicalDataError, match="another pull is filling it"):
        fetch(pacs, tmp_path)
    assert fetch(pacs, tmp_path).fetched == 12


def test_the_limit_counts_patients_and_keeps_them(pacs: FakePacs, tmp_path: Path) -> None:
    assert fetch(pacs, tmp_path, max_patients=1).fetched == SLICES
    first = images(tmp_path)
    pacs.headers = dict(reversed(pacs.headers.items()))  # another order, and a patient whose hash comes first
    assert fetch(pacs, tmp_path, max_patients=1).fetched == 0
    assert fetch(pacs, tmp_path, max_patients=2).fetched == SLICES
    assert first.items() <= images(tmp_path).items()
    assert fetch(pacs, tmp_path, max_patients=7).patients == 3


def test_patients_that_are_begun_come_first(pacs: FakePacs, tmp_path: Path) -> None:
    alone = {uid: header for uid, header in pacs.headers.items() if header.PatientID.endswith("2")}
    everyone, pacs.headers = pacs.headers, alone
    fetch(pacs, tmp_path)
    pacs.headers = everyone
    assert fetch(pacs, tmp_path, max_patients=1).present == SLICES


def test_all_series_of_a_patient_count_once(pacs: FakePacs, tmp_path: Path) -> None:
    uids = {header.SeriesInstanceUID for header in pacs.headers.values()}
    for uid, header in pacs.headers.items():
        if header.SeriesInstanceUID == max(uids):
            header.PatientID = "phantom-1-0000 "  # the reader takes it for the same
            pacs.files[uid] = changed(pacs.files[uid], PatientID="PHANTOM-1-0000")
        elif header.SeriesInstanceUID != min(uids):
            header.PatientID = "PHANTOM-1-0000"
            pacs.files[uid] = changed(pacs.files[uid], PatientID="PHANTOM-1-0000")
    report = fetch(pacs, tmp_path)
    assert (report.series, report.failed) == (3, {})
    assert report.patients in (1, 2)


def test_a_server_that_ignores_a_filter_gives_nothing(pacs: FakePacs, tmp_path: Path) -> None:
    report = fetch(pacs, tmp_path, filters={"StudyDate": "19000101-19001231"})
    assert report.skipped == {dicomweb.NOT_MATCHING: 3}
    assert not images(tmp_path)
    report = fetch(pacs, tmp_path, filters={"BodyPartExamined": "CHEST"})  # which it does not show
    assert report.skipped == {dicomweb.NOT_MATCHING: 3}
    assert not pacs.fetched


def test_series_of_nobody_and_of_another_modality_are_skipped(pacs: FakePacs, tmp_path: Path) -> None:
    first, second, _ = sorted({header.SeriesInstanceUID for header in pacs.headers.values()})

    def spoil(path: str, answer: Answer) -> Answer:
        if "/series?" not in path:
            return answer
        rows = json.loads(answer[2])
        for row in rows:
            if row["0020000E"]["Value"] == [first]:
                del row["00100020"]["Value"]
            if row["0020000E"]["Value"] == [second]:
                row["00080060"]["Value"] = ["MR"]
        return json_answer(rows)

    pacs.spoil = spoil
    report = fetch(pacs, tmp_path)
    assert report.skipped == {dicomweb.NO_PATIENT_ID: 1, dicomweb.NOT_MATCHING: 1}
    assert report.fetched == SLICES


def test_another_class_than_ct_is_never_fetched(pacs: FakePacs, tmp_path: Path) -> None:
    uid = next(iter(pacs.files))
    pacs.headers[uid].SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    report = fetch(pacs, tmp_path)
    assert report.skipped == {dicomweb.NO_CT_IMAGE: 1}
    assert uid not in pacs.fetched
    assert (report.fetched, report.failed) == (11, {})


def test_another_class_that_the_list_hides_is_not_written(pacs: FakePacs, tmp_path: Path) -> None:
    uid = next(iter(pacs.files))
    pacs.files[uid] = changed(pacs.files[uid], SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
    del pacs.headers[uid].SOPClassUID
    report = fetch(pacs, tmp_path)
    assert report.skipped == {dicomweb.NO_CT_IMAGE: 1}
    assert len(images(tmp_path)) == report.fetched == 11


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        (lambda content: multipart(changed(content, SOPInstanceUID="1.2.3")), dicomweb.OTHER_IMAGE),
        (lambda content: multipart(changed(content, SeriesInstanceUID="1.2.3")), dicomweb.OTHER_IMAGE),
        (lambda content: multipart(changed(content, StudyInstanceUID="1.2.3")), dicomweb.OTHER_IMAGE),
        (lambda content: multipart(changed(content, PatientID="Somebody^Else")), dicomweb.OTHER_IMAGE),
        (lambda content: multipart(b"<html>"), dicomweb.NO_DICOM),
        (lambda content: multipart(content, content), dicomweb.NO_DICOM),
        (lambda content: multipart(), dicomweb.NO_DICOM),
        (lambda content: (*multipart(content)[:2], multipart(content)[2][:-12]), dicomweb.NO_DICOM),
        (lambda content: (*multipart(content)[:2], multipart(content)[2][:-2]), dicomweb.NO_DICOM),
        (lambda content: (200, {"Content-Type": "multipart/related"}, content), dicomweb.NO_DICOM),
        (lambda content: (200, {}, content), dicomweb.NO_DICOM),
        (lambda content: (404, {}, b"gone: Phantom^H1"), "HTTP 404"),
        (lambda content: (500, {}, b""), "HTTP 500"),
    ],
)
def test_one_bad_image_is_counted_and_not_written(
    pacs: FakePacs, tmp_path: Path, spoiled: Callable[[bytes], Answer], reason: str
) -> None:
    bad = list(pacs.files)[6]
    pacs.spoil = lambda path, answer: spoiled(pacs.files[bad]) if path.endswith(f"/{bad}") else answer
    report = fetch(pacs, tmp_path)
    assert report.failed == {reason: 1}
    assert len(images(tmp_path)) == report.fetched == 11
    pacs.spoil = lambda path, answer: answer
    report = fetch(pacs, tmp_path)
    assert (report.fetched, report.failed) == (1, {})


def test_an_image_that_is_sent_bare_is_taken(pacs: FakePacs, tmp_path: Path) -> None:
    def spoil(path: str, answer: Answer) -> Answer:
        uid = path.rsplit("/", 1)[1]
        return (200, {"Content-Type": "application/dicom"}, pacs.files[uid]) if uid in pacs.files else answer

    pacs.spoil = spoil
    assert fetch(pacs, tmp_path).fetched == 12
    assert sorted(images(tmp_path).values()) == sorted(pacs.files.values())


def test_a_server_that_gives_no_image_is_not_asked_for_all(pacs: FakePacs, tmp_path: Path) -> None:
    pacs.spoil = lambda path, answer: (410, {}, b"") if re.search(r"/instances/", path) else answer
    with pytest.raises(RequestRefused, match="10 images in a row: HTTP 410"):
        fetch(pacs, tmp_path)
    assert len(pacs.fetched) == dicomweb.FAILURES_IN_A_ROW


def test_long_answers_come_in_pages(pacs: FakePacs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomweb, "PAGE", 2)
    assert fetch(pacs, tmp_path).fetched == 12
    searches = [path for path in pacs.asked if "/series?" in path]
    assert [parse_qs(urlsplit(path).query)["offset"] for path in searches] == [["0"], ["2"], ["3"]]


def test_a_server_that_begins_anew_is_refused(pacs: FakePacs, tmp_path: Path) -> None:
    first = pacs.answer("/dicom-web/series?limit=500")
    pacs.spoil = lambda path, answer: first if "/series?" in path else answer
    with pytest.raises(MalformedAnswer, match="same results at another offset"):
        fetch(pacs, tmp_path)
    assert not images(tmp_path)


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"Content-Type": "text/html"}, b"<html>Phantom^H1"),
        json_answer("PHANTOM-1-0000"),
        json_answer([1]),
        json_answer([{}]),
        json_answer([{"0020000E": {"vr": "UI", "Value": ["../../PHANTOM-1-0000"]}}]),
        json_answer([{"0020000E": {"vr": "UI", "Value": ["1." * 40 + "1"]}}]),
        json_answer([{"0020000E": {"vr": "UI", "Value": 7}}]),
        json_answer([{"0020000E": {"vr": "UI", "Value": ["1", "2"]}}]),
    ],
)
def test_malformed_searches_are_refused(pacs: FakePacs, tmp_path: Path, answer: Answer) -> None:
    pacs.spoil = lambda path, _: answer
    with pytest.raises(MalformedAnswer) as error:
        fetch(pacs, tmp_path)
    assert "PHANTOM" not in str(error.value).upper()
    assert error.value.__cause__ is error.value.__context__ is None  # nothing that a traceback would quote


def test_an_overloaded_server_is_asked_again(pacs: FakePacs, tmp_path: Path) -> None:
    answers = {"left": 2}

    def spoil(path: str, answer: Answer) -> Answer:
        if "/instances/" in path and answers["left"]:
            answers["left"] -= 1
            return 503, {}, b""
        return answer

    pacs.spoil = spoil
    assert fetch(pacs, tmp_path).fetched == 12
    assert len(pacs.fetched) == 14


def test_a_line_that_breaks_once_is_taken_up(pacs: FakePacs, tmp_path: Path) -> None:
    broken: list[str] = []

    def spoil(path: str, answer: Answer) -> Answer | None:
        if "/instances/" in path and len(broken) < 2:
            broken.append(path)
            status, headers, body = answer
            return None if len(broken) == 1 else (status, headers | {"Content-Length": str(len(body))}, body[:-9])
        return answer

    pacs.spoil = spoil
    assert fetch(pacs, tmp_path).fetched == 12
    assert sorted(images(tmp_path).values()) == sorted(pacs.files.values())


@pytest.mark.parametrize("dying", [None, (503, {}, b"")])
def test_a_server_that_dies_midway_ends_the_pull_and_the_next_goes_on(
    pacs: FakePacs, tmp_path: Path, dying: Answer | None
) -> None:
    pacs.spoil = lambda path, answer: dying if len(set(pacs.fetched)) > 5 else answer
    with pytest.raises(Unreachable, match="what was fetched stays"):
        fetch(pacs, tmp_path)
    assert len(images(tmp_path)) == 5
    pacs.spoil = lambda path, answer: answer
    report = fetch(pacs, tmp_path)
    assert (report.present, report.fetched) == (5, 7)


def test_redirects_are_refused(pacs: FakePacs, tmp_path: Path) -> None:
    pacs.spoil = lambda path, answer: (302, {"Location": f"{pacs.url}/elsewhere"}, b"")
    with pytest.raises(RequestRefused, match="a redirect"):
        pull(Server(url=pacs.url, token="secret"), Query(), tmp_path, progress=False)  # noqa: S106
    assert len({urlsplit(path).path for path in pacs.asked}) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_who_is_not_let_in_is_told(pacs: FakePacs, tmp_path: Path, status: int) -> None:
    pacs.spoil = lambda path, answer: (status, {}, b"")
    with pytest.raises(AccessDenied, match=f"server = HTTP {status}: give a token"):
        fetch(pacs, tmp_path)
    assert len(pacs.asked) == 1


@pytest.mark.parametrize(
    ("who", "header"),
    [
        ({"token": "abc.DEF"}, "Bearer abc.DEF"),
        ({"credentials": "pacs:a:b é"}, "Basic cGFjczphOmIgw6k="),
        ({}, None),
    ],
)
def test_credentials_arrive_and_the_environment_has_no_say(
    pacs: FakePacs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: dict[str, str], header: str | None
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server = Server(url=pacs.url, **who)  # type: ignore[arg-type]
    assert not any(secret in repr(server) for secret in who.values())
    pull(server, Query(max_patients=1), tmp_path / "scans", progress=False)
    assert {headers.get("Authorization") for headers in pacs.request_headers} == {header}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "http://pacs.example.org/dicom-web"}, "give https"),
        ({"url": "http://127.0.0.1.example.org/dicom-web"}, "give https"),
        ({"url": "http://10.0.0.1/dicom-web"}, "give https"),
        ({"url": "https://user:password@pacs.example.org/"}, "not in the address"),
        ({"url": "pacs.example.org"}, "give https://host"),
        ({"url": "ftp://pacs.example.org"}, "give https://host"),
        ({"url": "https://[::1]/dicom-web"}, "IPv4"),
        ({"url": "https://pacs.example.org/?a=b"}, "give https://host"),
        ({"url": "https://pacs", "token": "a", "credentials": "a:b"}, "give one"),
        ({"url": "https://pacs", "token": "a b"}, "bare token"),
        ({"url": "https://pacs", "credentials": "password"}, "not user:password"),
        ({"url": "https://pacs", "credentials": ":password"}, "not user:password"),
        ({"url": "https://pacs", "ca": Path("/nowhere")}, "no such file"),
        ({"url": "https://pacs", "client_cert": Path("/nowhere")}, "no such file"),
    ],
)
def test_servers_that_cannot_be_meant_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Server(**arguments)
    assert "password@" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "http://127.0.0.1:8042/dicom-web"},
        {"url": "http://127.3.2.1"},
        {"url": "http://localhost:8042/dicom-web"},
        {"url": "http://pacs.example.org", "allow_http": True},
        {"url": "https://pacs.example.org/dicom-web"},
    ],
)
def test_servers_that_can_be_meant_are_taken(arguments: dict[str, Any]) -> None:
    assert Server(**arguments).url == arguments["url"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filters": {"Modality": "MR"}}, "always CT"),
        ({"filters": {"StudyDat": "2020"}}, "'StudyDat': no attribute to search by"),
        ({"filters": {"PixelData": "2020"}}, "no attribute to search by"),
        ({"filters": {"ReferencedStudySequence": "x"}}, "no attribute to search by"),
        ({"filters": {"PatientID": " "}}, "PatientID: empty"),
        ({"filters": {"PatientID": "4711\r\nHost: x"}}, "PatientID: empty or with control characters"),
        ({"filters": {"StudyDate": "2020"}}, "StudyDate: no date"),
        ({"filters": {"StudyDate": "-"}}, "StudyDate: no date"),
        ({"max_patients": 0}, "max_patients = 0"),
        ({"max_patients": True}, "max_patients = True"),
    ],
)
def test_queries_that_cannot_be_meant_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Query(**arguments)
    assert "4711" not in str(error.value)


@pytest.mark.parametrize(
    ("vr", "wanted", "found", "matches"),
    [
        ("DA", "20200101-20201231", ["20200615"], True),
        ("DA", "20200101-20201231", ["20200101"], True),
        ("DA", "20200101-20201231", ["20210101"], False),
        ("DA", "20200101-", ["20210101"], True),
        ("DA", "20200101-", ["20191231"], False),
        ("DA", "-20200101", ["20191231"], True),
        ("DA", "-20200101", ["20200102"], False),
        ("DA", "20200101", ["20200101"], True),
        ("DA", "20200101", [], False),
        ("TM", "0800-1200", ["115959.5"], True),
        ("TM", "0800-1200", ["1201"], False),
        ("LO", "*thorax*", ["CT THORAX KM"], True),
        ("LO", "*thorax*", ["CT Abdomen"], False),
        ("LO", "CT?THORAX", ["CT THORAX"], True),
        ("LO", "CT", ["CT THORAX"], False),
        ("LO", "a.c", ["abc"], False),
        ("LO", "[ab]*", ["abc"], False),
        ("LO", "*", [], False),
        ("CS", "CT", ["MR", "CT"], True),
        ("UI", "1.2,1.3", ["1.3"], True),
        ("UI", "1.2\\1.3", ["1.3"], True),
        ("UI", "1.2", ["1.20"], False),
        ("DS", "5", ["5.0"], True),
        ("DS", "five", ["five"], False),
        ("IS", "5", ["6"], False),
    ],
)
def test_matching_follows_the_standard(vr: str, wanted: str, found: list[str], matches: bool) -> None:
    assert dicomweb._matches(vr, wanted, found) is matches


@pytest.mark.parametrize(
    ("text", "mode"), [("a", 0o640), ("a", 0o604), ("", 0o600), ("a\nb\n", 0o600), ("a\x00", 0o600)]
)
def test_credentials_that_others_can_read_or_that_are_none(tmp_path: Path, text: str, mode: int) -> None:
    file = tmp_path / "credentials"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(InsecureCredentials) as error:
        read_credentials(file)
    assert str(tmp_path) not in str(error.value)
    file.chmod(0o600)
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(InsecureCredentials, match="not one line of text"):
        read_credentials(file)
    file.write_text("user:pass word\n")
    assert read_credentials(file) == "user:pass word"


def certificate(folder: Path) -> Path:
    """A certificate of 127.0.0.1 that signs itself, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pacs")])
    now = datetime.now(timezone.utc)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "pacs.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(secret + built.public_bytes(serialization.Encoding.PEM))
    return file


def test_tls_needs_the_right_authority_and_certificate(
    scans: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicomweb_server, "WAIT_MS", 1)
    pem = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    context.load_verify_locations(pem)
    context.verify_mode = ssl.CERT_REQUIRED
    fake = FakePacs()
    fill(fake, scans)
    (tmp_path / "empty.pem").write_text("no certificate\n")
    with serve(fake, context):
        folder = tmp_path / "scans"
        for ca, ours in ((None, pem), (pem, None), (tmp_path / "empty.pem", pem)):
            with pytest.raises(Unreachable) as error:
                pull(Server(url=fake.url, ca=ca, client_cert=ours), Query(), folder, progress=False)
            assert "127.0.0.1" not in str(error.value)
        assert not fake.asked
        report = pull(Server(url=fake.url, ca=pem, client_cert=pem), Query(), folder, progress=False)
        assert report.fetched == 12


def fedct(*words: object) -> int:
    return cli.main(["data", "pull", *(str(word) for word in words)])


def test_the_command_counts_and_says_nothing_of_patients(
    pacs: FakePacs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = ("--query", "PatientID=PHANTOM-1-0001", "--query", "StudyDate=20000101-", "--limit", 5)
    assert fedct(pacs.url, tmp_path / "ct", *query) == 0
    out, err = capsys.readouterr()
    assert out == (
        "patients: 1\nseries: 1\nimages: 4 fetched, 0 there already\n"
        f"bytes: {sum(len(c) for c in images(tmp_path).values())} fetched\nskipped: 0\nfailed: 0\n"
    )
    assert err == ""  # no bar where nobody looks
    assert fedct(pacs.url, tmp_path / "ct", "--query", "PatientID=PHANTOM-1-0009") == 1
    capsys.readouterr()
    bad = next(uid for uid, header in pacs.headers.items() if header.PatientID.endswith("2"))
    pacs.spoil = lambda path, answer: (404, {}, b"PHANTOM") if path.endswith(bad) else answer
    assert fedct(pacs.url, tmp_path / "ct") == 2
    out, err = capsys.readouterr()
    assert out.endswith("failed: 1 (HTTP 404: 1)\n")
    pacs.spoil = lambda path, answer: (400, {}, b"PHANTOM")
    assert fedct(pacs.url, tmp_path / "ct", "--query", "PatientName=Phantom*") == 2
    failure = capsys.readouterr().err
    assert failure == "fedct: server = HTTP 400: check the address and the query\n"
    assert "phantom" not in (out + err + failure).lower()


def test_what_libraries_would_log_and_warn_is_not_said(
    pacs: FakePacs, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(path: str, answer: Answer) -> Answer | None:
        status, headers, body = answer
        uid = path.rsplit("/", 1)[1]
        if uid not in pacs.files:
            return status, headers | {"Warning": "299 - more of Phantom^H1"}, body
        if pacs.fetched.count(uid) == 1:
            return 503, {}, b""
        return 200, {"Content-Type": "application/dicom"}, pacs.files[uid]

    pacs.spoil = spoil
    with caplog.at_level("DEBUG"):
        assert fetch(pacs, tmp_path).fetched == 12
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_the_command_takes_credentials_from_one_place(
    pacs: FakePacs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret"
    file.write_text("user:pass\n")
    file.chmod(0o600)

    def sent(*words: object) -> str | None:
        assert fedct(pacs.url, tmp_path / "ct", "--limit", 1, *words) == 0
        return pacs.request_headers[-1].get("Authorization")

    assert sent("--credentials-file", file) == "Basic dXNlcjpwYXNz"
    assert sent("--token-file", file) == "Bearer user:pass"
    monkeypatch.setenv("FEDCT_PACS_TOKEN", "abc")
    assert sent() == "Bearer abc"
    capsys.readouterr()
    assert fedct(pacs.url, tmp_path / "ct", "--credentials-file", file) == 2
    err = capsys.readouterr().err
    assert err == "fedct: credentials = ['--credentials-file', 'FEDCT_PACS_TOKEN']: give one way to log in\n"
    monkeypatch.delenv("FEDCT_PACS_TOKEN")
    monkeypatch.setenv("FEDCT_PACS_CREDENTIALS", "user:pass")
    assert sent() == "Basic dXNlcjpwYXNz"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--query", "4711"), "--query = 'without =': give KEY=VALUE"),
        (("--query", "PatientID=4711", "--query", "PatientID=4711"), "--query = 'PatientID': given twice"),
        (("--query", "StudyDate=4711"), "StudyDate: no date"),
        (("--limit", 0), "max_patients = 0"),
        (("--token-file", "/nowhere"), "No such file"),
    ],
)
def test_the_command_says_what_to_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...], message: str
) -> None:
    assert fedct("https://pacs.example.org", tmp_path / "ct", *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "4711" not in err
    assert err.count("\n") == 1
    assert not (tmp_path / "ct").exists()


def test_plain_http_to_another_machine_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedct("http://pacs.example.org/dicom-web", tmp_path / "ct") == 2
    assert "would travel unencrypted" in capsys.readouterr().err


def test_help_says_what_stays_identifiable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fedct("--help")
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "still identifiable" in out
    assert "Exit code" in out


def test_every_failure_is_one_kind() -> None:
    assert all(issubclass(kind, PullFailed) for kind in (Unreachable, AccessDenied, RequestRefused, MalformedAnswer))
