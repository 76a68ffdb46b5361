"""Pictures of CT images that a person can judge: PNG grids in grey with the window written on them.

Everything here works on images as the network sees them: float32 in [-1, 1], where -1 is the lower and 1 the
upper end of the window in HU; slices [N, 1, H, W], or volumes [N, 1, D, H, W], which :func:`viewable` makes
into one picture each.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from custom.atomic import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

    from medical_data.preprocess import PreprocessConfig
    from medical_data.volume import Vector

SHAPES = {2: "[N, 1, H, W]", 3: "[N, 1, D, H, W]"}
# Room for float32 rounding of a clamped sample; anything further out was never brought into the window.
RANGE_TOLERANCE = 1e-5
# Height in pixels to about which small images are enlarged: whole factors, nearest neighbour, no invented detail.
VISIBLE_EDGE = 128
GAP = 2
# Between pictures of several planes, so that a gap inside one is not taken for its end.
WIDE_GAP = 12
BACKGROUND = 32
INK = 230
FONT_SIZE = 16


def check_images(images: NDArray[np.float32], *, name: str, spatial_dims: tuple[int, ...] = (2, 3)) -> None:
    """Refuse what is not a non-empty set of windowed images.

    Args:
        images: float32 [N, 1, H, W] or [N, 1, D, H, W], finite, in [-1, 1].
        name: the argument to name in the error.
        spatial_dims: which of the two are meant: 2 for slices, 3 for volumes.

    Raises:
        ValueError: dtype, shape, non-finite pixels or range; names argument, value and remedy.
    """
    fits = images.ndim - 2 in spatial_dims and images.shape[1] == 1 and images.size > 0
    if images.dtype != np.float32 or not fits:
        shapes = " or ".join(SHAPES[dims] for dims in spatial_dims)
        raise ValueError(f"{name} = {images.dtype} {images.shape}: give non-empty float32 {shapes}")
    low, high = float(images.min()), float(images.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name} holds non-finite pixels: check the sampler before judging its images")
    if low < -1 - RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(f"{name} spans [{low:.4g}, {high:.4g}]: clip it to [-1, 1], the ends of the window")


def check_window(window_hu: tuple[float, float]) -> None:
    """Refuse a window that is not (low, high) within int16 HU.

    Raises:
        ValueError: names the window and the remedy.
    """
    low, high = window_hu
    if not -32768 <= low < high <= 32767:
        raise ValueError(f"window_hu = {window_hu}: give (low, high), -32768 <= low < high <= 32767 HU")


def grey_levels(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images in [-1, 1] as grey levels 0..255, rounded to the nearest, same shape.

    Raises:
        ValueError: see :func:`check_images`.
    """
    check_images(images, name="images")
    levels: NDArray[np.float32] = np.rint((np.clip(images, -1, 1) + 1) * np.float32(127.5))
    return levels.astype(np.uint8)


def viewable(images: NDArray[np.float32], preprocess: PreprocessConfig) -> NDArray[np.float32]:
    """Images as the grids here take them: slices unchanged, of each volume its three middle planes.

    Args:
        images: float32 [N, 1, *spatial] in [-1, 1], as preprocessing or a model gives them.
        preprocess: how they were made.

    Returns:
        float32 [N, 1, h, w] in [-1, 1], of volumes as :func:`middle_planes` lays them out.

    Raises:
        ValueError: impossible images, or not of these dimensions.
    """
    check_images(images, name="images", spatial_dims=(preprocess.spatial_dims,))
    return images if preprocess.spacing_mm is None else middle_planes(images, preprocess.spacing_mm)


