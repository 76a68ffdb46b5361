"""Scores against reference models and against what an image's difficulty would suggest.

An image that is easy for every model has a low loss whether or not the model was trained on it. These scores ask how
much lower it is than that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from privacy.audit.errors import require
from privacy.audit.stacking import patient_folds

FEWEST_CALIBRATING_PATIENTS = 4
# Quantiles of a non-member's score: what a score must exceed to count, and from where the distance to it is a spread.
UPPER_QUANTILE, CENTRAL_QUANTILE = 0.9, 0.5
# Least predicted spread, as a share of the spread of all scores that the regression saw: quantile fits may cross.
_LEAST_SPREAD = 0.01
_NORMAL_INTERQUARTILE_RANGE = 1.349  # of a normal variable with σ = 1
_TREES = 30
_TREE_DEPTH = 2
_IMAGES_PER_LEAF = 10


def difficulty_calibrated(target: NDArray[np.float64], references: NDArray[np.float64]) -> NDArray[np.float64]:
    """Score less the mean score under reference models, float64 [N] (Watson et al. 2022, arXiv:2111.08440).

    Args:
        target: scores under the attacked model, such as -loss, float64 [N].
        references: the same under models of the same kind that were trained on other patients, float64 [R, N].

    Raises:
        Unattackable: no reference model, shapes that differ, or scores that are not finite.
    """
    _require_references(target, references, "references")
    calibrated: NDArray[np.float64] = target - references.mean(axis=0)
    return calibrated


def offline_rmia(
    target: NDArray[np.float64],
    references: NDArray[np.float64],
    out: NDArray[np.bool_],
    population: NDArray[np.float64],
    population_references: NDArray[np.float64],
    *,
    a: float = 0.95,
    gamma: float = 1.0,
) -> NDArray[np.float64]:
    """Share of a population that an image beats in a pairwise likelihood-ratio test, float64 [N] in [0, 1].

    Robust membership inference, offline (Zarifzadeh et al. 2024, arXiv:2312.03262), with OUT reference models alone:

        LR(x, z) = (p(x|θ) / p(x)) / (p(z|θ) / p(z)),    score(x) = Pr_z(LR(x, z) ≥ γ),
        p(x) = ((1 + a) mean p_OUT(x) + (1 - a)) / 2,    the mean of p_OUT and of p_IN ≈ a p_OUT + 1 - a.

    The paper's p is a class probability. A diffusion model has none, so p(x|θ) here is σ((ℓ(x) - m) / s) with ℓ the
    proxy of the log-likelihood and m and s median and normalised interquartile range of ℓ over the population under
    the same model: within (0, 1), as the line p_IN needs, and unchanged if a model's proxies are shifted or scaled.
    With γ = 1 the share is the image's rank in the population; a larger γ sets all to 0 that gain little.

    Args:
        target: ℓ of the attacked images under the attacked model, such as -loss, float64 [N].
        references: the same under reference models, float64 [R, N].
        out: whether a reference model was trained without the image's patient, bool [R, N].
        population: ℓ of images z of patients whom neither the attacked nor a reference model was trained on,
            float64 [Z], under the attacked model.
        population_references: the same under reference models, float64 [R, Z].
        a: in [0, 1]; 1 takes p_IN for p_OUT, 0 takes it for certainty. The paper's classifiers had 0.2 to 0.3 and so
            were nearly certain of what they were trained on; a diffusion model's losses barely move, which is a ≈ 1.
        gamma: γ > 0.

    Raises:
        Unattackable: an image without an OUT reference model, shapes that differ, proxies that are not finite or do not
            vary over the population, or a or γ out of range.
    """
    require(0 <= a <= 1, "a", a, "give a value in [0, 1]")
    require(gamma > 0, "gamma", gamma, "give a positive ratio")
    _require_references(target, references, "references")
    _require_references(population, population_references, "population_references")
    fits = out.shape == references.shape and out.dtype == np.bool_ and len(references) == len(population_references)
    require(fits, "out", (out.shape, str(out.dtype)), "give bool [R, N] and the same R models for the population")
    without = int((~out.any(axis=0)).sum())
    require(without == 0, "out", f"{without} images", "give each a reference model that was trained without it")

    def gain(p: NDArray[np.float64], p_out: NDArray[np.float64]) -> NDArray[np.float64]:
        return p / (((1 + a) * p_out + (1 - a)) / 2)

    p_x, p_z = _probabilities(target, population)
    of_references = [_probabilities(*each) for each in zip(references, population_references, strict=True)]
    p_out_x = np.mean([of_x for of_x, _ in of_references], axis=0, where=out)
    p_out_z = np.mean([of_z for _, of_z in of_references], axis=0)
    beaten = np.sort(gamma * gain(p_z, p_out_z))
    return np.searchsorted(beaten, gain(p_x, p_out_x), side="right") / len(population)


def quantile_calibrated(
    features: NDArray[np.float64],
    scores: NDArray[np.float64],
    patient: NDArray[np.int64],
    member: NDArray[np.bool_],
    calibrating: NDArray[np.bool_],
    *,
    seed: int,
    folds: int = 5,
) -> NDArray[np.float64]:
    """How far a score lies above what is high for a non-member that looks alike, float64 [N].

        (score - q̂₀.₉(features)) / (q̂₀.₉(features) - q̂₀.₅(features))

    Quantile regression in the manner of Bertran et al. (2023, arXiv:2307.03694), on diffusion models Tang et al. (2023,
    arXiv:2312.05140): it needs known non-members and no reference model. All patients are dealt into folds, members
    too, and each image is compared with regressions that were fitted on the other folds' calibrating images: no patient
    is scored by a regression that saw it, and members by no better one than non-members.

    Args:
        features: what an image's difficulty follows from, such as :func:`difficulty_features`, float64 [N, F].
        scores: float64 [N].
        patient: int64 [N].
        member: bool [P].
        calibrating: images of known non-members that the regression may use, bool [N].
        seed: of the folds.
        folds: at least 2; fewer if there are fewer calibrating or other patients.

    Raises:
        Unattackable: calibrating images of members, fewer than four calibrating patients, fewer than two others,
            shapes that differ, or numbers that are not finite or do not vary.
    """
    _require_calibrating(features, scores, patient, member, calibrating)
    of_calibrating = np.zeros(len(member), dtype=np.bool_)
    of_calibrating[patient[calibrating]] = True
    found = int(of_calibrating.sum())
    remedy = f"calibrate on at least {FEWEST_CALIBRATING_PATIENTS} patients"
    require(found >= FEWEST_CALIBRATING_PATIENTS, "calibrating", f"{found} patients", remedy)
    calibrated = np.empty(len(scores))
    for fitted, compared in _folds(patient, of_calibrating, calibrating, folds, seed):
        low, high = np.quantile(scores[fitted], [CENTRAL_QUANTILE, UPPER_QUANTILE])
        require(high > low, "scores", "equal over non-members", "leave out attacks that say nothing")
        central, upper = (
            _predicted_quantile(features[fitted], scores[fitted], features[compared], quantile)
            for quantile in (CENTRAL_QUANTILE, UPPER_QUANTILE)
        )
        spread = np.maximum(upper - central, _LEAST_SPREAD * (high - low))
        calibrated[compared] = (scores[compared] - upper) / spread
    return calibrated


def difficulty_features(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean, standard deviation and gradient energy of each image, float64 [N, 3].

    The gradient energy is the sum over axes of the mean squared difference between neighbours.

    Args:
        images: [N, 1, *spatial] with two or three spatial axes of at least two voxels.

    Raises:
        Unattackable: another shape, or images that are not finite.
    """
    fits = images.ndim in (4, 5) and images.shape[1] == 1 and min(images.shape[2:]) >= 2
    require(fits, "images", images.shape, "give [N, 1, *spatial] with two or three spatial axes")
    require(bool(np.isfinite(images).all()), "images", "not finite", "give finite images")
    axes = tuple(range(1, images.ndim))
    mean = images.mean(axis=axes, dtype=np.float64)
    spread = images.std(axis=axes, dtype=np.float64)
    energy = np.zeros(len(images))
    for axis in axes[1:]:
        energy += np.square(np.diff(images, axis=axis)).mean(axis=axes, dtype=np.float64)
    return np.stack([mean, spread, energy], axis=1)


