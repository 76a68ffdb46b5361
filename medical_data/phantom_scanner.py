"""What a scanner adds to a patient: field of view, kernel, noise, table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medical_data.phantom_raster import Array, Grid

# Effective attenuation of water at 120 kV (about 70 keV), 1/mm: NIST XCOM.
WATER_ATTENUATION = 0.0193
# Diameter in mm of water at which a scanner's noise is quoted.
REFERENCE_DIAMETER_MM = 300.0
SHARP_TO_SOFT_NOISE = 2.2
# Range of a 12-bit scanner.
LOWEST_HU, HIGHEST_HU = -1024.0, 3071.0


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """One hospital's scanner and protocol.

    Attributes:
        model: ManufacturerModelName (0008,1090).
        kernel: ConvolutionKernel (0018,1210).
        kvp: tube voltage in kV.
        fov_mm: smallest field of view; larger patients get a larger one, in steps of 10 mm.
        coverage_mm: from the first to one past the last slice; divided by their number it is the slice distance.
        slice_thickness_mm: collimation, thinner than the slice distance (interspaced thin sections).
        cutoff: of the kernel, in units of the Nyquist frequency of the pixels.
        boost: edge enhancement of the kernel, 0 for none.
        noise_hu: standard deviation in 300 mm of water.
        off_centre_mm: standard deviation of where patients lie, along x and y.
        table_gap_mm: from the back to the table top.
        table_radius_mm: of the table's curvature.
    """

    model: str
    kernel: str
    kvp: float
    fov_mm: float
    coverage_mm: float
    slice_thickness_mm: float
    cutoff: float
    boost: float
    noise_hu: float
    off_centre_mm: float
    table_gap_mm: float
    table_radius_mm: float


PRESETS = (
    Scanner(model="Soft 16", kernel="STANDARD", kvp=120, fov_mm=350, coverage_mm=208, slice_thickness_mm=1.25,
            cutoff=0.85, boost=0.0, noise_hu=14, off_centre_mm=4, table_gap_mm=3, table_radius_mm=420),
    Scanner(model="Wide 64", kernel="SMOOTH", kvp=100, fov_mm=420, coverage_mm=224, slice_thickness_mm=2.5,
            cutoff=0.60, boost=0.0, noise_hu=22, off_centre_mm=9, table_gap_mm=10, table_radius_mm=900),
    Scanner(model="Sharp 128", kernel="LUNG", kvp=120, fov_mm=390, coverage_mm=192, slice_thickness_mm=1.0,
            cutoff=1.10, boost=0.9, noise_hu=38, off_centre_mm=7, table_gap_mm=5, table_radius_mm=600),
)  # fmt: skip


def scanner_of(hospital: int, seed: int) -> Scanner:
    """The scanner of a hospital: one of three presets, and drawn at random from the fourth hospital on."""
    if hospital < len(PRESETS):
        return PRESETS[hospital]
    rng = np.random.default_rng([seed, hospital, 0x5CA2])
    boost = float(max(0.0, rng.uniform(-0.8, 1.0)))
    cutoff = float(rng.uniform(0.55, 0.9) + 0.25 * boost)
    return Scanner(
        model=f"Drawn {hospital}",
        kernel="SHARP" if boost else "STANDARD",
        kvp=float(rng.choice([100, 120, 140])),
        fov_mm=float(rng.integers(34, 47) * 10),
        coverage_mm=float(rng.integers(24, 29) * 8),
        slice_thickness_mm=float(rng.choice([1.0, 1.25, 2.0, 2.5])),
        cutoff=cutoff,
        boost=boost,
        noise_hu=float(rng.uniform(10, 40)),
        off_centre_mm=float(rng.uniform(3, 10)),
        table_gap_mm=float(rng.uniform(2, 12)),
        table_radius_mm=float(rng.uniform(400, 900)),
    )


def other_kernel(scanner: Scanner) -> Scanner:
    """The second reconstruction of the same raw data: sharp after a soft one, soft after a sharp one.

    At equal dose the sharp kernel shows :data:`SHARP_TO_SOFT_NOISE` times the noise of the soft one.
    """
    if scanner.boost:
        return replace(
            scanner, kernel="STANDARD", cutoff=0.8, boost=0.0, noise_hu=scanner.noise_hu / SHARP_TO_SOFT_NOISE
        )
    return replace(scanner, kernel="LUNG", cutoff=1.05, boost=0.8, noise_hu=scanner.noise_hu * SHARP_TO_SOFT_NOISE)


def field_of_view_mm(scanner: Scanner, widest_mm: float) -> float:
    """The field of view that a patient needs: the protocol's, or 10 mm of air on both sides of the widest diameter."""
    return float(max(scanner.fov_mm, 10 * np.ceil((widest_mm + 20) / 10)))


