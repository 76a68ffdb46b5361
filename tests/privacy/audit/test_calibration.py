from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from privacy.audit import calibration
from privacy.audit.calibration import difficulty_calibrated, difficulty_features, offline_rmia, quantile_calibrated
from privacy.audit.errors import Unattackable
from privacy.audit.statistics import auc


def proxies(seed: int, images: int, models: int, gain: float) -> tuple[NDArray[np.float64], ...]:
    """-loss of images under the attacked model and references: difficulty, common to all, hides what members gain."""
    rng = np.random.default_rng(seed)
    member = np.arange(images) < images // 2
    difficulty = rng.normal(size=images)
    target = gain * member - difficulty + 0.1 * rng.normal(size=images)
    return target, -difficulty + 0.1 * rng.normal(size=(models, images)), member


def test_difficulty_is_subtracted() -> None:
    assert difficulty_calibrated(np.array([3.0, 5.0]), np.array([[1.0, 2.0], [2.0, 6.0]])).tolist() == [1.5, 1.0]
    target, references, member = proxies(0, 400, 4, gain=0.3)
    assert auc(target, member) < 0.65
    assert auc(difficulty_calibrated(target, references), member) > 0.95


def slow_rmia(
    target: Any, references: Any, out: Any, population: Any, population_references: Any, a: float, gamma: float
) -> list[float]:
    def probability(proxy: float, of_population: Any) -> float:
        scale = (np.quantile(of_population, 0.75) - np.quantile(of_population, 0.25)) / 1.349
        return float(1 / (1 + np.exp(-(proxy - np.median(of_population)) / scale)))

    def gain(proxy: float, of_references: list[float]) -> float:
        p_out = sum(of_references) / len(of_references)
        p_in = a * p_out + 1 - a
        return probability(proxy, population) / ((p_in + p_out) / 2)

    models = range(len(references))
    scores = []
    for x in range(len(target)):
        of_x = [probability(references[r][x], population_references[r]) for r in models if out[r][x]]
        beaten = 0
        for z in range(len(population)):
            of_z = [probability(population_references[r][z], population_references[r]) for r in models]
            beaten += gain(target[x], of_x) / gain(population[z], of_z) >= gamma
        scores.append(beaten / len(population))
    return scores


@pytest.mark.parametrize(("a", "gamma"), [(0.3, 1.0), (0.0, 1.2), (1.0, 0.7)])
def test_rmia_is_the_slow_one(a: float, gamma: float) -> None:
    rng = np.random.default_rng(1)
    target, references = rng.normal(size=15), rng.normal(size=(3, 15))
    population, population_references = rng.normal(size=21), rng.normal(size=(3, 21))
    out = rng.random((3, 15)) < 0.5
    out[0] |= ~out.any(axis=0)
    arguments = target, references, out, population, population_references
    found = offline_rmia(*arguments, a=a, gamma=gamma)
    assert found.tolist() == slow_rmia(*arguments, a, gamma)
    assert 0 < found.mean() < 1


def rmia_of(seed: int, images: int, models: int, gain: float, **options: float) -> tuple[float, float]:
    target, references, member = proxies(seed, images, models, gain)
    population, population_references, _ = proxies(seed + 1, images, models, 0.0)
    out = np.ones(references.shape, dtype=bool)
    return auc(target, member), auc(
        offline_rmia(target, references, out, population, population_references, **options), member
    )


def test_rmia_finds_what_difficulty_hides() -> None:
    raw, area = rmia_of(0, 400, 4, gain=0.3)
    assert raw < 0.65
    assert area > 0.9
    assert rmia_of(0, 400, 4, gain=0.3, a=0.3)[1] < area - 0.1  # a classifier's a does not suit
    assert abs(rmia_of(0, 400, 4, gain=0.0)[1] - 0.5) < 0.06


def test_rmia_of_non_members_is_uniform() -> None:
    target, references, _ = proxies(3, 500, 2, gain=0.0)
    population, population_references, _ = proxies(4, 500, 2, gain=0.0)
    found = offline_rmia(target, references, np.ones((2, 500), dtype=bool), population, population_references)
    assert stats.kstest(found, "uniform").pvalue > 0.01


