from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from datetime import date
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medical_data.dicom import read_series
from medical_data.dicom_write import Generated, Scan, write_ct_series
from medical_data.errors import ImpossibleHU
from medical_data.volume import Volume

SCAN = Scan(
    patient_id="PHANTOM-0-0001",
    patient_name="Phantom^One",
    patient_sex="F",
    birth_date=date(1950, 1, 1),
    patient_size_m=1.62,
    patient_weight_kg=68.0,
    study_date=date(2000, 1, 2),
    institution="Phantom Hospital",
    manufacturer="phantom",
    model="Model",
    kernel="STANDARD",
    kvp=120,
    slice_thickness_mm=1.25,
    body_part="CHEST",
    made_artificially=True,
)
GENERATED = Generated(sample="0007", derivation="diffusion model, 50 steps, seed 1")

# PS3.3 A.3: attributes that must have a value (Type 1) and that must be present (Type 2) in the CT Image IOD.
TYPE_1 = [
    "StudyInstanceUID", "SeriesInstanceUID", "Modality", "FrameOfReferenceUID", "PixelSpacing",
    "ImageOrientationPatient", "ImagePositionPatient", "ImageType", "SamplesPerPixel",
    "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelData", "RescaleIntercept", "RescaleSlope", "SOPClassUID",
    "SOPInstanceUID", "PatientPosition",
]  # fmt: skip
TYPE_2 = [
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "ReferringPhysicianName", "StudyID", "AccessionNumber", "SeriesNumber",
    "PositionReferenceIndicator", "Manufacturer", "InstanceNumber", "SliceThickness", "KVP",
    "AcquisitionNumber",
]  # fmt: skip


def some_volume(depth: int = 5, **geometry: object) -> Volume:
    rng = np.random.default_rng(depth)
    hu = rng.integers(-1024, 3072, (depth, 6, 8)).astype(np.float32)
    return Volume(**{"hu": hu, "spacing_mm": (12.5, 2.9296875, 0.7), **geometry})  # type: ignore[arg-type]


@pytest.mark.parametrize("subject", [SCAN, GENERATED], ids=["scan", "generated"])
def test_every_required_attribute_is_there(tmp_path: Path, subject: Scan | Generated) -> None:
    for file in write_ct_series(some_volume(), tmp_path, subject=subject, uid_seed="study"):
        dataset = pydicom.dcmread(file)
        assert [k for k in TYPE_1 if k not in dataset or dataset[k].is_empty] == []
        assert [k for k in TYPE_2 if k not in dataset] == []
        assert dataset.SOPClassUID == pydicom.uid.CTImageStorage
        assert dataset.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert (dataset.BitsAllocated, dataset.PixelRepresentation) == (16, 1)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
@pytest.mark.parametrize("subject", [SCAN, GENERATED], ids=["scan", "generated"])
def test_dciodvfy_finds_no_error(tmp_path: Path, subject: Scan | Generated) -> None:
    for file in write_ct_series(some_volume(), tmp_path, subject=subject, uid_seed="study"):
        report = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False)
        errors = [line for line in report.stderr.splitlines() if line.startswith("Error")]
        # SyntheticData (0008,001C) is younger than the dictionary of the dicom3tools that are widely packaged.
        assert "CTImage" in report.stderr
        assert [line for line in errors if "0x0008,0x001c" not in line] == []


@pytest.mark.skipif(shutil.which("dcentvfy") is None, reason="dcentvfy (dicom3tools) is not installed")
def test_dcentvfy_finds_one_consistent_series(tmp_path: Path) -> None:
    files = write_ct_series(some_volume(), tmp_path, subject=GENERATED, uid_seed="study")
    report = subprocess.run(["dcentvfy", *map(str, files)], capture_output=True, text=True, check=True)
    assert "Error" not in report.stdout + report.stderr


@pytest.mark.skipif(shutil.which("dcmdump") is None, reason="dcmdump (dcmtk) is not installed")
def test_dcmtk_reads_every_file(tmp_path: Path) -> None:
    for file in write_ct_series(some_volume(), tmp_path, subject=GENERATED, uid_seed="study"):
        dump = subprocess.run(["dcmdump", str(file)], capture_output=True, text=True, check=True)
        assert dump.stderr == ""
        assert "(7fe0,0010) OW" in dump.stdout


