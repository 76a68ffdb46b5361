"""Exported samples read back as the HU they stand for, in the orientation they have, marked as synthetic."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels import apply_rescale

from custom.export import export_samples, hounsfield
from custom.pictures import grey_levels
from medical_data.dicom import read_series
from medical_data.errors import MedicalDataError
from medical_data.nifti import read_nifti

WINDOW = (-1000.0, 600.0)
SPACING = (5.0, 1.25, 1.5)
OPTIONS = {"window_hu": WINDOW, "spacing_mm": SPACING, "seed": 7}


def samples(count: int = 3) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (count, 1, 12, 20)).astype(np.float32)
    images[:, 0, 0, 0], images[:, 0, -1, -1] = -1, 1
    return images


def expected_hu(images: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.interp(images, (-1, 1), WINDOW)


@given(st.integers(-1000, 600))
def test_hounsfield_inverts_the_window(hu: int) -> None:
    image = np.full((1, 1, 2, 2), (hu + 1000) / 800 - 1, np.float32)
    assert (hounsfield(image, window_hu=WINDOW) == hu).all()


def test_png(tmp_path: Path) -> None:
    images = samples()
    files = export_samples(images, tmp_path / "out", format="png", **OPTIONS)
    assert [file.name for file in files] == ["sample_0000.png", "sample_0001.png", "sample_0002.png"]
    for file, image in zip(files, images, strict=True):
        with Image.open(file) as picture:
            assert picture.mode == "L"
            assert (np.asarray(picture) == grey_levels(image[None])[0, 0]).all()
            assert "synthetic" in picture.text["Description"]
            assert "-1000 to 600 HU" in picture.text["Description"]


def test_nifti(tmp_path: Path) -> None:
    images = samples()
    files = export_samples(images, tmp_path / "out", format="nifti", **OPTIONS)
    assert len(files) == 3
    for file, image in zip(files, images, strict=True):
        nifti = nibabel.load(file)
        assert nifti.get_data_dtype() == np.int16
        assert nibabel.aff2axcodes(nifti.affine) == ("L", "P", "S")
        assert nifti.header.get_zooms() == pytest.approx((1.5, 1.25, 5.0))
        assert nifti.header.get_xyzt_units()[0] == "mm"
        assert b"SYNTHETIC" in nifti.header["descrip"].item()
        stored = np.asarray(nifti.dataobj)[:, :, 0].T
        assert np.abs(stored - expected_hu(image[0])).max() <= 0.5 + 1e-3


def test_nifti_and_dicom_read_back_as_equal_volumes(tmp_path: Path) -> None:
    images = samples()
    niftis = export_samples(images, tmp_path / "nifti", format="nifti", **OPTIONS)
    series = export_samples(images, tmp_path / "dicom", format="dicom", **OPTIONS)
    for nifti, dicom, image in zip(niftis, series, images, strict=True):
        for volume in (read_nifti(nifti), read_series([dicom])):
            assert (volume.hu == np.rint(expected_hu(image))).all()
            assert volume.spacing_mm == pytest.approx(SPACING)


def test_dicom(tmp_path: Path) -> None:
    images = samples()
    files = export_samples(images, tmp_path / "out", format="dicom", **OPTIONS)
    for file, image in zip(files, images, strict=True):
        dataset = pydicom.dcmread(file)
        hu = apply_rescale(dataset.pixel_array, dataset)
        assert np.abs(hu - expected_hu(image[0])).max() <= 0.5 + 1e-3
        assert [float(value) for value in dataset.PixelSpacing] == [1.25, 1.5]
        assert [float(value) for value in dataset.ImageOrientationPatient] == [1, 0, 0, 0, 1, 0]


def test_dicom_is_synthetic_and_of_no_patient(tmp_path: Path) -> None:
    files = export_samples(samples(), tmp_path / "out", format="dicom", **OPTIONS)
    assert [file.parent.name for file in files] == ["sample_0000", "sample_0001", "sample_0002"]
    headers = [pydicom.dcmread(file) for file in files]
    for header in headers:
        assert header.SyntheticData == "YES"
        assert header.ImageType[:2] == ["DERIVED", "SECONDARY"]
        assert "seed 7" in header.DerivationDescription
        assert header.PatientID.startswith("SYNTHETIC-")
        assert (str(header.PatientName), header.PatientBirthDate, header.PatientSex) == ("", "", "")
    for keyword in (
        "PatientID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "SOPInstanceUID",
        "FrameOfReferenceUID",
    ):
        assert len({header[keyword].value for header in headers}) == 3


def test_samples_of_two_models_are_two_subjects(tmp_path: Path) -> None:
    one = export_samples(samples(1), tmp_path / "one", format="dicom", **OPTIONS)
    other = export_samples(-samples(1), tmp_path / "other", format="dicom", **OPTIONS)
    first, second = (pydicom.dcmread(files[0]) for files in (one, other))
    assert first.PatientID != second.PatientID
    assert first.StudyInstanceUID != second.StudyInstanceUID


@pytest.mark.parametrize("format", ["png", "nifti", "dicom"])
def test_the_same_arguments_give_the_same_bytes(tmp_path: Path, format: str) -> None:
    one = export_samples(samples(), tmp_path / "one", format=format, **OPTIONS)
    other = export_samples(samples(), tmp_path / "other", format=format, **OPTIONS)
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]
    assert [file.relative_to(tmp_path / "one") for file in one] == [
        file.relative_to(tmp_path / "other") for file in other
    ]


def test_an_empty_folder_is_taken_and_a_full_one_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    files = export_samples(samples(), tmp_path / "out", format="png", **OPTIONS)
    before = [file.read_bytes() for file in files]
    with pytest.raises(FileExistsError, match="not empty"):
        export_samples(-samples(), tmp_path / "out", format="png", **OPTIONS)
    assert [file.read_bytes() for file in files] == before


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    too_high = OPTIONS | {"window_hu": (-1000.0, 32767.0)}  # beyond int16 at DICOM's intercept of -1024
    with pytest.raises(MedicalDataError, match="int16"):
        export_samples(samples(), tmp_path / "out", format="dicom", **too_high)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "jpeg"}, "png, nifti, dicom"),
        ({"window_hu": (600.0, -1000.0)}, "window_hu"),
        ({"spacing_mm": (5.0, 0.0, 1.0)}, "spacing_mm"),
        ({"spacing_mm": (5.0, float("nan"), 1.0)}, "spacing_mm"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        export_samples(samples(), tmp_path / "out", **({"format": "png"} | OPTIONS | change))
    assert not list(tmp_path.iterdir())


def test_impossible_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clip it"):
        export_samples(2 * samples(), tmp_path / "out", format="nifti", **OPTIONS)
