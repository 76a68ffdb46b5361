"""A classifier that never sees the model: can members be told from non-members by their images alone?

If they can, the two groups differ by something other than training (a scanner, a year, a protocol), and an attack may
score well on a model that remembers nothing. Such an audit says nothing about the model.

    features of each image → of each patient → a linear discriminant, cross-fitted by patient → AUC over patients
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch.nn import functional

from privacy.audit.errors import Unattackable, require
from privacy.audit.stacking import patient_folds
from privacy.audit.statistics import Interval, clustered_auc_interval

# One-sided: cross-fitting makes AUCs below 1/2 under chance (whom a fold leaves out, the others lack), so that low ones
# mean nothing. 1 %: an alarm voids the audit.
LEVEL = 0.01
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_HISTOGRAM_EDGES = np.linspace(-1, 1, 9)[1:-1]  # eight bins; images lie in [-1, 1]
_THUMBNAIL = 8  # voxels along each axis
_COMPONENTS = 8
# λ, in units of a feature's variance: much of the way to the difference of means, which needs few patients.
_RIDGE = 3.0
_TINY = 1e-12  # keeps ratios and logarithms of blank images finite


@dataclass(frozen=True, kw_only=True)
class BlindTest:
    """Whether images alone tell members from non-members.

    Attributes:
        auc: over patients, cross-fitted; its 95 % interval takes the classifier as given.
        p_value: one-sided, by permutation of patients with a new fit each time.
        confounded: whether the p-value is at most 1 %.
        note: what was done and what it would have caught.
    """

    auc: Interval
    p_value: float
    confounded: bool
    note: str


def blind_test(
    images: NDArray[np.float32],
    patient: NDArray[np.int64],
    member: NDArray[np.bool_],
    *,
    seed: int,
    folds: int = 5,
    permutations: int = 999,
) -> BlindTest:
    """Test at 1 % whether a classifier of images alone beats chance.

    Labels are permuted among the patients of a fold, so that each permutation has the folds' shares of members that the
    truth has, and everything is fitted anew. The p-value (1 + permutations at least as good) / (1 + permutations) is
    valid for any classifier and any number of patients, if patients are exchangeable.

    Power, by simulation (60 cohorts, five images of 16 × 16 voxels a patient, noise of 0.05 that varies by a fifth
    between patients): a blur of 0.4 voxels in members is caught in 27 % of cohorts with 20 patients of each kind, 95 %
    with 50 and all with 100; noise of 0.03 added in 27 %, 73 % and 97 %; a level higher by 0.1, which is one standard
    deviation of the patients' levels, in 10 %, 37 % and 73 %. With 20 of each, only gross differences are seen.

    Args:
        images: float32 [N, 1, *spatial] in [-1, 1], two or three spatial axes.
        patient: int64 [N].
        member: bool [P].
        seed: of folds, permutations and the interval's resampling.
        folds: fewer are made where patients are so few that permutations could not reach 1 %.
        permutations: at least 99.

    Raises:
        Unattackable: fewer than five members or non-members, so that no outcome could be significant; too few
            permutations; shapes that do not fit; a patient without images; images that are not finite.
    """
    require(permutations >= round(1 / LEVEL) - 1, "permutations", permutations, f"give at least {1 / LEVEL - 1:.0f}")
    features = _patient_features(images, patient, member)
    fold = _powerful_folds(member, folds, seed)
    labels = _permuted_within(fold, member, permutations, seed)
    areas = _aucs(_cross_fitted(features, labels, fold), labels)
    observed, by_chance = areas[0], np.sort(areas[1:])[::-1]
    p_value = (1 + int((by_chance >= observed).sum())) / (1 + permutations)
    scores = _cross_fitted(features, member[:, None], fold)[:, 0]
    critical = by_chance[math.floor(LEVEL * (1 + permutations)) - 1]
    members = int(member.sum())
    note = (
        f"{features.shape[1]} features of {members} members and {len(member) - members} held-outs, {fold.max() + 1} "
        f"folds of patients, {permutations} permutations: a patient-level AUC above {critical:.2f} is significant at "
        f"{LEVEL:.0%}, one-sided; smaller differences between the groups go unseen"
    )
    return BlindTest(
        auc=clustered_auc_interval(scores, np.arange(len(member)), member, seed=seed),
        p_value=p_value,
        confounded=p_value <= LEVEL,
        note=note,
    )


def blind_scores(
    images: NDArray[np.float32], patient: NDArray[np.int64], member: NDArray[np.bool_], *, seed: int, folds: int = 5
) -> NDArray[np.float64]:
    """The score of each image's patient by the classifier of :func:`blind_test`, fitted on other patients, float64 [N].

    Args and errors are those of :func:`blind_test`.
    """
    features = _patient_features(images, patient, member)
    scores = _cross_fitted(features, member[:, None], _powerful_folds(member, folds, seed))
    of_image: NDArray[np.float64] = scores[patient, 0]
    return of_image


def image_features(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """What each image looks like, float64 [N, F]: histogram, moments, gradients, noise, sharpness, coarse content.

    The coarse content is that of thumbnails in their principal components over all images, labels unseen.

    Args:
        images: float32 [N, 1, *spatial] in [-1, 1], two or three spatial axes of at least three voxels.
    """
    flat = images.reshape(len(images), -1)
    centred = flat - flat.mean(axis=1, keepdims=True, dtype=np.float64)
    spread = centred.std(axis=1) + _TINY
    shares = [(flat < edge).mean(axis=1) for edge in _HISTOGRAM_EDGES]
    moments = [flat.mean(axis=1), np.log(spread), *((centred**k).mean(axis=1) / spread**k for k in (3, 4))]
    edges = []
    for axis in range(2, images.ndim):
        slope = np.abs(np.diff(images, axis=axis)).reshape(len(images), -1)
        curvature = np.abs(np.diff(images, n=2, axis=axis)).reshape(len(images), -1)
        gradient = slope.mean(axis=1, dtype=np.float64) + _TINY
        bend = curvature.mean(axis=1, dtype=np.float64) + _TINY
        noise = np.median(curvature, axis=1)
        edges += [np.log(gradient), np.log(gradient / spread), np.log(bend / gradient), noise]
    columns = [*np.quantile(flat, _QUANTILES, axis=1), *shares, *moments, *edges]
    return np.column_stack([*columns, _thumbnail_components(images)])


def _thumbnail_components(images: NDArray[np.float32]) -> NDArray[np.float64]:
    pool = functional.adaptive_avg_pool2d if images.ndim == 4 else functional.adaptive_avg_pool3d
    thumbnails = pool(torch.from_numpy(images), _THUMBNAIL).flatten(1).double().numpy()
    thumbnails -= thumbnails.mean(axis=0)
    _, _, axes = np.linalg.svd(thumbnails, full_matrices=False)
    components: NDArray[np.float64] = thumbnails @ axes[:_COMPONENTS].T
    return components


def _patient_features(
    images: NDArray[np.float32], patient: NDArray[np.int64], member: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Mean of each feature over a patient's images, as normal scores over patients, [P, F]: no outlier decides."""
    _require_images(images, patient, member)
    features = image_features(images)
    sums = np.zeros((len(member), features.shape[1]))
    np.add.at(sums, patient, features)
    means = sums / np.bincount(patient, minlength=len(member))[:, None]
    scores: NDArray[np.float64] = stats.norm.ppf(stats.rankdata(means, axis=0) / (len(member) + 1))
    return scores