def acquire(
    hu: Array, grid: Grid, scanner: Scanner, *, back_mm: float, diameter_mm: float, rng: np.random.Generator
) -> Array:
    """Scan a patient: put the table under him, blur by the kernel, add its correlated noise, quantise.

    The noise power spectrum of filtered back projection is f · MTF(f)² (Riederer, Pelc, Chesler, Phys Med Biol 23:446,
    1978). Quantum noise grows as exp(μD/2) behind a diameter D at constant tube current; tube current modulation
    that gives half of it back leaves exp(μD/4).

    Args:
        hu: Hounsfield units without a scanner, float32 [D, H, W].
        grid: where its voxels lie.
        scanner: whose kernel, noise and table.
        back_mm: y of the patient's back.
        diameter_mm: of the water cylinder that attenuates as much as the patient.
        rng: for the noise.

    Returns:
        Whole Hounsfield units within [-1024, 3071], float32 [D, H, W].
    """
    hu = np.maximum(hu, _table(grid, scanner, back_mm))
    frequency = 2 * np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in grid.shape), indexing="ij"))
    mtf = _transfer(scanner, frequency)
    amplitude = np.sqrt(frequency) * mtf
    # White noise of unit variance has this variance once filtered (Parseval).
    amplitude /= np.sqrt(np.mean(amplitude**2))
    growth = np.exp(WATER_ATTENUATION * (diameter_mm - REFERENCE_DIAMETER_MM) / 4)
    half = slice(0, grid.shape[1] // 2 + 1)
    white = rng.standard_normal(hu.shape, dtype=np.float32)
    spectrum = np.fft.rfft2(hu) * mtf[:, half].astype(np.float32)
    spectrum += np.fft.rfft2(white) * (amplitude * scanner.noise_hu * growth)[:, half].astype(np.float32)
    seen = np.fft.irfft2(spectrum, s=hu.shape[1:])
    return np.asarray(np.clip(np.rint(seen), LOWEST_HU, HIGHEST_HU), dtype=np.float32)


def _transfer(scanner: Scanner, frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Modulation transfer function at frequencies in units of Nyquist; 1 at 0, so that HU are kept."""
    enhanced = 1 + 2.2 * scanner.boost * frequency**2
    return np.asarray(enhanced * np.exp(-((frequency / scanner.cutoff) ** 2)))


def _table(grid: Grid, scanner: Scanner, back_mm: float) -> Array:
    """A carbon fibre shell around foam, curved up at the sides, not rolling with the patient: [H, W]."""
    down, across = ((np.arange(n, dtype=np.float32) - (n - 1) / 2) * grid.pixel_mm for n in grid.shape)
    x, y = across[None, :], down[:, None] + grid.centre_mm[1]
    depth = y - back_mm - scanner.table_gap_mm + x**2 / (2 * scanner.table_radius_mm)
    half = 200.0
    slab = np.maximum(np.abs(depth - 14) - 14, np.abs(x) - half)
    table = np.full(slab.shape, -1000.0, dtype=np.float32)
    table += (-930 + 1000) * grid.inside(slab)
    shell = grid.inside(np.abs(slab + 1.2) - 1.2) * min(1.0, 2.4 / grid.pixel_mm)
    return np.asarray(table + (-150 - table) * shell, dtype=np.float32)
