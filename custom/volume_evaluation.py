"""How close generated volumes are to those of held-out patients: slice by slice in three planes, and as wholes.

No feature extractor for CT volumes can be had here, so the distances of :mod:`custom.evaluation` are taken on
axial, coronal and sagittal slices and averaged over the three, as MAISI does with FID (Guo et al. 2024,
arXiv 2409.11169). A volume may show right slices in every plane and still be no body: MS-SSIM in 3D says how
much volumes differ, and :class:`Continuity` whether neighbouring slices belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from custom.evaluation import (
    EFFNET,
    INCEPTION,
    KID_SUBSETS,
    Distances,
    aligned,
    check_seed,
    check_sets,
    compare,
    distance_rows,
    equal_sets,
    extractors,
    kid_subset_size,
    mean_pairwise_ms_ssim,
    ms_ssim_scales,
    named_columns,
    prc_neighbours,
)
from medical_data.preprocess import evenly

Volumes = NDArray[np.float32]

# The axis of [N, 1, D, H, W] that each plane is cut across.
PLANES = {"axial": 2, "coronal": 3, "sagittal": 4}
SLICES_PER_PLANE = 8
MIN_VOLUMES = 6  # however many slices are cut of fewer patients, they say nothing of others


@dataclass(frozen=True, kw_only=True)
class Continuity:
    """How neighbouring slices along D go together, over all volumes of a set.

    Attributes:
        correlation: of slices d and d + 1, in [-1, 1]: the sum of their covariances over the sum of the products
            of their standard deviations, over all pairs of all volumes. That is the mean of their normalised
            cross-correlations in which a pair weighs by its contrast: a slice of air has none and weighs
            nothing, where it would otherwise be undefined, or noise of a thousandth of the window would count as
            much as a chest. 0 if no slice has contrast.
        change: mean |difference| of slices d and d + 1 in percent of the window, over all voxels.
    """

    correlation: float
    change: float


@dataclass(frozen=True, kw_only=True)
class Plane:
    """The distances of one set's slices in one plane.

    Attributes:
        effnet: from held-out in EfficientNet-Lite0's features.
        inception: the same in the original Inception's; None without its weights.
    """

    effnet: Distances
    inception: Distances | None


@dataclass(frozen=True, kw_only=True)
class VolumeColumn:
    """All figures of one set of volumes.

    Attributes:
        effnet: the mean over the three planes of each distance; ``kid_std`` too, so it is no deviation of the mean.
        inception: the same in the original Inception's features; None without its weights.
        planes: the distances by plane: axial, coronal, sagittal.
        ms_ssim: mean 3D MS-SSIM of random pairs of volumes; higher means less diverse.
        continuity: of neighbouring slices.
    """

    effnet: Distances
    inception: Distances | None
    planes: dict[str, Plane]
    ms_ssim: float
    continuity: Continuity


@dataclass(frozen=True, kw_only=True)
class VolumeEvaluation:
    """The result of :func:`evaluate_volumes`.

    Attributes:
        generated: generated volumes against held-out.
        baseline: real training volumes against held-out, disjoint patients: what perfection would score.
        untrained: samples of the untrained network against held-out, if given.
        held_out: what the continuity of generated volumes should be. Below its correlation slices do not belong
            together; above it, or with less change, volumes are smoother than patients.
        shuffled: where neighbouring slices are of two held-out volumes: what slices score that were drawn one by
            one, however real each is.
        volumes: number of volumes in each column.
        held_out_volumes: number of held-out volumes.
        image_size: (D, H, W) in voxels.
        slices_per_plane: evenly spaced slices of each volume in each plane.
        kid_subset_size: slices in each of the 100 subsets that KID averages over.
        prc_neighbours: the k of precision and recall's nearest neighbours.
        ms_ssim_scales: number of scales that the size allows.
        seed: decided subsets and pairs.
    """

    generated: VolumeColumn
    baseline: VolumeColumn
    untrained: VolumeColumn | None
    held_out: Continuity
    shuffled: Continuity
    volumes: int
    held_out_volumes: int
    image_size: tuple[int, int, int]
    slices_per_plane: int
    kid_subset_size: int
    prc_neighbours: int
    ms_ssim_scales: int
    seed: int

    @property
    def primary(self) -> str:
        """The row to look at: a Fréchet distance would need more volumes than features."""
        return "EffNet-KID" if self.generated.inception is None else "KID"

    def table(self) -> str:
        """The figures as aligned text, one column a set, with lines that say how they were made."""
        columns = named_columns(self.generated, self.baseline, self.untrained)
        rows = distance_rows(list(columns.values()))
        for plane in PLANES:
            _, kid, *_ = distance_rows([column.planes[plane] for column in columns.values()])
            rows.append([f"{kid[0]} {plane}", *kid[1:]])
        rows.append(["3D MS-SSIM within the set", *(f"{column.ms_ssim:.3f}" for column in columns.values())])
        neighbours = [*(column.continuity for column in columns.values()), self.held_out, self.shuffled]
        table = [
            ["against held-out patients", *columns, "held out", "shuffled"],
            *([*row, "", ""] for row in rows),
            ["slice-to-slice correlation", *(f"{one.correlation:.4f}" for one in neighbours)],
            ["slice-to-slice change", *(f"{one.change:.2f} %" for one in neighbours)],
        ]
        return "\n".join(
            [
                *aligned(table),
                f"{self.volumes} volumes a column, {self.held_out_volumes} held out, "
                f"{'x'.join(map(str, self.image_size))} voxels; distances: mean of axial, coronal and sagittal,",
                f"{self.slices_per_plane} slices of each volume; KID: {KID_SUBSETS} subsets of "
                f"{self.kid_subset_size}; precision and recall: {self.prc_neighbours} neighbours; MS-SSIM: "
                f"{self.ms_ssim_scales} scales.",
                f"Look at {self.primary} and compare it with its value for real volumes; and at the slice-to-slice",
                "figures, which should be those held out (shuffled: neighbours of two volumes).",
            ]
        )

    def to_json(self) -> dict[str, object]:
        """Everything as JSON types, with the version of the layout and the name of the primary figure."""
        return {"version": 1, "primary": self.primary, **asdict(self), "image_size": list(self.image_size)}


def evaluate_volumes(
    generated: Volumes,
    held_out: Volumes,
    *,
    train: Volumes,
    images_per_patient: int,
    seed: int,
    untrained: Volumes | None = None,
    inception_weights: Path | None = None,
    progress: bool = False,
) -> VolumeEvaluation:
    """Compare generated and real training volumes of one site with its held-out volumes.

    The counterpart of :func:`custom.evaluation.evaluate` in 3D: every column holds the same number of volumes, an
    image passes a network once, nothing is downloaded, torch's random state is left alone.

    The slices of a volume count as images of one patient, and few patients stay few, however many slices are cut
    of them. 7 held-out patients are enough to tell a bad model: of 24 phantom patients, real ones scored a KID
    within 0.004 of 0 however they were split, and with noise of a twentieth of the window 0.2. They cannot tell
    good models apart, nor see what a model has of patients rarer than one in seven. The KID of real volumes can lie
    slightly below 0: two slices of one volume are never of the same place, those of two volumes may be.

    Args:
        generated: float32 [N, 1, D, H, W] in [-1, 1].
        held_out: the same, [M, 1, D, H, W], of patients that trained nothing.
        train: the same, of the patients that trained; no patient of held_out.
        images_per_patient: the most volumes that held_out or train has of one patient.
        seed: 0 .. 2³²-1, decides subsets and pairs.
        untrained: samples of the network before training, as a second yardstick.
        inception_weights: the original FID Inception; a trusted file, as in ``evaluate``.
        progress: show a bar on standard error.

    Returns:
        The figures of all sets.

    Raises:
        ValueError: impossible volumes, fewer than :func:`fewest_volumes`, different sizes, an impossible seed or
            weights file.
        FileNotFoundError: no file at inception_weights.
    """
    sets = {"generated": generated, "train": train}
    if untrained is not None:
        sets["untrained"] = untrained
    neighbours = prc_neighbours(images_per_patient * SLICES_PER_PLANE)
    check_sets({**sets, "held_out": held_out}, fewest=fewest_volumes(images_per_patient), spatial_dims=3)
    check_seed(seed)
    depth, height, width = held_out.shape[2:]
    scales = ms_ssim_scales(min(depth, height, width))
    sets = equal_sets(sets, seed=seed)
    networks = extractors(inception_weights)

    from tqdm import tqdm

    planes: dict[str, dict[str, Plane]] = {name: {} for name in sets}
    with tqdm(total=len(PLANES) * len(sets), desc="evaluate", unit="plane", disable=not progress) as bar:
        for plane, axis in PLANES.items():
            compared = compare(
                {name: _slices(volumes, axis) for name, volumes in sets.items()},
                _slices(held_out, axis),
                networks,
                images_per_patient=images_per_patient * SLICES_PER_PLANE,
                seed=seed,
            )
            for name, distances in compared:
                planes[name][plane] = Plane(effnet=distances[EFFNET], inception=distances.get(INCEPTION))
                bar.update()

    def column(name: str) -> VolumeColumn:
        inception = [plane.inception for plane in planes[name].values() if plane.inception is not None]
        return VolumeColumn(
            effnet=_mean([plane.effnet for plane in planes[name].values()]),
            inception=_mean(inception) if inception else None,
            planes=planes[name],
            ms_ssim=mean_pairwise_ms_ssim(sets[name], seed=seed),
            continuity=continuity(sets[name]),
        )

    volumes = len(sets["generated"])
    return VolumeEvaluation(
        generated=column("generated"),
        baseline=column("train"),
        untrained=None if untrained is None else column("untrained"),
        held_out=continuity(held_out),
        # Half the set away, so mostly another patient's where patients have several volumes.
        shuffled=continuity(held_out, following=np.roll(held_out, len(held_out) // 2, axis=0)),
        volumes=volumes,
        held_out_volumes=len(held_out),
        image_size=(depth, height, width),
        slices_per_plane=SLICES_PER_PLANE,
        kid_subset_size=kid_subset_size(volumes * SLICES_PER_PLANE, len(held_out) * SLICES_PER_PLANE),
        prc_neighbours=neighbours,
        ms_ssim_scales=scales,
        seed=seed,
    )


def fewest_volumes(images_per_patient: int) -> int:
    """How many volumes each set of an evaluation needs: 6, and those of two patients.

    Args:
        images_per_patient: the most volumes that a set has of one patient.
    """
    return max(MIN_VOLUMES, images_per_patient + 1)


def continuity(volumes: Volumes, *, following: Volumes | None = None) -> Continuity:
    """How each slice along D goes with the next.

    Args:
        volumes: float32 [N, 1, D, H, W] in [-1, 1], D at least 2.
        following: the same shape: volumes to take the next slice from; None for the volumes themselves.
    """
    covariance = deviation = change = 0.0
    pairs = volumes.shape[2] - 1
    for here, there in zip(volumes, volumes if following is None else following, strict=True):
        one = here.reshape(pairs + 1, -1)[:-1].astype(np.float64)
        other = there.reshape(pairs + 1, -1)[1:].astype(np.float64)
        change += float(np.abs(one - other).mean())
        one -= one.mean(axis=1, keepdims=True)
        other -= other.mean(axis=1, keepdims=True)
        covariance += float((one * other).mean(axis=1).sum())
        deviation += float((one.std(axis=1) * other.std(axis=1)).sum())
    return Continuity(
        correlation=covariance / deviation if deviation > 0 else 0.0,
        change=100 * change / len(volumes) / 2,  # the window is 2 wide
    )


def _slices(volumes: Volumes, axis: int) -> Volumes:
    """Evenly spaced slices across an axis of [N, 1, D, H, W]: [N * SLICES_PER_PLANE, 1, h, w], volume by volume."""
    chosen = np.moveaxis(volumes.take(evenly(volumes.shape[axis], SLICES_PER_PLANE), axis), axis, 1)
    return chosen.reshape(-1, *chosen.shape[2:])


def _mean(distances: Sequence[Distances]) -> Distances:
    """Of each figure."""
    values = [asdict(one) for one in distances]
    return Distances(**{name: float(np.mean([one[name] for one in values])) for name in values[0]})
