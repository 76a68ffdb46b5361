"""Every case under shared/ct/edge_cases is read right or refused with its own error."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medical_data import errors
from medical_data.dicom import read_series

# The end of the file's name → how far any voxel may be from the uncompressed slice, in HU.
# JPEG 51 stores 12 bits at 2 HU a level with ringing at the edge of the body; 81 is near-lossless by 1, 91 is lossy.
READ_RIGHT = {
    "1.2.840.10008.1.2.dcm": 0,
    "1.2.840.10008.1.2.1.dcm": 0,
    "1.2.840.10008.1.2.2.dcm": 0,
    "1.2.840.10008.1.2.1.99.dcm": 0,
    "1.2.840.10008.1.2.5.dcm": 0,
    "1.2.840.10008.1.2.4.57.dcm": 0,
    "1.2.840.10008.1.2.4.70.dcm": 0,
    "1.2.840.10008.1.2.4.80.dcm": 0,
    "1.2.840.10008.1.2.4.81.dcm": 1,
    "1.2.840.10008.1.2.4.90.dcm": 0,
    "1.2.840.10008.1.2.4.91.dcm": 5,
    "1.2.840.10008.1.2.4.51.dcm": 36,
}
REFUSED = {
    "1.2.840.10008.1.2.4.50.dcm": (errors.CoarseHU, "RescaleSlope = 32.1216"),
    "1.2.840.10008.1.2.4.53.dcm": (errors.UndecodableTransferSyntax, "1.2.840.10008.1.2.4.53"),
    "1.2.840.10008.1.2.4.55.dcm": (errors.UndecodableTransferSyntax, "1.2.840.10008.1.2.4.55"),
}


@pytest.fixture(scope="session")
def edge_cases(shared_ct: Path) -> Path:
    return shared_ct / "edge_cases"


@pytest.fixture(scope="session")
def uncompressed(edge_cases: Path) -> np.ndarray:
    """HU of the uncompressed slice by numpy alone, with the field of view's outside as air."""
    ds = pydicom.dcmread(edge_cases / "transfer_syntaxes" / "CTImage.dcm")
    stored = np.frombuffer(ds.PixelData, "<i2").reshape(ds.Rows, ds.Columns).astype(float)
    hu = stored * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    assert hu.min() == -3024
    return np.where(hu < -1024, -1000, hu)


def encoded(edge_cases: Path, ending: str) -> Path:
    (file,) = (f for f in (edge_cases / "transfer_syntaxes").iterdir() if f.name.endswith("_" + ending))
    assert str(pydicom.dcmread(file, stop_before_pixels=True).file_meta.TransferSyntaxUID) + ".dcm" == ending
    return file


def test_every_encoding_is_listed(edge_cases: Path) -> None:
    names = {f.name for f in (edge_cases / "transfer_syntaxes").iterdir()} - {"CTImage.dcm"}
    assert {name.split("_")[-1] for name in names} == set(READ_RIGHT) | set(REFUSED)
    assert len(names) == 15


def test_the_original(edge_cases: Path, uncompressed: np.ndarray) -> None:
    volume = read_series([edge_cases / "transfer_syntaxes" / "CTImage.dcm"])
    np.testing.assert_array_equal(volume.hu[0], uncompressed)
    assert volume.spacing_mm == (5.0, 0.675781, 0.675781)
    assert volume.origin_mm == (-161.399994, -148.800003, 4.7)


@pytest.mark.parametrize("ending", READ_RIGHT)
def test_encodings_read_right(edge_cases: Path, uncompressed: np.ndarray, ending: str) -> None:
    hu = read_series([encoded(edge_cases, ending)]).hu[0]
    tolerance = READ_RIGHT[ending]
    off = np.abs(hu - uncompressed)
    # Noise of a lossy encoding carries air across -1024, where it becomes -1000: there 24 HU more.
    assert off[uncompressed > -1000].max() <= tolerance
    assert off.max() <= (tolerance + 24 if tolerance else 0)


