"""A CT cohort from a DICOMweb server into a site's folder of scans (PS3.18: QIDO-RS to search, WADO-RS to retrieve).

What is written is what the server sends, byte for byte: still identifiable, and de-identified by the reader like any
other scan. Folders and files are named after hashed UIDs, because a UID may hold a date, a device or a number that a
hospital gave. No patient has a folder: a hash of a short PatientID can be undone by trying them all.

    folder/<hash of SeriesInstanceUID>/<hash of SOPInstanceUID>.dcm
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from medical_data.deidentify import normal_patient_id
from medical_data.dicom_header import CT_SOP_CLASSES
from medical_data.dicomweb_server import (
    MalformedAnswer,
    RequestRefused,
    Server,
    Session,
    ask,
    connect,
    pages,
    quiet,
    uid_of,
    values_of,
)
from medical_data.errors import MedicalDataError

if TYPE_CHECKING:
    from dicomweb_client.web import DICOMwebClient

PAGE = 500  # results a search
FAILURES_IN_A_ROW = 10  # then the server is not asked any further

HASH_CHARACTERS = 32  # 128 bits: no collision among any number of images
PREAMBLE_BYTES = 132  # with "DICM" (PS3.10 7.1)

# Reasons in a report.
NO_PATIENT_ID = "series without PatientID"
NOT_MATCHING = "series that do not show what was asked for"
NO_CT_IMAGE = "images of another class than CT"
OTHER_IMAGE = "another image or patient than asked for"
NO_DICOM = "no DICOM file"

_DATES = re.compile(r"[0-9]{8}(-([0-9]{8})?)?|-[0-9]{8}")  # PS3.4 C.2.2.2.5
_RANGES = frozenset({"DA", "TM", "DT"})
_MATCHED = _RANGES | {"AE", "AS", "CS", "DS", "IS", "LO", "LT", "PN", "SH", "ST", "UC", "UI", "UT", "US", "UL"}


@dataclass(frozen=True, kw_only=True)
class Query:
    """Which series to pull. Modality is always CT.

    Attributes:
        filters: keyword of a patient's, study's or series' attribute → value: a date or time may be a range
            (``20200101-20201231``, ``20200101-``), a text may hold the wildcards ``*`` and ``?``, UIDs may be a list
            (PS3.4 C.2.2.2). Not shown in ``repr``.
        max_patients: no more than so many patients, or None for all.

    Raises:
        ValueError: a keyword that the standard does not know or that cannot be matched, an empty value, no date.
    """

    filters: Mapping[str, str] = field(default_factory=dict, repr=False)
    max_patients: int | None = None

    def __post_init__(self) -> None:
        for keyword, value in self.filters.items():
            if keyword == "Modality":
                raise ValueError("Modality: always CT; leave it out")
            vr = _vr(keyword)
            if vr not in _MATCHED:
                raise ValueError(f"{keyword!r}: no attribute to search by; give a DICOM keyword such as StudyDate")
            if not value.strip() or any(ord(character) < 32 for character in value):
                raise ValueError(f"{keyword}: empty or with control characters; give a value, or leave it out")
            if vr == "DA" and not _DATES.fullmatch(value):
                raise ValueError(f"{keyword}: no date; give YYYYMMDD or a range such as 20200101-20201231")
        most = self.max_patients
        if most is not None and (type(most) is not int or most < 1):
            raise ValueError(f"max_patients = {most!r}: give a positive integer or none")


@dataclass(frozen=True, kw_only=True)
class PullReport:
    """What a pull did: counts only.

    Attributes:
        patients: with an image in the folder, of those that were asked for.
        series: likewise.
        fetched: images written by this call.
        present: images that were there already.
        fetched_bytes: of the images written by this call.
        skipped: reason → number of what is not wanted.
        failed: reason → number of images that are wanted and not there.
    """

    patients: int
    series: int
    fetched: int
    present: int
    fetched_bytes: int
    skipped: Mapping[str, int]
    failed: Mapping[str, int]

    def text(self) -> str:
        """For a person: a count a line."""
        lines = [
            f"patients: {self.patients}",
            f"series: {self.series}",
            f"images: {self.fetched} fetched, {self.present} there already",
            f"bytes: {self.fetched_bytes} fetched",
        ]
        for name, counts in (("skipped", self.skipped), ("failed", self.failed)):
            total = sum(counts.values())
            why = "; ".join(f"{reason}: {number}" for reason, number in sorted(counts.items()))
            lines.append(f"{name}: {total}" + (f" ({why})" if total else ""))
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Series:
    """One series of a server's answer."""

    study: str = field(repr=False)
    uid: str = field(repr=False)
    patient: str = field(repr=False)

    @property
    def name(self) -> str:
        return hashed(self.uid)


