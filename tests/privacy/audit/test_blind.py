from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from privacy.audit import blind
from privacy.audit.blind import blind_scores, blind_test, image_features
from privacy.audit.errors import Unattackable
from privacy.audit.stacking import patient_folds
from privacy.audit.statistics import auc

Images = NDArray[np.float32]


def cohort(
    seed: int, patients: int, images: int = 3, size: int = 12, dims: int = 2
) -> tuple[Images, NDArray[np.int64], NDArray[np.bool_]]:
    """Smooth bodies, alike within a patient, with a level and a noise that vary between patients; all exchangeable."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), images)
    shape = [size] * dims
    over = (slice(None), *[None] * dims)
    body = gaussian_filter(rng.normal(size=(patients, *shape)), (0, *[2] * dims))
    own = gaussian_filter(rng.normal(size=(len(patient), *shape)), (0, *[2] * dims))
    level = rng.normal(0, 0.1, patients)[patient][over]
    noise = 0.05 * np.exp(rng.normal(0, 0.2, patients))[patient][over] * rng.normal(size=own.shape)
    values = 0.25 * (body / body.std())[patient] + 0.15 * own / own.std() + level + noise
    member = rng.permutation(np.arange(patients) < patients // 2)
    return values.clip(-1, 1).astype(np.float32)[:, None], patient, member


def scanned(images: Images, of_member: NDArray[np.bool_], scanner: str, seed: int = 0) -> Images:
    """Members as another scanner would show them."""
    changed = images.copy()
    ours = images[of_member]
    if scanner == "blur":
        changed[of_member] = gaussian_filter(ours, (0, 0, *[0.4] * (images.ndim - 2)))
    elif scanner == "noise":
        changed[of_member] += np.random.default_rng(seed).normal(0, 0.04, ours.shape).astype(np.float32)
    elif scanner == "level":
        changed[of_member] += np.float32(0.3)
    return changed


@pytest.mark.parametrize("scanner", ["blur", "noise", "level"])
def test_another_scanner_is_a_confounder(scanner: str) -> None:
    found = []
    for seed in range(5):
        images, patient, member = cohort(seed, 120)
        changed = scanned(images, member[patient], scanner, seed)
        outcome = blind_test(changed, patient, member, seed=seed)
        assert outcome.confounded == (outcome.p_value <= 0.01)
        found.append(outcome)
    assert sum(outcome.confounded for outcome in found) >= 4
    assert np.mean([outcome.auc.estimate for outcome in found]) > 0.7


def test_another_scanner_is_a_confounder_in_volumes() -> None:
    images, patient, member = cohort(0, 60, images=1, dims=3)
    assert blind_test(scanned(images, member[patient], "blur"), patient, member, seed=0).confounded
    assert not blind_test(images, patient, member, seed=0).confounded


def test_exchangeable_patients_are_not_confounded() -> None:
    p_values = []
    for seed in range(150):
        images, patient, member = cohort(seed, 24, images=2)
        p_values.append(blind_test(images, patient, member, seed=seed, permutations=199).p_value)
    assert np.mean(np.array(p_values) <= blind.LEVEL) <= 0.04  # 1 % and three standard deviations
    for level in (0.2, 0.5, 0.8):
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=0.13)


def test_as_many_images_as_one_likes_are_no_confounder() -> None:
    flagged = 0
    for seed in range(40):
        images, patient, member = cohort(seed, 30, images=6)
        kept = member[patient] | (np.arange(len(patient)) % 6 < 2)  # members have six images, the others two
        flagged += blind_test(images[kept], patient[kept], member, seed=seed, permutations=199).confounded
    assert flagged <= 3


def test_stated_power() -> None:
    caught = dict.fromkeys((20, 50), 0)
    for each in caught:
        for seed in range(20):
            images, patient, member = cohort(seed, 2 * each, images=5, size=16)
            changed = scanned(images, member[patient], "blur")
            caught[each] += blind_test(changed, patient, member, seed=seed).confounded
    assert caught[50] >= 15
    assert caught[20] < caught[50]


def test_permutations_are_refitted_one_by_one_by_the_slow_reference() -> None:
    rng = np.random.default_rng(0)
    features, member = rng.normal(size=(40, 7)), np.arange(40) < 18
    fold = patient_folds(member, folds=4, seed=0)
    labels = blind._permuted_within(fold, member, 5, seed=1)
    fast = blind._cross_fitted(features, labels, fold)
    for column in range(labels.shape[1]):
        for row in range(40):
            rest = fold != fold[row]
            ours, others = features[rest & labels[:, column]], features[rest & ~labels[:, column]]
            centred = features[rest] - features[rest].mean(axis=0)
            covariance = centred.T @ centred / (rest.sum() - 1)
            direction = np.linalg.inv(covariance + blind._RIDGE * np.eye(7)) @ (ours.mean(axis=0) - others.mean(axis=0))
            expected = direction @ (features[row] - (ours.mean(axis=0) + others.mean(axis=0)) / 2)
            assert fast[row, column] == pytest.approx(expected)
    areas = blind._aucs(fast.round(1), labels)
    assert areas == pytest.approx(np.array([auc(s, m) for s, m in zip(fast.round(1).T, labels.T, strict=True)]))


def test_permutations_keep_each_folds_shares() -> None:
    member = np.arange(50) < 20
    fold = patient_folds(member, folds=5, seed=0)
    labels = blind._permuted_within(fold, member, 99, seed=0)
    assert np.array_equal(labels[:, 0], member)
    for number in range(5):
        assert (labels[fold == number].sum(axis=0) == member[fold == number].sum()).all()
    assert len({column.tobytes() for column in labels.T}) == 100
    # Each patient is as often a member as its fold's share says.
    many = blind._permuted_within(fold, member, 4000, seed=0)
    assert many.mean(axis=1) == pytest.approx(np.full(50, 0.4), abs=0.05)


def test_scores_never_saw_the_patients_own_label() -> None:
    rng = np.random.default_rng(0)
    features, member = rng.normal(size=(30, 5)), np.arange(30) < 15
    fold = patient_folds(member, folds=5, seed=0)
    exchanged = member.copy()
    exchanged[fold == 2] = ~member[fold == 2]
    before, after = blind._cross_fitted(features, np.stack([member, exchanged], axis=1), fold).T
    assert before[fold == 2] == pytest.approx(after[fold == 2])
    assert not np.isclose(before[fold != 2], after[fold != 2]).any()


def test_scores_are_those_of_the_test() -> None:
    images, patient, member = cohort(1, 60)
    images = scanned(images, member[patient], "blur")
    scores = blind_scores(images, patient, member, seed=3)
    assert scores.shape == patient.shape
    first = np.searchsorted(patient, np.arange(60))
    assert np.array_equal(scores, scores[first][patient])
    outcome = blind_test(images, patient, member, seed=3)
    assert outcome.auc.estimate == pytest.approx(auc(scores[first], member))
    assert outcome == blind_test(images, patient, member, seed=3)
    assert "30 members and 30 held-outs, 5 folds" in outcome.note


def test_p_value_and_note_follow_from_the_permutations() -> None:
    images, patient, member = cohort(2, 60)
    features = blind._patient_features(images, patient, member)
    fold = patient_folds(member, folds=5, seed=0)
    labels = blind._permuted_within(fold, member, 999, seed=0)
    areas = blind._aucs(blind._cross_fitted(features, labels, fold), labels)
    found = blind_test(images, patient, member, seed=0)
    assert found.auc.estimate == pytest.approx(areas[0])
    assert found.p_value == (1 + (areas[1:] >= areas[0]).sum()) / 1000
    assert f"AUC above {np.sort(areas[1:])[-10]:.2f} is significant" in found.note


@pytest.mark.parametrize("dims", [2, 3])
def test_features_see_what_they_are_named_for(dims: int) -> None:
    images, _, _ = cohort(0, 10, images=1, dims=dims)
    features = image_features(images)
    assert features.shape == (10, 7 + 7 + 4 + 4 * dims + 8)
    assert np.isfinite(features).all()
    by_image = np.quantile(images.reshape(10, -1), 0.5, axis=1)
    assert features[:, 3] == pytest.approx(by_image, abs=1e-6)
    assert features[:, 14] == pytest.approx(images.reshape(10, -1).mean(axis=1), abs=1e-6)
    noisy = image_features(images + np.random.default_rng(0).normal(0, 0.1, images.shape).astype(np.float32))
    edges = slice(18, 18 + 4 * dims)  # gradient, gradient to contrast, curvature to gradient, noise
    assert (noisy[:, edges].mean(axis=0) > features[:, edges].mean(axis=0)).all()
    assert np.isfinite(image_features(np.zeros_like(images))).all()


def test_two_thousand_images_take_seconds() -> None:
    images, patient, member = cohort(0, 400, images=5, size=32)
    start = time.perf_counter()
    blind_test(images, patient, member, seed=0)
    assert time.perf_counter() - start < 10


def test_few_patients_get_few_folds_and_fewer_none() -> None:
    images, patient, member = cohort(0, 10)
    assert "2 folds" in blind_test(images, patient, member, seed=0).note
    images, patient, member = cohort(0, 8)
    with pytest.raises(Unattackable, match="at least five of each"):
        blind_test(images, patient, member, seed=0)
    with pytest.raises(Unattackable, match="at least five of each"):
        blind_scores(images, patient, member, seed=0)


IMAGES, PATIENT, MEMBER = cohort(0, 20, images=1, size=4)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"permutations": 98}, "permutations"),
        ({"images": IMAGES[:, :, :2]}, "images"),
        ({"images": IMAGES[:, 0]}, "images"),
        ({"images": np.full_like(IMAGES, np.inf)}, "images"),
        ({"patient": PATIENT[:-1]}, "patient, member"),
        ({"member": MEMBER.astype(np.int64)}, "patient, member"),
        ({"member": np.append(MEMBER, True)}, "patient"),
        ({"folds": 1}, "patients, folds"),
    ],
)
def test_refusals_name_the_argument(changes: dict[str, Any], argument: str) -> None:
    arguments = {"images": IMAGES, "patient": PATIENT, "member": MEMBER, "seed": 0}
    with pytest.raises(Unattackable) as refusal:
        blind_test(**{**arguments, **changes})
    assert refusal.value.argument == argument
