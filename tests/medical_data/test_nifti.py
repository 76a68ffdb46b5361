from __future__ import annotations

import contextlib
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from ct_samples import AFFINE, ORIGIN_MM, SPACING_MM, anatomy, series_datasets, write, write_nifti, xyz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medical_data import errors
from medical_data.dicom import read_series
from medical_data.nifti import read_nifti
from medical_data.volume import Volume


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_equal_to_the_dicom_series(tmp_path: Path, version: int, suffix: str, dtype: type) -> None:
    dicom = read_series(write(series_datasets(), tmp_path / "dicom"))
    file = write_nifti(tmp_path / f"ct{suffix}", xyz(anatomy()).astype(dtype), version=version)
    file = file.rename(tmp_path / "any name")  # the content counts
    nifti = read_nifti(file)
    np.testing.assert_array_equal(nifti.hu, dicom.hu)
    np.testing.assert_allclose(nifti.spacing_mm, dicom.spacing_mm, rtol=1e-6)
    np.testing.assert_allclose(nifti.origin_mm, dicom.origin_mm, rtol=1e-6)
    np.testing.assert_allclose(nifti.direction, dicom.direction, atol=1e-6)


@given(order=st.permutations([0, 1, 2]), flips=st.tuples(*[st.booleans()] * 3))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_storage_order_gives_the_same_volume(tmp_path: Path, order: list[int], flips: tuple[bool, ...]) -> None:
    """nibabel's own reorientation writes the file; the reader must undo it."""
    image = nib.Nifti1Image(xyz(anatomy()), AFFINE)
    orientation = np.array([[axis, -1 if flip else 1] for axis, flip in zip(order, flips, strict=True)])
    file = write_nifti(tmp_path / "ct.nii", *_data_and_affine(image.as_reoriented(orientation)))
    volume = read_nifti(file)
    np.testing.assert_array_equal(volume.hu, anatomy())
    np.testing.assert_allclose(volume.origin_mm, ORIGIN_MM, atol=1e-5)
    np.testing.assert_allclose(volume.spacing_mm, SPACING_MM, rtol=1e-6)


@given(
    turns=st.tuples(*[st.floats(-0.6, 0.6)] * 3),
    order=st.permutations([0, 1, 2]),
    signs=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
    spacing=st.tuples(*[st.floats(0.3, 20)] * 3),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_oblique_volume_reads_back(
    tmp_path: Path,
    turns: tuple[float, ...],
    order: list[int],
    signs: tuple[float, ...],
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float],
) -> None:
    rows = (Rotation.from_euler("xyz", turns).as_matrix() @ np.diag(signs))[order]
    volume = Volume(
        hu=anatomy().astype(np.float32),
        spacing_mm=spacing,
        origin_mm=origin,
        direction=tuple(tuple(map(float, row)) for row in rows),  # type: ignore[arg-type]
    )
    affine = np.eye(4)
    affine[:3, :3] = (rows * np.array(spacing)[:, None])[::-1].T  # columns: where x, y and z of the file grow to
    affine[:3, 3] = origin
    read = read_nifti(write_nifti(tmp_path / "ct.nii", xyz(anatomy()), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine))
    wanted = volume.canonical()
    np.testing.assert_array_equal(read.hu, wanted.hu)
    np.testing.assert_allclose(read.spacing_mm, wanted.spacing_mm, rtol=1e-5)
    np.testing.assert_allclose(read.origin_mm, wanted.origin_mm, atol=1e-3)
    np.testing.assert_allclose(read.direction, wanted.direction, atol=1e-5)


def _data_and_affine(image: nib.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(image.dataobj), image.affine


def test_scaled_integers(tmp_path: Path) -> None:
    image = nib.Nifti1Image((xyz(anatomy()) + 1024).astype(np.uint16), AFFINE)
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / "ct.nii")
    np.testing.assert_array_equal(read_nifti(tmp_path / "ct.nii").hu, anatomy())


def test_outside_the_field_of_view_becomes_air(tmp_path: Path) -> None:
    hu = anatomy()
    hu[0, 0, :3] = -3024, -1025, -1024
    read = read_nifti(write_nifti(tmp_path / "ct.nii", xyz(hu))).hu
    assert read[0, 0, :3].tolist() == [-1000, -1000, -1024]


