"""A site's patients, ready for training: prepared once, cached, and split by patient.

Opening a prepared cohort needs numpy and the standard library only and reads no scan.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from medical_data.cache import build_once, canonical_json, locked, verify
from medical_data.deidentify import SECRET_BYTES, Pseudonymizer, site_secret
from medical_data.errors import MedicalDataError, SeriesRefused
from medical_data.phantom import PhantomConfig, write_cohort
from medical_data.preprocess import PreprocessConfig, evenly, images_from_volume

if TYPE_CHECKING:
    from medical_data.inspection import SeriesRow

Part = Literal["train", "held_out"]

# Raise them when the images, the manifest or the embedded patients of the same configuration change.
CACHE_FORMAT = 1
EMBEDDED_FORMAT = 1

IMAGES = "images.npy"
MANIFEST = "manifest.json"


class CohortRefused(MedicalDataError):
    """A site's data cannot serve as a cohort."""


class TooFewPatients(CohortRefused):
    """Fewer usable patients than the site's limit."""


class SharedPixels(CohortRefused):
    """One scan under two patients: the split by patient would not keep it on one side."""


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """A site's own scans.

    Attributes:
        folder: searched at any depth.
        format: what to read there.

    Raises:
        ValueError: an unknown format.
    """

    folder: Path
    format: Literal["auto", "dicom", "nifti"] = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if self.format not in ("auto", "dicom", "nifti"):
            raise ValueError(f"format = {self.format!r}: give 'auto', 'dicom' or 'nifti'")


@dataclass(frozen=True, kw_only=True)
class EmbeddedSource:
    """The embedded cohort, written as DICOM at first use and then read like any other folder.

    Attributes as in :class:`medical_data.phantom.PhantomConfig`.

    Raises:
        ValueError: an impossible value.
    """

    hospital: int
    patients: int = 40
    slices: int = 16
    matrix: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        PhantomConfig(**asdict(self))


@dataclass(frozen=True, kw_only=True)
class DataLimits:
    """What the site itself decides about its data, whatever the job asks.

    Attributes:
        min_patients: fewer usable patients are refused.
        max_images_per_patient: a ceiling below the job's ``images_per_patient``, or None.
        held_out_fraction: share of patients that never train.
        split_seed: of the split.

    Raises:
        ValueError: an impossible value.
    """

    min_patients: int = 2
    max_images_per_patient: int | None = None
    held_out_fraction: float = 0.25
    split_seed: int = 0

    def __post_init__(self) -> None:
        if type(self.min_patients) is not int or self.min_patients < 2:
            raise ValueError(f"min_patients = {self.min_patients!r}: give 2 or more, so that both parts have one")
        most = self.max_images_per_patient
        if most is not None and (type(most) is not int or most < 1):
            raise ValueError(f"max_images_per_patient = {most!r}: give a positive integer or none")
        if not 0.0 < self.held_out_fraction < 1.0:
            raise ValueError(f"held_out_fraction = {self.held_out_fraction!r}: give a number between 0 and 1")
        if type(self.split_seed) is not int:
            raise ValueError(f"split_seed = {self.split_seed!r}: give an integer")


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """Patients and their images; the split is by patient.

    Attributes:
        images: float32 [N, 1, *spatial] in [-1, 1], memory-mapped and read-only, grouped by patient.
        patient: int32 [N], index into ``pseudonyms``.
        pseudonyms: [P], sorted.
        held_out: bool [P], true for patients that never train.
        manifest_sha256: of the manifest that records all this, hexadecimal.
    """

    images: NDArray[np.float32]
    patient: NDArray[np.int32]
    pseudonyms: tuple[str, ...]
    held_out: NDArray[np.bool_]
    manifest_sha256: str

    def rows(self, part: Part) -> NDArray[np.int64]:
        """Indices of the images of one part, int64, ascending.

        Raises:
            ValueError: ``part`` is neither "train" nor "held_out".
        """
        if part not in ("train", "held_out"):
            raise ValueError(f"part = {part!r}: give 'train' or 'held_out'")
        return np.flatnonzero(self.held_out[self.patient] == (part == "held_out"))


