"""Which files of a folder make up which series: by what they hold, not by what they are called."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medical_data.deidentify import ALLOWED, keep_allowed
from medical_data.errors import (
    MissingAttribute,
    SeriesRefused,
    TruncatedFile,
    UnreadableFile,
    UnreadableFolder,
)

Format = Literal["auto", "dicom", "nifti"]

_DICOMDIR = "1.2.840.10008.1.3.10"  # Media Storage Directory Storage, PS3.10 8.6
_HEADER_BYTES = 352  # a NIfTI-1 header with its magic; also holds the preamble and magic of PS3.10


@dataclass(frozen=True, kw_only=True)
class FoundSeries:
    """The files of one series, before any pixel is read.

    Attributes:
        format: what the files are.
        files: sorted by name; DICOM files of one SeriesInstanceUID, or one NIfTI file.
        patient_id: PatientID (0010,0020), or what stands for it; None where there is none. Not shown in
            ``repr``.
        attributes: what :func:`medical_data.deidentify.keep_allowed` keeps of the first file's header.
        refusal: why the header alone refuses it.
    """

    format: Literal["dicom", "nifti"]
    files: tuple[Path, ...]
    patient_id: str | None = field(repr=False)
    attributes: Mapping[str, object] = field(default_factory=dict)
    refusal: SeriesRefused | None = None


@dataclass(frozen=True, kw_only=True)
class FolderContents:
    """All files of a folder, each in exactly one place.

    Attributes:
        series: in the order of their first files.
        other_format: images of the format that was not asked for.
        not_images: everything else (text, DICOMDIR, ...).
    """

    series: tuple[FoundSeries, ...]
    other_format: tuple[Path, ...]
    not_images: tuple[Path, ...]


def find_series(folder: Path, format: Format, *, progress: bool = False) -> FolderContents:
    """All files of a folder by what they hold, not by what they are called; no pixel is read.

    Raises:
        UnreadableFolder: ``folder`` is not a folder.
    """
    from tqdm import tqdm

    if not folder.is_dir():
        raise UnreadableFolder(
            attribute="folder", value="not a folder", remedy="give a folder that holds scans", file=folder
        )
    dicom: dict[str, list[FoundSeries]] = {}
    alone: list[FoundSeries] = []
    other_format: list[Path] = []
    not_images: list[Path] = []
    for file in tqdm(sorted(_files(folder)), desc="finding series", unit="file", disable=not progress):
        try:
            kind = _sniff(file)
        except OSError as error:
            refusal = UnreadableFile(
                attribute="file", value=type(error).__name__, remedy="give the right to read it", file=file
            )
            unread: Literal["dicom", "nifti"] = "nifti" if format == "nifti" else "dicom"
            alone.append(FoundSeries(format=unread, files=(file,), patient_id=None, refusal=refusal))
            continue
        if kind is None:
            not_images.append(file)
        elif format not in ("auto", kind):
            other_format.append(file)
        elif kind == "nifti":
            alone.append(FoundSeries(format="nifti", files=(file,), patient_id=_nifti_patient(file, folder)))
        else:
            _sort_in(file, dicom, alone, not_images)
    series = alone + [_merge(parts) for parts in dicom.values()]
    return FolderContents(
        series=tuple(sorted(series, key=lambda s: s.files[0])),
        other_format=tuple(other_format),
        not_images=tuple(not_images),
    )


def _files(folder: Path) -> Iterator[Path]:
    """Everything below that is not a folder, through links, each folder once; and folders that cannot be opened."""
    seen = set()
    closed: list[OSError] = []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=closed.append):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place, name) for name in names)
    yield from (Path(error.filename) for error in closed)


def _sniff(file: Path) -> Literal["dicom", "nifti"] | None:
    """What the first bytes say.

    Raises:
        OSError: it cannot be opened.
    """
    from medical_data.nifti import GZIP_MAGIC, nifti_version

    if not (file.is_file() or file.is_symlink() or file.is_dir()):
        return None  # a socket or a device: nothing to open
    with file.open("rb") as stream:
        start = stream.read(_HEADER_BYTES)
    if start[128:132] == b"DICM":
        return "dicom"
    if start.startswith(GZIP_MAGIC):
        try:
            with gzip.open(file) as stream:
                start = stream.read(_HEADER_BYTES)
        except (EOFError, OSError, zlib.error):
            return None
    if nifti_version(start) is not None:
        return "nifti"
    # Without the preamble of PS3.10 a data set starts with group 0008 (or 0002), little or big endian.
    return "dicom" if start[:2] in (b"\x08\0", b"\x02\0", b"\0\x08", b"\0\x02") and len(start) > 8 else None


def _sort_in(file: Path, dicom: dict[str, list[FoundSeries]], alone: list[FoundSeries], not_images: list[Path]) -> None:
    """Put one DICOM file where it belongs by its header."""
    from medical_data.dicom_header import read_dataset, refusing

    try:
        header = read_dataset(file, tags=("SOPClassUID", "SeriesInstanceUID", "PatientID", *ALLOWED))
        with refusing(file):
            if header.file_meta.get("MediaStorageSOPClassUID") == _DICOMDIR:
                not_images.append(file)
                return
            if not header.preamble and "SOPClassUID" not in header:
                not_images.append(file)  # only looked like a data set without preamble
                return
            uid = str(header.get("SeriesInstanceUID") or "")
            patient_id = str(header.get("PatientID") or "")
            attributes = keep_allowed(header)
            if not uid and "Rows" not in header:
                raise TruncatedFile(attribute="header", value="ends too early", remedy="copy the file again")
            if not uid:
                raise MissingAttribute(
                    attribute="SeriesInstanceUID", value="absent", remedy="export the series again with it"
                )
    except SeriesRefused as refusal:
        alone.append(FoundSeries(format="dicom", files=(file,), patient_id=None, refusal=refusal))
        return
    dicom.setdefault(uid, []).append(
        FoundSeries(format="dicom", files=(file,), patient_id=patient_id, attributes=attributes)
    )


def _merge(parts: list[FoundSeries]) -> FoundSeries:
    """The files of one SeriesInstanceUID; whether their patients agree is for the reader to say."""
    return FoundSeries(
        format="dicom",
        files=tuple(part.files[0] for part in parts),
        patient_id=next((part.patient_id for part in parts if part.patient_id), None),
        attributes=parts[0].attributes,
    )


def _nifti_patient(file: Path, folder: Path) -> str:
    below = file.relative_to(folder).parts
    if len(below) > 1:
        return below[0]
    name = file.name
    for suffix in (".gz", ".nii"):
        name = name.removesuffix(suffix)
    return name
