from __future__ import annotations

import contextlib
import logging
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from ct_samples import (
    ORIGIN_MM,
    SPACING_MM,
    anatomy,
    changed_series,
    enhanced,
    series_datasets,
    slice_dataset,
    write,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileDataset
from pydicom.filebase import DicomBytesIO
from pydicom.uid import ImplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from medical_data import errors
from medical_data.dicom import read_series
from medical_data.stack import GANTRY_TILT_TOLERANCE_DEG, SPACING_TOLERANCE
from medical_data.volume import Volume


def assert_is_anatomy(volume: Volume) -> None:
    np.testing.assert_array_equal(volume.hu, anatomy())
    np.testing.assert_allclose(volume.spacing_mm, SPACING_MM)
    np.testing.assert_allclose(volume.origin_mm, ORIGIN_MM)
    assert volume.direction == ((0, 0, 1), (0, 1, 0), (1, 0, 0))


def test_slices_are_ordered_by_position_not_by_name_or_number(tmp_path: Path) -> None:
    datasets = series_datasets()
    for ds, number in zip(datasets, ("3", "1", "5", "2", "4"), strict=True):
        ds.InstanceNumber = number
    files = write(datasets, tmp_path)
    random.Random(0).shuffle(files)
    assert_is_anatomy(read_series(files))


def test_positions_against_the_normal(tmp_path: Path) -> None:
    """Rows and columns swapped in sign: the normal points to the feet, the volume still grows to the head."""
    hu = anatomy()
    z = ORIGIN_MM[2]
    last = ORIGIN_MM[1] + (hu.shape[1] - 1) * SPACING_MM[1]
    datasets = [
        slice_dataset(
            plane[::-1],
            position=(ORIGIN_MM[0], last, z + k * SPACING_MM[0]),
            orientation=(1, 0, 0, 0, -1, 0),
            number=k,
        )
        for k, plane in enumerate(hu)
    ]
    assert_is_anatomy(read_series(write(datasets, tmp_path)))


def test_oblique_series_keeps_its_directions(tmp_path: Path) -> None:
    c, s = np.cos(0.2), np.sin(0.2)
    row, column, normal = np.array([1, 0, 0.0]), np.array([0, c, -s]), np.array([0, s, c])
    datasets = [
        slice_dataset(plane, position=tuple(2.5 * k * normal), orientation=(*row, *column), number=k)
        for k, plane in enumerate(anatomy())
    ]
    volume = read_series(write(datasets, tmp_path))
    np.testing.assert_array_equal(volume.hu, anatomy())
    np.testing.assert_allclose(volume.direction, [normal, column, row], atol=1e-12)
    assert volume.spacing_mm[0] == pytest.approx(2.5)


def test_modality_lut_per_slice(tmp_path: Path) -> None:
    def rescale(ds: FileDataset, k: int) -> None:
        intercept = -1024 + k
        stored = np.frombuffer(ds.PixelData, "<i2").astype(np.int32)
        ds.PixelData = ((stored - intercept) * 2).astype("<u2").tobytes()
        ds.PixelRepresentation = 0
        ds.RescaleSlope, ds.RescaleIntercept = "0.5", str(intercept)

    assert_is_anatomy(read_series(changed_series(tmp_path, rescale)))


@pytest.mark.parametrize(
    ("value", "limit", "stored", "vr"),
    [
        (-2000, None, -2000, "SS"),
        (63536, None, -2000, "US"),  # GE: the signed -2000 in an unsigned VR
        (200, None, 200, "SS"),  # within the range of tissue: the file says that it is none
        (200, 204, 203, "SS"),
    ],
)
def test_padding_becomes_air(tmp_path: Path, value: int, limit: int | None, stored: int, vr: str) -> None:
    def pad(ds: FileDataset, _: int) -> None:
        pixels = np.frombuffer(ds.PixelData, "<i2").copy()
        pixels[(pixels >= 195) & (pixels <= 210)] = 0
        pixels[:3] = stored
        ds.PixelData = pixels.tobytes()
        ds.add_new("PixelPaddingValue", vr, value)
        if limit is not None:
            ds.add_new("PixelPaddingRangeLimit", vr, limit)

    hu = read_series(changed_series(tmp_path, pad)).hu
    expected = anatomy()
    expected[(expected >= 195) & (expected <= 210)] = 0
    np.testing.assert_array_equal(hu, expected)


def test_outside_the_field_of_view_becomes_air_without_padding_value(tmp_path: Path) -> None:
    def outside(ds: FileDataset, _: int) -> None:
        pixels = np.frombuffer(ds.PixelData, "<i2").copy()
        pixels[0], pixels[1], pixels[2] = -3024, -1025, -1024
        ds.PixelData = pixels.tobytes()

    hu = read_series(changed_series(tmp_path, outside)).hu
    assert hu[0, 0, :4].tolist() == [-1000, -1000, -1024, -1000]


def test_single_slice_takes_its_thickness(tmp_path: Path) -> None:
    volume = read_series(write(series_datasets(anatomy(slices=1)), tmp_path))
    assert volume.hu.shape[0] == 1
    assert volume.spacing_mm == SPACING_MM


def test_enhanced_equals_single_frames(tmp_path: Path) -> None:
    datasets = series_datasets()
    random.Random(1).shuffle(datasets)
    assert_is_anatomy(read_series(write([enhanced(datasets)], tmp_path)))


def test_enhanced_across_two_files(tmp_path: Path) -> None:
    datasets = series_datasets()
    parts = [enhanced(datasets[:2]), enhanced(datasets[2:])]
    assert_is_anatomy(read_series(write(parts, tmp_path)))


def test_without_preamble_and_meta(tmp_path: Path) -> None:
    files = []
    for k, ds in enumerate(series_datasets()):
        bare = Dataset(ds)
        files.append(tmp_path / str(k))
        bare.save_as(files[-1], implicit_vr=True, little_endian=True)
        assert files[-1].read_bytes()[128:132] != b"DICM"
    assert_is_anatomy(read_series(files))


# One change that makes a good series bad → the refusal and the attribute that it names.
def _set(keyword: str, value: object) -> Callable[[FileDataset, int], None]:
    return lambda ds, k: setattr(ds, keyword, value)


def _one(keyword: str, value: object) -> Callable[[FileDataset, int], None]:
    return lambda ds, k: setattr(ds, keyword, value) if k == 2 else None


def _drop(keyword: str) -> Callable[[FileDataset, int], None]:
    return lambda ds, k: delattr(ds, keyword)


def _move(step: Callable[[int], tuple[float, float, float]]) -> Callable[[FileDataset, int], None]:
    def change(ds: FileDataset, k: int) -> None:
        ds.ImagePositionPatient = [float(o + d) for o, d in zip(ORIGIN_MM, step(k), strict=True)]

    return change


def _pixels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[FileDataset, int], None]:
    def apply(ds: FileDataset, k: int) -> None:
        ds.PixelData = change(np.frombuffer(ds.PixelData, "<i2").copy()).astype("<i2").tobytes()

    return apply