def test_a_series_is_one_evenly_stepped_frame_of_reference(tmp_path: Path) -> None:
    tilt = np.deg2rad(10)
    along = (0.0, -float(np.sin(tilt)), float(np.cos(tilt)))
    direction = (along, (0.0, float(np.cos(tilt)), float(np.sin(tilt))), (1.0, 0.0, 0.0))
    volume = some_volume(9, origin_mm=(-10.5, 20.25, 300.0), direction=direction)
    files = write_ct_series(volume, tmp_path, subject=GENERATED, uid_seed="sample 7")
    headers = [pydicom.dcmread(file) for file in files]
    for keyword in ("FrameOfReferenceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        assert len({header[keyword].value for header in headers}) == 1
    assert len({tuple(header.ImageOrientationPatient) for header in headers}) == 1
    steps = np.diff(np.array([header.ImagePositionPatient for header in headers], dtype=float), axis=0)
    assert steps == pytest.approx(np.tile(12.5 * np.array(along), (8, 1)), abs=1e-6)


def test_read_back_equals_what_was_written(tmp_path: Path) -> None:
    volume = some_volume(origin_mm=(-187.123456789, -200.5, -312.7))
    back = read_series(write_ct_series(volume, tmp_path, subject=SCAN, uid_seed="study"))
    assert np.array_equal(back.hu, volume.hu)
    assert back.spacing_mm == pytest.approx(volume.spacing_mm, rel=1e-9)
    assert back.origin_mm == pytest.approx(volume.origin_mm, abs=1e-6)
    assert np.asarray(back.direction) == pytest.approx(np.asarray(volume.direction), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    order=st.sampled_from(list(permutations(range(3)))),
    signs=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
    roll=st.floats(-0.6, 0.6),
    pitch=st.floats(-0.6, 0.6),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 20)] * 3),
    depth=st.integers(2, 5),
    subject=st.sampled_from([SCAN, GENERATED]),
)
def test_any_orientation_survives(
    order: tuple[int, ...],
    signs: tuple[float, ...],
    roll: float,
    pitch: float,
    origin: tuple[float, float, float],
    spacing: tuple[float, float, float],
    depth: int,
    subject: Scan | Generated,
) -> None:
    about_z = np.array([[np.cos(roll), np.sin(roll), 0], [-np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]])
    rows = (np.diag(signs) @ np.eye(3)[list(order)]) @ about_z @ about_x
    volume = some_volume(
        depth, origin_mm=origin, spacing_mm=spacing, direction=tuple(tuple(map(float, row)) for row in rows)
    )
    with TemporaryDirectory() as folder:
        back = read_series(write_ct_series(volume, Path(folder), subject=subject, uid_seed="oblique"))
    expected = volume.canonical()
    assert np.array_equal(back.hu, expected.hu)
    assert back.spacing_mm == pytest.approx(expected.spacing_mm, rel=1e-5)
    assert back.origin_mm == pytest.approx(expected.origin_mm, abs=1e-3)
    assert np.asarray(back.direction) == pytest.approx(np.asarray(expected.direction), abs=1e-6)


def test_a_fraction_of_a_hounsfield_unit_is_rounded(tmp_path: Path) -> None:
    hu = np.array([[[-999.6, -0.4, 40.5, 1000.49]]], dtype=np.float32)
    file = write_ct_series(
        Volume(hu=hu, spacing_mm=(1, 1, 1)), tmp_path, subject=replace(SCAN, slice_thickness_mm=1), uid_seed="x"
    )
    assert np.array_equal(read_series(file).hu, np.rint(hu))


@pytest.mark.parametrize("hu", [31744.0, -33793.0])
def test_what_int16_cannot_hold_is_refused_and_nothing_written(tmp_path: Path, hu: float) -> None:
    volume = Volume(hu=np.full((1, 2, 2), hu, np.float32), spacing_mm=(1, 1, 1))
    with pytest.raises(ImpossibleHU, match="clip"):
        write_ct_series(volume, tmp_path / "series", subject=SCAN, uid_seed="x")
    assert not (tmp_path / "series").exists()


def test_a_generated_sample_is_marked_and_has_no_patient(tmp_path: Path) -> None:
    file = write_ct_series(some_volume(1), tmp_path, subject=GENERATED, uid_seed="sample 7")[0]
    dataset = pydicom.dcmread(file)
    assert dataset[0x0008, 0x001C].value == "YES"
    assert list(dataset.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
    assert dataset.DerivationDescription == GENERATED.derivation
    assert dataset.PatientID == "SYNTHETIC-0007"
    assert dataset.PatientIdentityRemoved == "YES"
    assert dataset.DeidentificationMethod
    for keyword in ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "AccessionNumber"):
        assert dataset[keyword].is_empty
    for keyword in ("PatientWeight", "PatientSize", "InstitutionName", "SeriesDate", "PatientAge"):
        assert keyword not in dataset


