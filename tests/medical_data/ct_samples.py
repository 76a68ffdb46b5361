"""Small synthetic CT series, written with pydicom and nibabel alone: the readers are tested against other hands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

SPACING_MM = (2.5, 0.75, 0.5)
PER_FRAME = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"),
    *("RescaleType", "InstanceNumber"),
)
ORIGIN_MM = (-10.0, -20.0, 30.0)
# LPS axes of [x, y, z] voxels → RAS, as the NIfTI standard asks.
AFFINE = np.diag([-SPACING_MM[2], -SPACING_MM[1], SPACING_MM[0], 1.0])
AFFINE[:3, 3] = -ORIGIN_MM[0], -ORIGIN_MM[1], ORIGIN_MM[2]


def anatomy(slices: int = 5, rows: int = 12, columns: int = 16) -> NDArray[np.int16]:
    """HU [D, H, W]: a body of water and fat in air, no two voxels of the body's diagonal alike."""
    hu = np.full((slices, rows, columns), -1000, dtype=np.int16)
    body = hu[:, 2:-2, 3:-3]
    body[...] = np.arange(body.size, dtype=np.int16).reshape(body.shape) % 350 - 100
    return hu


def slice_dataset(
    stored: NDArray[np.int16],
    *,
    position: Sequence[float],
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    number: int = 1,
    series: str = "series",
    patient_id: str = "PATIENT A",
) -> FileDataset:
    """One CT Image Storage object with stored values [H, W], slope 1 and intercept 0."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID = generate_uid(entropy_srcs=["study"])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[series])
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame"])
    ds.Modality = "CT"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientID = patient_id
    ds.PatientName = "Doe^Synthetic"
    ds.PatientBirthDate = "19010203"
    ds.PatientSex = "F"
    ds.PatientAge = "099Y"
    ds.InstitutionName = "Nowhere General"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.SeriesNumber = "20010203", "101112", "7", "1"
    ds.AccessionNumber = "ACC-1"
    ds.StudyDescription = "free text about Doe"
    ds.Manufacturer = "GE MEDICAL SYSTEMS"
    ds.ConvolutionKernel = "STANDARD"
    ds.BodyPartExamined = "CHEST"
    ds.KVP = "120"
    ds.GantryDetectorTilt = "0"
    ds.SliceThickness = str(SPACING_MM[0])
    ds.InstanceNumber = str(number)
    ds.ImagePositionPatient = [float(v) for v in position]
    ds.ImageOrientationPatient = [float(v) for v in orientation]
    ds.PixelSpacing = [SPACING_MM[1], SPACING_MM[2]]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = "1", "0", "HU"
    ds.PixelData = stored.astype("<i2").tobytes()
    return ds


def series_datasets(hu: NDArray[np.int16] | None = None, **kwargs: object) -> list[FileDataset]:
    """An axial series, first slice lowest."""
    hu = anatomy() if hu is None else hu
    x, y, z = ORIGIN_MM
    return [
        slice_dataset(plane, position=(x, y, z + k * SPACING_MM[0]), number=k + 1, **kwargs)  # type: ignore[arg-type]
        for k, plane in enumerate(hu)
    ]


def write(datasets: Sequence[Dataset], folder: Path, *, stem: str = "image") -> list[Path]:
    """Files without suffix whose names say nothing about the order of slices."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{stem}{(7 * k) % 101:03d}" for k in range(len(datasets))]
    for file, ds in zip(files, datasets, strict=True):
        ds.save_as(file, enforce_file_format=True)
    return files


def changed_series(folder: Path, change: Callable[[FileDataset, int], None]) -> list[Path]:
    """A valid series after ``change(dataset, slice index)`` was applied to each slice."""
    datasets = series_datasets()
    for k, ds in enumerate(datasets):
        change(ds, k)
    return write(datasets, folder)


def enhanced(datasets: Sequence[Dataset]) -> FileDataset:
    """The same slices as one Enhanced CT object with functional groups (PS3.3 A.38)."""
    first = datasets[0]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["enhanced"])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    for element in first:
        if element.tag.group in (0x0008, 0x0010, 0x0020, 0x0028) and element.keyword not in PER_FRAME:
            ds[element.tag] = element
    ds.SOPClassUID, ds.SOPInstanceUID = EnhancedCTImageStorage, meta.MediaStorageSOPInstanceUID
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    ds.NumberOfFrames = len(datasets)
    measures, orientation, transform, kind, shared = (Dataset() for _ in range(5))
    measures.PixelSpacing, measures.SliceThickness = first.PixelSpacing, first.SliceThickness
    orientation.ImageOrientationPatient = first.ImageOrientationPatient
    transform.RescaleSlope, transform.RescaleIntercept = first.RescaleSlope, first.RescaleIntercept
    transform.RescaleType = "HU"
    kind.FrameType = ds.ImageType
    shared.PixelMeasuresSequence = [measures]
    shared.PlaneOrientationSequence = [orientation]
    shared.PixelValueTransformationSequence = [transform]
    shared.CTImageFrameTypeSequence = [kind]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for plane in datasets:
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = plane.ImagePositionPatient
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.PixelData = b"".join(plane.PixelData for plane in datasets)
    return ds


def write_nifti(file: Path, voxels: np.ndarray, affine: np.ndarray | None = AFFINE, version: int = 1) -> Path:
    """One NIfTI file by nibabel."""
    image = (nib.Nifti1Image if version == 1 else nib.Nifti2Image)(voxels, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, file)
    return file


def xyz(hu: np.ndarray) -> np.ndarray:
    """[D, H, W] → [x, y, z], as NIfTI stores it."""
    return hu.transpose(2, 1, 0)