REFUSALS: dict[str, tuple[Callable[[FileDataset, int], None], type[errors.SeriesRefused], str]] = {
    "mr": (_set("Modality", "MR"), errors.NotCT, "Modality"),
    "secondary capture": (_set("SOPClassUID", SecondaryCaptureImageStorage), errors.NotCT, "SOPClassUID"),
    "scout": (_one("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), errors.Localizer, "ImageType"),
    "mip": (_set("ImageType", ["DERIVED", "SECONDARY", "MIP"]), errors.DerivedMap, "ImageType"),
    "perfusion": (_set("ImageType", ["DERIVED", "PRIMARY", "PERFUSION"]), errors.DerivedMap, "ImageType"),
    "burned in": (_set("BurnedInAnnotation", "YES"), errors.BurnedInAnnotation, "BurnedInAnnotation"),
    "screen save": (_set("ImageType", ["DERIVED", "SECONDARY", "SCREEN SAVE"]), errors.BurnedInAnnotation, "ImageType"),
    "no image type": (_drop("ImageType"), errors.MissingAttribute, "ImageType"),
    "no sop class": (_drop("SOPClassUID"), errors.MissingAttribute, "SOPClassUID"),
    "no modality": (_drop("Modality"), errors.MissingAttribute, "Modality"),
    "no pixels": (_drop("PixelData"), errors.TruncatedFile, "PixelData"),
    "no slope": (_drop("RescaleSlope"), errors.MissingRescale, "RescaleSlope"),
    "empty slope": (_set("RescaleSlope", None), errors.MissingRescale, "RescaleSlope"),
    "no intercept": (_drop("RescaleIntercept"), errors.MissingRescale, "RescaleIntercept"),
    "negative slope": (_set("RescaleSlope", "-1"), errors.MalformedAttribute, "RescaleSlope"),
    "coarse": (_set("RescaleSlope", "32"), errors.CoarseHU, "RescaleSlope"),
    "other unit": (_set("RescaleType", "US"), errors.NotHounsfield, "RescaleType"),
    "no position": (_drop("ImagePositionPatient"), errors.MissingAttribute, "ImagePositionPatient"),
    "no orientation": (_drop("ImageOrientationPatient"), errors.MissingAttribute, "ImageOrientationPatient"),
    "no spacing": (_drop("PixelSpacing"), errors.MissingAttribute, "PixelSpacing"),
    "zero spacing": (_set("PixelSpacing", [0, 1]), errors.ImpossibleGeometry, "PixelSpacing"),
    "one spacing": (_set("PixelSpacing", [1]), errors.MalformedAttribute, "PixelSpacing"),
    "skewed": (_set("ImageOrientationPatient", [1, 0, 0, 0.5, 0.8, 0]), errors.ImpossibleGeometry, "Orientation"),
    "turned": (_one("ImageOrientationPatient", [0, 1, 0, 0, 0, -1]), errors.MixedOrientations, "Orientation"),
    "duplicate": (_move(lambda k: (0, 0, 2.5 * min(k, 3))), errors.DuplicateSlices, "ImagePositionPatient"),
    "missing": (_move(lambda k: (0, 0, 2.5 * (k + (k > 1)))), errors.MissingSlices, "ImagePositionPatient"),
    "uneven": (_move(lambda k: (0, 0, 2.5 * k**1.3)), errors.UnevenSpacing, "ImagePositionPatient"),
    "sheared": (_move(lambda k: (0, 0.3 * k, 2.5 * k)), errors.GantryTilt, "ImagePositionPatient"),
    "beside": (_move(lambda k: (20.0 * (k == 2), 0, 2.5 * k)), errors.ImpossibleGeometry, "ImagePositionPatient"),
    "far apart": (_move(lambda k: (0, 0, 100 * k)), errors.ImpossibleGeometry, "ImagePositionPatient"),
    "tilt": (_set("GantryDetectorTilt", "-12"), errors.GantryTilt, "GantryDetectorTilt"),
    "two patients": (_one("PatientID", "OTHER"), errors.MixedSeries, "PatientID"),
    "two series": (_one("SeriesInstanceUID", generate_uid()), errors.MixedSeries, "SeriesInstanceUID"),
    "two frames": (_one("FrameOfReferenceUID", generate_uid()), errors.MixedSeries, "FrameOfReferenceUID"),
    "two spacings": (_one("PixelSpacing", [1, 1]), errors.MixedSeries, "PixelSpacing"),
    "too few bytes": (_one("Rows", 40), errors.MixedSeries, "Rows"),
    "all too few bytes": (_set("Rows", 40), errors.TruncatedFile, "PixelData"),
    "colour": (_set("SamplesPerPixel", 3), errors.NotCT, "SamplesPerPixel"),
    "no rows": (_drop("Rows"), errors.MissingAttribute, "Rows"),
    "bits": (_set("BitsAllocated", 12), errors.CorruptPixels, "PixelData"),
    "blank": (_pixels(np.zeros_like), errors.ImpossibleHU, "PixelData"),
    "no rescale applied": (_pixels(lambda p: p + 1024), errors.ImpossibleHU, "PixelData"),
    "only air": (_pixels(lambda p: np.full_like(p, -1000)), errors.ImpossibleHU, "PixelData"),
    "only padding": (_pixels(lambda p: np.full_like(p, -2000)), errors.ImpossibleHU, "PixelData"),
    "intercept": (_set("RescaleIntercept", "40000"), errors.ImpossibleHU, "PixelData"),
    "not a number": (_set("RescaleIntercept", "1e308"), errors.ImpossibleHU, "PixelData"),
    "frames": (_set("NumberOfFrames", "2"), errors.MissingAttribute, "PerFrameFunctionalGroupsSequence"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, tmp_path: Path) -> None:
    change, kind, attribute = REFUSALS[case]
    files = changed_series(tmp_path, change)
    with pytest.raises(errors.SeriesRefused) as caught:
        read_series(files)
    assert type(caught.value) is kind
    assert attribute in caught.value.attribute
    assert caught.value.remedy
    for leak in ("PATIENT A", "OTHER", "Doe", "1901", "Nowhere", "ACC-1", str(tmp_path), "image0"):
        assert leak not in str(caught.value)


def test_a_refusal_names_the_file_to_blame(tmp_path: Path) -> None:
    files = changed_series(tmp_path, _one("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    with pytest.raises(errors.Localizer) as caught:
        read_series(files)
    assert caught.value.file == files[2]
    assert str(files[2]) not in str(caught.value)


@pytest.mark.parametrize(("jitter", "refused"), [(0.8 * SPACING_TOLERANCE, False), (1.6 * SPACING_TOLERANCE, True)])
def test_spacing_tolerance(tmp_path: Path, jitter: float, refused: bool) -> None:
    files = changed_series(tmp_path, _move(lambda k: (0, 0, 2.5 * (k + jitter * (k == 2)))))
    if refused:
        with pytest.raises(errors.UnevenSpacing):
            read_series(files)
    else:
        assert read_series(files).spacing_mm[0] == pytest.approx(2.5)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_tilt_tolerance(tmp_path: Path, factor: float) -> None:
    slope = np.tan(np.radians(factor * GANTRY_TILT_TOLERANCE_DEG))
    files = changed_series(tmp_path, _move(lambda k: (0, 2.5 * slope * k, 2.5 * k)))
    if factor > 1:
        with pytest.raises(errors.GantryTilt):
            read_series(files)
    else:
        np.testing.assert_array_equal(read_series(files).hu, anatomy())


@pytest.mark.parametrize("missing", [1, 2, 20, 38])
def test_one_missing_slice_is_found_anywhere(tmp_path: Path, missing: int) -> None:
    datasets = series_datasets(anatomy(slices=40))
    del datasets[missing]
    with pytest.raises(errors.MissingSlices, match="1 missing among 39 slices"):
        read_series(write(datasets, tmp_path))


def test_enhanced_with_a_temporal_position_is_a_duplicate(tmp_path: Path) -> None:
    datasets = series_datasets()
    with pytest.raises(errors.DuplicateSlices):
        read_series(write([enhanced([*datasets, *datasets])], tmp_path))


def test_enhanced_with_missing_groups(tmp_path: Path) -> None:
    ds = enhanced(series_datasets())
    ds.PerFrameFunctionalGroupsSequence = ds.PerFrameFunctionalGroupsSequence[:-1]
    with pytest.raises(errors.MalformedAttribute, match="PerFrameFunctionalGroupsSequence"):
        read_series(write([ds], tmp_path))


def test_no_files() -> None:
    with pytest.raises(ValueError, match="files"):
        read_series([])


def test_a_file_that_is_not_there_or_not_dicom(tmp_path: Path) -> None:
    with pytest.raises(errors.UnreadableFile, match="FileNotFoundError"):
        read_series([tmp_path / "absent"])
    text = tmp_path / "text"
    text.write_text("not a scan\n" * 100)
    with pytest.raises(errors.SeriesRefused):
        read_series([text])


def test_what_pydicom_says_about_bad_values_stays_unsaid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """pydicom quotes malformed values in warnings and logs; the reader lets neither out."""
    datasets = series_datasets()
    uid = datasets[0].FrameOfReferenceUID.encode()
    files = write(datasets, tmp_path)
    for file in files:
        content = file.read_bytes()
        assert uid in content
        file.write_bytes(content.replace(uid, b"Doe" + uid[3:]).replace(b"DS\x04\x002.5 ", b"DS\x04\x00Doe "))
    with pytest.warns(UserWarning, match="Doe"):  # the tripwire: pydicom alone quotes it
        _ = pydicom.dcmread(files[0]).FrameOfReferenceUID
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        caplog.clear()
        assert_is_anatomy(read_series(files))
        with pytest.raises(errors.MalformedAttribute, match="SliceThickness") as refusal:
            read_series(files[:1])
    assert "Doe" not in str(refusal.value)
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__
    assert not caught
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


# --- malformed files: a volume or a SeriesRefused, nothing else -------------------------------------------------


def read_or_refuse(files: list[Path]) -> None:
    with contextlib.suppress(errors.SeriesRefused):
        assert np.isfinite(read_series(files).hu).all()


def with_raw_value(ds: FileDataset, tag: int, raw: bytes | None) -> bytes:
    """The file with one element dropped (None) or holding any bytes, in Implicit VR Little Endian (no VR to check)."""
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    buffer = DicomBytesIO()
    Dataset.save_as(ds, buffer, implicit_vr=True, little_endian=True, enforce_file_format=True)
    content = buffer.getvalue()
    end_of_meta = 128 + 4 + 12 + struct.unpack_from("<L", content, 140)[0]  # FileMetaInformationGroupLength
    place, kept, rest = end_of_meta, content[:end_of_meta], b""
    while place < len(content):
        group, element, length = struct.unpack_from("<HHL", content, place)
        here, chunk = group << 16 | element, content[place : place + 8 + length]
        kept, rest = (kept + chunk, rest) if here < tag else (kept, rest + chunk * (here != tag))
        place += len(chunk)
    value = b"" if raw is None else struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(raw)) + raw
    return kept + value + rest


def test_the_corrupting_writer_can_write_a_valid_file(tmp_path: Path) -> None:
    files = []
    for k, ds in enumerate(series_datasets()):
        files.append(tmp_path / str(k))
        files[-1].write_bytes(with_raw_value(ds, pydicom.datadict.tag_for_keyword("RescaleSlope"), b"1 "))
    assert_is_anatomy(read_series(files))


KEYWORDS = sorted(
    {element.keyword for element in series_datasets()[0] if element.keyword}
    | {"NumberOfFrames", "PixelPaddingValue", "SharedFunctionalGroupsSequence", "BurnedInAnnotation"}
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keyword=st.sampled_from(KEYWORDS),
    raw=st.none() | st.sampled_from([b"", b"\\\\", b"nan", b"-1", b"1e999", b"\xff\xff"]) | st.binary(max_size=12),
    multiframe=st.booleans(),
)
def test_any_attribute_dropped_or_corrupted(tmp_path: Path, keyword: str, raw: bytes | None, multiframe: bool) -> None:
    datasets = series_datasets(anatomy(slices=3))
    if multiframe:
        datasets = [enhanced(datasets)]
    files = [tmp_path / str(k) for k in range(len(datasets))]
    for file, ds in zip(files, datasets, strict=True):
        file.write_bytes(with_raw_value(ds, pydicom.datadict.tag_for_keyword(keyword), raw))
    read_or_refuse(files)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_changed_or_cut(tmp_path: Path, data: st.DataObject) -> None:
    file = write(series_datasets(anatomy(slices=1)), tmp_path)[0]
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_or_refuse([file])


def test_cut_anywhere_is_refused(tmp_path: Path) -> None:
    file = write(series_datasets(anatomy(slices=1)), tmp_path)[0]
    content = file.read_bytes()
    for length in range(0, len(content), 37):
        file.write_bytes(content[:length])
        with pytest.raises(errors.SeriesRefused):
            read_series([file])


def test_implicit_little_endian(tmp_path: Path) -> None:
    files = []
    for k, ds in enumerate(series_datasets()):
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        files.append(tmp_path / str(k))
        Dataset.save_as(ds, files[-1], implicit_vr=True, little_endian=True)
    assert_is_anatomy(read_series(files))


# --- real data ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("patient", ["STS_043", "TCGA-50-5044"])
def test_the_same_voxels_at_the_same_places_as_monai_reads(shared_ct: Path, patient: str) -> None:
    """MONAI's PydicomReader shares no code with ours; the second patient's rows run to the front."""
    from monai.data import PydicomReader

    files = sorted((shared_ct / patient).rglob("*.dcm"))
    volume = read_series(files)
    reader = PydicomReader()
    voxels, meta = reader.get_data(reader.read(str(files[0].parent) if len(files) > 1 else str(files[0])))
    voxels = voxels.reshape(*voxels.shape[:2], -1)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in volume.hu.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    lps = index * np.asarray(volume.spacing_mm) @ np.asarray(volume.direction) + np.asarray(volume.origin_mm)
    ras = np.column_stack([lps * [-1, -1, 1], np.ones(len(lps))])
    theirs = (ras @ np.linalg.inv(meta["affine"]).T)[:, :3]
    np.testing.assert_allclose(theirs, np.rint(theirs), atol=1e-6)
    values = voxels[tuple(np.rint(theirs).astype(int).T)]
    np.testing.assert_array_equal(np.where(values < -1024, -1000, values), volume.hu.ravel())