def test_a_single_generated_slice_reads_back(tmp_path: Path) -> None:
    volume = some_volume(1)
    back = read_series(write_ct_series(volume, tmp_path, subject=GENERATED, uid_seed="sample 7"))
    assert np.array_equal(back.hu, volume.hu)
    assert back.spacing_mm == pytest.approx(volume.spacing_mm, rel=1e-9)


def test_a_scan_is_an_original_and_says_when_it_is_made_up(tmp_path: Path) -> None:
    made_up = pydicom.dcmread(write_ct_series(some_volume(), tmp_path / "a", subject=SCAN, uid_seed="x")[0])
    assert (made_up.SyntheticData, made_up.QualityControlSubject) == ("YES", "YES")
    assert list(made_up.ImageType) == ["ORIGINAL", "PRIMARY", "AXIAL"]
    assert (made_up.SliceThickness, made_up.SpacingBetweenSlices) == (1.25, 12.5)
    real = replace(SCAN, made_artificially=False)
    written = pydicom.dcmread(write_ct_series(some_volume(), tmp_path / "b", subject=real, uid_seed="x")[0])
    assert "SyntheticData" not in written
    assert "QualityControlSubject" not in written


def test_uids_tell_instances_series_and_studies_apart(tmp_path: Path) -> None:
    volume = some_volume()
    other = Volume(hu=volume.hu + 1, spacing_mm=volume.spacing_mm)

    def uids(name: str, content: Volume, seed: str, number: int) -> list[pydicom.Dataset]:
        files = write_ct_series(content, tmp_path / name, subject=SCAN, uid_seed=seed, series_number=number)
        return [pydicom.dcmread(f, stop_before_pixels=True) for f in files]

    first = uids("a", volume, "study", 1)
    second = uids("b", volume, "study", 2)
    changed = uids("c", other, "study", 1)
    stranger = uids("d", volume, "another study", 1)
    everything = [first, second, changed, stranger]
    assert len({d.SOPInstanceUID for series in everything for d in series}) == 4 * len(first)
    assert len({d.SeriesInstanceUID for series in everything for d in series}) == 4
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        assert len({d[keyword].value for series in (first, second, changed) for d in series}) == 1
        assert stranger[0][keyword].value != first[0][keyword].value
    assert all(pydicom.uid.UID(d.SOPInstanceUID).is_valid for d in first)


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    runs = [write_ct_series(some_volume(), tmp_path / name, subject=SCAN, uid_seed="study") for name in ("a", "b")]
    assert [f.read_bytes() for f in runs[0]] == [f.read_bytes() for f in runs[1]]
    assert [f.name for f in runs[0]] == [f"IM{i:04d}.dcm" for i in range(1, 6)]


def test_a_second_series_does_not_go_into_the_same_folder(tmp_path: Path) -> None:
    write_ct_series(some_volume(), tmp_path, subject=SCAN, uid_seed="study")
    with pytest.raises(FileExistsError, match="own folder"):
        write_ct_series(some_volume(2), tmp_path, subject=SCAN, uid_seed="study")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patient_id", ""),
        ("patient_id", "A" * 65),
        ("patient_name", "Secret\\Name"),
        ("institution", "line\nbreak"),
        ("kernel", "K" * 17),
        ("model", "Größe"),
        ("patient_sex", "female"),
        ("kvp", 0.0),
        ("kvp", float("nan")),
        ("slice_thickness_mm", -1.0),
        ("birth_date", date(2001, 1, 1)),
    ],
)
def test_an_impossible_scan_is_refused_without_quoting_it(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as refusal:
        replace(SCAN, **{field: value})  # type: ignore[arg-type]
    assert "Secret" not in str(refusal.value)


@pytest.mark.parametrize("sample", ["", "x" * 55, "a\\b"])
def test_an_impossible_sample_name_is_refused(sample: str) -> None:
    with pytest.raises(ValueError, match="sample"):
        Generated(sample=sample, derivation="a model")


def test_a_study_without_a_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uid_seed"):
        write_ct_series(some_volume(), tmp_path, subject=SCAN, uid_seed="")
