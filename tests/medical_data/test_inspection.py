from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ct_samples import anatomy, changed_series, series_datasets, write, write_nifti, xyz
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage, generate_uid

from medical_data.deidentify import Pseudonymizer
from medical_data.discovery import Format, find_series
from medical_data.errors import SeriesRefused, UnreadableFolder
from medical_data.inspection import InspectionReport, SeriesRow, iter_volumes
from medical_data.volume import Volume

PSEUDONYMIZER = Pseudonymizer(bytes(range(32)))


def inspect(folder: Path, format: Format = "auto") -> tuple[InspectionReport, list[Volume | None]]:
    pairs = list(iter_volumes(folder, format=format, pseudonymizer=PSEUDONYMIZER, progress=False))
    return InspectionReport(rows=tuple(row for row, _ in pairs)), [volume for _, volume in pairs]


def files_on_disk(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def assert_adds_up(report: InspectionReport, folder: Path) -> None:
    counts = report.counts()
    assert counts["files_found"] == files_on_disk(folder)
    assert counts["files_found"] == (
        counts["files_in_accepted_series"]
        + counts["files_in_refused_series"]
        + counts["files_of_other_format"]
        + counts["files_not_images"]
    )
    assert counts["series_refused"] == sum(report.refusals().values())


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two series of one patient and one of another in one folder, NIfTI of both, a bad series, and no images."""
    folder = tmp_path / "scans"
    write(series_datasets(series="one", patient_id="STS_002"), folder / "x" / "y", stem="b")
    write(series_datasets(series="two", patient_id="sts_002 "), folder / "x" / "y", stem="a")
    write(series_datasets(series="three", patient_id="STS_003"), folder / "x" / "y", stem="c")
    (folder / "STS_002" / "deep").mkdir(parents=True)
    write_nifti(folder / "STS_002" / "deep" / "ct.nii.gz", xyz(anatomy()))
    write_nifti(folder / "STS_003.nii", xyz(anatomy()))
    write_nifti(folder / "STS_002" / "mask.nii.gz", (xyz(anatomy()) > 0).astype(np.uint8))
    changed_series(folder / "bad", lambda ds, k: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    for file in (folder / "bad").iterdir():
        content = file.read_bytes().replace(b"PATIENT A", b"STS_003  ")
        file.write_bytes(content)
    (folder / "README.txt").write_text("about these scans")
    (folder / ".hidden").write_bytes(b"")
    return folder


def test_patients_across_series_folders_and_formats(mixed: Path) -> None:
    report, volumes = inspect(mixed)
    assert_adds_up(report, mixed)
    counts = report.counts()
    assert counts["patients_accepted"] == 2
    assert (counts["series_accepted"], counts["series_refused"]) == (5, 2)
    assert counts["files_not_images"] == 2
    accepted = [row for row in report.rows if row.accepted]
    two, three = (PSEUDONYMIZER.pseudonym(p) for p in ("STS_002", "STS_003"))
    assert [row.pseudonym for row in accepted] == [two, three, two, two, three]
    assert report.refusals() == {"Localizer": 1, "NotCT": 1}
    for row, volume in zip(report.rows, volumes, strict=True):
        assert (volume is not None) == row.accepted
        if volume is not None:
            np.testing.assert_array_equal(volume.hu, anatomy())
            assert row.slices == 5
            assert row.size == (12, 16)
            assert row.hu_range == (-1000, 249)
            assert row.spacing_mm == pytest.approx((2.5, 0.75, 0.5))


def test_the_order_depends_on_names_only(mixed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(mixed, copy)
    for file in sorted((p for p in copy.rglob("*") if p.is_file()), reverse=True):  # other inodes, other times
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    one, other = (inspect(folder)[0].to_json() for folder in (mixed, copy))
    assert json.dumps(one).replace(str(mixed), "") == json.dumps(other).replace(str(copy), "")


@pytest.mark.parametrize(("format", "accepted", "other"), [("dicom", 3, 3), ("nifti", 2, 20), ("auto", 5, 0)])
def test_formats(mixed: Path, format: Format, accepted: int, other: int) -> None:
    report, _ = inspect(mixed, format)
    assert_adds_up(report, mixed)
    assert report.counts()["series_accepted"] == accepted
    assert report.counts()["files_of_other_format"] == other


def test_every_file_has_its_place(mixed: Path) -> None:
    contents = find_series(mixed, "auto")
    placed = [f for s in contents.series for f in s.files] + list(contents.other_format) + list(contents.not_images)
    assert sorted(placed) == sorted(p for p in mixed.rglob("*") if p.is_file())
    assert "STS_" not in "".join(repr(s).replace(str(mixed), "").split("files=")[0] for s in contents.series)
    assert all("patient_id" not in repr(s) for s in contents.series)


def test_files_that_cannot_be_read_are_refused_alone(mixed: Path) -> None:
    good = inspect(mixed)[0].counts()
    (mixed / "broken link").symlink_to(mixed / "nowhere")
    whole = next((mixed / "x" / "y").iterdir()).read_bytes()
    (mixed / "header cut").write_bytes(whole[:200])
    (mixed / "no patient").mkdir()
    changed_series(mixed / "no patient", lambda ds, k: setattr(ds, "PatientID", " "))
    for file in (mixed / "no patient").iterdir():  # a series of its own
        file.write_bytes(file.read_bytes().replace(b"1.2.826", b"1.2.827"))
    report, _ = inspect(mixed)
    assert_adds_up(report, mixed)
    assert report.counts()["series_accepted"] == good["series_accepted"]
    assert report.refusals() == {
        "Localizer": 1,
        "MissingPatientID": 1,
        "NotCT": 1,
        "TruncatedFile": 1,
        "UnreadableFile": 1,
    }
    assert {row.pseudonym for row in report.rows if row.reason == "MissingPatientID"} == {None}


def test_a_series_without_uid_and_two_patients_under_one(tmp_path: Path) -> None:
    write(series_datasets(), tmp_path / "a")
    datasets = series_datasets(series="other")
    datasets[3].PatientID = "SOMEBODY ELSE"
    write(datasets, tmp_path / "b")
    datasets = series_datasets(series="third")
    for ds in datasets:
        del ds.SeriesInstanceUID
    write(datasets, tmp_path / "c")
    report, _ = inspect(tmp_path)
    assert_adds_up(report, tmp_path)
    assert report.refusals() == {"MissingAttribute": 5, "MixedSeries": 1}
    assert report.counts()["series_accepted"] == 1


def test_a_dicomdir_and_look_alikes_are_not_images(tmp_path: Path) -> None:
    (tmp_path / "disc").mkdir()
    write(series_datasets(), tmp_path / "disc" / "images")
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["directory"])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    directory.FileSetID, directory.DirectoryRecordSequence = "DISC", []
    directory.save_as(tmp_path / "disc" / "DICOMDIR", enforce_file_format=True)
    (tmp_path / "disc" / "looks").write_bytes(b"\x08\0" + b"no data set " * 20)
    (tmp_path / "disc" / "zipped.gz").write_bytes(b"\x1f\x8b not really")
    report, volumes = inspect(tmp_path / "disc")
    assert_adds_up(report, tmp_path / "disc")
    assert report.counts()["files_not_images"] == 3
    assert report.counts()["series_accepted"] == 1
    assert volumes[0] is not None


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(series_datasets(), tmp_path / "elsewhere")
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "one").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (scans / "loop").symlink_to(scans, target_is_directory=True)
    report, _ = inspect(scans)
    assert report.counts()["files_found"] == 5
    assert report.counts()["series_accepted"] == 1


def test_a_folder_that_cannot_be_opened_is_not_passed_over(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def denied(place: str) -> object:
        if Path(place) == mixed / "x" / "y":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", denied)
    report, _ = inspect(mixed)
    (row,) = (row for row in report.rows if row.reason == "UnreadableFile")
    assert row.example_file == mixed / "x" / "y"
    assert report.counts()["series_accepted"] == 2


def test_an_empty_folder_and_none(tmp_path: Path) -> None:
    report, _ = inspect(tmp_path)
    assert report.rows == ()
    assert report.counts()["files_found"] == 0
    assert "files found: 0" in report.table()
    with pytest.raises(UnreadableFolder):
        inspect(tmp_path / "absent")


def test_table_and_json(mixed: Path) -> None:
    report, _ = inspect(mixed)
    table = report.table()
    lines = table.splitlines()
    starts = [lines[1].index(" " * 2 + "-", place) for place in (0, 40)]
    for row in lines[2:9]:
        assert all(row[start : start + 2] == "  " for start in starts)  # columns are aligned
    assert "refused: Localizer" in table
    assert "ImageType = LOCALIZER" in table
    assert "patients accepted: 2" in table
    data = json.loads(json.dumps(report.to_json()))
    assert (data["schema"], data["version"]) == ("fedct.inspection", 1)
    assert data["counts"] == report.counts()
    assert len(data["rows"]) == len(report.rows)
    without_files = json.dumps([{k: v for k, v in row.items() if k != "example_file"} for row in data["rows"]])
    for leak in ("STS_00", "Doe", "1901", "Nowhere", "ACC-1", str(mixed)):
        assert leak not in without_files


def test_progress_goes_to_stderr(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (False, True):
        list(iter_volumes(mixed, format="auto", pseudonymizer=PSEUDONYMIZER, progress=progress))
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("reading series" in captured.err) == progress


def test_a_row_says_either_patient_or_reason(tmp_path: Path) -> None:
    for wrong in ({"accepted": True, "pseudonym": None}, {"accepted": False, "pseudonym": "p"}):
        with pytest.raises(ValueError, match="SeriesRow"):
            SeriesRow(format="dicom", files=1, example_file=tmp_path, **wrong)  # type: ignore[arg-type]


def test_reasons_are_the_names_of_refusals(mixed: Path) -> None:
    names = {kind.__name__ for kind in _all_kinds(SeriesRefused)}
    assert set(inspect(mixed)[0].refusals()) <= names


def _all_kinds(kind: type[SeriesRefused]) -> set[type[SeriesRefused]]:
    return {kind}.union(*(_all_kinds(sub) for sub in kind.__subclasses__()))


def test_the_module_alone_loads_nothing_heavy() -> None:
    """Every task of a site is a fresh process and pays for what it imports."""
    code = "import sys, medical_data.inspection; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "medical_data" in done.stdout.split()
    assert not set(done.stdout.split()) & {"pydicom", "nibabel", "scipy", "skimage", "torch", "monai", "tqdm"}


# --- real data ----------------------------------------------------------------------------------------------------


def manifest(shared_ct: Path) -> dict[str, list[str]]:
    lines = (shared_ct / "MANIFEST.md").read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith(("|STS_", "|TCGA-"))]
    return {row[0]: row[1:] for row in rows}


def test_all_real_patients_are_accepted_as_the_manifest_says(shared_ct: Path) -> None:
    report, volumes = inspect(shared_ct)
    assert_adds_up(report, shared_ct)
    expected = manifest(shared_ct)
    assert len(expected) == report.counts()["patients_accepted"] == report.counts()["series_accepted"] == 30
    by_pseudonym = {row.pseudonym: row for row in report.rows if row.accepted}
    for patient, (kind, slices, size, spacing, low, high, maker, *_) in expected.items():
        row = by_pseudonym[PSEUDONYMIZER.pseudonym(patient)]
        assert row.format == ("dicom" if kind.startswith("DICOM") else "nifti")
        assert row.slices == int(slices)
        assert row.size == tuple(int(n) for n in size.split("x"))
        assert row.spacing_mm is not None
        assert row.hu_range is not None
        column, line, *between = (float(v) for v in spacing.split("x"))
        assert row.spacing_mm[1:] == pytest.approx((line, column), abs=5e-4)
        if between:
            assert row.spacing_mm[0] == pytest.approx(between[0], abs=1e-4)
        assert row.hu_range[1] == int(high)
        assert row.hu_range[0] == max(int(low), -1024)  # what lies below is padding, now air
        if row.format == "dicom":
            assert maker.startswith(str(row.attributes["Manufacturer"]))
    assert report.refusals() == {
        "BurnedInAnnotation": 1,
        "CoarseHU": 1,  # 16 encodings of one slice share a SeriesInstanceUID, one of them is 8 bit
        "DerivedMap": 1,
        "GantryTilt": 1,
        "Localizer": 1,
        "MissingSlices": 1,
        "NotCT": 22,  # the masks
    }
    assert sum(volume is not None for volume in volumes) == 30
    for volume in volumes:
        if volume is not None:
            np.testing.assert_allclose(volume.direction, [(0, 0, 1), (0, 1, 0), (1, 0, 0)], atol=1e-6)
