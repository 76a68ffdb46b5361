"""A made-up patient: the sizes and tissues in which patients differ.

Patient axes in mm: x to Left, y to Posterior, z to Superior; 0 is the middle of the thoracic cavity at the height of
the right diaphragm dome. t = z / lung height is 0 at that dome and 1 at the apex of the lungs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medical_data.phantom_raster import Array

BLOOD_HU = 40.0  # without contrast medium


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What makes one patient differ from another; lengths in mm.

    Attributes:
        female: sex.
        age_years: whole years.
        height_m: body height.
        bmi: body mass index, kg/m².
        cavity: half width and half depth of the thoracic cavity at its widest.
        lung_height: from the right diaphragm dome to the apex.
        fat: thickness of the subcutaneous fat at the flank.
        muscle: thickness of the muscles over the ribs at the flank.
        breast: size of the breasts, 0 without.
        heart: half of the long axis.
        kyphosis: how far the spine recedes between its ends.
        scoliosis: how far it leaves the midline.
        left_dome: how far the left diaphragm dome lies below the right one.
        lung_hu: of the parenchyma between the vessels.
        blood_hu: of blood, with or without contrast medium.
        trabecular_hu: of the vertebral bodies.
        nodules: (x, y, z, radius) each.
        seed: of textures and vessel trees.
    """

    female: bool
    age_years: int
    height_m: float
    bmi: float
    cavity: tuple[float, float]
    lung_height: float
    fat: float
    muscle: float
    breast: float
    heart: float
    kyphosis: float
    scoliosis: float
    left_dome: float
    lung_hu: float
    blood_hu: float
    trabecular_hu: float
    nodules: tuple[tuple[float, float, float, float], ...]
    seed: int

    @property
    def body(self) -> tuple[float, float, float]:
        """Half width, and how far the skin lies before and behind the middle of the cavity, in mm."""
        wide, deep = self.cavity
        return (
            wide + 13 + self.muscle + self.fat,
            deep + 12 + 0.6 * self.muscle + 0.75 * self.fat,
            deep + 31 + 0.4 * self.muscle + 0.6 * self.fat,
        )


def draw_patient(rng: np.random.Generator) -> Patient:
    """A patient at random; distributions are round numbers for adults."""
    female = bool(rng.random() < 0.48)
    age = int(rng.integers(30, 86))
    height = float(np.clip(rng.normal(1.63 if female else 1.76, 0.065), 1.45, 2.0))
    bmi = float(np.clip(18 + rng.gamma(3.2, 2.8), 18, 42))
    scale = height / (1.63 if female else 1.76)
    inspiration = rng.normal(1.0, 0.05)
    wide = (117.0 if female else 131.0) * scale * rng.normal(1, 0.035)
    deep = (83.0 if female else 92.0) * scale * rng.normal(1, 0.05) * inspiration
    lung_height = (205.0 if female else 228.0) * scale * rng.normal(1, 0.06) * inspiration
    cavity = (float(wide), float(deep))
    count = int(rng.integers(1, 4)) if rng.random() < 0.35 else 0
    nodules = []
    for _ in range(count):
        angle, out, t = rng.uniform(-1.0, 1.0), rng.uniform(0.55, 0.85), rng.uniform(0.2, 0.75)
        x = float(rng.choice([-1, 1])) * wide * out * np.cos(angle) * (1 - 0.35 * t)
        radius = float(rng.uniform(4, 13))
        nodules.append((float(x), float(deep * out * np.sin(angle)), float(t * lung_height), radius))
    enhanced = rng.random() < 0.4
    return Patient(
        female=female,
        age_years=age,
        height_m=height,
        bmi=bmi,
        cavity=cavity,
        lung_height=float(lung_height),
        fat=float((4 if female else 2.5) + 1.25 * (bmi - 18) * rng.uniform(0.8, 1.2)),
        muscle=float((8 if female else 12) * rng.uniform(0.8, 1.3)),
        breast=float(rng.uniform(0.5, 0.8) + 0.03 * (bmi - 18)) if female else 0.0,
        heart=float((56 if female else 63) * rng.normal(1, 0.07)),
        kyphosis=float(rng.uniform(8, 20)),
        scoliosis=float(rng.normal(0, 4)),
        left_dome=float(rng.uniform(6, 20)),
        lung_hu=float(rng.normal(-865, 18)),
        blood_hu=float(rng.uniform(130, 260)) if enhanced else BLOOD_HU,
        trabecular_hu=float(np.clip(rng.normal(250 - 1.5 * (age - 30), 25), 110, 320)),
        nodules=tuple(nodules),
        seed=int(rng.integers(2**31)),
    )


def spine_line(patient: Patient, z: Array) -> tuple[Array, Array]:
    """(x, y) of the middle of the vertebral body at heights z."""
    t = z / patient.lung_height
    x = patient.scoliosis * np.sin(np.pi * t)
    y = 0.70 * patient.cavity[1] - patient.kyphosis * (2 * t - 0.9) ** 2
    return np.asarray(x, dtype=np.float32), np.asarray(y, dtype=np.float32)
