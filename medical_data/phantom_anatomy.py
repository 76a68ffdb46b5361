"""The Hounsfield units of a supine chest with raised arms.

Axes as in :mod:`medical_data.phantom_patient`.

Hounsfield units: air -1000 and water 0 by definition; tissues after Schneider et al., Phys Med Biol 45:459 (2000);
fat -190 to -30: Yoshizumi et al., Radiology 211:283 (1999); trabecular bone of the vertebra falling with age:
Pickhardt et al., Ann Intern Med 158:588 (2013); liver: Kodama et al., AJR 188:1307 (2007); enhanced blood: Bae,
Radiology 256:32 (2010). Sizes of vertebrae: Panjabi et al., Spine 16:888 (1991).
"""

from __future__ import annotations

import numpy as np

from medical_data.phantom_patient import BLOOD_HU, Patient, spine_line
from medical_data.phantom_raster import Array, Grid, Segments, ellipse, ellipsoid, smooth_noise, tubes
from medical_data.phantom_vessels import airways, great_vessels, polyline, small_vessels, vessel_tree

AIR_HU = -1000.0
FAT_HU = -100.0
MEDIASTINAL_FAT_HU = -70.0  # strands of other tissue run through it
SKIN_HU = 20.0
MUSCLE_HU = 55.0
MYOCARDIUM_HU = 45.0
WALL_HU = 36.0  # of airways and oesophagus
LIVER_HU = 58.0
SPLEEN_HU = 48.0
MEAL_HU = 30.0
GAS_HU = -950.0
CARTILAGE_HU = 110.0
DISC_HU = 80.0
CORD_HU = 30.0
GLAND_HU = 25.0
CORTICAL_HU = 1100.0
FLAT_BONE_HU = 500.0  # thin cortex and marrow in one voxel
NODULE_HU = 45.0

VERTEBRA_PITCH_MM = 23.0
RIB_PITCH_MM = 25.0


def chest_hu(patient: Patient, grid: Grid) -> Array:
    """Hounsfield units of the patient on the grid, without scanner, noise or table: float32 [D, H, W]."""
    wide, front, back = patient.body
    box = grid.box((-1.15 * wide, 1.15 * wide), (-front - 35, back + 15))
    hu = np.full((grid.z.size, *grid.shape), AIR_HU, dtype=np.float32)
    grid = grid.crop(box)
    rng = np.random.default_rng(patient.seed)
    coarse, fine, irregular = (smooth_noise(grid, pitch, rng) for pitch in (24.0, 9.0, 80.0))
    cavity = _cavity(patient, grid, irregular)
    body, muscle = _trunk(patient, grid, cavity, (coarse, fine, irregular))
    _mediastinum_and_lungs(body, patient, grid, cavity, (coarse, fine), rng)
    _rib_cage(body, patient, grid, cavity, muscle)
    _spine(body, patient, grid)
    hu[box] = body
    return hu


def _blend(hu: Array, cover: Array, tissue: Array | float) -> None:
    """Paint a tissue where it covers, in place."""
    hu += (tissue - hu) * cover


def _ramp(value: Array, start: float, end: float) -> Array:
    """0 before ``start``, 1 after ``end``, smooth between (3f² - 2f³)."""
    f = np.clip((value - start) / (end - start), 0, 1)
    return np.asarray(f * f * (3 - 2 * f), dtype=np.float32)


def _cavity(patient: Patient, grid: Grid, irregular: Array) -> tuple[Array, Array, Array, Array]:
    """Distance to the thoracic cavity, its angle (0 dorsal to 1 ventral), its half depth and its middle (y)."""
    x, y, z = grid.xyz
    t = z / patient.lung_height
    wide = patient.cavity[0] * np.sqrt(1 - np.clip((t - 0.22) / 0.85, 0, 0.985) ** 2.5)
    deep = patient.cavity[1] * np.sqrt(1 - np.clip((t - 0.1) / 0.99, 0, 0.985) ** 3)
    middle = 16 * _ramp(t, 0.35, 1.05)
    distance = ellipse(x, y - middle, wide, deep, square=0.025) + 2.5 * irregular
    v = (y - middle) / deep
    angle = (1 - v / np.sqrt((x / wide) ** 2 + v * v + np.float32(1e-6))) / 2
    return distance, np.clip(angle, 0, 1), deep, middle


