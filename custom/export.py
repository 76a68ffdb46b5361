"""Generated slices and volumes as files for other programs: PNG, NIfTI and DICOM, all marked as synthetic."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from custom.pictures import check_images, check_window, grey_levels, middle_planes, write_png
from medical_data.volume import Vector, Volume

Format = Literal["png", "nifti", "dicom"]

# Training scales every body to the frame, so a slice's pixel size is a convention.
NOMINAL_MM: Vector = (6.0, 6.0, 6.0)


def export_samples(
    images: NDArray[np.float32],
    folder: Path,
    *,
    format: Format,
    window_hu: tuple[float, float],
    spacing_mm: Vector,
    seed: int,
) -> list[Path]:
    """Write every image as its own picture, volume or series; all of them or nothing.

    - png: ``sample_0000.png``, 8 bit grey over the window; of a volume the middle planes.
    - nifti: ``sample_0000.nii.gz``, int16 HU, a slice one voxel deep, axes x, y, z in RAS+ millimetres.
    - dicom: ``sample_0000/*.dcm``, int16 HU, a series, study, frame of reference and subject of its own,
      SyntheticData YES.

    Slices have no true pixel size, because preprocessing scales every patient's body to the frame: their
    `spacing_mm` is nominal and lengths measured in the files mean nothing. Volumes keep the size of what they
    show: theirs is the voxel size that the model was trained at, and lengths are true.

    Args:
        images: float32 [N, 1, H, W] or [N, 1, D, H, W] in [-1, 1]; D grows towards the patient's Superior, H
            towards Posterior, W towards Left.
        folder: new or empty.
        format: what to write.
        window_hu: HU that -1 and 1 stand for, as the job has it.
        spacing_mm: along (D, H, W) in mm: of volumes ``preprocess.spacing_mm``, of slices a nominal thickness
            and pixel size.
        seed: the sampler's, which DICOM records in DerivationDescription (0008,2111).

    Returns:
        The files, sorted by sample. The same arguments give the same bytes.

    Raises:
        ValueError: impossible images, format, window or spacing.
        MedicalDataError: a window that DICOM's int16 cannot hold.
        FileExistsError: the folder holds something already.
    """
    if format not in get_args(Format):
        raise ValueError(f"format = {format!r}: give one of {', '.join(get_args(Format))}")
    if not all(np.isfinite(length) and length > 0 for length in spacing_mm):
        raise ValueError(f"spacing_mm = {spacing_mm}: give positive mm along (D, H, W)")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder = {folder}: not empty; choose a new one")
    hu = hounsfield(images, window_hu=window_hu)
    stacks = hu.reshape(len(hu), *hu.shape[-3:])  # [N, D, H, W], D = 1 for slices
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        if format == "png":
            files = _write_pngs(images, part, window_hu=window_hu, spacing_mm=spacing_mm)
        elif format == "nifti":
            files = _write_niftis(stacks, part, spacing_mm=spacing_mm)
        else:
            files = _write_dicom(stacks, part, spacing_mm=spacing_mm, seed=seed)
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return [folder / file.relative_to(part) for file in files]


def hounsfield(images: NDArray[np.float32], *, window_hu: tuple[float, float]) -> NDArray[np.int16]:
    """Images in [-1, 1] as whole HU, -1 and 1 being the ends of the window; same shape.

    Raises:
        ValueError: impossible images or window.
    """
    check_images(images, name="images")
    check_window(window_hu)
    low, high = window_hu
    hu: NDArray[np.float64] = np.rint((np.clip(images, -1, 1).astype(np.float64) + 1) / 2 * (high - low) + low)
    return hu.astype(np.int16)


def _write_pngs(
    images: NDArray[np.float32], folder: Path, *, window_hu: tuple[float, float], spacing_mm: Vector
) -> list[Path]:
    from PIL import Image

    files = [folder / f"sample_{index:04d}.png" for index in range(len(images))]
    what, pictures = "slice", images
    if images.ndim == 5:
        what, pictures = "volume (middle axial, coronal and sagittal plane)", middle_planes(images, spacing_mm)
    text = {"Description": f"synthetic CT {what}, no patient; window {window_hu[0]:g} to {window_hu[1]:g} HU"}
    for levels, file in zip(grey_levels(pictures)[:, 0], files, strict=True):
        write_png(Image.fromarray(levels), file, text=text)
    return files


def _write_niftis(stacks: NDArray[np.int16], folder: Path, *, spacing_mm: Vector) -> list[Path]:
    """One file a sample; array axes (W, H, D) along which patient Left, Posterior and Superior grow."""
    import nibabel

    files = [folder / f"sample_{index:04d}.nii.gz" for index in range(len(stacks))]
    depth, row, column = spacing_mm
    # NIfTI's world is RAS+: what grows towards Left and Posterior runs backwards in it.
    affine = np.diag([-column, -row, depth, 1.0])
    for sample, file in zip(stacks, files, strict=True):
        image = nibabel.Nifti1Image(np.ascontiguousarray(sample.transpose(2, 1, 0)), affine)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = b"SYNTHETIC CT, no patient"
        nibabel.save(image, file)
    return files


def _write_dicom(stacks: NDArray[np.int16], folder: Path, *, spacing_mm: Vector, seed: int) -> list[Path]:
    """One folder a sample, each a subject of its own.

    The name comes from the voxels, so that samples of two models never become one patient in an archive.
    """
    from medical_data.dicom_write import Generated, write_ct_series

    files = []
    for index, sample in enumerate(stacks):
        name = f"{hashlib.sha256(sample.tobytes()).hexdigest()[:16]}-{seed}-{index:04d}"
        how = f"Sampled from a diffusion model, no patient's scan: seed {seed}, sample {index}"
        files += write_ct_series(
            Volume(hu=sample.astype(np.float32), spacing_mm=spacing_mm),
            folder / f"sample_{index:04d}",
            subject=Generated(sample=name, derivation=how),
            uid_seed=name,
        )
    return files
