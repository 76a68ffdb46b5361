from __future__ import annotations

import base64
import hashlib
import hmac
import math
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydicom
import pytest
from ct_samples import series_datasets
from hypothesis import given
from hypothesis import strategies as st

from medical_data.deidentify import ALLOWED, SECRET_BYTES, Pseudonymizer, keep_allowed, site_secret
from medical_data.errors import InsecureSecret, MissingPatientID

SECRET = bytes(range(SECRET_BYTES))
OTHER_SECRET = bytes(reversed(range(SECRET_BYTES)))


@given(st.text(min_size=1).filter(lambda s: s.strip(" \0\t\r\n")))
def test_pseudonyms_are_safe_file_names_and_keyed(patient_id: str) -> None:
    pseudonym = Pseudonymizer(SECRET).pseudonym(patient_id)
    assert re.fullmatch(r"p[a-z2-7]{32}", pseudonym)  # 32 × 5 bits
    assert pseudonym == Pseudonymizer(SECRET).pseudonym(patient_id)
    assert pseudonym != Pseudonymizer(OTHER_SECRET).pseudonym(patient_id)


def test_the_pseudonym_is_hmac_sha256() -> None:
    digest = hmac.new(SECRET, b"fedct patient\0sts_002", hashlib.sha256).digest()
    assert Pseudonymizer(SECRET).pseudonym("STS_002") == "p" + base64.b32encode(digest)[:32].decode().lower()


@pytest.mark.parametrize("same", ["STS_002 ", " STS_002", "STS_002\0", "sts_002", "STS_002", " Sts_002\0 "])
def test_padding_and_case_do_not_make_another_patient(same: str) -> None:
    assert Pseudonymizer(SECRET).pseudonym(same) == Pseudonymizer(SECRET).pseudonym("STS_002")


@pytest.mark.parametrize(
    ("one", "other"), [("STS_002", "STS_003"), ("A B", "AB"), ("A  B", "A B"), ("1", "01"), ("É", "E")]
)
def test_other_identifiers_are_other_patients(one: str, other: str) -> None:
    assert Pseudonymizer(SECRET).pseudonym(one) != Pseudonymizer(SECRET).pseudonym(other)


@pytest.mark.parametrize("nobody", ["", " ", "\0\0", " \0 "])
def test_nobody(nobody: str) -> None:
    with pytest.raises(MissingPatientID):
        Pseudonymizer(SECRET).pseudonym(nobody)


@pytest.mark.parametrize("secret", [b"", b"short", bytes(31), bytes(33)])
def test_the_secret_has_32_bytes_and_stays_out_of_repr(secret: bytes) -> None:
    with pytest.raises(InsecureSecret):
        Pseudonymizer(secret)
    assert "\\x" not in repr(Pseudonymizer(SECRET))


def test_site_secret_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "site" / "secret"
    secret = site_secret(path)
    assert len(secret) == SECRET_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert site_secret(path) == secret
    assert site_secret(tmp_path / "other") != secret
    assert [p.name for p in path.parent.iterdir()] == ["secret"]


def test_of_several_at_once_one_wins(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(site_secret, [tmp_path / "secret"] * 64))
    assert len(secrets) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_secret_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    site_secret(path)
    path.chmod(mode)
    with pytest.raises(InsecureSecret, match=f"{mode:04o}") as caught:
        site_secret(path)
    assert caught.value.file == path


@pytest.mark.parametrize("size", [0, 16, 33])
def test_a_secret_of_wrong_size_is_refused_and_kept(tmp_path: Path, size: int) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x" * size)
    path.chmod(0o600)
    with pytest.raises(InsecureSecret, match=f"{size} bytes"):
        site_secret(path)
    assert path.read_bytes() == b"x" * size


def test_keep_allowed_of_a_synthetic_header() -> None:
    kept = keep_allowed(series_datasets()[0])
    assert kept == {
        "Modality": "CT",
        "PatientSex": "F",
        "BodyPartExamined": "CHEST",
        "Manufacturer": "GE",
        "ConvolutionKernel": "STANDARD",
        "KVP": 120.0,
        "SliceThickness": 2.5,
        "PixelSpacing": [0.75, 0.5],
        "Rows": 12.0,
        "Columns": 16.0,
    }


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("Modality", "DOE"),
        ("PatientSex", "DOE"),
        ("BodyPartExamined", "DOE JOHN"),
        ("ConvolutionKernel", "Doe John"),
        ("PatientPosition", "DOE"),
        ("KVP", "nan"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_text_where_a_code_belongs_is_not_kept(keyword: str, value: str) -> None:
    ds = series_datasets()[0]
    setattr(ds, keyword, value)
    assert keyword not in keep_allowed(ds)


def test_an_unknown_maker_is_not_quoted() -> None:
    ds = series_datasets()[0]
    ds.Manufacturer = "Workshop of John Doe"
    assert keep_allowed(ds)["Manufacturer"] == "OTHER"


def test_the_list_holds_nothing_that_the_standard_would_remove() -> None:
    """No person, identifier, UID, date, time, age or free text on the list (VRs of PS3.5 that carry them)."""
    free = {"PN", "UI", "DA", "TM", "DT", "AS", "LT", "ST", "UT", "UC", "AE", "OB", "OW", "UN", "SQ"}
    for keyword in ALLOWED:
        vr = pydicom.datadict.dictionary_VR(keyword)
        assert vr not in free
        if vr in {"LO", "SH"}:
            assert keyword in {"Manufacturer", "ConvolutionKernel"}  # each has a check of its own


def test_real_headers_keep_nothing_identifying(shared_ct: Path) -> None:
    seen = 0
    for patient in sorted(p for p in shared_ct.iterdir() if p.is_dir() and p.name != "edge_cases"):
        for file in sorted(patient.rglob("*.dcm"))[:1]:
            ds = pydicom.dcmread(file, stop_before_pixels=True)
            kept = keep_allowed(ds)
            seen += 1
            assert kept["Modality"] == "CT"
            assert kept["Manufacturer"] in {"GE", "SIEMENS"}
            assert all(isinstance(v, str) or math.isfinite(v) for v in kept.values() if not isinstance(v, list))
            text = repr(kept)
            for keyword in ("PatientID", "PatientName", "StudyDate", "AccessionNumber", "StudyInstanceUID"):
                value = str(ds.get(keyword) or "")
                assert len(value) < 4 or value not in text
    assert seen == 22