@pytest.mark.parametrize("ending", REFUSED)
def test_encodings_refused(edge_cases: Path, ending: str) -> None:
    kind, message = REFUSED[ending]
    with pytest.raises(errors.SeriesRefused) as caught:
        read_series([encoded(edge_cases, ending)])
    assert type(caught.value) is kind
    assert message in str(caught.value)


def test_why_eight_bits_are_refused(edge_cases: Path, uncompressed: np.ndarray) -> None:
    """The 8-bit JPEG decodes, but inside the body it is off by more than noise; the 12-bit one by less."""
    ds = pydicom.dcmread(encoded(edge_cases, "1.2.840.10008.1.2.4.50.dcm"))
    hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    body = (uncompressed > -200) & (uncompressed < 300)
    off = (hu - uncompressed)[body]
    assert np.abs(off).mean() > 20
    assert off.mean() < -15
    twelve = read_series([encoded(edge_cases, "1.2.840.10008.1.2.4.51.dcm")]).hu[0]
    off = (twelve - uncompressed)[body]
    assert np.abs(off).mean() < 5
    assert -1 < off.mean() < 1


@pytest.mark.parametrize("ending", [*READ_RIGHT, *REFUSED])
def test_cut_encodings_are_truncated_not_undecodable(edge_cases: Path, tmp_path: Path, ending: str) -> None:
    content = encoded(edge_cases, ending).read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(content[: int(0.6 * len(content))])
    with pytest.raises(errors.TruncatedFile):
        read_series([cut])


@pytest.mark.parametrize("ending", [e for e in READ_RIGHT if ".1.2.4." in e])
def test_damaged_compression_is_corrupt(edge_cases: Path, tmp_path: Path, ending: str) -> None:
    content = bytearray(encoded(edge_cases, ending).read_bytes())
    marker = max(content.find(b"\xff\xd8\xff"), content.find(b"\xff\x4f\xff"))  # start of a JPEG, JPEG 2000 stream
    content[marker + 2 : marker + 66] = bytes(64)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(content)
    with pytest.raises(errors.CorruptPixels):
        read_series([damaged])


def test_encodings_of_one_slice_as_one_series_are_duplicates(edge_cases: Path) -> None:
    endings = ["1.2.840.10008.1.2.dcm", "1.2.840.10008.1.2.1.dcm"]
    with pytest.raises(errors.DuplicateSlices):
        read_series([encoded(edge_cases, ending) for ending in endings])


def test_gantry_tilt(edge_cases: Path) -> None:
    files = sorted((edge_cases / "ge_tilt_uneven").iterdir())
    with pytest.raises(errors.GantryTilt, match=r"GantryDetectorTilt = 18\.50 degrees"):
        read_series(files)


def _rewritten(files: list[Path], folder: Path, **changes: object) -> list[Path]:
    for file in files:
        ds = pydicom.dcmread(file)
        for keyword, value in changes.items():
            setattr(ds, keyword, value)
        ds.save_as(folder / file.name)
    return [folder / file.name for file in files]


def test_gantry_tilt_shows_in_the_positions_alone(edge_cases: Path, tmp_path: Path) -> None:
    files = sorted((edge_cases / "ge_tilt_uneven").iterdir())[:6]  # evenly spaced
    with pytest.raises(errors.GantryTilt, match=r"ImagePositionPatient = 18\.50 degrees"):
        read_series(_rewritten(files, tmp_path, GantryDetectorTilt="0"))


