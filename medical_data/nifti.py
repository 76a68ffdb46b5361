"""One NIfTI file → one :class:`Volume`, equal to the volume of the DICOM series it was made from."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medical_data.errors import ImpossibleGeometry, NotCT, TruncatedFile, UnreadableFile
from medical_data.hounsfield import padding_to_air, refuse_impossible
from medical_data.stack import refuse_spacing, refuse_tilt
from medical_data.volume import Vector, Volume

GZIP_MAGIC = b"\x1f\x8b"
# A label mask has few values and none below zero; CT has air at -1000 HU and thousands of values.
MASK_VALUES = 256


def read_nifti(file: Path) -> Volume:
    """The CT volume of a NIfTI-1 or NIfTI-2 file (.nii, .nii.gz; the content counts, not the name).

    Values are taken as Hounsfield units after scl_slope and scl_inter; below -1024 HU becomes air. The affine
    (sform before qform) is turned from RAS to LPS.

    Args:
        file: header and voxels in one file.

    Returns:
        float32 [D, H, W], :meth:`Volume.canonical`.

    Raises:
        SeriesRefused: one of its subclasses in :mod:`medical_data.errors`, with ``file`` set.
    """
    from medical_data.dicom_header import refusing

    with refusing(file):
        image = _load(file)
        header = image.header
        shape = tuple(int(n) for n in image.shape)
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3 or 0 in shape:
            raise NotCT(attribute="dim", value="x".join(map(str, image.shape)), remedy="give one 3D volume a file")
        dtype = header.get_data_dtype()
        if dtype.kind not in "iuf":
            raise NotCT(attribute="datatype", value=str(dtype), remedy="give integer or float voxels")
        if not (int(header["sform_code"]) or int(header["qform_code"])):
            raise ImpossibleGeometry(
                attribute="sform_code, qform_code", value="0, 0", remedy="give the affine to patient space"
            )
        unit = header.get_xyzt_units()[0]
        if unit not in ("mm", "unknown"):
            raise ImpossibleGeometry(attribute="xyzt_units", value=unit, remedy="give millimetres")
        spacing, direction, origin = _geometry(np.asarray(image.affine, dtype=float))
        try:
            voxels = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise TruncatedFile(
                attribute="voxels",
                value=f"end too early ({type(error).__name__})",
                remedy="copy the file again",
            ) from None
        hu = np.ascontiguousarray(voxels.transpose(2, 1, 0))
        _refuse_mask(hu)
        replaced = padding_to_air(hu)
        refuse_impossible(hu, replaced=replaced, attribute="voxels")
        return Volume(hu=hu, spacing_mm=spacing, origin_mm=origin, direction=direction).canonical()


def _load(file: Path) -> Any:
    """The nibabel image; nibabel itself would choose the format by the file's name."""
    from nibabel import Nifti1Image, Nifti2Image
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    content = file.read_bytes()
    if content.startswith(GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TruncatedFile(
                attribute="gzip stream",
                value=f"broken ({type(error).__name__})",
                remedy="copy the file again",
            ) from None
    kind = nifti_version(content[:352])
    if kind is None:
        raise UnreadableFile(
            attribute="magic", value="not NIfTI", remedy="give header and voxels in one file (.nii, .nii.gz)"
        )
    try:
        return (Nifti1Image if kind == 1 else Nifti2Image).from_stream(io.BytesIO(content))
    except (ImageFileError, HeaderDataError) as error:
        raise UnreadableFile(attribute="header", value=type(error).__name__, remedy="write it again") from None


def nifti_version(start: bytes) -> int | None:
    """1 or 2 for the first 352 (uncompressed) bytes of a one-file NIfTI image, else None."""
    if start[344:348] == b"n+1\0":
        return 1
    return 2 if start[4:12] == b"n+2\0\r\n\x1a\n" else None


def _geometry(affine: NDArray[np.float64]) -> tuple[Vector, tuple[Vector, Vector, Vector], Vector]:
    """Spacing and directions of [z, y, x] and the origin, in LPS.

    Raises:
        ImpossibleGeometry: not a finite affine with three edges that a scanner has.
        GantryTilt: sheared axes.
    """
    if not np.isfinite(affine).all():
        raise ImpossibleGeometry(attribute="affine", value="not finite", remedy="write it again")
    to_lps = np.diag([-1.0, -1.0, 1.0])
    edges = to_lps @ affine[:3, :3]
    spacing = np.linalg.norm(edges, axis=0)
    refuse_spacing("affine", spacing)
    axes = (edges / spacing).T
    cosines = np.abs(axes @ axes.T - np.eye(3)).max()
    refuse_tilt("affine (shear)", float(np.degrees(np.arcsin(np.clip(cosines, 0, 1)))))
    # A shear within the tolerance is dropped as the DICOM reader drops it: the slice normal replaces the
    # third axis.
    x, y = axes[0], axes[1] - axes[0] * (axes[0] @ axes[1])
    y /= np.linalg.norm(y)
    normal = np.cross(x, y)
    z = normal * np.sign(normal @ axes[2])
    height, width = float(spacing[1]), float(spacing[0])
    return (
        (float(spacing[2] * abs(axes[2] @ z)), height, width),
        (_vector(z), _vector(y), _vector(x)),
        _vector(to_lps @ affine[:3, 3]),
    )


def _vector(values: NDArray[np.float64]) -> Vector:
    x, y, z = (float(v) for v in values)
    return x, y, z


def _refuse_mask(values: NDArray[np.float32]) -> None:
    """Refuse label masks and 8-bit pictures: few, whole and none below zero."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite([low, high]).all() and low >= 0 and high <= 65535):
        return
    whole = values.astype(np.uint16)
    if not np.array_equal(whole, values):
        return
    count = int(np.count_nonzero(np.bincount(whole.ravel())))
    if count <= MASK_VALUES:
        raise NotCT(
            attribute="voxels",
            value=f"{count} whole values from {low:.0f} to {high:.0f}",
            remedy="leave it out: a label mask or a picture, not Hounsfield units",
        )
