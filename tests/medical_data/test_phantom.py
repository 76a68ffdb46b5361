from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

import medical_data.phantom as phantom
from medical_data.dicom import read_series
from medical_data.phantom import (
    PhantomConfig,
    phantom_label,
    phantom_patient,
    phantom_series,
    phantom_volume,
    write_cohort,
)
from medical_data.phantom_anatomy import chest_hu
from medical_data.phantom_patient import Patient, spine_line
from medical_data.phantom_raster import Grid
from medical_data.phantom_scanner import PRESETS, acquire, scanner_of
from medical_data.phantom_vessels import airways, great_vessels

SMALL = PhantomConfig(hospital=0, patients=5, slices=4, matrix=64, seed=3)
PIXEL_MM, SLICE_MM = 3.0, 6.0


def full_grid(patient: Patient, **changes: object) -> Grid:
    """From below the diaphragm to above the lungs, larger than the body."""
    z = np.arange(-80, 1.15 * patient.lung_height, SLICE_MM).astype(np.float32)
    values = {"z": z, "shape": (130, 150), "pixel_mm": PIXEL_MM, "centre_mm": (0.0, 5.0), "rotation_rad": 0.0}
    return Grid(**{**values, **changes})  # type: ignore[arg-type]


@cache
def whole_chest(number: int) -> tuple[Patient, Grid, NDArray[np.float32]]:
    patient = phantom_patient(PhantomConfig(hospital=number % 3, seed=11), number)
    grid = full_grid(patient)
    return patient, grid, chest_hu(patient, grid)


