"""Middle lines and radii of the vessels, the airways and the oesophagus, in the patient's axes (mm).

Sizes: trachea: Breatnach et al., AJR 142:903 (1984); aorta: Hager et al., J Thorac Cardiovasc Surg 123:1060 (2002).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from medical_data.phantom_patient import Patient, spine_line
from medical_data.phantom_raster import Segments

# (x, y, z, radius) in mm, point by point.
Line = list[tuple[float, float, float, float]]


class GreatVessels(NamedTuple):
    """Middle lines of the vessels of the mediastinum, and of the oesophagus among them."""

    aorta: list[Line]
    pulmonary: list[Line]
    veins: list[Line]
    neck: list[Line]
    oesophagus: list[Line]


def great_vessels(patient: Patient) -> GreatVessels:
    """What runs through the mediastinum of a patient."""
    h, deep = patient.lung_height, patient.cavity[1]
    wide = 1.0 + 0.004 * (patient.age_years - 55)

    def spine(t: float) -> tuple[float, float]:
        x, y = spine_line(patient, np.array(t * h, np.float32))
        return float(x), float(y)

    down = [(spine(t)[0] + dx, spine(t)[1] - 24, t * h, 12.0 * wide) for t, dx in
            ((0.60, 22), (0.5, 22), (0.3, 20), (0.1, 15), (-0.1, 8), (-0.4, 2))]  # fmt: skip
    aorta: Line = [
        (4, -0.32 * deep, 0.36 * h, 15 * wide),
        (-12, -0.36 * deep, 0.46 * h, 16 * wide),
        (-13, -0.30 * deep, 0.57 * h, 15.5 * wide),
        (-6, -0.12 * deep, 0.665 * h, 14.5 * wide),
        (8, 0.10 * deep, 0.70 * h, 13.5 * wide),
        (20, 0.34 * deep, 0.67 * h, 12.5 * wide),
        *down,
    ]
    trunk: Line = [
        (22, -0.48 * deep, 0.34 * h, 13),
        (19, -0.30 * deep, 0.45 * h, 13.5),
        (12, -0.05 * deep, 0.50 * h, 12),
    ]
    to_right: Line = [
        trunk[-1],
        (-12, 0.06 * deep, 0.49 * h, 11),
        (-42, 0.14 * deep, 0.455 * h, 8.5),
        (-50, 0.24 * deep, 0.37 * h, 6.5),
    ]
    to_left: Line = [
        trunk[1],
        (30, -0.05 * deep, 0.51 * h, 10.5),
        (43, 0.20 * deep, 0.50 * h, 9),
        (46, 0.32 * deep, 0.40 * h, 6.5),
    ]
    cava: Line = [
        (-25, -0.12 * deep, 0.30 * h, 9.5),
        (-25, -0.16 * deep, 0.55 * h, 9),
        (-22, -0.22 * deep, 0.80 * h, 8),
    ]
    neck: list[Line] = [
        [(-6, -0.12 * deep, 0.68 * h, 7), (-16, 0.0, 0.82 * h, 6), (-24, 2.0, 1.1 * h, 5)],
        [(5, 0.04 * deep, 0.70 * h, 5), (11, 0.06 * deep, 0.85 * h, 4.5), (20, 4.0, 1.1 * h, 4)],
        [(16, 0.26 * deep, 0.69 * h, 5.5), (24, 0.26 * deep, 0.85 * h, 5.5), (36, 8.0, 1.05 * h, 5)],
    ]
    veins: list[Line] = [
        cava,
        [cava[-1], (-30, -0.16 * deep, 0.95 * h, 7), (-44, -4.0, 1.08 * h, 6)],
        [cava[-1], (6, -0.30 * deep, 0.80 * h, 6.5), (34, -0.10 * deep, 0.97 * h, 6.5)],
        [(-22, 0.14 * deep, -0.4 * h, 11), (-26, 0.0, 0.12 * h, 11)],
        [(-22, 0.05 * deep, 0.33 * h, 7), (-52, 0.12 * deep, 0.31 * h, 5)],
        [(22, 0.12 * deep, 0.34 * h, 7), (48, 0.22 * deep, 0.33 * h, 5)],
    ]
    gullet: Line = [
        (spine(t)[0] + dx, spine(t)[1] - 25, t * h, 7.0) for t, dx in ((-0.1, 10), (0.3, 2), (0.6, 1), (1.1, 2))
    ]
    return GreatVessels([aorta], [trunk, to_right, to_left], veins, neck, [gullet])


def airways(patient: Patient) -> list[Line]:
    """Trachea, main and lobar bronchi (lumen)."""
    h, deep = patient.lung_height, patient.cavity[1]
    r = 7.5 if patient.female else 9.0
    carina = (2.0, 0.16 * deep, 0.575 * h, 0.85 * r)
    trachea: Line = [(0.0, 0.02 * deep, 1.12 * h, r), (-1.0, 0.10 * deep, 0.75 * h, r), carina]
    right: Line = [
        carina,
        (-26, 0.17 * deep, 0.50 * h, 0.72 * r),
        (-38, 0.18 * deep, 0.42 * h, 0.5 * r),
        (-46, 0.34 * deep, 0.28 * h, 0.35 * r),
    ]
    left: Line = [
        carina,
        (32, 0.24 * deep, 0.475 * h, 0.66 * r),
        (43, 0.34 * deep, 0.40 * h, 0.48 * r),
        (52, 0.46 * deep, 0.27 * h, 0.33 * r),
    ]
    upper: list[Line] = [
        [right[1], (-48, 0.10 * deep, 0.58 * h, 0.36 * r), (-60, 0.0, 0.70 * h, 0.22 * r)],
        [left[1], (48, 0.05 * deep, 0.55 * h, 0.34 * r), (58, -0.1 * deep, 0.66 * h, 0.22 * r)],
    ]
    return [trachea, right, left, *upper]


def polyline(lines: list[Line], wall: float) -> Segments:
    """Segments of lines, their radii widened by a wall: in mm."""
    points = [np.asarray(line, np.float32) for line in lines]
    start, end = np.concatenate([p[:-1] for p in points]), np.concatenate([p[1:] for p in points])
    radius = np.stack([start[:, 3], end[:, 3]], axis=1) + np.float32(wall)
    return Segments(start[:, :3], end[:, :3], radius)


def vessel_tree(patient: Patient, rng: np.random.Generator) -> Segments:
    """Arteries and veins of both lungs: each generation forks into two, thinner and shorter.

    Radii fall by 2^(-1/3) and a little (Murray, Proc Natl Acad Sci 12:207, 1926: r³ is kept at a fork).
    """
    wide, deep = patient.cavity
    h = patient.lung_height
    starts, ends, radii = [], [], []
    for side in (-1.0, 1.0):
        count = 15
        root = np.array([side * 40, 0.2 * deep, 0.43 * h]) + rng.normal(0, 1, (count, 3)) * [4, 9, 16]
        aim = np.stack([
            side * rng.uniform(0.25, 1.0, count) * wide * 0.62,
            rng.uniform(-0.85, 0.75, count) * deep,
            rng.uniform(-0.42, 0.42, count) * h,
        ], axis=1)  # fmt: skip
        direction = aim / np.linalg.norm(aim, axis=1, keepdims=True)
        length = np.linalg.norm(aim, axis=1) * 0.38
        radius = rng.uniform(2.8, 4.4, count)
        for _ in range(6):
            tip = root + direction * length[:, None]
            thinner = radius * 0.76
            starts.append(root)
            ends.append(tip)
            radii.append(np.stack([radius, thinner], axis=1))
            turn = rng.normal(0, 1, tip.shape)
            turn -= (turn * direction).sum(axis=1, keepdims=True) * direction
            turn /= np.linalg.norm(turn, axis=1, keepdims=True)
            bend = rng.uniform(0.25, 0.75, (2, len(tip), 1))
            direction = np.concatenate([direction + turn * bend[0], direction - turn * bend[1]])
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            root, radius = np.concatenate([tip, tip]), np.concatenate([thinner, thinner])
            length = np.concatenate([length, length]) * rng.uniform(0.6, 0.95, len(root))
    return Segments(*(np.concatenate(part).astype(np.float32) for part in (starts, ends, radii)))


def small_vessels(patient: Patient, rng: np.random.Generator) -> Segments:
    """Vessels of the lung's periphery, too many to follow: short, thin, pointing away from the hilum."""
    wide, deep = patient.cavity
    h, count = patient.lung_height, 1600
    side = rng.choice([-1.0, 1.0], count)
    across = side * wide * rng.uniform(0.25, 1.0, count)
    place = np.stack([across, deep * rng.uniform(-0.95, 0.95, count), h * rng.uniform(-0.25, 1.0, count)], axis=1)
    away = place - np.stack([side * 40, np.full(count, 0.2 * deep), np.full(count, 0.43 * h)], axis=1)
    away = away / np.linalg.norm(away, axis=1, keepdims=True) + rng.normal(0, 0.25, (count, 3))
    end = place + away * rng.uniform(8, 20, (count, 1))
    radius = rng.uniform(0.6, 1.25, count)
    radii = np.stack([radius, 0.8 * radius], axis=1)
    return Segments(*(part.astype(np.float32) for part in (place, end, radii)))
