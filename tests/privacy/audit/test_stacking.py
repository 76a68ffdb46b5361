from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_predict

from privacy.audit import stacking
from privacy.audit.errors import Unattackable
from privacy.audit.stacking import patient_folds, stacked_scores
from privacy.audit.statistics import auc


def audit(
    seed: int, patients: int, images: int, identity: float, membership: float
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """Twenty features that tell patients apart, the first of which also tells members."""
    rng = np.random.default_rng(seed)
    member = rng.permutation(np.arange(patients) < patients // 2)
    patient = np.repeat(np.arange(patients), images)
    features = identity * rng.normal(size=(patients, 20))[patient] + rng.normal(size=(len(patient), 20))
    features[:, 0] += membership * member[patient]
    return features, patient, member


@given(st.integers(2, 30), st.integers(2, 30), st.integers(2, 8), st.integers(0, 99))
def test_folds_share_out_both_kinds(members: int, others: int, folds: int, seed: int) -> None:
    member = np.random.default_rng(seed).permutation(np.arange(members + others) < members)
    fold = patient_folds(member, folds=folds, seed=seed)
    made = min(folds, members, others)
    for side in (member, ~member):
        counts = np.bincount(fold[side], minlength=made)
        assert len(counts) == made
        assert counts.min() >= 1
        assert np.ptp(counts) <= 1
    assert np.array_equal(fold, patient_folds(member, folds=folds, seed=seed))


def test_identity_of_patients_does_not_leak_into_scores() -> None:
    # With random labels, features that tell patients apart say nothing of a patient who is held out.
    areas, leaky = [], []
    for seed in range(5):
        features, patient, member = audit(seed, patients=30, images=8, identity=6.0, membership=0.0)
        label = member[patient]
        areas.append(auc(stacked_scores(features, patient, member, seed=seed), label))
        by_image = KFold(5, shuffle=True, random_state=seed)
        model = LogisticRegression(max_iter=2000)
        split_by_image = cross_val_predict(model, features, label, cv=by_image, method="decision_function")
        leaky.append(auc(split_by_image, label))
    assert abs(np.mean(areas) - 0.5) < 0.15
    assert np.mean(leaky) > 0.85


def test_scores_of_a_patient_do_not_depend_on_its_label() -> None:
    features, patient, member = audit(1, patients=16, images=3, identity=1.0, membership=1.0)
    fold = patient_folds(member, folds=4, seed=5)
    scores = stacked_scores(features, patient, member, seed=5, folds=4)
    first, second = (np.flatnonzero((fold == 0) & side)[0] for side in (member, ~member))
    exchanged = member.copy()
    exchanged[[first, second]] = exchanged[[second, first]]
    with pytest.MonkeyPatch.context() as patch:  # the same folds, although labels differ
        inner = patient_folds
        patch.setattr(stacking, "patient_folds", lambda m, **k: fold if len(m) == len(fold) else inner(m, **k))
        again = stacked_scores(features, patient, exchanged, seed=5, folds=4)
    held_out = fold[patient] == 0
    assert again[held_out] == pytest.approx(scores[held_out])
    assert not np.allclose(again[~held_out], scores[~held_out])


def test_stacking_is_better_than_each_score() -> None:
    rng = np.random.default_rng(0)
    member = np.arange(120) < 60
    patient = np.repeat(np.arange(120), 3)
    features = rng.normal(size=(360, 6)) + 0.5 * member[patient][:, None]
    singly = max(auc(column, member[patient]) for column in features.T)
    assert auc(stacked_scores(features, patient, member, seed=0), member[patient]) > singly + 0.08


def test_scores_are_log_odds_whatever_the_shares() -> None:
    # Two members to eight others, three images to one: both weigh the same, so the middle between them is at even odds.
    rng = np.random.default_rng(0)
    member = np.arange(500) < 100
    patient = np.repeat(np.arange(500), np.where(member, 3, 1))
    features = rng.normal(size=(len(patient), 1)) + np.where(member, 1.0, -1.0)[patient][:, None]
    scores = stacked_scores(features, patient, member, seed=0)
    slope, intercept = np.polyfit(features[:, 0], scores, 1)
    assert slope == pytest.approx(2.0, rel=0.25)  # log N(x; 1, 1) - log N(x; -1, 1) = 2 x
    assert intercept == pytest.approx(0.0, abs=0.25)


def test_a_patient_counts_once_however_many_images_it_has() -> None:
    features, patient, member = audit(2, patients=12, images=1, identity=1.0, membership=1.0)
    rows = np.repeat(np.arange(12), np.arange(1, 13))
    scores = stacked_scores(features[rows], patient[rows], member, seed=0)
    fold = patient_folds(member, folds=5, seed=0)
    # The weights that a fit sees sum to the same for all patients of a kind.
    weights = np.bincount(patient[rows], stacking._weights(patient[rows], member))
    assert weights == pytest.approx(1.0)
    assert all(np.ptp(scores[rows == p]) < 1e-9 for p in range(12))
    assert len(set(fold)) == 5


def test_strength_follows_the_signal() -> None:
    features, patient, member = audit(3, patients=60, images=2, identity=0.0, membership=2.0)
    strong = stacking._strength(features, patient, member, seed=0)
    noise = stacking._strength(np.random.default_rng(0).normal(size=features.shape), patient, member, seed=0)
    assert noise < strong


def test_same_seed_same_scores_other_seed_other_folds() -> None:
    features, patient, member = audit(4, patients=20, images=2, identity=1.0, membership=1.0)
    scores = stacked_scores(features, patient, member, seed=0)
    assert np.array_equal(scores, stacked_scores(features, patient, member, seed=0))
    assert not np.allclose(scores, stacked_scores(features, patient, member, seed=1))


def test_four_of_a_kind_make_four_folds() -> None:
    features, patient, member = audit(5, patients=8, images=2, identity=1.0, membership=1.0)
    assert set(patient_folds(member, folds=5, seed=0)) == {0, 1, 2, 3}
    assert np.isfinite(stacked_scores(features, patient, member, seed=0)).all()


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"member": np.arange(8) < 3}, "members"),
        ({"member": np.arange(8) < 5}, "non-members"),
        ({"member": np.arange(9) < 4}, "patient"),
        ({"features": np.full((8, 2), np.nan)}, "features"),
        ({"features": np.zeros(8)}, "features"),
        ({"features": np.zeros((7, 2))}, "features"),
        ({"folds": 1}, "folds"),
    ],
)
def test_refusals_name_the_argument(changes: dict[str, Any], argument: str) -> None:
    arguments = {"features": np.ones((8, 2)), "patient": np.arange(8), "member": np.arange(8) < 4, "seed": 0}
    with pytest.raises(Unattackable) as refusal:
        stacked_scores(**{**arguments, **changes})
    assert refusal.value.argument == argument


def test_folds_need_two_of_each() -> None:
    with pytest.raises(Unattackable, match="at least two of each"):
        patient_folds(np.arange(5) < 1, folds=2, seed=0)