def _trunk(
    patient: Patient, grid: Grid, cavity: tuple[Array, ...], noise: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    """Air, skin, subcutaneous fat, breasts, muscles with fat planes, scapulae, clavicles."""
    x, y, z = grid.xyz
    t = z / patient.lung_height
    coarse, fine, irregular = noise
    distance = cavity[0]
    wide, front, back = patient.body
    shoulder = _ramp(t, 0.55, 1.05)
    half_x = wide * (1 + 0.10 * shoulder)
    half_y = (front + back) / 2 * (1 - 0.07 * shoulder)
    middle = (back - front) / 2 + 0.07 * (front + back) / 2 * shoulder
    skin = ellipse(x, y - middle, half_x, half_y, square=0.03)
    # The groove over the spinous processes.
    skin = skin + 5 * np.exp(-((x / 16) ** 2)) * (y > 0) + 4 * irregular
    v = (y - middle) / half_y
    up = v / np.sqrt((x / half_x) ** 2 + v * v + np.float32(1e-6))
    fat = patient.fat * (1 - 0.3 * np.abs(up)) * (1 + 0.12 * coarse)
    outline = skin
    if patient.breast:
        fullness = np.sqrt(np.clip(1 - ((t - 0.28) / 0.34) ** 2, 0.0016, 1))
        breast = ellipse(
            np.abs(x) - 0.50 * wide, y + 0.70 * front, 72 * patient.breast**0.5 * fullness,
            52 * patient.breast**0.7 * fullness,
        )  # fmt: skip
        outline = np.minimum(skin, breast)
    body = grid.inside(outline)
    hu = np.full(body.shape, AIR_HU, dtype=np.float32)
    _blend(hu, body, FAT_HU + 6 * fine)
    _blend(hu, grid.inside(np.abs(outline + 1.0) - 1.0) * np.float32(min(1.0, 2 / grid.pixel_mm)), SKIN_HU)
    if patient.breast:
        gland = np.clip(0.9 * fine + 0.5 * coarse - 0.2, 0, 1) * grid.inside(breast + 9)
        _blend(hu, gland * np.float32(0.9), GLAND_HU)

    under_fat = skin + fat
    muscle = grid.inside(under_fat)
    _blend(hu, muscle, MUSCLE_HU + 6 * fine)
    # Fat planes: between the chest wall and the muscles that move shoulder and arm, and between those muscles.
    plenty = 0.35 + 0.03 * (patient.bmi - 18)
    chest_wall = grid.inside(np.abs(distance - 14 - 2 * coarse) - (1.2 + 1.5 * plenty))
    inter = grid.inside(np.abs(under_fat + 15 + 7 * coarse) - 1.2 * plenty) * (distance > 16)
    axilla = np.exp(-((up - 0.05) ** 2) / 0.06) * shoulder * np.clip(0.6 + coarse, 0, 1) * (distance > 13)
    streaks = np.clip(0.9 * fine + 0.8 * coarse - 1.5 + plenty, 0, 1) * (distance > 13)
    seam = np.maximum(np.maximum(0.8 * chest_wall, 0.8 * inter), np.maximum(axilla, 0.7 * streaks))
    _blend(hu, seam * muscle * (y < back - 20), FAT_HU)
    # Erector spinae to both sides of the spinous processes stay muscle.
    spine_x, spine_y = spine_line(patient, z)
    box = grid.box((-75, 75), (0, back))
    plane = box[1:]
    erector = ellipse(np.abs(x[0][plane] - spine_x) - 27, y[0][plane] - spine_y - 38, 22, 15)
    _blend(hu[box], grid.inside(erector) * muscle[box], MUSCLE_HU)

    blade_end = 0.50 - 0.62 * _ramp(t, 0.42, 0.9)
    blade = np.maximum(np.abs(under_fat + 15) - 2.2, 60 * np.maximum(up - 0.82, blade_end - up))
    border = np.abs(under_fat + 15) - 5 + 90 * np.abs(up - blade_end)
    scapula = np.where(t > 0.42, np.minimum(blade, border), np.float32(99))
    apart = np.clip((distance - 13) / 4, 0, 1)
    _blend(hu, grid.inside(scapula) * apart, FLAT_BONE_HU)
    height = patient.lung_height
    clavicle = np.array([[s * 24, -front + 34 + patient.fat * 0.5, 0.93 * height] for s in (-1, 1)], np.float32)
    tip = np.array([[s * 0.92 * wide, -0.25 * front, 1.12 * height] for s in (-1, 1)], np.float32)
    _blend(hu, tubes(grid, Segments(clavicle, tip, np.full((2, 2), 6.5, np.float32))), FLAT_BONE_HU)
    return hu, muscle


def _mediastinum_and_lungs(
    hu: Array, patient: Patient, grid: Grid, cavity: tuple[Array, ...], noise: tuple[Array, Array],
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Everything inside the rib cage."""
    x, y, z = grid.xyz
    coarse, fine = noise
    distance, _, deep, middle = cavity
    wide = patient.cavity[0]
    t = z / patient.lung_height
    spine_x, spine_y = spine_line(patient, z)
    heart_centre, heart_axes = _heart(patient)

    inner = grid.inside(distance)
    _blend(hu, inner, MEDIASTINAL_FAT_HU + 20 * coarse)

    # Diaphragm: two paraboloids z = top - 55 ρ², flatter over the heart.
    right, left = -0.5 * wide, 0.5 * wide
    from_front = ((y + 4) / (0.95 * patient.cavity[1])) ** 2
    right_floor = -55 * (((x - right) / (0.56 * wide)) ** 2 + from_front)
    left_floor = -55 * (((x - left) / (0.56 * wide)) ** 2 + from_front) - patient.left_dome
    # The dome is oblique to the slice: 0.6 turns its height above the slice into a distance within it.
    above = (np.maximum(right_floor, left_floor) - z) * np.float32(0.6)
    below = inner * grid.inside(-above)
    left_side = below * (left_floor > right_floor)
    enhanced = patient.blood_hu - BLOOD_HU
    _blend(hu, below - left_side, LIVER_HU + 0.35 * enhanced)
    _blend(hu, left_side, SPLEEN_HU + 0.4 * enhanced)
    stomach = ellipse(x - 0.40 * wide, y + 0.25 * patient.cavity[1], 0.30 * wide, 0.45 * patient.cavity[1])
    _blend(hu, grid.inside(stomach) * left_side, np.where(y < -0.5 * patient.cavity[1], GAS_HU, MEAL_HU))

    # The space between the lungs.
    band_width = 31 + 5 * _ramp(t, 0.75, 1.0) + 3 * coarse
    band = ellipse(x - 0.35 * spine_x, y - middle + 2, band_width, 0.62 * deep)
    behind_sternum = np.clip(1 - (y - middle + deep) / 45, 0, 1)
    junction = np.maximum(np.abs(x - 3) - 2 - 20 * behind_sternum - 12 * _ramp(t, 0.7, 0.95), y - middle)
    vertebra = ellipse(x - spine_x, y - spine_y, 24, 21)
    behind = np.maximum(np.abs(x - spine_x) - 14, spine_y - 40 - y)
    rim = heart_axes * (1 + 5 / patient.heart)
    heart_box, heart_rim = ellipsoid(grid, heart_centre, rim)
    between = np.maximum(
        np.maximum(grid.inside(band), grid.inside(junction)), grid.inside(np.minimum(vertebra, behind))
    )
    between[heart_box] = np.maximum(between[heart_box], heart_rim)
    lines, airway_lines = great_vessels(patient), airways(patient)
    aorta = tubes(grid, polyline(lines.aorta, 2.5))
    between = np.maximum(between, aorta)

    lung = grid.inside(np.maximum(distance, above)) * (1 - between)
    gravity = 25 * y / patient.cavity[1]
    parenchyma = patient.lung_hu + gravity + 18 * fine + 10 * coarse
    _blend(hu, lung, parenchyma)
    vessels = np.maximum(tubes(grid, vessel_tree(patient, rng)), tubes(grid, small_vessels(patient, rng)))
    blood = patient.blood_hu
    _blend(hu, vessels * lung, blood)
    for nodule in patient.nodules:
        radius = nodule[3]
        box, cover = ellipsoid(grid, np.array(nodule[:3], np.float32), np.eye(3, dtype=np.float32) * radius)
        _blend(hu[box], np.clip(cover * (1.1 + 0.25 * fine[box]), 0, 1) * lung[box], NODULE_HU)

    # Soft tissue of the mediastinum, then what runs through it.
    _blend(hu, tubes(grid, polyline(lines.oesophagus, 0)), WALL_HU)
    box, cover = ellipsoid(grid, heart_centre, heart_axes)
    _blend(hu[box], cover, MYOCARDIUM_HU + 0.25 * enhanced)
    for centre, axes in _chambers(heart_centre, heart_axes):
        box, cover = ellipsoid(grid, centre, axes)
        _blend(hu[box], cover, blood)
    for vessel in (lines.aorta, lines.pulmonary, lines.veins, lines.neck):
        _blend(hu, tubes(grid, polyline(vessel, 0)), blood)
    _blend(hu, tubes(grid, polyline(airway_lines, 1.6)), WALL_HU)
    _blend(hu, tubes(grid, polyline(airway_lines, 0)), AIR_HU)


def _heart(patient: Patient) -> tuple[Array, Array]:
    """Centre and semi-axes of the heart: the long axis points left, forward and down."""
    long = np.array([0.68, -0.58, -0.45])
    across = np.cross(long, [0.0, 0.0, 1.0])
    up = np.cross(across, long)
    rows = [patient.heart * r * axis / np.linalg.norm(axis) for r, axis in ((1, long), (0.73, across), (0.78, up))]
    centre = (20.0, -0.27 * patient.cavity[1], 0.14 * patient.lung_height)
    return np.array(centre, np.float32), np.array(rows, np.float32)


def _chambers(centre: Array, axes: Array) -> list[tuple[Array, Array]]:
    """Left and right ventricle, left and right atrium, placed along the heart's own axes (long, across, up)."""
    layout = (
        ((0.26, 0.38, 0.05), 0.40),
        ((0.20, -0.42, 0.0), 0.42),
        ((-0.52, 0.25, 0.30), 0.36),
        ((-0.42, -0.42, 0.05), 0.40),
    )
    stretch = np.array([[1.15], [1.0], [1.1]], np.float32)
    return [
        (centre + np.asarray(place, np.float32) @ axes, axes * np.float32(size) * stretch) for place, size in layout
    ]


def _rib_cage(hu: Array, patient: Patient, grid: Grid, cavity: tuple[Array, ...], muscle: Array) -> None:
    """Ribs fall from back to front, so that a slice cuts each of them once; cartilage and sternum in front."""
    x, y, z = grid.xyz
    distance, angle, deep, middle = cavity
    t = z / patient.lung_height
    drop = 0.42 * patient.lung_height
    nearest = np.mod(z + drop * (0.75 * angle + 0.25 * np.sqrt(angle)), RIB_PITCH_MM) - RIB_PITCH_MM / 2
    outward = distance - 6.0
    shape = np.sqrt((nearest / 6.5) ** 2 + (outward / 4.2) ** 2)
    rib = grid.inside((shape - 1) * 4.2) * muscle
    core = grid.inside((shape - 0.55) * 4.2)
    bony = np.clip((0.80 - angle) / 0.04, 0, 1) * np.clip((angle - 0.012) / 0.01, 0, 1)
    _blend(hu, rib * (1 - bony) * (angle > 0.5), CARTILAGE_HU)
    _blend(hu, rib * bony, CORTICAL_HU - (CORTICAL_HU - patient.trabecular_hu) * core)
    thickness, half = 6.0, 15.0 + 9 * _ramp(t, 0.72, 0.85)
    plate = ellipse(x, y - (middle - deep - 7), half, thickness, square=0.08)
    sternum = grid.inside(plate) * np.clip((t - 0.12) / 0.02, 0, 1) * np.clip((0.92 - t) / 0.02, 0, 1)
    _blend(hu, sternum, FLAT_BONE_HU)
    _blend(hu, grid.inside(plate + 2.2) * sternum, 0.7 * patient.trabecular_hu)


def _spine(hu: Array, patient: Patient, grid: Grid) -> None:
    """Vertebral bodies with discs between them, canal, and the processes of every vertebra."""
    z = grid.xyz[2]
    spine_x, spine_y = spine_line(patient, z)
    size = 0.92 if patient.female else 1.0
    size_z = size * (1.06 - 0.16 * z / patient.lung_height)
    box = grid.box((-60, 60), (float(spine_y.min()) - 30, float(spine_y.max()) + 60))
    x, y = grid.xyz[0][0][box[1:]], grid.xyz[1][0][box[1:]]
    dx, dy = x - spine_x, y - spine_y
    phase = np.mod(z, VERTEBRA_PITCH_MM) - VERTEBRA_PITCH_MM / 2
    to_disc = VERTEBRA_PITCH_MM / 2 - np.abs(phase)
    in_disc = np.clip((2.5 - to_disc) + 0.5, 0, 1)
    plate = np.clip(1 - np.abs(to_disc - 3.3) / 1.2, 0, 1)

    # Neural arch and processes first, then the canal is cut out of them, then the body.
    levels = np.arange(-6, 16) * VERTEBRA_PITCH_MM + 0.5 * VERTEBRA_PITCH_MM
    cx, cy = spine_line(patient, levels.astype(np.float32))
    canal = cy + 24 * size
    starts, ends, radii = [], [], []
    for side in (-1, 1):
        starts.append(np.stack([cx + side * 11 * size, canal - 4, levels + 3], axis=1))
        ends.append(np.stack([cx + side * 33 * size, canal + 9, levels + 5], axis=1))
        radii.append(np.tile([5.5, 4.5], (levels.size, 1)))
    starts.append(np.stack([cx, canal + 10, levels], axis=1))
    ends.append(np.stack([cx, canal + 32 * size, levels - 20], axis=1))
    radii.append(np.tile([4.2, 3.6], (levels.size, 1)))
    processes = Segments(*(np.concatenate(part).astype(np.float32) for part in (starts, ends, radii)))
    _blend(hu, tubes(grid, processes), FLAT_BONE_HU)
    hu = hu[box]
    arch = ellipse(dx, dy - 24 * size, 13.5 * size, 13 * size)
    _blend(hu, grid.inside(arch) * np.clip(1 - 1.2 * in_disc, 0.35, 1), FLAT_BONE_HU)
    body = ellipse(dx, dy, 17.5 * size_z, 14.5 * size_z, square=0.04)
    shell = 0.6 * CORTICAL_HU  # thinner than a millimetre
    bone = patient.trabecular_hu + (shell - patient.trabecular_hu) * np.maximum(grid.inside(-body - 2.0), plate)
    _blend(hu, grid.inside(body), bone + (DISC_HU - bone) * in_disc)
    _blend(hu, grid.inside(ellipse(dx, dy - 24 * size, 9.5 * size, 8.5 * size)), CORD_HU)
