"""One DICOM CT series → one :class:`Volume`, or one typed refusal.

Follows PS3.3 CT Image IOD (A.3) and Enhanced CT Image IOD (A.38); a file is read once, and everything in the
headers is checked before the first pixel is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medical_data.deidentify import normal_patient_id
from medical_data.dicom_header import (
    code,
    missing,
    numbers,
    optional,
    read_dataset,
    refuse_other_than_ct,
    refusing,
    sequence,
)
from medical_data.errors import (
    CoarseHU,
    CorruptPixels,
    MalformedAttribute,
    MissingRescale,
    MixedSeries,
    NotCT,
    NotHounsfield,
    TruncatedFile,
    UndecodableTransferSyntax,
)
from medical_data.hounsfield import padding_to_air, refuse_impossible
from medical_data.stack import order_slices, refuse_spacing, refuse_tilt, slice_axes
from medical_data.volume import Volume

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Tissues differ by tens of HU (fat -100, water 0, muscle 50) and CT noise is about 10 HU. One slice at 32 HU a level
# (8-bit JPEG) is off by 22 HU on average inside the body and 15 HU too low; at 2 HU a level (12 bit) by 4.5 and 1.
MAX_HU_STEP = 5.0


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What the header says about one slice."""

    file: int
    index: int
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    pixel_mm: tuple[float, ...]
    thickness: object
    slope: float
    intercept: float


def read_series(files: Sequence[Path]) -> Volume:
    """The volume of one series in Hounsfield units.

    Slices are sorted by position along the slice normal, stored values go through the modality LUT
    (RescaleSlope, RescaleIntercept (0028,1053/1052)), padding and everything below -1024 HU becomes air
    (-1000 HU).

    Args:
        files: all files of one SeriesInstanceUID, in any order: one slice each, or multi-frame.

    Returns:
        float32 [D, H, W], :meth:`Volume.canonical`. A series of one slice takes SliceThickness as its
        spacing.

    Raises:
        SeriesRefused: one of its subclasses in :mod:`medical_data.errors`, with ``file`` set where one is to
            blame.
        ValueError: no file given.
    """
    if not files:
        raise ValueError("files: give at least one file of the series")
    datasets: list[Dataset] = []
    frames: list[_Frame] = []
    for number, file in enumerate(files):
        dataset = read_dataset(file)
        with refusing(file):
            refuse_other_than_ct(dataset)
            frames += _frames(dataset, number)
        datasets.append(dataset)
    with refusing(files[0] if len(files) == 1 else None):
        _refuse_mixed(datasets, frames)
        pixel_mm = np.asarray(frames[0].pixel_mm)
        refuse_spacing("PixelSpacing", pixel_mm)
        axes = slice_axes(np.array([frame.orientation for frame in frames]))
        positions = np.array([frame.position for frame in frames])
        if len(frames) == 1:
            order, step = np.zeros(1, dtype=np.intp), _only_thickness(frames[0])
        else:
            order, step = order_slices(positions, axes, float(pixel_mm.min()))
        hu = _decode(datasets, [frames[i] for i in order], files)
        depth, height, width = ((float(x), float(y), float(z)) for x, y, z in axes)
        x, y, z = (float(v) for v in positions[order[0]])
        return Volume(
            hu=hu,
            spacing_mm=(step, float(pixel_mm[0]), float(pixel_mm[1])),
            origin_mm=(x, y, z),
            direction=(depth, height, width),
        ).canonical()


