"""The embedded cohort: procedural chest CT of made-up patients in made-up hospitals, written as DICOM.

Every patient is a function of (seed, hospital, patient): nothing depends on how many others are made.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from medical_data.dicom_write import Scan, write_ct_series
from medical_data.phantom_anatomy import chest_hu
from medical_data.phantom_patient import Patient, draw_patient
from medical_data.phantom_raster import Grid
from medical_data.phantom_scanner import Scanner, acquire, field_of_view_mm, other_kernel, scanner_of
from medical_data.volume import Volume

# Every fifth patient has a second series: another kernel of the same study, as scanners reconstruct them.
SECOND_SERIES_EVERY = 5
LARGEST_SLICE_DISTANCE_MM = 20.0  # few slices lie around the middle of the lungs
SHOULDER_MARGIN = 1.06  # the body is wider at the shoulders than at the heart
OVERWEIGHT_BMI, OBESE_BMI = 25.0, 30.0  # WHO Technical Report Series 894 (2000)


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """One hospital of the embedded cohort.

    Attributes:
        hospital: 0, 1 and 2 have preset scanners, each further one its own.
        patients: how many.
        slices: axial slices a series, at least 2, apex to diaphragm.
        matrix: pixels a side.
        seed: of everything.

    Raises:
        ValueError: not an integer, or one out of range (matrix: 32 to 512).
    """

    hospital: int
    patients: int = 40
    slices: int = 16
    matrix: int = 128
    seed: int

    def __post_init__(self) -> None:
        for name, low, high in (
            ("hospital", 0, 10_000),
            ("patients", 1, 100_000),
            ("slices", 2, 1024),
            ("matrix", 32, 512),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} = {value!r}: give an integer from {low} to {high}")


def phantom_patient(config: PhantomConfig, patient: int) -> Patient:
    """The made-up patient behind a series.

    Raises:
        ValueError: no such patient.
    """
    if not 0 <= patient < config.patients:
        raise ValueError(f"patient = {patient}: give 0 to {config.patients - 1}")
    return draw_patient(np.random.default_rng([config.seed, config.hospital, patient, 0]))


def phantom_label(config: PhantomConfig, patient: int) -> int:
    """Habitus for studies of label skew: 0 up to normal weight, 1 overweight, 2 obese (WHO, by body mass index)."""
    bmi = phantom_patient(config, patient).bmi
    return int(bmi >= OVERWEIGHT_BMI) + int(bmi >= OBESE_BMI)


def phantom_series(patient: int) -> int:
    """How many series the patient has, 1 or 2: a patient is not a series."""
    return 2 if patient % SECOND_SERIES_EVERY == SECOND_SERIES_EVERY - 1 else 1


def phantom_volume(config: PhantomConfig, patient: int, *, series: int = 0) -> Volume:
    """One series in whole Hounsfield units, canonical axes, as :func:`write_cohort` writes it.

    Raises:
        ValueError: no such patient or series.
    """
    if not 0 <= series < phantom_series(patient):
        raise ValueError(f"series = {series}: give 0 to {phantom_series(patient) - 1}")
    return _volumes(config, patient)[series][1]


def write_cohort(config: PhantomConfig, folder: Path, *, progress: bool) -> None:
    """Write one hospital's patients as DICOM: ``folder/patient_0007/series_1/IM0001.dcm``.

    The folder appears in one piece when all is written: where it exists, it is complete. The same configuration
    gives the same bytes.

    Args:
        config: which hospital.
        folder: must not exist; its parents are created.
        progress: show a progress bar on stderr.

    Raises:
        FileExistsError: the folder exists.
    """
    from tqdm import tqdm

    if folder.exists():
        raise FileExistsError("folder: exists already; remove it, or give the cohort another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        for patient in tqdm(
            range(config.patients), desc=f"phantom hospital {config.hospital}", unit="patient", disable=not progress
        ):
            for number, (scanner, volume) in enumerate(_volumes(config, patient), start=1):
                write_ct_series(
                    volume,
                    unfinished / f"patient_{patient:04d}" / f"series_{number}",
                    subject=_scan(config, patient, scanner),
                    uid_seed=f"fedct phantom {config.seed} {config.hospital} {patient} {config.slices} {config.matrix}",
                    series_number=number,
                )
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _volumes(config: PhantomConfig, patient: int) -> list[tuple[Scanner, Volume]]:
    """All series of a patient: one acquisition, one reconstruction a kernel."""
    who = phantom_patient(config, patient)
    scanner = scanner_of(config.hospital, config.seed)
    rng = np.random.default_rng([config.seed, config.hospital, patient, 1])
    wide, front, back = who.body
    off_x, off_y = (float(v) for v in rng.normal(0, scanner.off_centre_mm, 2))
    pixel_mm = field_of_view_mm(scanner, 2 * (SHOULDER_MARGIN * wide + abs(off_x))) / config.matrix
    slice_mm = min(scanner.coverage_mm / config.slices, LARGEST_SLICE_DISTANCE_MM)
    first = 0.48 * who.lung_height - slice_mm * config.slices / 2 + rng.normal(0, 5)
    grid = Grid(
        z=(first + slice_mm * np.arange(config.slices)).astype(np.float32),
        shape=(config.matrix, config.matrix),
        pixel_mm=pixel_mm,
        centre_mm=(off_x, (back - front) / 2 + off_y),
        rotation_rad=float(np.deg2rad(rng.normal(0, 2.0))),
    )
    hu = chest_hu(who, grid)
    edge = -(config.matrix - 1) / 2 * pixel_mm
    table_mm = float(np.round(rng.uniform(-400, -100), 1))
    volumes = []
    for series in range(phantom_series(patient)):
        kernel = scanner if series == 0 else other_kernel(scanner)
        # The same raw data behind every reconstruction: the same noise before filtering.
        noise = np.random.default_rng([config.seed, config.hospital, patient, 2])
        seen = acquire(hu, grid, kernel, back_mm=back, diameter_mm=float(np.sqrt(2 * wide * (front + back))), rng=noise)
        volumes.append(
            (kernel, Volume(hu=seen, spacing_mm=(slice_mm, pixel_mm, pixel_mm), origin_mm=(edge, edge, table_mm)))
        )
    return volumes


def _scan(config: PhantomConfig, patient: int, scanner: Scanner) -> Scan:
    """What the scanner notes about a made-up patient; names and dates are plainly made up."""
    who = phantom_patient(config, patient)
    study = date(2000, 1, 1) + timedelta(days=patient % 365)
    return Scan(
        patient_id=f"PHANTOM-{config.hospital}-{patient:04d}",
        patient_name=f"Phantom^H{config.hospital} P{patient:04d}",
        patient_sex="F" if who.female else "M",
        birth_date=date(study.year - who.age_years, 1, 1),
        patient_size_m=who.height_m,
        patient_weight_kg=who.bmi * who.height_m**2,
        study_date=study,
        institution=f"Phantom Hospital {config.hospital}",
        manufacturer="fedct phantom",
        model=scanner.model,
        kernel=scanner.kernel,
        kvp=scanner.kvp,
        slice_thickness_mm=scanner.slice_thickness_mm,
        body_part="CHEST",
        made_artificially=True,
    )