@given(st.floats(0.1, 50), st.floats(-50, 50))
@settings(max_examples=20)
def test_rmia_does_not_see_a_models_scale(scale: float, shift: float) -> None:
    target, references, _ = proxies(5, 30, 2, gain=0.3)
    population, population_references, _ = proxies(6, 30, 2, gain=0.0)
    out = np.ones(references.shape, dtype=bool)
    expected = offline_rmia(target, references, out, population, population_references, gamma=1.1)
    one = np.array([[scale], [1.0]])
    found = offline_rmia(
        target / scale - shift,
        references * one + shift,
        out,
        population / scale - shift,
        population_references * one + shift,
        gamma=1.1,
    )
    assert np.abs(found - expected).max() <= 1 / 30 + 1e-12  # rounding may move a tie


def test_rmia_does_not_use_models_trained_on_the_image() -> None:
    target, references, _ = proxies(7, 20, 2, gain=0.3)
    population, population_references, _ = proxies(8, 20, 2, gain=0.0)
    out = np.ones((2, 20), dtype=bool)
    out[1, ::2] = False
    expected = offline_rmia(target, references, out, population, population_references)
    references[1, ::2] += 100.0
    assert np.array_equal(offline_rmia(target, references, out, population, population_references), expected)
    references[1, 1] += 100.0
    assert not np.array_equal(offline_rmia(target, references, out, population, population_references), expected)


def difficult(seed: int, patients: int, images: int, gain: float) -> dict[str, Any]:
    """Scores that follow from features, with a spread that does too, and what members gain in units of that spread."""
    rng = np.random.default_rng(seed)
    member = rng.permutation(np.arange(patients) < patients // 3)
    patient = np.repeat(np.arange(patients), images)
    features = rng.normal(size=(len(patient), 2))
    spread = np.exp(0.5 * features[:, 1])
    scores = 3 * np.abs(features[:, 0]) + spread * (gain * member[patient] + rng.normal(size=len(patient)))
    calibrating_patient = ~member & (rng.random(patients) < 0.5)
    return {
        "features": features,
        "scores": scores,
        "patient": patient,
        "member": member,
        "calibrating": calibrating_patient[patient],
        "seed": seed,
    }


def test_quantile_calibration_finds_what_difficulty_hides() -> None:
    given_ = difficult(0, 150, 6, gain=1.0)
    label = given_["member"][given_["patient"]]
    raw, calibrated = auc(given_["scores"], label), auc(quantile_calibrated(**given_), label)
    assert raw < 0.64
    assert calibrated > raw + 0.06


def test_quantile_calibration_treats_calibrating_patients_as_all_others() -> None:
    # Regressions that had seen the calibrating patients would score them lower than members who gained nothing.
    areas, high = [], []
    for seed in range(5):
        given_ = difficult(seed, 80, 4, gain=0.0)
        found, label = quantile_calibrated(**given_), given_["member"][given_["patient"]]
        areas.append(auc(found[label | given_["calibrating"]], label[label | given_["calibrating"]]))
        high.append((found > 0).mean())
    assert abs(np.mean(areas) - 0.5) < 0.05
    assert np.mean(high) == pytest.approx(0.12, abs=0.06)


def test_no_patient_is_compared_with_a_regression_that_saw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = difficult(1, 40, 3, gain=1.0)
    given_["features"] = given_["patient"][:, None].astype(np.float64)  # who an image belongs to
    compared: list[int] = []

    def spy(features: Any, scores: Any, wanted: Any, quantile: float) -> NDArray[np.float64]:
        fitted, held_out = set(features[:, 0]), set(wanted[:, 0])
        assert not fitted & held_out
        assert not given_["member"][[int(p) for p in fitted]].any()
        if quantile == 0.5:
            compared.extend(int(p) for p in held_out)
        return np.full(len(wanted), quantile)

    monkeypatch.setattr(calibration, "_predicted_quantile", spy)
    found = quantile_calibrated(**given_)
    assert sorted(compared) == list(range(40))
    assert found == pytest.approx((given_["scores"] - 0.9) / 0.4)


def test_predicted_quantiles_are_quantiles() -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(-1, 1, size=(3000, 1))
    scores = features[:, 0] + (1 + (features[:, 0] > 0)) * rng.normal(size=3000)
    wanted = np.array([[-0.5], [0.5]])
    for quantile in (0.5, 0.9):
        expected = wanted[:, 0] + np.array([1, 2]) * stats.norm.ppf(quantile)
        found = calibration._predicted_quantile(features, scores, wanted, quantile)
        assert found == pytest.approx(expected, abs=0.35)


def test_spread_that_vanishes_has_a_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = difficult(2, 40, 3, gain=0.0)
    crossing = {0.5: 1.0, 0.9: 0.5}
    monkeypatch.setattr(calibration, "_predicted_quantile", lambda f, s, w, q: np.full(len(w), crossing[q]))
    found = quantile_calibrated(**given_)
    assert np.isfinite(found).all()
    assert np.array_equal(np.sign(found), np.sign(given_["scores"] - 0.5))


@pytest.mark.parametrize("shape", [(3, 1, 6, 5), (3, 1, 4, 6, 5)])
def test_difficulty_features_are_the_slow_ones(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for image, found in zip(images[:, 0].astype(np.float64), difficulty_features(images), strict=True):
        energy = 0.0
        for axis in range(image.ndim):
            after = np.take(image, np.arange(1, image.shape[axis]), axis)
            before = np.take(image, np.arange(image.shape[axis] - 1), axis)
            energy += ((after - before) ** 2).mean()
        assert found == pytest.approx([image.mean(), image.std(), energy], rel=1e-5)


def rmia_arguments() -> dict[str, Any]:
    target, references, _ = proxies(0, 6, 2, 0.1)
    population, population_references, _ = proxies(1, 8, 2, 0.0)
    return {
        "target": target,
        "references": references,
        "out": np.ones((2, 6), dtype=bool),
        "population": population,
        "population_references": population_references,
    }


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"a": 1.1}, "a"),
        ({"gamma": 0.0}, "gamma"),
        ({"out": np.arange(12).reshape(2, 6) % 6 > 0}, "out"),
        ({"out": np.ones((2, 6))}, "out"),
        ({"out": np.ones((2, 5), dtype=bool)}, "out"),
        ({"references": np.zeros((2, 5))}, "references"),
        ({"target": np.full(6, np.nan)}, "references"),
        ({"population_references": np.zeros((3, 8))}, "out"),
        ({"population_references": np.zeros((2, 7))}, "population_references"),
        ({"population": np.zeros(8)}, "population"),
    ],
)
def test_rmia_refusals_name_the_argument(changes: dict[str, Any], argument: str) -> None:
    with pytest.raises(Unattackable) as refusal:
        offline_rmia(**{**rmia_arguments(), **changes})
    assert refusal.value.argument == argument


