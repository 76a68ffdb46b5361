"""What lies in a site's folder: every file accounted for, every series read or refused with its reason.

The report is the site's own: it names files. What may leave a site is decided elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medical_data.deidentify import Pseudonymizer
from medical_data.discovery import Format, FoundSeries, find_series
from medical_data.errors import SeriesRefused
from medical_data.volume import Vector, Volume

SCHEMA, SCHEMA_VERSION = "fedct.inspection", 1

# Reasons of rows that are no series; all other reasons are names of SeriesRefused classes.
NOT_AN_IMAGE, OTHER_FORMAT = "NotAnImage", "OtherFormat"


@dataclass(frozen=True, kw_only=True)
class SeriesRow:
    """One line of the report: a series, or all files that are none.

    Attributes:
        pseudonym: of the patient; None where there is none.
        format: "dicom", "nifti", or "other" for files that are no series of the format asked for.
        files: how many.
        example_file: one of them (the one to blame, where one is), for the site's own report.
        accepted: whether it was read.
        slices, size, spacing_mm, hu_range: D, (H, W), mm along (D, H, W), lowest and highest HU; None if
            refused.
        reason: name of the refusal's class, "NotAnImage" or "OtherFormat"; None if accepted.
        message: attribute and value that were refused; None if accepted.
        remedy: what to do about it; None if accepted.
        attributes: acquisition facts that may be kept (:data:`medical_data.deidentify.ALLOWED`).
    """

    pseudonym: str | None
    format: Literal["dicom", "nifti", "other"]
    files: int
    example_file: Path
    accepted: bool
    slices: int | None = None
    size: tuple[int, int] | None = None
    spacing_mm: Vector | None = None
    hu_range: tuple[float, float] | None = None
    reason: str | None = None
    message: str | None = None
    remedy: str | None = None
    attributes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.accepted != (self.reason is None) or (self.accepted and self.pseudonym is None):
            raise ValueError("SeriesRow: give a pseudonym to what is accepted and a reason to what is not")


@dataclass(frozen=True, kw_only=True)
class InspectionReport:
    """All rows of one folder, in the order of :func:`iter_volumes`, and what they add up to."""

    rows: tuple[SeriesRow, ...]

    def counts(self) -> dict[str, int]:
        """Files and series by outcome; files_found is the sum of the four other counts of files."""
        series = [row for row in self.rows if row.format != "other"]
        files = {
            "files_in_accepted_series": sum(row.files for row in series if row.accepted),
            "files_in_refused_series": sum(row.files for row in series if not row.accepted),
            "files_of_other_format": sum(row.files for row in self.rows if row.reason == OTHER_FORMAT),
            "files_not_images": sum(row.files for row in self.rows if row.reason == NOT_AN_IMAGE),
        }
        return {
            "files_found": sum(row.files for row in self.rows),
            **files,
            "series_accepted": sum(row.accepted for row in series),
            "series_refused": sum(not row.accepted for row in series),
            "patients_accepted": len({row.pseudonym for row in series if row.accepted}),
        }

    def refusals(self) -> dict[str, int]:
        """How many series each reason refused, by name."""
        refused = Counter(row.reason for row in self.rows if row.format != "other" and row.reason)
        return dict(sorted(refused.items()))

    def table(self) -> str:
        """The report for a person: one line a series, refusals explained, counts."""
        head = ("patient", "format", "files", "slices", "size", "spacing mm", "HU", "result")
        lines = [head, *(_cells(row) for row in self.rows if row.format != "other")]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        text.insert(1, "  ".join("-" * width for width in widths))
        refused: dict[tuple[str | None, str | None, str | None], list[SeriesRow]] = {}
        for row in self.rows:
            if not row.accepted:
                refused.setdefault((row.reason, row.message, row.remedy), []).append(row)
        for (reason, message, remedy), rows in refused.items():
            count = sum(row.files for row in rows)
            files = f"{count} file" if count == 1 else f"{count} files"
            text += ["", f"{reason}: {message} ({files}, e.g. {rows[0].example_file})", f"  {remedy}"]
        text += ["", *(f"{name.replace('_', ' ')}: {count}" for name, count in self.counts().items())]
        return "\n".join(text)

    def to_json(self) -> dict[str, object]:
        """The report for a program; ``schema`` and ``version`` say which keys to expect."""
        return {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "counts": self.counts(),
            "refusals": self.refusals(),
            "rows": [
                {
                    "pseudonym": row.pseudonym,
                    "format": row.format,
                    "files": row.files,
                    "example_file": str(row.example_file),
                    "accepted": row.accepted,
                    "slices": row.slices,
                    "size": None if row.size is None else list(row.size),
                    "spacing_mm": None if row.spacing_mm is None else list(row.spacing_mm),
                    "hu_range": None if row.hu_range is None else list(row.hu_range),
                    "reason": row.reason,
                    "message": row.message,
                    "remedy": row.remedy,
                    "attributes": dict(row.attributes),
                }
                for row in self.rows
            ],
        }


def iter_volumes(
    folder: Path, *, format: Format, pseudonymizer: Pseudonymizer, progress: bool
) -> Iterator[tuple[SeriesRow, Volume | None]]:
    """Every series of a folder with its volume, or without one and with the reason; then the files that are
    none.

    The order depends on nothing but names below ``folder``. One bad series never stops the others.

    Args:
        folder: any nesting, any file names.
        format: which files to read; "auto" for both.
        pseudonymizer: turns PatientID into what the row shows. For NIfTI the first folder below ``folder``
            stands for the PatientID, or the name of the file without its suffixes where there is no such
            folder.
        progress: bars on stderr.

    Raises:
        UnreadableFolder: ``folder`` is not a folder.
    """
    from tqdm import tqdm

    contents = find_series(folder, format, progress=progress)
    for series in tqdm(contents.series, desc="reading series", unit="series", disable=not progress):
        yield _read(series, pseudonymizer)
    for reason, files, message, remedy in (
        (
            OTHER_FORMAT,
            contents.other_format,
            "images of a format that was not asked for",
            "set the format to auto",
        ),
        (NOT_AN_IMAGE, contents.not_images, "neither DICOM nor NIfTI images", "nothing to do"),
    ):
        if files:
            yield (
                SeriesRow(
                    pseudonym=None,
                    format="other",
                    files=len(files),
                    example_file=files[0],
                    accepted=False,
                    reason=reason,
                    message=message,
                    remedy=remedy,
                ),
                None,
            )


def _read(series: FoundSeries, pseudonymizer: Pseudonymizer) -> tuple[SeriesRow, Volume | None]:
    """Read one series; a refusal becomes its row."""
    from medical_data.dicom import read_series
    from medical_data.nifti import read_nifti

    pseudonym: str | None = None
    try:
        if series.refusal is not None:
            raise series.refusal
        pseudonym = pseudonymizer.pseudonym(series.patient_id or "")
        volume = read_series(series.files) if series.format == "dicom" else read_nifti(series.files[0])
    except SeriesRefused as refusal:
        return (
            SeriesRow(
                pseudonym=pseudonym,
                format=series.format,
                files=len(series.files),
                example_file=refusal.file or series.files[0],
                accepted=False,
                reason=type(refusal).__name__,
                message=f"{refusal.attribute} = {refusal.value}",
                remedy=refusal.remedy,
                attributes=series.attributes,
            ),
            None,
        )
    slices, height, width = volume.hu.shape
    return (
        SeriesRow(
            pseudonym=pseudonym,
            format=series.format,
            files=len(series.files),
            example_file=series.files[0],
            accepted=True,
            slices=slices,
            size=(height, width),
            spacing_mm=volume.spacing_mm,
            hu_range=(float(volume.hu.min()), float(volume.hu.max())),
            attributes=series.attributes,
        ),
        volume,
    )


def _cells(row: SeriesRow) -> tuple[str, ...]:
    missing = "-"
    return (
        missing if row.pseudonym is None else row.pseudonym,
        row.format,
        str(row.files),
        missing if row.slices is None else str(row.slices),
        missing if row.size is None else f"{row.size[0]}x{row.size[1]}",
        missing if row.spacing_mm is None else "x".join(f"{s:.3g}" for s in row.spacing_mm),
        missing if row.hu_range is None else f"{row.hu_range[0]:.0f}..{row.hu_range[1]:.0f}",
        "accepted" if row.accepted else f"refused: {row.reason}",
    )
