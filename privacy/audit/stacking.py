"""One attacker from many scores: a logistic regression that is never asked about a patient it was fitted on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.audit.errors import require

FEWEST_PATIENTS = 4  # of each kind
# C, the inverse strength of the L2 penalty on standardised features.
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_INNER_FOLDS = 3
_MOST_ITERATIONS = 1000


def patient_folds(member: NDArray[np.bool_], *, folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of each patient, int64 [P]: at random, and as many members and as many non-members in each as can be.

    Args:
        member: bool [P].
        folds: at least 2; fewer are made if there are fewer members or non-members.
        seed: of the draw.

    Raises:
        Unattackable: fewer than two folds, members or non-members.
    """
    rng = np.random.default_rng(seed)
    members = int(member.sum())
    fewest = min(members, len(member) - members)
    require(folds >= 2, "folds", folds, "give at least 2")
    require(fewest >= 2, "patients of a kind", fewest, "cross-fitting needs at least two of each")
    fold = np.empty(len(member), dtype=np.int64)
    for side in (member, ~member):
        fold[side] = rng.permutation(int(side.sum())) % min(folds, fewest)
    return fold


def stacked_scores(
    features: NDArray[np.float64],
    patient: NDArray[np.int64],
    member: NDArray[np.bool_],
    *,
    seed: int,
    folds: int = 5,
) -> NDArray[np.float64]:
    """Log-odds that an image's patient is a member, each from a fit that saw no image of that patient, float64 [N].

    Folds are of patients. In each, features are standardised and C is chosen by the log-loss of inner folds, again of
    patients, all on the other folds alone. Members and non-members weigh the same in a fit, and so do all patients of a
    kind, however many images they have: otherwise the folds' log-odds would differ by what share of them are members.

    Args:
        features: float64 [N, F], such as the scores of single attacks.
        patient: int64 [N].
        member: bool [P].
        seed: of the folds.
        folds: fewer if there are fewer patients of a kind.

    Raises:
        Unattackable: fewer than four members or non-members, a patient without images, or features that are not finite.
    """
    _require_features(features, patient, member)
    label, weight = member[patient], _weights(patient, member)
    scores = np.empty(len(patient))
    for fitted, held_out in _splits(patient, member, folds, seed):
        strength = _strength(features[fitted], patient[fitted], member, seed)
        model = _fitted(features[fitted], label[fitted], weight[fitted], strength)
        scores[held_out] = model.decision_function(features[held_out])
    return scores


def _strength(features: NDArray[np.float64], patient: NDArray[np.int64], member: NDArray[np.bool_], seed: int) -> float:
    """C with the least log-loss on inner folds of the patients given; the strongest penalty of equals."""
    there, patient = np.unique(patient, return_inverse=True)
    member = member[there]
    label, weight = member[patient], _weights(patient, member)
    losses = np.zeros(len(_STRENGTHS))
    for fitted, held_out in _splits(patient, member, _INNER_FOLDS, seed):
        for index, strength in enumerate(_STRENGTHS):
            model = _fitted(features[fitted], label[fitted], weight[fitted], strength)
            margin = np.where(label[held_out], 1, -1) * model.decision_function(features[held_out])
            losses[index] += weight[held_out] @ np.logaddexp(0, -margin)
    return _STRENGTHS[int(losses.argmin())]


def _splits(
    patient: NDArray[np.int64], member: NDArray[np.bool_], folds: int, seed: int
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Images to fit on and images held out, bool [N] each."""
    fold = patient_folds(member, folds=folds, seed=seed)[patient]
    for number in range(int(fold.max()) + 1):
        yield fold != number, fold == number


def _weights(patient: NDArray[np.int64], member: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of each image, so that both kinds sum to half the number of patients and a kind's patients weigh the same."""
    members = int(member.sum())
    of_patient = np.where(member, len(member) / 2 / members, len(member) / 2 / (len(member) - members))
    weights: NDArray[np.float64] = (of_patient / np.bincount(patient, minlength=len(member)))[patient]
    return weights


def _fitted(
    features: NDArray[np.float64], label: NDArray[np.bool_], weight: NDArray[np.float64], strength: float
) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_MOST_ITERATIONS))
    return model.fit(features, label, logisticregression__sample_weight=weight)


def _require_features(features: NDArray[np.float64], patient: NDArray[np.int64], member: NDArray[np.bool_]) -> None:
    fits = features.ndim == 2 and len(features) == len(patient) and features.shape[1] > 0 and member.dtype == np.bool_
    require(fits, "features", features.shape, "give [N, F] with a patient for each, and member as bool [P]")
    require(bool(np.isfinite(features).all()), "features", "not finite", "leave out attacks whose scores overflow")
    there = np.unique(patient)
    everyone = np.array_equal(there, np.arange(len(member)))
    require(everyone, "patient", f"{len(there)} patients", f"give images of each of {len(member)} patients")
    members = int(member.sum())
    for name, count in (("members", members), ("non-members", len(member) - members)):
        require(count >= FEWEST_PATIENTS, name, count, f"stacking needs at least {FEWEST_PATIENTS} patients of each")