def lung_mask(patient: Patient, grid: Grid, hu: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Aerated tissue within the rib cage, without skin edges and airways."""
    x, y, _ = grid.xyz
    within = np.hypot(x / patient.cavity[0], y / patient.cavity[1]) < 1.15
    return (hu > -980) & (hu < -500) & within


def hu_at(grid: Grid, hu: NDArray[np.float32], x: float, y: float, z: float) -> float:
    row, column = grid.index(np.float32(x), np.float32(y))
    return float(hu[int(np.argmin(np.abs(grid.z - z))), round(float(row)), round(float(column))])


@pytest.mark.parametrize("number", range(8))
def test_the_body_is_in_proportion(number: int) -> None:
    patient, grid, hu = whole_chest(number)
    lung = lung_mask(patient, grid, hu)
    litres = lung.sum() * PIXEL_MM**2 * SLICE_MM / 1e6
    assert 2.0 < litres < 8.0
    # Above the breasts and below the shoulders.
    middle = hu[int(np.argmin(np.abs(grid.z - 0.66 * patient.lung_height)))] > -500
    width, depth = (np.ptp(np.flatnonzero(middle.any(axis=axis))) * PIXEL_MM for axis in (0, 1))
    assert 250 < width < 480
    assert 0.6 < depth / width < 0.9
    assert -900 < np.median(hu[lung]) < -760
    assert hu.min() == -1000
    assert 400 < hu.max() <= 1200


def test_the_right_lung_is_the_larger_one() -> None:
    ratios = []
    for number in range(8):
        patient, grid, hu = whole_chest(number)
        lung = lung_mask(patient, grid, hu)
        x = np.broadcast_to(grid.xyz[0], hu.shape)
        ratios.append(lung[x < 0].sum() / lung[x > 0].sum())
    assert min(ratios) > 0.9
    assert 1.03 < np.mean(ratios) < 1.3


@pytest.mark.parametrize("number", range(8))
def test_tissues_lie_where_they_belong(number: int) -> None:
    patient, grid, hu = whole_chest(number)
    height = patient.lung_height

    def at(x: float, y: float, z: float) -> float:
        return hu_at(grid, hu, x, y, z)

    trachea, aorta = airways(patient)[0], great_vessels(patient).aorta[0]
    assert at(*trachea[1][:3]) == pytest.approx(-1000, abs=20)
    for x, y, z, _ in aorta[6:9]:
        assert at(x, y, z) == pytest.approx(patient.blood_hu, abs=5)
    vertebral_body = []
    for level in np.arange(1, 7) * 23.0 + 11.5:
        x, y = (float(v) for v in spine_line(patient, np.float32(level)))
        vertebral_body.append(at(x, y, level))
        assert at(x, y + 23, level) < 60  # the canal behind it
    assert np.median(vertebral_body) == pytest.approx(patient.trabecular_hu, abs=30)
    assert at(22, -0.27 * patient.cavity[1], 0.14 * height) > 20  # heart
    right_lung = [at(-0.6 * patient.cavity[0], y, t * height) for y in range(-30, 31, 6) for t in (0.2, 0.4, 0.6)]
    assert np.median(right_lung) == pytest.approx(patient.lung_hu, abs=60)
    assert 40 < at(-0.5 * patient.cavity[0], 0, -40) < 160  # liver under the right dome
    row, level = grid.shape[0] // 2, int(np.argmin(np.abs(grid.z - 0.45 * height)))
    flank = hu[level, row, : int(np.flatnonzero(hu[level, row] > -500).min() + patient.fat // PIXEL_MM)]
    if patient.fat > 4 * PIXEL_MM:
        assert -130 < np.median(flank[flank > -500]) < -60  # subcutaneous fat
    # Ribs surround the lungs in every slice of the thorax.
    x, y, z = grid.xyz
    outside = np.hypot(x / patient.cavity[0], y / patient.cavity[1]) > 0.9
    lateral = (np.abs(x) > 0.5 * patient.cavity[0]) & outside
    for k in np.flatnonzero((grid.z > 0) & (grid.z < 0.7 * height)):
        assert ((hu[k] > 250) & lateral[0]).sum() * PIXEL_MM**2 > 150


def test_the_same_place_is_the_same_tissue_on_another_grid() -> None:
    patient, grid, hu = whole_chest(1)
    fewer = replace(grid, z=grid.z[4::5])
    assert chest_hu(patient, fewer) == pytest.approx(hu[4::5], abs=0.5)
    part = grid.crop((slice(None), slice(10, 110), slice(None)))
    assert chest_hu(patient, part) == pytest.approx(hu[:, 10:110], abs=0.5)


def test_slices_continue_through_the_volume() -> None:
    volume = phantom_volume(replace(SMALL, slices=48), 0)
    assert volume.spacing_mm[0] == pytest.approx(PRESETS[0].coverage_mm / 48)
    assert phantom_volume(replace(SMALL, slices=4), 0).spacing_mm[0] == 20
    next_to, far = (np.abs(volume.hu[step:] - volume.hu[:-step]).mean() for step in (1, 16))
    assert 1.5 * next_to < far


def test_a_volume_is_what_a_scanner_delivers() -> None:
    volume = phantom_volume(SMALL, 0)
    assert volume.hu.shape == (4, 64, 64)
    assert volume.hu.dtype == np.float32
    assert np.array_equal(volume.hu, np.rint(volume.hu))
    assert volume.hu.min() >= -1024
    assert volume.hu.max() <= 3071


def test_a_patient_depends_on_nothing_but_seed_hospital_and_number() -> None:
    first = phantom_volume(SMALL, 1)
    assert np.array_equal(phantom_volume(replace(SMALL, patients=200), 1).hu, first.hu)
    for other in (replace(SMALL, seed=4), replace(SMALL, hospital=1)):
        assert phantom_patient(other, 1) != phantom_patient(SMALL, 1)
    assert phantom_patient(SMALL, 2) != phantom_patient(SMALL, 1)


def test_patients_differ() -> None:
    config = PhantomConfig(hospital=0, patients=40, slices=2, matrix=64, seed=0)
    patients = [phantom_patient(config, i) for i in range(40)]
    assert 8 < sum(p.female for p in patients) < 32
    assert 3 < sum(bool(p.nodules) for p in patients) < 30
    assert np.std([p.cavity[0] for p in patients]) > 5
    assert np.std([p.lung_height for p in patients]) > 10
    slices = [phantom_volume(config, i).hu[0] for i in range(6)]
    differences = [np.abs(a - b).mean() for i, a in enumerate(slices) for b in slices[:i]]
    assert min(differences) > 3 * PRESETS[0].noise_hu


def test_labels_are_habitus() -> None:
    config = PhantomConfig(hospital=2, patients=200, seed=5)
    labels = [phantom_label(config, i) for i in range(200)]
    assert min(Counter(labels).values()) > 20
    assert set(labels) == {0, 1, 2}
    fat = [np.mean([phantom_patient(config, i).fat for i in range(200) if labels[i] == k]) for k in range(3)]
    assert fat[0] < fat[1] < fat[2]


@pytest.mark.parametrize("hospital", range(5))
def test_noise_is_what_the_scanner_states(hospital: int) -> None:
    scanner = scanner_of(hospital, seed=0)
    grid = Grid(z=np.zeros(8, np.float32), shape=(96, 96), pixel_mm=3.0, centre_mm=(0.0, -1e4), rotation_rad=0.0)
    water = np.zeros((8, 96, 96), np.float32)
    rng = np.random.default_rng(1)
    seen = acquire(water, grid, scanner, back_mm=0.0, diameter_mm=300.0, rng=rng)
    assert seen.std() == pytest.approx(scanner.noise_hu, rel=0.05)
    assert abs(seen.mean()) < 0.5
    # Its power spectrum is f MTF².
    f = 2 * np.hypot(np.fft.fftfreq(96)[:, None], np.fft.fftfreq(96)[None])
    mtf = (1 + 2.2 * scanner.boost * f**2) * np.exp(-((f / scanner.cutoff) ** 2))
    measured, expected = (np.abs(np.fft.fft2(seen)) ** 2).mean(axis=0), f * mtf**2
    ring = (f / 0.1).astype(int)
    for k in range(8):
        share = [power[ring == k].sum() / power.sum() for power in (measured, expected)]
        assert share[0] == pytest.approx(share[1], rel=0.2, abs=0.002)
    larger = acquire(water, grid, scanner, back_mm=0.0, diameter_mm=400.0, rng=rng)
    assert larger.std() > 1.3 * seen.std()


def test_hospitals_differ_as_scanners_do() -> None:
    volumes = [phantom_volume(PhantomConfig(hospital=h, patients=12, seed=0), 0) for h in range(4)]
    assert len({v.spacing_mm[0] for v in volumes[:3]}) == 3
    assert len({v.spacing_mm[1] for v in volumes[:3]}) == 3
    # Noise in the air in front of the patient, sharpness as the steepest edges.
    noise = [v.hu[:, :8].std() for v in volumes]
    assert noise[0] < 0.8 * noise[1] < noise[2]
    edge = [np.percentile(np.abs(np.diff(v.hu, axis=2)) / v.spacing_mm[2], 99) for v in volumes]
    assert edge[1] < edge[0] < edge[2]


def test_the_table_stays_below_and_outside_the_body() -> None:
    for scanner in PRESETS:
        patient = phantom_patient(SMALL, 0)
        grid = full_grid(patient)
        body = chest_hu(patient, grid)
        quiet = replace(scanner, noise_hu=0.0, cutoff=50.0, boost=0.0)
        rng = np.random.default_rng(0)
        seen = acquire(body, grid, quiet, back_mm=patient.body[2], diameter_mm=300.0, rng=rng)
        added = (seen - body) > 20
        assert added.any()
        assert np.broadcast_to(grid.xyz[1], body.shape)[added].min() > 0
        assert body[added].max() < -300


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "hospital"
    write_cohort(SMALL, folder, progress=False)
    return folder


def series_of(folder: Path) -> dict[tuple[int, int], list[Path]]:
    return {
        (int(s.parent.name.split("_")[1]), int(s.name.split("_")[1]) - 1): sorted(s.iterdir())
        for s in sorted(folder.glob("patient_*/series_*"))
    }


def test_the_reader_returns_the_phantom(cohort: Path) -> None:
    found = series_of(cohort)
    assert sorted(found) == [(p, s) for p in range(5) for s in range(phantom_series(p))]
    for (patient, series), files in found.items():
        expected = phantom_volume(SMALL, patient, series=series)
        back = read_series(files[::-1])
        assert np.array_equal(back.hu, expected.hu)
        assert back.spacing_mm == pytest.approx(expected.spacing_mm, rel=1e-9)
        assert back.origin_mm == pytest.approx(expected.origin_mm, abs=1e-6)


def test_a_patient_is_not_a_series(cohort: Path) -> None:
    headers = {k: pydicom.dcmread(f[0], stop_before_pixels=True) for k, f in series_of(cohort).items()}
    first, second = headers[4, 0], headers[4, 1]
    assert first.PatientID == second.PatientID
    assert first.StudyInstanceUID == second.StudyInstanceUID
    assert first.FrameOfReferenceUID == second.FrameOfReferenceUID
    assert first.SeriesInstanceUID != second.SeriesInstanceUID
    assert first.ConvolutionKernel != second.ConvolutionKernel
    assert len({h.PatientID for h in headers.values()}) == SMALL.patients
    soft, sharp = (phantom_volume(SMALL, 4, series=s).hu[:, :4] for s in (0, 1))
    assert sharp.std() > 1.5 * soft.std()


def test_all_instances_are_unique_and_marked_as_made_up(cohort: Path) -> None:
    headers = [pydicom.dcmread(f, stop_before_pixels=True) for files in series_of(cohort).values() for f in files]
    assert len({h.SOPInstanceUID for h in headers}) == len(headers) == 6 * SMALL.slices
    assert {h.SyntheticData for h in headers} == {"YES"}
    for header in headers:
        bmi = float(header.PatientWeight) / float(header.PatientSize) ** 2
        label = phantom_label(SMALL, int(str(header.PatientID).split("-")[-1]))
        assert label == int(bmi >= 25) + int(bmi >= 30) or min(abs(bmi - 25), abs(bmi - 30)) < 0.5


def test_same_configuration_same_bytes(cohort: Path, tmp_path: Path) -> None:
    write_cohort(SMALL, tmp_path / "again", progress=False)
    files = {f.relative_to(cohort): f for f in cohort.rglob("*") if f.is_file()}
    again = {f.relative_to(tmp_path / "again"): f for f in (tmp_path / "again").rglob("*") if f.is_file()}
    assert files.keys() == again.keys()
    assert all(files[name].read_bytes() == again[name].read_bytes() for name in files)


def test_an_interrupted_cohort_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def interrupted(*args: object, **kwargs: object) -> None:
        written.append(args)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(phantom, "write_ct_series", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_cohort(SMALL, tmp_path / "cohort", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_appears_only_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = phantom.write_ct_series
    seen = []

    def watching(*args: object, **kwargs: object) -> list[Path]:
        seen.append((tmp_path / "cohort").exists())
        return write(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(phantom, "write_ct_series", watching)
    write_cohort(replace(SMALL, patients=2), tmp_path / "cohort", progress=False)
    assert seen == [False, False]
    assert [p.name for p in tmp_path.iterdir()] == ["cohort"]


def test_a_folder_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "cohort").mkdir()
    with pytest.raises(FileExistsError, match="another folder"):
        write_cohort(SMALL, tmp_path / "cohort", progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"hospital": -1},
        {"patients": 0},
        {"slices": 1},
        {"matrix": 31},
        {"matrix": 1024},
        {"seed": -1},
        {"seed": 1.5},
        {"patients": True},
    ],
)
def test_an_impossible_configuration_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(SMALL, **change)


def test_a_patient_or_series_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="patient = 5"):
        phantom_volume(SMALL, 5)
    with pytest.raises(ValueError, match="series = 1"):
        phantom_volume(SMALL, 0, series=1)
