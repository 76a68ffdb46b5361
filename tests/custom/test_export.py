"""Exported samples read back as the HU they stand for, in the orientation they have, marked as synthetic."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels import apply_rescale

from custom.export import export_samples, hounsfield
from custom.pictures import grey_levels, middle_planes
from medical_data.deidentify import Pseudonymizer
from medical_data.dicom import read_series
from medical_data.errors import MedicalDataError
from medical_data.inspection import iter_volumes
from medical_data.nifti import read_nifti
from medical_data.volume import Volume

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


# --- volumes ---

SHAPE = (6, 12, 20)
CANONICAL = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def volumes(count: int = 2, shape: tuple[int, int, int] = SHAPE, *, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 1, *shape)).astype(np.float32)


def by_sample(files: list[Path]) -> list[list[Path]]:
    folders = sorted({file.parent for file in files})
    return [[file for file in files if file.parent == folder] for folder in folders]


def assert_equal(volume: Volume, image: NDArray[np.float32], spacing_mm: tuple[float, ...], *, rel: float) -> None:
    """Voxels to the last bit; geometry as a sample has it, in its own millimetres."""
    assert (volume.hu == np.rint(expected_hu(image[0]))).all()
    assert volume.spacing_mm == pytest.approx(spacing_mm, rel=rel)
    assert volume.origin_mm == (0, 0, 0)
    assert volume.direction == CANONICAL


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 6), st.integers(2, 9), st.integers(2, 9)),
    spacing=st.tuples(*[st.floats(0.3, 20)] * 3),
    seed=st.integers(0, 99),
)
def test_any_volume_reads_back_from_both_formats(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int
) -> None:
    images = volumes(1, shape, seed=seed)
    images[0, 0, 0, 0, :2] = -1, (40 + 1000) / 800 - 1  # air and tissue, without which the readers see no patient
    with TemporaryDirectory() as name:
        options = {"window_hu": WINDOW, "spacing_mm": spacing, "seed": 0}
        (nifti,) = export_samples(images, Path(name) / "nifti", format="nifti", **options)
        series = export_samples(images, Path(name) / "dicom", format="dicom", **options)
        assert_equal(read_nifti(nifti), images[0], spacing, rel=1e-6)  # float32 in its header
        assert_equal(read_series(series[::-1]), images[0], spacing, rel=1e-9)


def test_a_sites_own_reader_takes_the_samples(tmp_path: Path) -> None:
    images = volumes(3)
    pseudonymizer = Pseudonymizer(bytes(32))
    for format in ("nifti", "dicom"):
        export_samples(images, tmp_path / format, format=format, **OPTIONS)
        read = list(iter_volumes(tmp_path / format, format=format, pseudonymizer=pseudonymizer, progress=False))
        assert [row.accepted for row, _ in read] == [True] * 3
        assert len({row.pseudonym for row, _ in read}) == 3
        for (_, volume), image in zip(read, images, strict=True):
            assert_equal(volume, image, SPACING, rel=1e-6)


def test_other_programs_know_where_the_patient_would_lie(tmp_path: Path) -> None:
    """Brighter towards Superior: nibabel turns the axes to RAS, in which it grows along the third."""
    images = np.zeros((1, 1, *SHAPE), np.float32) + np.linspace(-1, 1, 6, dtype=np.float32)[:, None, None]
    images[..., :10] -= 0.0625 * (images[..., :10] > 0)  # the patient's right half is darker
    (file,) = export_samples(images, tmp_path / "out", format="nifti", **OPTIONS)
    nifti = nibabel.load(file)
    assert nibabel.aff2axcodes(nifti.affine) == ("L", "P", "S")
    ras = nibabel.as_closest_canonical(nifti)
    assert ras.header.get_zooms() == pytest.approx((1.5, 1.25, 5.0))
    hu = np.asarray(ras.dataobj)
    assert (np.diff(hu.mean(axis=(0, 1))) > 0).all()
    assert hu[:10].mean() > hu[10:].mean()


def test_a_volume_is_one_series_in_one_frame_of_reference(tmp_path: Path) -> None:
    files = export_samples(volumes(), tmp_path / "out", format="dicom", **OPTIONS)
    series = [[pydicom.dcmread(file) for file in one] for one in by_sample(files)]
    assert [len(one) for one in series] == [6, 6]
    for headers in series:
        for keyword in ("FrameOfReferenceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"):
            assert len({header[keyword].value for header in headers}) == 1
        assert len({header.SOPInstanceUID for header in headers}) == 6
        assert [header.InstanceNumber for header in headers] == [1, 2, 3, 4, 5, 6]
        assert {tuple(header.ImageOrientationPatient) for header in headers} == {(1, 0, 0, 0, 1, 0)}
        positions = np.array([header.ImagePositionPatient for header in headers], dtype=float)
        assert (np.diff(positions, axis=0) == (0, 0, 5)).all()
        assert {header.SyntheticData for header in headers} == {"YES"}
        assert {(header.SliceThickness, header.SpacingBetweenSlices) for header in headers} == {(5, 5)}
    for keyword in ("FrameOfReferenceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"):
        assert series[0][0][keyword].value != series[1][0][keyword].value


@pytest.mark.skipif(shutil.which("dcentvfy") is None, reason="dciodvfy and dcentvfy (dicom3tools) are not installed")
def test_other_hands_find_no_error_in_a_volume(tmp_path: Path) -> None:
    files = export_samples(volumes(1), tmp_path / "out", format="dicom", **OPTIONS)
    for command in (["dciodvfy", str(files[0])], ["dciodvfy", str(files[-1])], ["dcentvfy", *map(str, files)]):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]
        # SyntheticData (0008,001C) is younger than the dictionary of the dicom3tools that are widely packaged.
        assert [line for line in errors if "0x0008,0x001c" not in line] == []


@pytest.mark.skipif(shutil.which("dcmdump") is None, reason="dcmdump (dcmtk) is not installed")
def test_dcmtk_reads_a_volume(tmp_path: Path) -> None:
    files = export_samples(volumes(1), tmp_path / "out", format="dicom", **OPTIONS)
    shown = ["ImagePositionPatient", "PixelSpacing", "SpacingBetweenSlices"]
    command = ["dcmdump", "-q", "+P", shown[0], "+P", shown[1], "+P", shown[2], "+P", "0008,001c", str(files[2])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    values = [line[line.index("[") + 1 : line.index("]")] for line in done.stdout.splitlines()]
    assert values == [r"0.0\0.0\10.0", r"1.25\1.5", "5.0", "YES"]


def test_a_volume_as_png_is_what_the_grids_show(tmp_path: Path) -> None:
    images = volumes()
    files = export_samples(images, tmp_path / "out", format="png", **OPTIONS)
    assert len(files) == 2
    for file, levels in zip(files, grey_levels(middle_planes(images, SPACING))[:, 0], strict=True):
        with Image.open(file) as picture:
            assert (np.asarray(picture) == levels).all()
            assert "synthetic CT volume" in picture.text["Description"]


def test_slices_are_written_as_ever(tmp_path: Path) -> None:
    """The name, a hash of the voxels, and the rest as they were before volumes could be written."""
    written = {
        format: export_samples(samples(3), tmp_path / format, format=format, **OPTIONS)[0]
        for format in ("png", "nifti", "dicom")
    }
    with Image.open(written["png"]) as picture:
        assert picture.text["Description"] == "synthetic CT slice, no patient; window -1000 to 600 HU"
    assert nibabel.load(written["nifti"]).shape == (20, 12, 1)
    header = pydicom.dcmread(written["dicom"])
    assert header.PatientID == "SYNTHETIC-043657b09dad47ed-7-0000"
    assert header.ImagePositionPatient == [0, 0, 0]