def _frames(dataset: Dataset, file: int) -> list[_Frame]:
    """The slices of one file: one, or as many as its functional groups describe (PS3.3 C.7.6.16)."""
    shared = sequence(dataset, "SharedFunctionalGroupsSequence")
    per_frame = sequence(dataset, "PerFrameFunctionalGroupsSequence")
    count = optional(dataset, "NumberOfFrames")
    number = 1 if count is None else int(numbers("NumberOfFrames", count, 1)[0])
    enhanced = bool(shared or per_frame)
    if enhanced and len(per_frame) != number:
        raise MalformedAttribute(
            attribute="PerFrameFunctionalGroupsSequence",
            value=f"{len(per_frame)} items for {number} frames",
            remedy="export the series again",
        )
    if not enhanced and number != 1:
        raise missing("PerFrameFunctionalGroupsSequence")

    def frame(index: int) -> _Frame:
        def find(group: str, keyword: str) -> Any:
            if not enhanced:
                return optional(dataset, keyword)
            places = [item for g in (per_frame[index], *shared) for item in sequence(g, group)]
            found = [value for item in places if (value := optional(item, keyword)) is not None]
            return found[0] if found else None

        _refuse_other_units(find)
        return _Frame(
            file=file,
            index=index,
            position=_required(find, "PlanePositionSequence", "ImagePositionPatient", 3),
            orientation=_required(find, "PlaneOrientationSequence", "ImageOrientationPatient", 6),
            pixel_mm=_required(find, "PixelMeasuresSequence", "PixelSpacing", 2),
            thickness=find("PixelMeasuresSequence", "SliceThickness"),
            slope=_rescale(find, "RescaleSlope"),
            intercept=_rescale(find, "RescaleIntercept"),
        )

    frames = [frame(index) for index in range(number)]
    details = [item for g in (*shared, *per_frame) for item in sequence(g, "CTAcquisitionDetailsSequence")]
    for holder in (dataset, *details):
        tilt = optional(holder, "GantryDetectorTilt")
        if tilt is not None:
            refuse_tilt("GantryDetectorTilt", numbers("GantryDetectorTilt", tilt, 1)[0])
    return frames


def _refuse_other_units(find: Callable[[str, str], Any]) -> None:
    unit = find("PixelValueTransformationSequence", "RescaleType")
    if unit is not None and str(unit).strip().upper() != "HU":
        raise NotHounsfield(attribute="RescaleType", value=code(unit), remedy="give the series in Hounsfield units")


def _rescale(find: Callable[[str, str], Any], keyword: str) -> float:
    value = find("PixelValueTransformationSequence", keyword)
    if value is None:
        raise MissingRescale(
            attribute=keyword,
            value="absent",
            remedy="export the series again with its rescale: stored values are not Hounsfield units",
        )
    number = numbers(keyword, value, 1)[0]
    if keyword == "RescaleSlope":
        if number <= 0:
            raise MalformedAttribute(attribute=keyword, value=f"{number:.6g}", remedy="give a positive slope")
        if number > MAX_HU_STEP:
            raise CoarseHU(
                attribute=keyword,
                value=f"{number:.6g}",
                remedy=f"give grey levels of at most {MAX_HU_STEP} HU (12 bits or more, not an 8-bit copy)",
            )
    return number


def _refuse_mixed(datasets: Sequence[Dataset], frames: Sequence[_Frame]) -> None:
    """Refuse files that do not belong to one stack; values of identifiers are counted, never shown."""
    seen: dict[str, set[object]] = {
        "SeriesInstanceUID": {optional(d, "SeriesInstanceUID") for d in datasets},
        "PatientID": {normal_patient_id(str(optional(d, "PatientID") or "")) for d in datasets},
        "FrameOfReferenceUID": {optional(d, "FrameOfReferenceUID") for d in datasets},
        "Rows": {optional(d, "Rows") for d in datasets},
        "Columns": {optional(d, "Columns") for d in datasets},
        "PixelSpacing": {tuple(round(v, 4) for v in f.pixel_mm) for f in frames},
    }
    for keyword, values in seen.items():
        if len(values) > 1:
            raise MixedSeries(
                attribute=keyword,
                value=f"{len(values)} different",
                remedy="give one series per SeriesInstanceUID",
            )


def _only_thickness(frame: _Frame) -> float:
    thickness = numbers("SliceThickness", frame.thickness, 1)[0]
    refuse_spacing("SliceThickness", thickness)
    return thickness


