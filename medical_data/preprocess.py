"""From a CT volume to the images a diffusion model sees: the same steps, alike at every site."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medical_data.errors import SeriesRefused
from medical_data.hounsfield import AIR_HU
from medical_data.stack import SPACING_LIMITS_MM
from medical_data.volume import Vector, Volume

# Between air and lung (below) and fat (above, about -100 HU): outlines the body whatever the kernel or the
# dose.
BODY_THRESHOLD_HU = -500.0
# The body is outlined on pixels of about this size: fine enough for a box, and quick on a 512 x 512 series.
BODY_GRID_MM = 2.0
# What is thinner than twice this is opened away: a couch is a shell of 1-5 mm, a chest wall is 10 mm and
# more.
OPENING_RADIUS_MM = 4.0
# A second part this large beside the largest belongs to the frame (the other leg: about 1); an arm beside a
# chest (about 0.1) and what is left of a couch do not.
BODY_PART_FRACTION = 0.25
# Air left around the body in the frame, so that the skin is not cut by the coarse grid.
MARGIN_MM = 4.0
# An image of which less than this is body is dropped: the ends of a series, and patches beside the patient.
MIN_BODY_FRACTION = 0.1


class TooLittleBody(SeriesRefused):
    """No slice or patch of the series holds enough of a body."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How volumes become images; part of a job, because every site must do it alike.

    Attributes:
        spatial_dims: 2 for axial slices, 3 for cubic patches.
        size: pixels (voxels) along each edge of an image.
        window_hu: (lowest, highest) HU, mapped linearly to [-1, 1]; what lies outside is clipped.
        images_per_patient: at most this many images of a patient, evenly spaced over the body.
        spacing_mm: voxel size of patches along (D, H, W) in mm; only for 3D. A slice has no fixed pixel
            size: the body's square frame is scaled to ``size``.

    Raises:
        ValueError: an impossible or meaningless value.
    """

    spatial_dims: int = 2
    size: int = 64
    window_hu: tuple[float, float] = (-1000.0, 600.0)
    images_per_patient: int = 16
    spacing_mm: Vector | None = None

    def __post_init__(self) -> None:
        for name, least in (("spatial_dims", 2), ("size", 8), ("images_per_patient", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} = {value!r}: give an integer of at least {least}")
        if self.spatial_dims > 3:
            raise ValueError(f"spatial_dims = {self.spatial_dims}: give 2 (axial slices) or 3 (patches)")
        low, high = self.window_hu if len(self.window_hu) == 2 else (math.nan, math.nan)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"window_hu = {self.window_hu}: give two finite HU, the lower one first")
        object.__setattr__(self, "window_hu", (float(low), float(high)))
        if self.spatial_dims == 2 and self.spacing_mm is not None:
            raise ValueError(f"spacing_mm = {self.spacing_mm}: leave it out for 2D, where the body fills the frame")
        if self.spatial_dims == 3:
            spacing = tuple(float(s) for s in self.spacing_mm or ())
            low, high = SPACING_LIMITS_MM  # a sample that is written must be readable
            if len(spacing) != 3 or not all(low <= s <= high for s in spacing):
                raise ValueError(
                    f"spacing_mm = {self.spacing_mm}: give the voxel size (D, H, W) for 3D, {low:g} to {high:g} mm"
                )
            object.__setattr__(self, "spacing_mm", spacing)


def images_from_volume(volume: Volume, config: PreprocessConfig) -> NDArray[np.float32]:
    """The images of one volume.

    2D: axial slices. The box around the body (:func:`body_mask`), the same for all slices so that they
    share one scale, is padded with air to a square in mm, smoothed against aliasing and scaled to ``size``;
    aspect ratio is kept. 3D: the box is resampled to ``spacing_mm`` and tiled with patches of ``size``
    voxels, the last of a row moved back inside; what is smaller than a patch is centred in air. Either way
    the images that hold enough body are taken evenly from the feet to the head, then HU are mapped through
    the window.

    Args:
        volume: a canonical volume (:meth:`Volume.canonical`), HU [D, H, W].
        config: what to make of it.

    Returns:
        float32 [K, 1, H, W] or [K, 1, D, H, W] in [-1, 1], K between 1 and ``images_per_patient``.

    Raises:
        TooLittleBody: no slice or patch holds enough body.
    """
    from monai.transforms import CropForeground, ScaleIntensityRange

    mask = body_mask(volume)
    if not mask.any():
        raise TooLittleBody(
            attribute="body fraction",
            value=0.0,
            remedy=f"give a CT that shows a body (above {BODY_THRESHOLD_HU:.0f} HU)",
        )
    margin = [0, *(math.ceil(MARGIN_MM / s) for s in volume.spacing_mm[1:])]
    start, end = CropForeground(margin=margin, allow_smaller=True).compute_bounding_box(mask[None])
    box = tuple(slice(int(a), int(b)) for a, b in zip(start, end, strict=True))
    make = _slices if config.spatial_dims == 2 else _patches
    images = make(volume.hu[box], mask[box], volume.spacing_mm, config)
    low, high = config.window_hu
    scaled = ScaleIntensityRange(a_min=low, a_max=high, b_min=-1.0, b_max=1.0, clip=True)(images)
    return np.ascontiguousarray(np.asarray(scaled, dtype=np.float32))


def body_mask(volume: Volume) -> NDArray[np.bool_]:
    """Where the patient is, without the couch: bool [D, H, W].

    Thresholded, opened in each slice (what leaves the field of view counts as going on), reduced to the
    largest connected part and those near its size, and filled in each slice. Accurate to about
    ``BODY_GRID_MM``.
    """
    from scipy import ndimage

    _, height, width = volume.hu.shape
    steps = [max(1, round(BODY_GRID_MM / s)) for s in volume.spacing_mm[1:]]
    coarse = volume.hu[:, :: steps[0], :: steps[1]] > BODY_THRESHOLD_HU
    radii = [max(1.0, OPENING_RADIUS_MM / (s * k)) for s, k in zip(volume.spacing_mm[1:], steps, strict=True)]
    y, x = np.ogrid[-int(radii[0]) : int(radii[0]) + 1, -int(radii[1]) : int(radii[1]) + 1]
    disk = ((y / radii[0]) ** 2 + (x / radii[1]) ** 2 <= 1.0)[None]
    opened = ndimage.binary_dilation(ndimage.binary_erosion(coarse, disk, border_value=1), disk)
    labels, parts = ndimage.label(opened)
    if parts == 0:
        return np.zeros(volume.hu.shape, dtype=np.bool_)
    voxels = np.bincount(labels.ravel())
    voxels[0] = 0
    body = np.isin(labels, np.flatnonzero(voxels >= BODY_PART_FRACTION * voxels.max()))
    filled = np.stack([ndimage.binary_fill_holes(s) for s in body])
    return filled.repeat(steps[0], axis=1).repeat(steps[1], axis=2)[:, :height, :width]


def evenly(count: int, most: int) -> NDArray[np.intp]:
    """The middle indices of ``min(count, most)`` equal stretches of ``range(count)``."""
    kept = min(count, most)
    return np.asarray((np.arange(kept) + 0.5) * count / max(kept, 1), dtype=np.intp)


def _slices(
    hu: NDArray[np.float32], mask: NDArray[np.bool_], spacing_mm: Vector, config: PreprocessConfig
) -> NDArray[np.float32]:
    """Axial slices of the box scaled to the frame: HU [K, 1, size, size]."""
    from monai.transforms import Resize, SpatialPad

    edge_mm = max(n * s for n, s in zip(hu.shape[1:], spacing_mm[1:], strict=True))
    frame = [max(n, round(edge_mm / s)) for n, s in zip(hu.shape[1:], spacing_mm[1:], strict=True)]
    fractions = mask.sum(axis=(1, 2)) / (frame[0] * frame[1])
    hu = hu[_chosen(fractions, config.images_per_patient)]
    padded = SpatialPad(spatial_size=frame, constant_values=AIR_HU)(hu).numpy()
    smooth = _antialiased(padded, [1.0, *(n / config.size for n in frame)])
    resized = Resize(spatial_size=(config.size, config.size), mode="bilinear")(smooth)
    return np.asarray(resized)[:, None]


def _patches(
    hu: NDArray[np.float32], mask: NDArray[np.bool_], spacing_mm: Vector, config: PreprocessConfig
) -> NDArray[np.float32]:
    """Patches of the resampled box: HU [K, 1, size, size, size]."""
    from monai.data import MetaTensor
    from monai.data.utils import dense_patch_slices
    from monai.transforms import Spacing, SpatialPad

    assert config.spacing_mm is not None  # noqa: S101 - PreprocessConfig requires it for 3D
    factors = [new / old for new, old in zip(config.spacing_mm, spacing_mm, strict=True)]
    both = np.stack([_antialiased(hu, factors), mask.astype(np.float32)])
    affine = np.diag([*spacing_mm, 1.0])
    spaced = Spacing(pixdim=config.spacing_mm, mode="bilinear", padding_mode="border", dtype=np.float32)(
        MetaTensor(both, affine=affine)
    )
    patch = [config.size] * 3
    image = SpatialPad(spatial_size=patch, constant_values=AIR_HU)(spaced[:1]).numpy()[0]
    body = SpatialPad(spatial_size=patch)(spaced[1:]).numpy()[0]
    places = dense_patch_slices(image.shape, patch, patch)
    chosen = _chosen(np.array([body[p].mean() for p in places]), config.images_per_patient)
    return np.stack([image[places[i]] for i in chosen])[:, None]


def _chosen(body_fractions: NDArray[np.floating], most: int) -> NDArray[np.intp]:
    """Indices of at most ``most`` images, evenly spaced among those that hold enough body."""
    enough = np.flatnonzero(body_fractions >= MIN_BODY_FRACTION)
    if enough.size == 0:
        raise TooLittleBody(
            attribute="body fraction",
            value=round(float(body_fractions.max()), 3),
            remedy=f"give a CT of which one image is at least {MIN_BODY_FRACTION} body",
        )
    return enough[evenly(enough.size, most)]


def _antialiased(hu: NDArray[np.float32], factors: list[float]) -> NDArray[np.float32]:
    """Gaussian of standard deviation (factor - 1) / 2 voxels along each axis that shrinks by ``factor``.

    That is the rule of ``skimage.transform.resize``; MONAI's own smoothing in ``Resize`` takes the outside
    of the image for 0 HU.
    """
    from scipy import ndimage

    sigma = [max(0.0, (f - 1.0) / 2.0) for f in factors]
    return np.asarray(ndimage.gaussian_filter(hu, sigma, mode="nearest"), dtype=np.float32)