def test_a_trailing_axis_of_one(tmp_path: Path) -> None:
    volume = read_nifti(write_nifti(tmp_path / "ct.nii", xyz(anatomy())[..., None]))
    np.testing.assert_array_equal(volume.hu, anatomy())


def sheared(degrees: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[1, 2] = np.tan(np.radians(degrees)) * affine[2, 2]
    return affine


def changed(value: float) -> np.ndarray:
    hu = xyz(anatomy()).astype(np.float32)
    hu[0, 0, 0] = value
    return hu


@pytest.mark.parametrize(
    ("voxels", "affine", "kind"),
    [
        ((xyz(anatomy()) > 0).astype(np.uint8), AFFINE, errors.NotCT),
        ((xyz(anatomy()) > 0).astype(np.float32) * 104, AFFINE, errors.NotCT),
        ((xyz(anatomy()) // 10 + 100).astype(np.uint8), AFFINE, errors.NotCT),
        (np.zeros((4, 4, 4), np.float32), AFFINE, errors.NotCT),
        (np.stack([xyz(anatomy())] * 2, axis=-1), AFFINE, errors.NotCT),
        (xyz(anatomy())[0], AFFINE, errors.NotCT),
        (xyz(anatomy()).astype(np.complex64), AFFINE, errors.NotCT),
        ((xyz(anatomy()) / 1000).astype(np.float32), AFFINE, errors.ImpossibleHU),
        ((xyz(anatomy()) + 1024.5).astype(np.float32), AFFINE, errors.ImpossibleHU),
        (changed(np.nan), AFFINE, errors.ImpossibleHU),
        (changed(np.inf), AFFINE, errors.ImpossibleHU),
        (changed(-np.inf), AFFINE, errors.ImpossibleHU),
        (changed(1e5), AFFINE, errors.ImpossibleHU),
        (changed(-1e5), AFFINE, errors.ImpossibleHU),
        (xyz(anatomy()), sheared(10), errors.GantryTilt),
        (xyz(anatomy()), AFFINE * 100, errors.ImpossibleGeometry),
        (xyz(anatomy()), AFFINE / 1000, errors.ImpossibleGeometry),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, voxels: np.ndarray, affine: np.ndarray, kind: type[Exception]) -> None:
    affine = affine.copy()
    affine[3, 3] = 1
    file = write_nifti(tmp_path / "name of a patient.nii", voxels, affine)
    with pytest.raises(errors.SeriesRefused) as caught:
        read_nifti(file)
    assert type(caught.value) is kind
    assert caught.value.file == file
    assert "patient" not in f"{caught.value.attribute} {caught.value.value}"


def test_a_slight_shear_is_dropped(tmp_path: Path) -> None:
    volume = read_nifti(write_nifti(tmp_path / "ct.nii", xyz(anatomy()), sheared(0.3)))
    np.testing.assert_array_equal(volume.hu, anatomy())
    assert volume.spacing_mm[0] == pytest.approx(SPACING_MM[0], rel=1e-4)


def test_no_affine_and_other_units(tmp_path: Path) -> None:
    image = nib.Nifti1Image(xyz(anatomy()), None)
    nib.save(image, tmp_path / "ct.nii")
    with pytest.raises(errors.ImpossibleGeometry, match="sform_code"):
        read_nifti(tmp_path / "ct.nii")
    image = nib.Nifti1Image(xyz(anatomy()), AFFINE)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "ct.nii")
    with pytest.raises(errors.ImpossibleGeometry, match="meter"):
        read_nifti(tmp_path / "ct.nii")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_cut_files(tmp_path: Path, suffix: str) -> None:
    file = write_nifti(tmp_path / f"ct{suffix}", xyz(anatomy()))
    content = file.read_bytes()
    for length in range(0, len(content) - 1, 97):
        file.write_bytes(content[:length])
        with pytest.raises((errors.TruncatedFile, errors.UnreadableFile)):
            read_nifti(file)
    file.write_bytes(content[: len(content) * 9 // 10])
    with pytest.raises(errors.TruncatedFile):
        read_nifti(file)


def test_not_nifti(tmp_path: Path) -> None:
    file = tmp_path / "ct.nii.gz"
    for content in (b"", b"text", gzip.compress(b"text" * 200), bytes(1000)):
        file.write_bytes(content)
        with pytest.raises(errors.UnreadableFile):
            read_nifti(file)
    with pytest.raises(errors.UnreadableFile, match="FileNotFoundError"):
        read_nifti(tmp_path / "absent")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_header_is_read_or_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    file = write_nifti(tmp_path / "ct.nii", xyz(anatomy()))
    content = bytearray(file.read_bytes())
    for place, value in changes:
        content[place] = value
    file.write_bytes(content)
    with contextlib.suppress(errors.SeriesRefused):
        assert np.isfinite(read_nifti(file).hu).all()


# --- real data ----------------------------------------------------------------------------------------------------


def test_real_dicom_written_as_nifti_by_other_hands(shared_ct: Path, tmp_path: Path) -> None:
    """A real series stacked with pydicom and numpy, written by nibabel, equals what the DICOM reader gives."""
    files = sorted((shared_ct / "STS_002").rglob("*.dcm"))
    slices = sorted((pydicom.dcmread(f) for f in files), key=lambda d: -d.ImagePositionPatient[2])  # head first
    step = float(slices[0].ImagePositionPatient[2] - slices[1].ImagePositionPatient[2])
    row_mm, column_mm = (float(v) for v in slices[0].PixelSpacing)
    affine = np.diag([-column_mm, -row_mm, -step, 1])
    affine[:3, 3] = np.array([-1, -1, 1]) * np.array(slices[0].ImagePositionPatient, dtype=float)
    voxels = np.stack([d.pixel_array.T * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in slices], -1)
    file = write_nifti(tmp_path / "ct.nii.gz", voxels.astype(np.float32), affine)
    nifti, dicom = read_nifti(file), read_series(files)
    np.testing.assert_array_equal(nifti.hu, dicom.hu)
    np.testing.assert_allclose(nifti.spacing_mm, dicom.spacing_mm, atol=1e-5)
    np.testing.assert_allclose(nifti.origin_mm, dicom.origin_mm, atol=1e-4)
    np.testing.assert_allclose(nifti.direction, dicom.direction, atol=1e-6)


@pytest.mark.parametrize("patient", ["STS_002", "STS_025", "STS_051"])
def test_a_published_mask_fits_the_dicom_volume(shared_ct: Path, patient: str) -> None:
    """The tumour masks were drawn and published by others, as NIfTI beside these DICOM series."""
    dicom = read_series(sorted((shared_ct / patient).rglob("*.dcm")))
    mask = nib.load(shared_ct / patient / "CT_mask.nii.gz")
    assert nib.aff2axcodes(mask.affine) == ("L", "P", "S")
    inside = np.asarray(mask.dataobj).transpose(2, 1, 0) > 0
    assert inside.shape == dicom.hu.shape
    np.testing.assert_allclose(np.abs(np.diag(mask.affine)[2::-1]), dicom.spacing_mm, atol=1e-4)
    np.testing.assert_allclose(mask.affine[:3, 3] * [-1, -1, 1], dicom.origin_mm, atol=1e-3)
    # A tumour is soft tissue: a flip or shift of either would catch air, fat and bone.
    assert -30 < np.median(dicom.hu[inside]) < 100
    assert np.percentile(dicom.hu[inside], 2) > -300


@pytest.mark.parametrize("patient", ["STS_001", "STS_034"])
def test_real_nifti_and_its_mask(shared_ct: Path, patient: str) -> None:
    volume = read_nifti(shared_ct / patient / "CT_image.nii.gz")
    assert volume.hu.min() == -1000
    assert volume.direction == ((0, 0, 1), (0, 1, 0), (1, 0, 0))
    inside = np.asarray(nib.load(shared_ct / patient / "CT_mask.nii.gz").dataobj).transpose(2, 1, 0) > 0
    assert -30 < np.median(volume.hu[inside]) < 100
    with pytest.raises(errors.NotCT, match="2 whole values"):
        read_nifti(shared_ct / patient / "CT_mask.nii.gz")