def prepare_cohort(
    *,
    source: FolderSource | EmbeddedSource,
    preprocess: PreprocessConfig,
    limits: DataLimits,
    home: Path,
    progress: bool = False,
) -> Cohort:
    """Open the cohort of this source and configuration, after reading and preprocessing it if that is new.

    The cache is keyed by the configuration, the limits, and names, sizes and times of the source's files,
    under the site's secret; any change makes a new one. Processes may call this at the same time: one
    prepares, the others wait.

    Args:
        source: where the scans lie.
        preprocess: the job's part.
        limits: the site's part.
        home: the site's own folder: holds ``secret``, ``cache/<key>/``, ``cache/<key>.inspection.json``
            (the report of the preparation, which names files) and ``embedded/``. Must not lie inside the
            source folder.
        progress: show bars on stderr.

    Raises:
        TooFewPatients: fewer than ``limits.min_patients`` patients have a usable image.
        SharedPixels: two patients hold an identical image.
        CohortRefused: no such folder, or ``home`` inside it.
        CacheCorrupted: the cached files are not what was written.
    """
    if isinstance(source, EmbeddedSource):
        source, secret = _embedded(source, home, progress)
    else:
        _check_places(source.folder, home)
        secret = site_secret(home / "secret")
    identity = {
        "format": CACHE_FORMAT,
        "preprocess": asdict(preprocess),
        "limits": asdict(limits),
        "source": {"format": source.format, "files": _listing_sha256(source.folder)},
    }
    key = hmac.new(secret, b"fedct cohort\x00" + canonical_json(identity), hashlib.sha256).hexdigest()[:32]
    folder = home / "cache" / key

    report_file = folder.with_name(f"{key}.inspection.json")

    def build(partial: Path) -> None:
        with _one_thread():
            _build(partial, source, preprocess, limits, Pseudonymizer(secret), report_file, progress)

    build_once(folder, build)
    return _open(folder)


def split_by_patient(pseudonyms: tuple[str, ...], limits: DataLimits) -> NDArray[np.bool_]:
    """Who is held out: bool [P].

    Patients are ordered by SHA-256 of (seed, pseudonym); the first round(fraction P) are held out, at least
    one, and at least one trains. It depends on the set of pseudonyms and on nothing else.

    Raises:
        ValueError: fewer than two patients.
    """
    count = len(pseudonyms)
    if count < 2:
        raise ValueError(f"pseudonyms = {count} patients: a split needs two")
    order = sorted(
        range(count),
        key=lambda i: hashlib.sha256(f"{limits.split_seed}\x00{pseudonyms[i]}".encode()).digest(),
    )
    held_out = np.zeros(count, dtype=np.bool_)
    held_out[order[: min(max(round(limits.held_out_fraction * count), 1), count - 1)]] = True
    return held_out


def _check_places(folder: Path, home: Path) -> None:
    if not folder.is_dir():
        raise CohortRefused(attribute="folder", value="not a folder", remedy="name an existing folder with scans")
    if home.resolve().is_relative_to(folder.resolve()):
        raise CohortRefused(attribute="home", value="inside the source folder", remedy="keep it beside the scans")
    home.mkdir(parents=True, exist_ok=True, mode=0o700)


def _embedded(source: EmbeddedSource, home: Path, progress: bool) -> tuple[FolderSource, bytes]:
    """The folder of an embedded cohort, written if it is not there yet, and the key of its pseudonyms.

    Nobody stands behind these patients: the key is public and the same on every machine, so that the same
    seed gives the same split and the same model everywhere.
    """
    fields = canonical_json({"format": EMBEDDED_FORMAT, **asdict(source)})
    name = hashlib.sha256(fields).hexdigest()[:32]
    folder = home / "embedded" / name
    if not folder.is_dir():
        with locked(folder.with_name(f"{name}.lock")):
            if not folder.is_dir():
                write_cohort(PhantomConfig(**asdict(source)), folder, progress=progress)
    public = hashlib.sha256(b"fedct embedded pseudonyms\x00" + fields).digest()[:SECRET_BYTES]
    return FolderSource(folder=folder, format="dicom"), public


def _listing_sha256(folder: Path) -> str:
    """SHA-256 of relative names, sizes and modification times of all files below; opens none of them."""
    digest = hashlib.sha256()
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(files):
            file = Path(parent, name)
            status = file.stat(follow_symlinks=file.exists())  # a dangling link is listed as itself
            line = f"{file.relative_to(folder).as_posix()}\x00{status.st_size}\x00{status.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _open(folder: Path) -> Cohort:
    """Memory-map a complete cache after checking it."""
    verify(folder)
    manifest_bytes = (folder / MANIFEST).read_bytes()
    patients = json.loads(manifest_bytes)["patients"]
    images: NDArray[np.float32] = np.load(folder / IMAGES, mmap_mode="r")
    patient = np.repeat(np.arange(len(patients), dtype=np.int32), [p["images"] for p in patients])
    held_out = np.array([p["part"] == "held_out" for p in patients], dtype=np.bool_)
    patient.flags.writeable = held_out.flags.writeable = False
    return Cohort(
        images=images,
        patient=patient,
        pseudonyms=tuple(p["pseudonym"] for p in patients),
        held_out=held_out,
        manifest_sha256=hashlib.sha256(manifest_bytes).hexdigest(),
    )


