"""De-identification at the door: who a patient was stays with the site, what a scanner did may come along.

A patient becomes a keyed pseudonym (HMAC-SHA256, RFC 2104): without the site's secret nobody can test whether
a known PatientID is in a data set, and two sites give one patient two unrelated pseudonyms.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import os
import re
import secrets
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from medical_data.errors import InsecureSecret, MissingPatientID

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SECRET_BYTES = 32
# 160 of 256 bits: 32 characters of base32 without padding, no collision among any number of patients.
PSEUDONYM_BYTES = 20


_MAKERS = ("GE", "SIEMENS", "PHILIPS", "CANON", "TOSHIBA", "HITACHI", "FUJIFILM", "NEUSOFT", "UNITED IMAGING")
# Codes of reconstruction kernels such as B30f or STANDARD. No blank: a person's name has one, a code can do
# without.
_KERNEL = re.compile(r"[A-Za-z0-9+_./-]{1,16}")


def _number(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _maker(text: str) -> str:
    """A known maker; anything else is OTHER, since the attribute is free text."""
    return next((maker for maker in _MAKERS if text.upper().startswith(maker)), "OTHER")


def _kernel(text: str) -> str | None:
    return text if _KERNEL.fullmatch(text) else None


def _one_of(codes: str) -> Callable[[str], str | None]:
    known = frozenset(codes.split())
    return lambda text: text if text in known else None


# All that may be kept of a header, and what a value must be. Not on the list, and so never kept: names,
# identifiers, UIDs, dates, ages, institutions, free text, private elements, and whatever a later edition of
# the standard adds.
ALLOWED: Mapping[str, Callable[[str], str | float | None]] = {
    "Modality": _one_of("CT"),
    "PatientSex": _one_of("M F O"),
    "PatientPosition": _one_of("HFS HFP HFDR HFDL FFS FFP FFDR FFDL"),
    "BodyPartExamined": _one_of(
        "ABDOMEN ABDOMENPELVIS ARM BRAIN CHEST CHESTABDOMEN CHESTABDPELVIS CSPINE EXTREMITY HEAD HEADNECK "
        "HEART HIP KNEE LEG LIVER LSPINE LUNG NECK PELVIS SHOULDER SKULL SPINE THORAX TSPINE WHOLEBODY"
    ),
    "Manufacturer": _maker,
    "ConvolutionKernel": _kernel,
    "KVP": _number,
    "XRayTubeCurrent": _number,
    "SliceThickness": _number,
    "SpacingBetweenSlices": _number,
    "PixelSpacing": _number,
    "ReconstructionDiameter": _number,
    "Rows": _number,
    "Columns": _number,
}


def keep_allowed(dataset: Dataset) -> dict[str, object]:
    """What of a DICOM header may be kept: the acquisition facts in ``ALLOWED``, each checked.

    A value that is not what the list asks for (free text where a code belongs) is left out, as are absent
    ones.

    Args:
        dataset: any parsed header; only top-level attributes are looked at.

    Returns:
        Keyword → str, float, or a list of them, in the list's order.
    """
    kept: dict[str, object] = {}
    for keyword, allowed in ALLOWED.items():
        try:
            value = dataset.get(keyword)
            many = [value] if value is None or isinstance(value, (str, int, float)) else list(value)
            values = [allowed(str(v).strip()) for v in many if v is not None]
        except Exception:  # noqa: S112  (pydicom raises many kinds on a malformed value: it is not kept)
            continue
        if values and None not in values:
            kept[keyword] = values[0] if len(values) == 1 else values
    return kept


def normal_patient_id(patient_id: str) -> str:
    """A PatientID (0010,0020) as it is compared.

    Leading and trailing spaces and NUL padding carry no meaning in VR LO (PS3.5 6.2). Case is folded and
    compatible
    Unicode forms are unified as well: taking two spellings for one patient errs on the safe side, since
        split,
    privacy and audit count patients.
    """
    return unicodedata.normalize("NFKC", patient_id).strip(" \0\t\r\n").casefold()


@dataclass(frozen=True)
class Pseudonymizer:
    """Patient identifiers → keyed pseudonyms of one site.

    Args:
        secret: 32 random bytes that never leave the site (:func:`site_secret`).

    Raises:
        InsecureSecret: another number of bytes.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            raise InsecureSecret(
                attribute="secret",
                value=f"{len(self.secret)} bytes",
                remedy=f"give {SECRET_BYTES} random bytes",
            )

    def pseudonym(self, patient_id: str) -> str:
        """The pseudonym of a patient: "p" and 32 characters of [a-z2-7], safe as a file name on any system.

        Raises:
            MissingPatientID: nothing is left of the identifier once padding is gone.
        """
        normal = normal_patient_id(patient_id)
        if not normal:
            raise MissingPatientID(
                attribute="PatientID",
                value="absent",
                remedy="give each patient an identifier: split and privacy accounting are by patient",
            )
        digest = hmac.new(self.secret, b"fedct patient\0" + normal.encode(), hashlib.sha256).digest()
        return "p" + base64.b32encode(digest[:PSEUDONYM_BYTES]).decode().lower()


def site_secret(path: Path) -> bytes:
    """The site's secret; created with 32 random bytes and mode 0600 where there is none.

    Creation is atomic and race-free: of several processes one wins and all return its secret.

    Args:
        path: file of the secret; missing folders above it are created.

    Raises:
        InsecureSecret: the file has another size, is not a plain file, or group or others may access it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)  # fails where another process was faster: then its secret counts
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    status = path.stat()
    if status.st_mode & 0o077:
        raise InsecureSecret(
            attribute="mode of the secret",
            value=f"{status.st_mode & 0o777:04o}",
            remedy="take the rights of group and others away (chmod 600), or replace it if others read it",
            file=path,
        )
    if not path.is_file() or status.st_size != SECRET_BYTES:
        raise InsecureSecret(
            attribute="size of the secret",
            value=f"{status.st_size} bytes",
            remedy=f"restore the {SECRET_BYTES} bytes from a backup: another secret makes other pseudonyms",
            file=path,
        )
    return path.read_bytes()