def test_uneven_spacing_beside_the_tilt(edge_cases: Path, tmp_path: Path) -> None:
    files = sorted((edge_cases / "ge_tilt_uneven").iterdir())
    upright = _rewritten(files, tmp_path, GantryDetectorTilt="0", ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    with pytest.raises(errors.UnevenSpacing, match=r"from 1\.140 to 7\.380 mm"):
        read_series(upright)
    volume = read_series(upright[:6])
    assert volume.spacing_mm[0] == pytest.approx(4.22)
    assert volume.hu.min() >= -1024  # PixelPaddingValue -1500


def test_perfusion_map(edge_cases: Path) -> None:
    with pytest.raises(errors.DerivedMap, match="PERFUSION"):
        read_series([edge_cases / "enhanced_ct" / "eCT_Supplemental.dcm"])


def test_what_else_is_wrong_with_the_perfusion_map(edge_cases: Path, tmp_path: Path) -> None:
    ds = pydicom.dcmread(edge_cases / "enhanced_ct" / "eCT_Supplemental.dcm")
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    shared = ds.SharedFunctionalGroupsSequence[0]
    ds.save_as(tmp_path / "ct")
    with pytest.raises(errors.DerivedMap):  # FrameType still says so
        read_series([tmp_path / "ct"])
    shared.CTImageFrameTypeSequence[0].FrameType = ds.ImageType
    ds.save_as(tmp_path / "ct")
    with pytest.raises(errors.NotHounsfield, match="RescaleType = US"):
        read_series([tmp_path / "ct"])


def test_enhanced_geometry_of_a_real_object(edge_cases: Path, tmp_path: Path) -> None:
    """The real functional groups around pixels that are HU: frames 2 and 1 of the stack, rows running to the right."""
    ds = pydicom.dcmread(edge_cases / "enhanced_ct" / "eCT_Supplemental.dcm")
    shared = ds.SharedFunctionalGroupsSequence[0]
    ds.ImageType = shared.CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    shared.PixelValueTransformationSequence[0].RescaleType = "HU"
    stored = np.full((2, 512, 512), 24, np.uint16)  # -1000 HU
    stored[0, 100:300, 200:300] = np.arange(100) + 1000
    stored[1, 100:300, 200:300] = np.arange(100) + 1100
    ds.PixelData = stored.tobytes()
    ds.save_as(tmp_path / "ct")
    volume = read_series([tmp_path / "ct"])
    assert volume.direction == ((0, 0, 1), (0, 1, 0), (1, 0, 0))
    assert volume.spacing_mm == pytest.approx((10, 0.388672, 0.388672))
    np.testing.assert_array_equal(volume.hu, stored[:, :, ::-1].astype(float) - 1024)
    assert volume.origin_mm == pytest.approx((99.5 - 511 * 0.388672, -301.5, -159.0))


def test_localizer_and_burned_in_text(edge_cases: Path) -> None:
    folder = edge_cases / "localizer_and_burned_in"
    with pytest.raises(errors.Localizer, match="LOCALIZER"):
        read_series([folder / "S1000_I10_LOCALIZER.dcm"])
    with pytest.raises(errors.BurnedInAnnotation, match="YES"):
        read_series([folder / "S4010_I30_PATIENT_INFO.dcm"])


@pytest.mark.parametrize("annotation", ["NO", None])
def test_burned_in_text_that_is_not_declared(edge_cases: Path, tmp_path: Path, annotation: str | None) -> None:
    ds = pydicom.dcmread(edge_cases / "localizer_and_burned_in" / "S4010_I30_PATIENT_INFO.dcm")
    ds.BurnedInAnnotation = annotation
    ds.save_as(tmp_path / "ct")
    with pytest.raises(errors.BurnedInAnnotation, match="PATIENT_INFO"):
        read_series([tmp_path / "ct"])
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.save_as(tmp_path / "ct")
    with pytest.raises(errors.NotCT, match="Secondary Capture Image Storage"):
        read_series([tmp_path / "ct"])


def test_missing_slice_and_blanked_pixels(edge_cases: Path) -> None:
    files = sorted((edge_cases / "missing_slice_header_only").iterdir())
    with pytest.raises(errors.MissingSlices, match=r"1 missing among 4 slices every 5\.000 mm"):
        read_series(files)
    with pytest.raises(errors.ImpossibleHU, match="voxels"):
        read_series(files[:3])


def test_a_missing_slice_of_a_real_series(shared_ct: Path, tmp_path: Path) -> None:
    files = sorted((shared_ct / "STS_025").rglob("*.dcm"))
    with pytest.raises(errors.MissingSlices, match="1 missing among 46 slices"):
        read_series(files[:20] + files[21:])
    shutil.copy(files[5], tmp_path / "again")
    with pytest.raises(errors.DuplicateSlices, match="1 of 48 slices"):
        read_series([*files, tmp_path / "again"])