def hashed(uid: str) -> str:
    """A UID as a file name: 32 hexadecimal characters of its SHA-256."""
    return hashlib.sha256(uid.encode()).hexdigest()[:HASH_CHARACTERS]


def pull(server: Server, query: Query, folder: Path, *, progress: bool) -> PullReport:
    """Fetch what a query finds and the folder lacks.

    An image is in the folder whole or not at all, whenever the process is killed; a later call fetches what is
    missing. Nothing is ever removed or fetched again. Where patients are limited, those of whom the folder has a
    series already come first, so that a later call goes on with the same.

    A series must show in the server's answer that it is what was asked for: a server that ignores a filter gives
    nothing. An image is written only if it is the one that was asked for, of that patient, and a CT image.

    Args:
        server: where.
        query: what.
        folder: made where it is not there, mode 0700; files have mode 0600.
        progress: bar on stderr.

    Raises:
        PullFailed: the server cannot be asked any further. What was written stays.
        MedicalDataError: another pull is filling the folder.
    """
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    client, session = connect(server)
    with _locked(folder), session:
        counts = _Counts()
        chosen = _choose(_search_series(client, session, query, counts), folder, query.max_patients)
        with tqdm(chosen, desc="pulling", unit="series", disable=not progress) as bar:
            for series in bar:
                _pull_series(client, session, series, folder, counts)
                bar.set_postfix(images=counts.fetched, MB=counts.fetched_bytes // 10**6)
        return PullReport(
            patients=len(counts.patients),
            series=counts.series,
            fetched=counts.fetched,
            present=counts.present,
            fetched_bytes=counts.fetched_bytes,
            skipped=dict(counts.skipped),
            failed=dict(counts.failed),
        )


class _Counts:
    """What becomes a report."""

    def __init__(self) -> None:
        self.patients: set[str] = set()
        self.series = self.fetched = self.present = self.fetched_bytes = 0
        self.skipped: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.failures_in_a_row = 0


def _search_series(client: DICOMwebClient, session: Session, query: Query, counts: _Counts) -> list[_Series]:
    """All series that match, in the order of the server."""
    filters = {"Modality": "CT", **query.filters}
    found = pages(
        session,
        "0020000E",
        lambda offset: client.search_for_series(
            search_filters=filters, fields=["PatientID", *query.filters], limit=PAGE, offset=offset
        ),
    )
    series = []
    for answer in found:
        if not all(_matches(_vr(keyword), value, values_of(answer, keyword)) for keyword, value in filters.items()):
            counts.skipped[NOT_MATCHING] += 1
            continue
        patient = normal_patient_id("".join(values_of(answer, "PatientID")[:1]))
        if not patient:
            counts.skipped[NO_PATIENT_ID] += 1
            continue
        series.append(_Series(study=uid_of(answer, "0020000D"), uid=uid_of(answer, "0020000E"), patient=patient))
    return series


def _choose(found: list[_Series], folder: Path, most: int | None) -> list[_Series]:
    """The series of at most so many patients: those that the folder knows first, then by a hash, never by name."""
    begun = {series.patient for series in found if (folder / series.name).is_dir()}
    patients = sorted({series.patient for series in found}, key=lambda p: (p not in begun, hashed(p)))
    place = {patient: number for number, patient in enumerate(patients[:most])}
    chosen = [series for series in found if series.patient in place]
    return sorted(chosen, key=lambda series: (place[series.patient], series.name))


def _pull_series(client: DICOMwebClient, session: Session, series: _Series, folder: Path, counts: _Counts) -> None:
    """Fetch what is missing of one series."""
    found = pages(
        session,
        "00080018",
        lambda offset: client.search_for_instances(
            series.study, series.uid, fields=["SOPClassUID"], limit=PAGE, offset=offset
        ),
    )
    place = folder / series.name
    there = {file.name for file in place.iterdir()} if place.is_dir() else set()
    for name in there:
        if name.endswith(".part"):  # of a pull that was killed
            (place / name).unlink()
    images = 0
    for answer in found:
        uid = uid_of(answer, "00080018")
        name = f"{hashed(uid)}.dcm"
        sop_class = values_of(answer, "SOPClassUID")
        if name in there:
            counts.present += 1
        elif sop_class and sop_class[0] not in CT_SOP_CLASSES:
            counts.skipped[NO_CT_IMAGE] += 1
            continue
        else:
            content = _fetch(client, session, series, uid, counts)
            if content is None:
                continue
            place.mkdir(exist_ok=True, mode=0o700)
            _write(place / name, content)
            counts.fetched += 1
            counts.fetched_bytes += len(content)
        images += 1
    if images:
        counts.series += 1
        counts.patients.add(series.patient)


def _fetch(client: DICOMwebClient, session: Session, series: _Series, uid: str, counts: _Counts) -> bytes | None:
    """One image as the server sends it; None, and counted, where it cannot be had or is not wanted."""
    content, refusal = _retrieve(client, session, series, uid)
    if refusal is None or refusal == NO_CT_IMAGE:
        counts.failures_in_a_row = 0
    if refusal is None:
        return content
    if refusal == NO_CT_IMAGE:
        counts.skipped[refusal] += 1
        return None
    counts.failed[refusal] += 1
    counts.failures_in_a_row += 1
    if counts.failures_in_a_row == FAILURES_IN_A_ROW:
        raise RequestRefused(
            attribute="server",
            value=f"{FAILURES_IN_A_ROW} images in a row: {refusal}",
            remedy="have its log looked at and call again: what was fetched stays",
        )
    return None


def _retrieve(client: DICOMwebClient, session: Session, series: _Series, uid: str) -> tuple[bytes, str | None]:
    """What the server sends for one image, and why it is not that image; None if it is."""
    try:
        ask(session, lambda: client.retrieve_instance(series.study, series.uid, uid, (("application/dicom", "*"),)))
        content = _only_part(session)
    except RequestRefused as refused:
        return b"", str(refused.value)
    except MalformedAnswer:
        return b"", NO_DICOM
    return content, _refusal(content, series, uid)


def _refusal(content: bytes, series: _Series, uid: str) -> str | None:
    """Why the bytes that came are not the image that was asked for; None if they are."""
    from pydicom import dcmread

    wanted = {"StudyInstanceUID": series.study, "SeriesInstanceUID": series.uid, "SOPInstanceUID": uid}
    try:
        with quiet():
            tags = [*wanted, "SOPClassUID", "PatientID"]
            header = dcmread(BytesIO(content), stop_before_pixels=True, specific_tags=tags)
            found = {keyword: str(header.get(keyword) or "") for keyword in tags}
    except Exception:
        return NO_DICOM
    if any(found[keyword] != value for keyword, value in wanted.items()):
        return OTHER_IMAGE
    if normal_patient_id(found["PatientID"]) != series.patient:
        return OTHER_IMAGE
    return None if found["SOPClassUID"] in CT_SOP_CLASSES else NO_CT_IMAGE


def _only_part(session: Session) -> bytes:
    """The one part of a multipart/related message (RFC 2387), or the body of a server that sends it bare.

    The client library checks and parses the same message, but gives no bytes: what is written must not be encoded anew.

    Raises:
        MalformedAnswer: no part, several, or a message that ends too early.
    """
    response = session.last
    assert response is not None  # noqa: S101  (asked just now)
    content: bytes = response.content
    header = Message()
    header["Content-Type"] = response.headers.get("Content-Type", "")
    if header.get_content_maintype() != "multipart":
        return content
    delimiter = b"\r\n--" + str(header.get_boundary("")).encode()
    parts = (b"\r\n" + content).split(delimiter)
    if len(parts) != 3 or not parts[2].startswith(b"--"):
        raise MalformedAnswer(attribute="image", value="not one whole part", remedy="call again")
    return parts[1].partition(b"\r\n\r\n")[2]


def _write(file: Path, content: bytes) -> None:
    """Write a DICOM file that is there whole or not at all.

    The draft lies beside it, on any file system; it has no preamble and is no DICOM to any reader until the rest is
    written. So a process may be killed at any moment.
    """
    draft = file.with_suffix(".part")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(bytes(PREAMBLE_BYTES))
            stream.write(content[PREAMBLE_BYTES:])
            stream.flush()
            stream.seek(0)
            stream.write(content[:PREAMBLE_BYTES])
            stream.flush()
            os.fsync(stream.fileno())
        draft.rename(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One pull a folder; the operating system releases it when a process dies, and no file is left."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MedicalDataError(
                attribute="folder", value="another pull is filling it", remedy="wait for it, or end it", file=folder
            ) from None
        yield
    finally:
        os.close(handle)


def _vr(keyword: str) -> str:
    """The value representation of a keyword (PS3.6); empty where the standard does not know it."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    tag = tag_for_keyword(keyword)
    return "" if tag is None else str(dictionary_VR(tag))


def _matches(vr: str, wanted: str, found: list[str]) -> bool:
    """Whether one of the values is what was asked for, by the rules of PS3.4 C.2.2.2; case does not count."""
    if vr in _RANGES and "-" in wanted:
        low, _, high = wanted.partition("-")
        return any(low <= value[: len(low) or None] and (not high or value[: len(high)] <= high) for value in found)
    if vr == "UI":
        return any(value in re.split(r"[,\\]", wanted) for value in found)
    if vr in ("DS", "IS", "US", "UL"):
        return any(_number(value) is not None and _number(value) == _number(wanted) for value in found)
    pattern = re.escape(wanted.strip()).replace(r"\*", ".*").replace(r"\?", ".")
    return any(re.fullmatch(pattern, value, re.IGNORECASE | re.DOTALL) for value in found)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