def middle_planes(volumes: NDArray[np.float32], spacing_mm: Vector) -> NDArray[np.float32]:
    """The middle axial, coronal and sagittal plane of each volume side by side, in true proportions.

    A pixel is a square of the finest of the three spacings, so that no slice is lost; coarser axes are
    interpolated linearly. Superior is up in the coronal and the sagittal plane, Anterior in the axial one and on
    the left of the sagittal one; the patient's Left is on the right.

    Args:
        volumes: float32 [N, 1, D, H, W] in [-1, 1]; D grows to Superior, H to Posterior, W to Left.
        spacing_mm: voxel size along (D, H, W) in mm.

    Returns:
        float32 [N, 1, h, w] in [-1, 1]; between and beside the planes the grey of the grids.

    Raises:
        ValueError: impossible volumes.
    """
    import torch
    from torch.nn.functional import interpolate

    check_images(volumes, name="volumes", spatial_dims=(3,))
    depth, height, width = (
        round(count * mm / min(spacing_mm)) for count, mm in zip(volumes.shape[2:], spacing_mm, strict=True)
    )
    upright = np.flip(volumes, axis=2)
    middle = [count // 2 for count in volumes.shape[2:]]
    planes = [
        interpolate(torch.from_numpy(plane.copy()), size=size, mode="bilinear").numpy()
        for plane, size in (
            (volumes[:, :, middle[0]], (height, width)),
            (upright[:, :, :, middle[1]], (depth, width)),
            (upright[..., middle[2]], (depth, height)),
        )
    ]
    tallest, row = max(depth, height), width + GAP + width + GAP + height
    picture = np.full((len(volumes), 1, tallest, row), BACKGROUND / 127.5 - 1, np.float32)
    left = 0
    for plane in planes:
        high, wide = plane.shape[2:]
        top = (tallest - high) // 2
        picture[:, :, top : top + high, left : left + wide] = plane
        left += wide + GAP
    return picture


def sample_grid(
    images: NDArray[np.float32],
    file: Path,
    *,
    title: str,
    window_hu: tuple[float, float],
    columns: int = 8,
) -> None:
    """Write the images row by row as one PNG, under a title and above the window.

    Args:
        images: float32 [N, 1, H, W] in [-1, 1], of volumes :func:`viewable`; images lower than 128 pixels are
            enlarged by a whole factor.
        file: the PNG, written atomically; missing folders are made.
        title: one line, latin-1.
        window_hu: HU of black and of white.
        columns: images in a row; fewer where they are wider than high.

    Raises:
        ValueError: impossible images, window or number of columns.
    """
    grids([(title, images)], file, window_hu=window_hu, columns=columns)


def real_and_generated(
    real: NDArray[np.float32],
    generated: NDArray[np.float32],
    file: Path,
    *,
    window_hu: tuple[float, float],
    columns: int = 4,
) -> None:
    """Write held-out images and generated ones side by side as one PNG.

    The left panel shows patients: such a picture is patient data and stays where the patients' scans may be.

    Args:
        real: float32 [N, 1, H, W] in [-1, 1], images of held-out patients; of volumes :func:`viewable`.
        generated: float32 [M, 1, H, W] in [-1, 1], the same H and W.
        file: the PNG, written atomically; missing folders are made.
        window_hu: HU of black and of white.
        columns: images in a row of each panel; fewer where they are wider than high.

    Raises:
        ValueError: impossible images, window or number of columns, or images of different sizes.
    """
    if real.shape[1:] != generated.shape[1:]:
        sizes = f"real {real.shape[1:]}, generated {generated.shape[1:]}"
        raise ValueError(f"{sizes}: give images of one size")
    panels = [("held-out patients (real)", real), ("generated", generated)]
    grids(panels, file, window_hu=window_hu, columns=columns)


def write_png(image: Image, file: Path, *, text: dict[str, str]) -> None:
    """Write a picture as PNG with text chunks; the file is there as a whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=chunks)
    write_atomically(file, content.getvalue())


def grids(
    panels: list[tuple[str, NDArray[np.float32]]],
    file: Path,
    *,
    window_hu: tuple[float, float],
    columns: int,
) -> None:
    """Write several sets of images side by side as one PNG, each under its title.

    Args:
        panels: title, one line in latin-1, and images, float32 [N, 1, H, W] in [-1, 1]; of volumes
            :func:`viewable`.
        file: the PNG, written atomically; missing folders are made.
        window_hu: HU of black and of white.
        columns: images in a row of each panel; fewer where they are wider than high.

    Raises:
        ValueError: impossible images, window or number of columns.
    """
    from PIL import Image, ImageDraw, ImageFont

    check_window(window_hu)
    if columns < 1:
        raise ValueError(f"columns = {columns}: give at least 1")
    for title, images in panels:
        check_images(images, name=title, spatial_dims=(2,))
    window = f"window {window_hu[0]:g} to {window_hu[1]:g} HU"
    font = ImageFont.load_default(size=FONT_SIZE)
    montages = [_montage(grey_levels(images)[:, 0], columns=columns) for _, images in panels]
    widths = [
        max(montage.shape[1], round(font.getlength(title)))
        for (title, _), montage in zip(panels, montages, strict=True)
    ]
    line = 2 * FONT_SIZE
    width = max(sum(widths) + line * (len(panels) + 1), round(font.getlength(window)) + 2 * line)
    height = max(montage.shape[0] for montage in montages)
    canvas = Image.new("L", (width, height + 2 * line), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    left = line
    for (title, _), montage, room in zip(panels, montages, widths, strict=True):
        draw.text((left, line // 2), title, fill=INK, font=font, anchor="lm")
        canvas.paste(Image.fromarray(montage), (left, line))
        left += room + line
    draw.text((line, height + line + line // 2), window, fill=INK, font=font, anchor="lm")
    write_png(canvas, file, text={"Description": ", ".join(title for title, _ in panels) + f"; {window}"})


def _montage(images: NDArray[np.uint8], *, columns: int) -> NDArray[np.uint8]:
    """Images [N, H, W] in rows of `columns` squares, enlarged, with gaps between them."""
    count, height, width = images.shape
    factor = max(1, round(VISIBLE_EDGE / height))
    gap = GAP if width <= height else WIDE_GAP
    columns = min(-(-columns * height // width), count)
    rows = -(-count // columns)
    high, wide = height * factor + gap, width * factor + gap
    montage = np.full((rows * high - gap, columns * wide - gap), BACKGROUND, np.uint8)
    for index, one in enumerate(images.repeat(factor, axis=1).repeat(factor, axis=2)):
        top, left = index // columns * high, index % columns * wide
        montage[top : top + high - gap, left : left + wide - gap] = one
    return montage