def _cross_fitted(
    features: NDArray[np.float64], labels: NDArray[np.bool_], fold: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Regularised discriminant w · (x - (μ₁ + μ₀) / 2), w = (Σ + λ I)⁻¹ (μ₁ - μ₀), for each column of labels, [P, B].

    Each patient is scored by a fit on the other folds. Σ is the covariance of all their patients, both kinds together:
    it is one for all permutations, so that they cost one matrix product.

    Args:
        features: float64 [P, F].
        labels: bool [P, B].
        fold: int64 [P].
    """
    scores = np.empty(labels.shape)
    for number in range(int(fold.max()) + 1):
        held_out = fold == number
        fitted, ours = features[~held_out], labels[~held_out]
        covariance = np.cov(fitted, rowvar=False) + _RIDGE * np.eye(features.shape[1])
        members, others = (fitted.T @ (side / side.sum(axis=0)) for side in (ours, ~ours))
        direction = np.linalg.solve(covariance, members - others)
        middle = ((members + others) / 2 * direction).sum(axis=0)
        scores[held_out] = features[held_out] @ direction - middle
    return scores


def _powerful_folds(member: NDArray[np.bool_], folds: int, seed: int) -> NDArray[np.int64]:
    """As many folds as leave enough arrangements of labels within folds for one to be rarer than the level."""
    members = int(member.sum())
    for fewer in range(min(folds, members, len(member) - members), 1, -1):
        fold = patient_folds(member, folds=fewer, seed=seed)
        sizes, ours = np.bincount(fold), np.bincount(fold[member])
        if math.prod(math.comb(int(n), int(k)) for n, k in zip(sizes, ours, strict=True)) >= 1 / LEVEL:
            return fold
    raise Unattackable(
        argument="patients, folds",
        value=(members, len(member) - members, folds),
        remedy=f"too few to reach a level of {LEVEL:.0%} in the blind test: give at least five of each kind, two folds",
    )


def _permuted_within(
    fold: NDArray[np.int64], member: NDArray[np.bool_], permutations: int, seed: int
) -> NDArray[np.bool_]:
    """The labels, and then permutations of them within folds, [P, 1 + permutations]."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(member[:, None], 1 + permutations, axis=1)
    for number in range(int(fold.max()) + 1):
        rows = np.flatnonzero(fold == number)
        labels[rows, 1:] = rng.permuted(labels[rows, 1:], axis=0)
    return labels


def _aucs(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> NDArray[np.float64]:
    """AUC of each column, [B]."""
    members = labels.sum(axis=0)
    ranks = (stats.rankdata(scores, axis=0) * labels).sum(axis=0)
    areas: NDArray[np.float64] = (ranks - members * (members + 1) / 2) / (members * (len(labels) - members))
    return areas


def _require_images(images: NDArray[np.float32], patient: NDArray[np.int64], member: NDArray[np.bool_]) -> None:
    fits = images.ndim in (4, 5) and images.shape[1] == 1 and min(images.shape[2:]) >= 3
    require(fits, "images", images.shape, "give [N, 1, *spatial] with two or three axes of at least three voxels")
    alike = patient.shape == images.shape[:1] and member.ndim == 1 and member.dtype == np.bool_
    require(alike, "patient, member", (patient.shape, member.shape), "give [N] and bool [P]")
    require(bool(np.isfinite(images).all()), "images", "not finite", "give finite images")
    everyone = np.array_equal(np.unique(patient), np.arange(len(member)))
    require(everyone, "patient", "not all of them have images", f"give images of each of {len(member)} patients")