def test_calibration_without_references_is_refused() -> None:
    with pytest.raises(Unattackable, match="R ≥ 1"):
        difficulty_calibrated(np.zeros(3), np.zeros((0, 3)))


GIVEN = difficult(0, 20, 2, gain=0.0)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"calibrating": np.ones(40, dtype=bool)}, "calibrating"),
        ({"calibrating": GIVEN["calibrating"] & (np.cumsum(GIVEN["calibrating"]) <= 6)}, "calibrating"),
        ({"scores": np.full(40, np.nan)}, "features, scores"),
        ({"scores": np.zeros(40)}, "scores"),
        ({"scores": np.zeros(39)}, "features, scores, patient, calibrating"),
        ({"calibrating": np.zeros(40)}, "features, scores, patient, calibrating"),
        ({"member": np.zeros(21, dtype=bool)}, "patient"),
        ({"folds": 1}, "folds"),
    ],
)
def test_quantile_refusals_name_the_argument(changes: dict[str, Any], argument: str) -> None:
    with pytest.raises(Unattackable) as refusal:
        quantile_calibrated(**{**GIVEN, **changes})
    assert refusal.value.argument == argument


@pytest.mark.parametrize("images", [np.zeros((2, 1, 9)), np.zeros((2, 3, 9, 9)), np.zeros((2, 1, 1, 9))])
def test_images_of_another_shape_are_refused(images: NDArray[np.float32]) -> None:
    with pytest.raises(Unattackable, match="two or three spatial axes"):
        difficulty_features(images)


def test_images_that_are_not_finite_are_refused() -> None:
    with pytest.raises(Unattackable, match="not finite"):
        difficulty_features(np.full((2, 1, 4, 4), np.nan, dtype=np.float32))