def _build(
    partial: Path,
    source: FolderSource,
    preprocess: PreprocessConfig,
    limits: DataLimits,
    pseudonymizer: Pseudonymizer,
    report_file: Path,
    progress: bool,
) -> None:
    """Read, preprocess and split the source into the files of a cache; one patient at a time is in memory."""
    from medical_data.inspection import InspectionReport, iter_volumes

    spool = partial / "spool"
    spool.mkdir()
    pieces: dict[str, list[Path]] = {}
    rows: list[SeriesRow] = []
    for row, volume in iter_volumes(
        source.folder, format=source.format, pseudonymizer=pseudonymizer, progress=progress
    ):
        if volume is not None:
            try:
                images = images_from_volume(volume, preprocess)
            except SeriesRefused as refusal:
                row = _refused(row, refusal)
            else:
                piece = spool / f"{len(rows)}.npy"
                np.save(piece, images)
                pieces.setdefault(str(row.pseudonym), []).append(piece)
        rows.append(row)
    report = InspectionReport(rows=tuple(rows))
    report_file.write_text(json.dumps(report.to_json(), indent=1))
    report_file.chmod(0o600)
    if len(pieces) < limits.min_patients:
        raise TooFewPatients(
            attribute="usable patients",
            value=len(pieces),
            remedy=f"the site's limit is {limits.min_patients}: add patients; why series were refused "
            f"stands in cache/{report_file.name} in the site's home",
        )

    pseudonyms = tuple(sorted(pieces))
    most = min(preprocess.images_per_patient, limits.max_images_per_patient or preprocess.images_per_patient)
    counts = [min(most, sum(len(np.load(f, mmap_mode="r")) for f in pieces[p])) for p in pseudonyms]
    shape = (1, *(preprocess.size,) * preprocess.spatial_dims)
    out = np.lib.format.open_memmap(partial / IMAGES, mode="w+", dtype=np.float32, shape=(sum(counts), *shape))
    held_out = split_by_patient(pseudonyms, limits)
    seen: dict[bytes, str] = {}
    patients = []
    start = 0
    for pseudonym, count, held in zip(pseudonyms, counts, held_out, strict=True):
        pooled = np.concatenate([np.load(f) for f in pieces[pseudonym]])
        _refuse_shared(pooled, pseudonym, seen)
        chosen = pooled[evenly(len(pooled), most)]
        out[start : start + count] = chosen
        start += count
        patients.append(
            {
                "pseudonym": pseudonym,
                "images": count,
                "part": "held_out" if held else "train",
                "pixels_sha256": hashlib.sha256(chosen.tobytes()).hexdigest(),
            }
        )
    out.flush()
    del out
    shutil.rmtree(spool)
    manifest = {
        "format": CACHE_FORMAT,
        "preprocess": asdict(preprocess),
        "limits": asdict(limits),
        "series": {"accepted": report.counts()["series_accepted"], "refused": report.refusals()},
        "patients": patients,
    }
    (partial / MANIFEST).write_bytes(canonical_json(manifest))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: slices are too small for more, and sites that share cores wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _refused(row: SeriesRow, refusal: SeriesRefused) -> SeriesRow:
    """The row of a series that was read and then refused."""
    return replace(
        row,
        accepted=False,
        slices=None,
        size=None,
        spacing_mm=None,
        hu_range=None,
        reason=type(refusal).__name__,
        message=f"{refusal.attribute} = {refusal.value}",
        remedy=refusal.remedy,
    )


def _refuse_shared(images: NDArray[np.float32], pseudonym: str, seen: dict[bytes, str]) -> None:
    """Compare every image with those of the patients before; the whole pool, whatever is chosen from it."""
    digests = {hashlib.sha256(image.tobytes()).digest() for image in images}
    others = sorted({seen[d] for d in digests if d in seen})
    if others:
        raise SharedPixels(
            attribute="pixels",
            value=f"{sum(d in seen for d in digests)} images of {pseudonym} equal images of {', '.join(others)}",
            remedy="one scan is filed under several patients: give it to one, or remove the copies",
        )
    seen.update(dict.fromkeys(digests, pseudonym))
