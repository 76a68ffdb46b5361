"""The header of one DICOM file: parsed quietly, each attribute read or refused, and whether it is a CT image."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medical_data.errors import (
    BurnedInAnnotation,
    DerivedMap,
    Localizer,
    MalformedAttribute,
    MissingAttribute,
    NotCT,
    SeriesRefused,
    TruncatedFile,
    UnreadableFile,
)
from medical_data.quiet import muted

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# CT Image, Enhanced CT Image, Legacy Converted Enhanced CT Image Storage (PS3.4 B.5).
CT_SOP_CLASSES = frozenset(f"1.2.840.10008.5.1.4.1.1.2{suffix}" for suffix in ("", ".1", ".2"))

# Values 3 and on of ImageType (0008,0008) and FrameType (0008,9007): PS3.3 C.8.2.1.1.1, C.8.15.3.3,
# C.8.16.1.3-4, and what vendors write. DERIVED alone refuses nothing: a lossy compressed or averaged axial
# slice is DERIVED too.
LOCALIZER_TYPES = frozenset({"LOCALIZER", "SCOUT", "TOPOGRAM"})
ANNOTATED_TYPES = frozenset({"PATIENT_INFO", "SCREEN SAVE", "DOSE_INFO", "DOSE"})
DERIVED_TYPES: frozenset[str] = frozenset().union(
    ("PERFUSION", "RCBF", "RCBV", "RMTT", "CBF", "CBV", "MTT", "TTP", "TMAX", "PERMEABILITY"),  # perfusion
    ("MAXIMUM", "MINIMUM", "MAX_IP", "MIN_IP", "MIP", "MINIP", "PROJECTION IMAGE"),  # projections
    ("VRT", "SSD", "3D", "VOLREN"),  # renderings
    ("ADDITION", "SUBTRACTION", "MULTIPLICATION", "DIVISION", "STD_DEVIATION", "QUANTITY"),  # arithmetic
    ("Z_EFF", "EFF_ATOMIC_NUM", "ELECTRON_DENSITY", "VIRTUAL_NON_CONTRAST"),  # spectral maps
    ("MAT_SPECIFIC", "MAT_MODIFIED", "MAT_FRACTIONAL", "MAT_VALUE_BASED", "MAT_REMOVED"),  # material maps
)

_CODE = re.compile(r"[A-Z0-9_ ]{1,16}")  # VR CS, PS3.5 6.2


@contextmanager
def refusing(file: Path | None = None) -> Iterator[None]:
    """Everything that goes wrong inside becomes a :class:`SeriesRefused` that knows its file; nothing is
    printed.

    pydicom warns and logs about malformed values and quotes them, which may be patient data: both are muted.
    """
    try:
        with muted("pydicom", "pylibjpeg", "libjpeg", "openjpeg"):
            yield
    except SeriesRefused as refusal:
        refusal.file = refusal.file or file
        raise
    except Exception as error:
        # `from None`: the cause may quote the header.
        raise UnreadableFile(
            attribute="file", value=type(error).__name__, remedy="copy or export it again", file=file
        ) from None


def read_dataset(file: Path, *, tags: Sequence[str] | None = None) -> Dataset:
    """One parsed DICOM file, with or without the preamble of PS3.10.

    Args:
        file: any name.
        tags: keywords to read without the pixel data; all of the file when None.

    Raises:
        TruncatedFile: a deflated data set ends too early.
        UnreadableFile: cannot be opened or parsed.
    """
    from pydicom import dcmread
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    with refusing(file):
        try:
            dataset = dcmread(
                file,
                force=True,
                stop_before_pixels=tags is not None,
                specific_tags=None if tags is None else list(tags),
            )
        except zlib.error:
            raise TruncatedFile(
                attribute="TransferSyntaxUID",
                value="deflated data end too early",
                remedy="copy the file again",
            ) from None
        if "TransferSyntaxUID" not in dataset.file_meta:
            implicit, little = dataset.original_encoding
            explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
        return dataset


def refuse_other_than_ct(dataset: Dataset) -> None:
    """Refuse what is not a CT image with pixel data.

    Raises:
        NotCT: Modality or SOPClassUID of something else.
        BurnedInAnnotation: BurnedInAnnotation (0028,0301) is YES, or ImageType is that of a screen full of
            text.
        Localizer, DerivedMap: by ImageType or FrameType.
        TruncatedFile: no pixel data follow the header.
        MissingAttribute: SOPClassUID or ImageType is absent.
    """
    modality = optional(dataset, "Modality")
    if modality is not None and str(modality).strip() != "CT":
        raise NotCT(attribute="Modality", value=code(modality), remedy="give CT only")
    types = _image_types(dataset)
    if str(optional(dataset, "BurnedInAnnotation")).strip() == "YES":
        raise BurnedInAnnotation(
            attribute="BurnedInAnnotation", value="YES", remedy="leave it out: the text may name the patient"
        )
    if found := types & ANNOTATED_TYPES:
        raise BurnedInAnnotation(
            attribute="ImageType", value=min(found), remedy="leave it out: a screen of text, not a slice"
        )
    has_pixels = "PixelData" in dataset
    sop_class = optional(dataset, "SOPClassUID")
    if sop_class is not None and str(sop_class) not in CT_SOP_CLASSES:
        raise NotCT(
            attribute="SOPClassUID",
            value=_sop_class_name(sop_class),
            remedy="give CT Image Storage objects only",
        )
    if not has_pixels:
        raise TruncatedFile(attribute="PixelData", value="absent or cut off", remedy="copy or export the file again")
    if sop_class is None:
        raise missing("SOPClassUID")
    if modality is None:
        raise missing("Modality")
    if not types:
        raise missing("ImageType")
    if found := types & LOCALIZER_TYPES:
        raise Localizer(attribute="ImageType", value=min(found), remedy="leave it out: a projection, not a slice")
    if found := types & DERIVED_TYPES:
        raise DerivedMap(
            attribute="ImageType", value=min(found), remedy="give the original slices it was computed from"
        )


def _image_types(dataset: Dataset) -> frozenset[str]:
    """All values of ImageType and FrameType, upper case and without padding."""
    groups = [*sequence(dataset, "SharedFunctionalGroupsSequence")]
    groups += sequence(dataset, "PerFrameFunctionalGroupsSequence")
    sources = [(dataset, "ImageType")]
    sources += [(item, "FrameType") for g in groups for item in sequence(g, "CTImageFrameTypeSequence")]
    values: set[str] = set()
    for source, keyword in sources:
        value = optional(source, keyword)
        many = [value] if isinstance(value, str) else (value or [])
        values |= {str(v).strip().upper() for v in many}
    return frozenset(values - {""})


def optional(dataset: Dataset, keyword: str) -> Any:
    """The value of an attribute, None where it is absent or empty.

    Raises:
        MalformedAttribute: pydicom cannot read the value.
    """
    try:
        value = dataset.get(keyword)
    except Exception:
        raise malformed(keyword, "unreadable") from None
    return None if value is None or (hasattr(value, "__len__") and len(value) == 0) else value


def sequence(dataset: Dataset, keyword: str) -> list[Any]:
    """The items of a sequence, none where it is absent.

    Raises:
        MalformedAttribute: not a sequence.
    """
    value = optional(dataset, keyword)
    if value is None:
        return []
    from pydicom.sequence import Sequence as DicomSequence

    if not isinstance(value, DicomSequence):
        raise malformed(keyword, "not a sequence")
    return list(value)


def numbers(keyword: str, value: Any, count: int) -> tuple[float, ...]:
    """``count`` finite numbers.

    Raises:
        MissingAttribute: ``value`` is None.
        MalformedAttribute: other than ``count`` finite numbers.
    """
    if value is None:
        raise missing(keyword)
    try:
        many = [value] if count == 1 else list(value)
        values = tuple(float(v) for v in many)
    except (TypeError, ValueError):
        raise malformed(keyword, "not a number" if count == 1 else f"not {count} numbers") from None
    if len(values) != count or not np.isfinite(values).all():
        raise malformed(keyword, "not a finite number" if count == 1 else f"not {count} finite numbers")
    return values


def missing(keyword: str) -> MissingAttribute:
    """The refusal of an absent attribute."""
    return MissingAttribute(attribute=keyword, value="absent", remedy="export the series again with it")


def malformed(keyword: str, what: str) -> MalformedAttribute:
    """The refusal of a value, which is described and not quoted."""
    return MalformedAttribute(attribute=keyword, value=what, remedy="export the series again")


def code(value: object) -> str:
    """A coded value that may be shown; free text may not."""
    text = str(value).strip()
    return text if _CODE.fullmatch(text) else "not a code"


def _sop_class_name(uid: object) -> str:
    from pydicom.uid import UID

    known = UID(str(uid))
    return known.name if known.name != known else "unknown"