def _decode(datasets: list[Dataset], frames: Sequence[_Frame], files: Sequence[Path]) -> NDArray[np.float32]:
    """Hounsfield units [D, H, W] of the frames in their order; frees the pixel data that were used."""
    waiting: dict[int, list[int]] = {}
    for place, frame in enumerate(frames):
        waiting.setdefault(frame.file, []).append(place)
    hu: NDArray[np.float32] | None = None
    replaced = 0
    for number, places in waiting.items():
        with refusing(files[number]):
            stored = _stored_values(datasets[number])
            padding = _padding(datasets[number])
            if hu is None:
                hu = np.empty((len(frames), *stored.shape[1:]), dtype=np.float32)
            for place in places:
                frame = frames[place]
                values = stored[frame.index]
                np.multiply(values, np.float32(frame.slope), out=hu[place], casting="unsafe")
                hu[place] += np.float32(frame.intercept)
                mask = None if padding is None else (values >= padding[0]) & (values <= padding[1])
                replaced += padding_to_air(hu[place], mask)
            del datasets[number].PixelData
    assert hu is not None  # noqa: S101  (there is at least one frame)
    refuse_impossible(hu, replaced=replaced, attribute="PixelData")
    return hu


def _stored_values(dataset: Dataset) -> NDArray[Any]:
    """Stored values [F, H, W], or why there are none."""
    from pydicom.pixels import get_decoder, pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decodable = get_decoder(syntax).is_available
    except NotImplementedError:
        decodable = False
    if not decodable:
        raise UndecodableTransferSyntax(
            attribute="TransferSyntaxUID",
            value=str(syntax) if re.fullmatch(r"[0-9.]{1,64}", str(syntax)) else "not a UID",
            remedy="convert the series to Explicit VR Little Endian (for example with gdcmconv --raw)",
        )
    rows, columns, bits = (int(numbers(k, optional(dataset, k), 1)[0]) for k in ("Rows", "Columns", "BitsAllocated"))
    samples = numbers("SamplesPerPixel", optional(dataset, "SamplesPerPixel"), 1)[0]
    if samples != 1:
        raise NotCT(attribute="SamplesPerPixel", value=int(samples), remedy="give grey slices: colour is a rendering")
    frames = int(numbers("NumberOfFrames", optional(dataset, "NumberOfFrames") or 1, 1)[0])
    expected, actual = rows * columns * frames * bits // 8, len(dataset.PixelData)
    if not syntax.is_encapsulated and actual < expected:
        raise TruncatedFile(attribute="PixelData", value=f"{actual} of {expected} bytes", remedy="copy the file again")
    stored: NDArray[Any]
    try:
        stored = pixel_array(dataset)
    except Exception as error:
        raise CorruptPixels(attribute="PixelData", value=type(error).__name__, remedy="export the file again") from None
    return stored.reshape(frames, rows, columns)


def _padding(dataset: Dataset) -> tuple[float, float] | None:
    """Stored values from PixelPaddingValue (0028,0120) to PixelPaddingRangeLimit (0028,0121), both included.

    Their VR follows PixelRepresentation, but GE writes -2000 as the unsigned 63536: read in the pixels' own
    sign.
    """
    value = optional(dataset, "PixelPaddingValue")
    if value is None:
        return None
    limit = optional(dataset, "PixelPaddingRangeLimit")
    first = numbers("PixelPaddingValue", value, 1)[0]
    last = first if limit is None else numbers("PixelPaddingRangeLimit", limit, 1)[0]
    if int(numbers("PixelRepresentation", optional(dataset, "PixelRepresentation"), 1)[0]) == 1:
        bits = int(numbers("BitsAllocated", optional(dataset, "BitsAllocated"), 1)[0])
        first, last = (v - 2**bits if v >= 2 ** (bits - 1) else v for v in (first, last))
    return min(first, last), max(first, last)


def _required(find: Callable[[str, str], Any], group: str, keyword: str, count: int) -> tuple[float, ...]:
    value = find(group, keyword)
    if value is None:
        raise missing(keyword)
    return numbers(keyword, value, count)