def _probabilities(
    proxies: NDArray[np.float64], population: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """p of one model for the attacked images and for the population."""
    lower, median, upper = np.quantile(population, [0.25, 0.5, 0.75])
    scale = (upper - lower) / _NORMAL_INTERQUARTILE_RANGE
    require(scale > 0, "population", "does not vary", "give images that differ")
    return expit((proxies - median) / scale), expit((population - median) / scale)


def _folds(
    patient: NDArray[np.int64],
    of_calibrating: NDArray[np.bool_],
    calibrating: NDArray[np.bool_],
    folds: int,
    seed: int,
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Images that a regression is fitted on and images that are compared with it, bool [N] each."""
    fold = patient_folds(of_calibrating, folds=folds, seed=seed)[patient]
    for number in range(int(fold.max()) + 1):
        yield calibrating & (fold != number), fold == number


def _predicted_quantile(
    features: NDArray[np.float64], scores: NDArray[np.float64], wanted: NDArray[np.float64], quantile: float
) -> NDArray[np.float64]:
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(
        loss="quantile",
        alpha=quantile,
        n_estimators=_TREES,
        max_depth=_TREE_DEPTH,
        min_samples_leaf=_IMAGES_PER_LEAF,
        random_state=0,  # breaks ties between features; nothing else is random
    )
    predicted: NDArray[np.float64] = model.fit(features, scores).predict(wanted)
    return predicted


def _require_references(target: NDArray[np.float64], references: NDArray[np.float64], argument: str) -> None:
    fits = target.ndim == 1 and target.size > 0 and references.ndim == 2 and references.shape[1:] == target.shape
    require(fits and len(references) > 0, argument, (target.shape, references.shape), "give [N] and [R, N], R ≥ 1")
    finite = bool(np.isfinite(target).all() and np.isfinite(references).all())
    require(finite, argument, "not finite", "leave out models whose loss overflows")


def _require_calibrating(
    features: NDArray[np.float64],
    scores: NDArray[np.float64],
    patient: NDArray[np.int64],
    member: NDArray[np.bool_],
    calibrating: NDArray[np.bool_],
) -> None:
    alike = scores.ndim == 1 and scores.shape == patient.shape == calibrating.shape == features.shape[:1]
    boolean = member.dtype == calibrating.dtype == np.bool_
    shapes = (features.shape, scores.shape, patient.shape, calibrating.shape)
    remedy = "give [N, F], [N], [N] and bool [N]"
    require(alike and boolean and features.ndim == 2, "features, scores, patient, calibrating", shapes, remedy)
    finite = bool(np.isfinite(features).all() and np.isfinite(scores).all())
    require(finite, "features, scores", "not finite", "leave out attacks whose scores overflow")
    everyone = np.array_equal(np.unique(patient), np.arange(len(member)))
    require(everyone, "patient", "not all of them have images", f"give images of each of {len(member)} patients")
    wrong = int((calibrating & member[patient]).sum())
    require(wrong == 0, "calibrating", f"{wrong} images of members", "calibrate on known non-members alone")
