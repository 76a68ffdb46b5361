"""Volumes into DICOM CT series: as a scanner writes them, or marked as made by a model.

Reference: DICOM PS3.3 A.3 (CT Image IOD), C.8.2.1 (CT Image Module), C.7.6.2 (Image Plane), C.12.1 (SOP Common).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from medical_data.errors import ImpossibleHU
from medical_data.volume import Volume

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

RESCALE_INTERCEPT_HU = -1024
MANUFACTURER = "fedct"

# PS3.5 table 6.2-1: VR LO holds 64 characters, VR SH 16, neither with a backslash or control characters.
# Kept to ASCII, so that every reader shows them alike.
_TEXT = re.compile(r"[ -\[\]-~]*")


def _check_text(attribute: str, value: str, *, longest: int = 64) -> None:
    if not _TEXT.fullmatch(value) or len(value) > longest or not value.strip():
        # Never the value: it may name a patient.
        raise ValueError(f"{attribute}: give 1 to {longest} printable ASCII characters without backslash")


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a scanner writes about a patient and an acquisition.

    Attributes:
        patient_id: PatientID (0010,0020).
        patient_name: PatientName (0010,0010) as ``Family^Given``.
        patient_sex: PatientSex (0010,0040).
        birth_date: PatientBirthDate (0010,0030).
        patient_size_m: PatientSize (0010,1020).
        patient_weight_kg: PatientWeight (0010,1030).
        study_date: StudyDate (0008,0020), SeriesDate, AcquisitionDate and ContentDate.
        institution: InstitutionName (0008,0080).
        manufacturer: Manufacturer (0008,0070).
        model: ManufacturerModelName (0008,1090).
        kernel: ConvolutionKernel (0018,1210).
        kvp: KVP (0018,0060), tube voltage in kV.
        slice_thickness_mm: SliceThickness (0018,0050), which may differ from the distance between slices.
        body_part: BodyPartExamined (0018,0015), a code of PS3.16 annex L; unpaired, such as ``CHEST``.
        made_artificially: SyntheticData (0008,001C) = YES, and the subject is a quality control phantom (0010,0200).

    Raises:
        ValueError: a text that the value representation cannot hold, or a quantity that is not positive.
    """

    patient_id: str
    patient_name: str
    patient_sex: Literal["F", "M", "O"]
    birth_date: date
    patient_size_m: float
    patient_weight_kg: float
    study_date: date
    institution: str
    manufacturer: str
    model: str
    kernel: str
    kvp: float
    slice_thickness_mm: float
    body_part: str
    made_artificially: bool

    def __post_init__(self) -> None:
        for name in ("patient_id", "patient_name", "institution", "manufacturer", "model"):
            _check_text(name, getattr(self, name))
        _check_text("kernel", self.kernel, longest=16)
        _check_text("body_part", self.body_part, longest=16)
        if self.patient_sex not in ("F", "M", "O"):
            raise ValueError("patient_sex: give F, M or O")
        for name in ("patient_size_m", "patient_weight_kg", "kvp", "slice_thickness_mm"):
            if not 0 < getattr(self, name) < 1000:
                raise ValueError(f"{name}: give a number between 0 and 1000")
        if self.birth_date > self.study_date:
            raise ValueError("birth_date: lies after study_date")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A sample of a generative model: it belongs to no patient and says so.

    Attributes:
        sample: names the sample; PatientID (0010,0020) becomes ``SYNTHETIC-<sample>``.
        derivation: DerivationDescription (0008,2111), how it was made (model, sampler, seed).

    Raises:
        ValueError: a text that the value representation cannot hold.
    """

    sample: str
    derivation: str

    def __post_init__(self) -> None:
        _check_text("sample", self.sample, longest=64 - len("SYNTHETIC-"))
        _check_text("derivation", self.derivation, longest=1024)


def write_ct_series(
    volume: Volume, folder: Path, *, subject: Scan | Generated, uid_seed: str, series_number: int = 1
) -> list[Path]:
    """Write one CT Image Storage file per slice, Explicit VR Little Endian, int16.

    Hounsfield units are rounded to integers (RescaleSlope 1). The same arguments give the same bytes. Equal
    ``uid_seed`` puts two series into one study and one frame of reference; the series and instance UIDs depend
    on the voxels too, so that different images never share a UID.

    Args:
        volume: [D, H, W]; any orthonormal direction, so oblique series as well. D may be 1.
        folder: where the files go, created if absent.
        subject: whose image it is.
        uid_seed: entropy of StudyInstanceUID and FrameOfReferenceUID.
        series_number: SeriesNumber (0020,0011).

    Returns:
        The files in the order of the axis D: ``folder/IM0001.dcm``, …

    Raises:
        ImpossibleHU: HU that int16 cannot hold at an intercept of -1024.
        ValueError: an empty ``uid_seed``.
        FileExistsError: a series lies in the folder already.
    """
    from pydicom.filewriter import dcmwrite
    from pydicom.uid import generate_uid

    if not uid_seed:
        raise ValueError("uid_seed: is empty; name the study, its UIDs derive from it")
    stored = _stored_values(volume.hu)
    entropy = [uid_seed, str(series_number), hashlib.sha256(stored.tobytes()).hexdigest(), repr(volume.origin_mm)]
    header = _subject_header(subject)
    _add_study(header, uid_seed=uid_seed, series_number=series_number)
    header.SeriesInstanceUID = generate_uid(entropy_srcs=[*entropy, "series"])
    _add_geometry(header, volume)
    _add_pixel_format(header)

    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("IM*.dcm")):
        raise FileExistsError("folder: holds DICOM files already; give every series its own folder")
    step_mm = volume.spacing_mm[0] * np.asarray(volume.direction[0], dtype=float)
    files = []
    for index, pixels in enumerate(stored):
        header.SOPInstanceUID = generate_uid(entropy_srcs=[*entropy, str(index)])
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
        header.InstanceNumber = index + 1
        header.ImagePositionPatient = _decimal_strings(np.asarray(volume.origin_mm) + index * step_mm)
        header.PixelData = pixels.tobytes()
        file = folder / f"IM{index + 1:04d}.dcm"
        dcmwrite(file, header, enforce_file_format=True)
        files.append(file)
    return files


def _stored_values(hu: NDArray[np.float32]) -> NDArray[np.int16]:
    values = np.rint(hu) - RESCALE_INTERCEPT_HU
    limits = np.iinfo(np.int16)
    if values.min() < limits.min or values.max() > limits.max:
        raise ImpossibleHU(
            attribute="hu",
            value=f"[{hu.min():.0f}, {hu.max():.0f}]",
            remedy=f"clip to what int16 holds at RescaleIntercept {RESCALE_INTERCEPT_HU}",
        )
    return values.astype("<i2")


def _decimal_strings(values: NDArray[np.float64] | tuple[float, ...]) -> list[str]:
    """VR DS: at most 16 characters (PS3.5 6.2), as precise as they allow."""
    from pydicom.valuerep import format_number_as_ds

    return [format_number_as_ds(float(v) + 0.0) for v in values]


def _subject_header(subject: Scan | Generated) -> Dataset:
    """Everything that depends on whose image it is."""
    from pydicom.dataset import Dataset

    header = Dataset()
    header.PatientBirthDate = ""
    header.PatientSex = ""
    header.StudyDate = ""
    header.KVP = None
    if isinstance(subject, Generated):
        header.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
        header.DerivationDescription = subject.derivation
        header.SyntheticData = "YES"
        header.PatientName = ""
        header.PatientID = f"SYNTHETIC-{subject.sample}"
        header.PatientIdentityRemoved = "YES"
        header.DeidentificationMethod = "No patient: made by a generative model"
        header.Manufacturer = MANUFACTURER
        header.Laterality = ""
        return header
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    if subject.made_artificially:
        header.SyntheticData = "YES"
        header.QualityControlSubject = "YES"
    header.PatientName = subject.patient_name
    header.PatientID = subject.patient_id
    header.PatientBirthDate = f"{subject.birth_date:%Y%m%d}"
    header.PatientSex = subject.patient_sex
    header.PatientSize = f"{subject.patient_size_m:.2f}"
    header.PatientWeight = f"{subject.patient_weight_kg:.1f}"
    for keyword in ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"):
        setattr(header, keyword, f"{subject.study_date:%Y%m%d}")
    header.InstitutionName = subject.institution
    header.Manufacturer = subject.manufacturer
    header.ManufacturerModelName = subject.model
    header.BodyPartExamined = subject.body_part
    header.ConvolutionKernel = subject.kernel
    header.KVP = f"{subject.kvp:g}"
    header.SliceThickness = f"{subject.slice_thickness_mm:g}"
    return header


def _add_study(header: Dataset, *, uid_seed: str, series_number: int) -> None:
    """SOP Common, General Study, General Series, Frame of Reference; empty where Type 2 allows it."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    header.file_meta = FileMetaDataset()
    header.file_meta.MediaStorageSOPClassUID = CTImageStorage
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID = CTImageStorage
    header.StudyInstanceUID = generate_uid(entropy_srcs=[uid_seed, "study"])
    header.FrameOfReferenceUID = generate_uid(entropy_srcs=[uid_seed, "frame of reference"])
    for keyword in ("StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber", "ContentTime"):
        setattr(header, keyword, "")
    header.PositionReferenceIndicator = ""
    header.Modality = "CT"
    header.PatientPosition = "HFS"
    header.SeriesNumber = series_number
    header.AcquisitionNumber = 1


def _add_geometry(header: Dataset, volume: Volume) -> None:
    """Image Plane: rows run along W, columns along H (C.7.6.2.1.1)."""
    spacing_d, spacing_h, spacing_w = volume.spacing_mm
    header.ImageOrientationPatient = _decimal_strings((*volume.direction[2], *volume.direction[1]))
    header.PixelSpacing = _decimal_strings((spacing_h, spacing_w))
    if "SliceThickness" not in header:  # no collimation: a voxel stands for all of its extent
        header.SliceThickness = _decimal_strings((spacing_d,))[0]
    header.SpacingBetweenSlices = _decimal_strings((spacing_d,))[0]
    header.Rows, header.Columns = volume.hu.shape[1:]


def _add_pixel_format(header: Dataset) -> None:
    header.SamplesPerPixel = 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.BitsAllocated = 16
    header.BitsStored = 16
    header.HighBit = 15
    header.PixelRepresentation = 1
    header.BurnedInAnnotation = "NO"
    header.LossyImageCompression = "00"
    header.RescaleIntercept = str(RESCALE_INTERCEPT_HU)
    header.RescaleSlope = "1"
    header.RescaleType = "HU"
