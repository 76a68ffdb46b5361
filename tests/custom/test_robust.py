"""Rules that combine updates, each beside a slow obvious one, and what an aggregator of them accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray
from scipy.stats import trim_mean

from custom.aggregators.in_time_average import InTimeAverage
from custom.aggregators.robust_average import RobustAverage
from custom.config import ExperimentConfig
from custom.federation_config import RobustConfig
from custom.robust import clipped, combined, mean, median, multi_krum, trimmed_mean
from custom.stages import model_shapes

Update = dict[str, NDArray[np.float32]]

SHAPES = {"a": (3, 2), "b": (4,), "c": ()}


def updates_of(count: int, seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> list[Update]:
    rng = np.random.default_rng(seed)
    return [
        {name: np.asarray(rng.normal(0, 0.01, shape), np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def flat(update: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    return np.concatenate([update[name].ravel() for name in sorted(update)]).astype(np.float64)


def meta(weight: float = 1.0) -> dict[str, Any]:
    return {"weight": weight, "metrics": {"train_loss": 1.0, "held_out_loss": 1.0, "seconds": 1.0}}


# ---- clipping


def test_clipping_scales_all_tensors_to_the_joint_norm_and_leaves_short_ones() -> None:
    (update,) = updates_of(1)
    length = np.linalg.norm(flat(update))
    short = clipped(update, norm=float(length) / 3)
    np.testing.assert_allclose(flat(short), flat(update) / 3, rtol=1e-6)
    assert all(type(array) is np.ndarray and array.dtype == np.float32 for array in short.values())
    assert {name: array.shape for name, array in short.items()} == SHAPES
    same = clipped(update, norm=float(length) * 1.001)
    assert all(same[name] is update[name] for name in update)
    zero = {"a": np.zeros(3, np.float32)}
    np.testing.assert_array_equal(clipped(zero, norm=1.0)["a"], zero["a"])


def test_clipping_sums_beyond_the_range_of_float32() -> None:
    huge = {"a": np.full(4, 3e30, np.float32)}  # whose squares are infinite in float32
    np.testing.assert_allclose(clipped(huge, norm=1.0)["a"], 0.5, rtol=1e-6)


# ---- each rule beside another implementation


@pytest.mark.parametrize("count", [3, 4, 7])
def test_mean_median_and_trimmed_mean_are_those_of_every_coordinate(count: int) -> None:
    updates, weights = updates_of(count), [1.0 + place for place in range(count)]
    stacked = np.stack([flat(update) for update in updates])
    expected = {
        "mean": np.array([sum(w * x for w, x in zip(weights, column, strict=True)) for column in stacked.T])
        / sum(weights),
        "median": np.array(
            [0.5 * (sorted(column)[(count - 1) // 2] + sorted(column)[count // 2]) for column in stacked.T]
        ),
        "trimmed": trim_mean(stacked, 1 / count + 1e-9, axis=0),
    }
    found = {"mean": mean(updates, weights), "median": median(updates), "trimmed": trimmed_mean(updates, malicious=1)}
    for name, update in found.items():
        np.testing.assert_allclose(flat(update), expected[name], rtol=1e-6, atol=1e-10, err_msg=name)
        assert all(type(array) is np.ndarray and array.dtype == np.float32 for array in update.values())
        assert {key: array.shape for key, array in update.items()} == SHAPES


def slow_krum(updates: list[Update], malicious: int) -> list[int]:
    """Blanchard et al., sec. 4 and 5, word by word."""
    count, scores = len(updates), []
    for i, update in enumerate(updates):
        others = [float(np.sum((flat(update) - flat(updates[j])) ** 2)) for j in range(count) if j != i]
        scores.append(sum(sorted(others)[: count - malicious - 2]))
    return sorted(sorted(range(count), key=scores.__getitem__)[: count - malicious])


@pytest.mark.parametrize(("count", "malicious"), [(5, 1), (6, 1), (7, 2), (9, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_multi_krum_is_the_mean_of_what_its_paper_chooses(count: int, malicious: int, seed: int) -> None:
    updates = updates_of(count, seed)
    found, chosen = multi_krum(updates, malicious=malicious)
    assert list(chosen) == slow_krum(updates, malicious)
    np.testing.assert_allclose(flat(found), np.mean([flat(updates[i]) for i in chosen], axis=0), rtol=1e-6, atol=1e-10)


# ---- what malicious updates can do

any_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
honest_value = st.floats(-10, 10, width=32)


@st.composite
def attacked(draw: st.DrawFn, *, per_malicious: int, beside: int) -> tuple[list[Update], list[Update], int]:
    """All updates in any order, the honest ones among them, and f: n ≥ per_malicious·f + beside, f of any values."""
    malicious = draw(st.integers(1, 3))
    count = per_malicious * malicious + beside + draw(st.integers(0, 2))
    good = [{"a": draw(arrays_of.arrays(np.float32, 4, elements=honest_value))} for _ in range(count - malicious)]
    bad = [{"a": draw(arrays_of.arrays(np.float32, 4, elements=any_float32))} for _ in range(malicious)]
    return draw(st.permutations([*good, *bad])), good, malicious


@settings(max_examples=60, deadline=None)
@given(attacked(per_malicious=2, beside=1))
def test_median_and_trimmed_mean_stay_within_the_honest_range(case: tuple[list[Update], list[Update], int]) -> None:
    updates, good, malicious = case
    honest = np.stack([update["a"] for update in good])
    lowest, highest = honest.min(axis=0), honest.max(axis=0)
    for found in (median(updates)["a"], trimmed_mean(updates, malicious=malicious)["a"]):
        assert (lowest <= found).all()
        assert (found <= highest).all()


@settings(max_examples=60, deadline=None)
@given(attacked(per_malicious=2, beside=3), st.floats(1e3, 1e6))
def test_multi_krum_never_chooses_a_far_outlier(case: tuple[list[Update], list[Update], int], distance: float) -> None:
    """Though all malicious updates are the same one, so that each has f - 1 neighbours at no distance."""
    _, good, malicious = case
    far = {"a": np.full(4, distance, np.float32)}
    found, chosen = multi_krum([*[far] * malicious, *good], malicious=malicious)
    assert chosen == tuple(range(malicious, malicious + len(good)))
    assert np.abs(found["a"]).max() <= 10


def test_one_malicious_update_moves_the_plain_mean_anywhere() -> None:
    """What the tests above would not find in it: they can fail."""
    updates = updates_of(5)
    updates[2] = {name: np.full_like(array, 1e4) for name, array in updates[2].items()}
    assert flat(mean(updates, [1.0] * 5)).min() > 1e3
    assert 4 not in multi_krum([*updates_of(4), updates[2]], malicious=1)[1]


# ---- too few updates

RULES = [
    RobustConfig(clip_norm=1.0),
    RobustConfig(rule="median"),
    RobustConfig(rule="trimmed_mean", malicious=1),
    RobustConfig(rule="trimmed_mean", malicious=2),
    RobustConfig(rule="multi_krum", malicious=1),
    RobustConfig(rule="multi_krum", malicious=2),
]


@pytest.mark.parametrize("config", RULES, ids=lambda config: f"{config.rule}-{config.malicious}")
def test_fewer_updates_than_the_rule_needs_are_refused(config: RobustConfig) -> None:
    enough = updates_of(config.fewest)
    assert set(combined(enough, [1.0] * len(enough), config)) == set(SHAPES)
    with pytest.raises(ValueError, match=rf"updates = {config.fewest - 1}: {config.rule} needs.*min_responses"):
        combined(enough[1:], [1.0] * (len(enough) - 1), config)


@pytest.mark.parametrize(
    ("rule", "fewest"),
    [
        (lambda updates: mean(updates, [1.0] * len(updates)), 1),
        (median, 1),
        (lambda updates: trimmed_mean(updates, malicious=2), 5),
        (lambda updates: multi_krum(updates, malicious=2)[0], 7),
    ],
)
def test_a_rule_by_itself_refuses_fewer_updates_than_mean_anything(
    rule: Callable[[list[Update]], Update], fewest: int
) -> None:
    assert set(rule(updates_of(fewest))) == set(SHAPES)
    with pytest.raises(ValueError, match="updates = "):
        rule(updates_of(fewest - 1))


def test_the_configuration_decides() -> None:
    updates, weights = updates_of(7), [1.0 + place for place in range(7)]
    expected = {
        "mean": mean(updates, weights),
        "median": median(updates),
        "trimmed_mean": trimmed_mean(updates, malicious=2),
        "multi_krum": multi_krum(updates, malicious=2)[0],
    }
    for rule, update in expected.items():
        config = RobustConfig(rule=rule, malicious=2, clip_norm=1.0)  # type: ignore[arg-type]
        np.testing.assert_array_equal(flat(combined(updates, weights, config)), flat(update))


# ---- the aggregator


def of_model(experiment: ExperimentConfig, count: int) -> list[Update]:
    return updates_of(count, shapes=model_shapes(experiment))


def test_the_plain_rule_is_the_average_in_time(experiment: ExperimentConfig) -> None:
    updates, weights = of_model(experiment, 3), [3.0, 1.0, 7.0]
    robust = RobustAverage(model_shapes(experiment), experiment, RobustConfig(clip_norm=1e6))
    plain = InTimeAverage(model_shapes(experiment), experiment)
    for place in range(3):
        assert robust.add(str(place), updates[place], meta(weights[place]))
        assert plain.add(str(place), updates[place], meta(weights[place]))
    np.testing.assert_allclose(flat(robust.mean()), flat(plain.mean()), rtol=2e-7, atol=1e-12)
    assert robust.accepted == plain.accepted
    assert robust.metrics == {}


@pytest.mark.parametrize("rule", ["mean", "multi_krum"])
def test_the_order_of_arrival_changes_nothing(experiment: ExperimentConfig, rule: Any) -> None:
    shapes = {"a": (3,)}
    updates = dict(zip("vwxyz", updates_of(5, shapes=shapes), strict=True))
    found = []
    for order in list(permutations(updates))[::17]:
        average = RobustAverage(shapes, experiment, RobustConfig(rule=rule, malicious=1, clip_norm=1.0))
        assert all(average.add(site, updates[site], meta()) for site in order)
        found.append(average.mean()["a"])
    assert all((one == found[0]).all() for one in found)


def test_a_bad_reply_is_refused_by_name_and_the_others_count(experiment: ExperimentConfig) -> None:
    average = RobustAverage(SHAPES, experiment, RobustConfig(rule="median"))
    *good, bad = updates_of(4)
    bad["a"][1, 1] = np.nan
    assert not average.add("bad", bad, meta())
    assert not average.add("empty", None, meta())
    assert not average.add("heavy", good[0], meta(0.5))
    assert not average.add("long", {**good[0], "b": np.full(4, 1e6, np.float32)}, meta())
    for place, update in enumerate(good):
        assert average.add(f"good{place}", update, meta())
    assert not average.add("good1", good[2], meta())
    assert set(average.accepted) == {"good0", "good1", "good2"}
    words = {"bad": "NaN", "empty": "no weight", "heavy": "weight", "long": "max_update_norm", "good1": "second"}
    assert all(word in average.refused[site] for site, word in words.items())
    np.testing.assert_array_equal(flat(average.mean()), flat(median(good)))


def test_too_few_accepted_are_no_mean(experiment: ExperimentConfig) -> None:
    average = RobustAverage(SHAPES, experiment, RobustConfig(rule="median"))
    for place, update in enumerate(updates_of(2)):
        average.add(str(place), update, meta())
    with pytest.raises(ValueError, match="median needs at least 3"):
        average.mean()


def test_updates_are_clipped_before_they_are_judged_and_the_judge_refuses(experiment: ExperimentConfig) -> None:
    seen = []

    def judge(update: Mapping[str, NDArray[np.float32]]) -> str | None:
        seen.append(float(np.linalg.norm(flat(update))))
        return "too bright" if update["c"] > 0 else None

    average = RobustAverage(SHAPES, experiment, RobustConfig(clip_norm=0.001), judge)
    good, bad = updates_of(2)
    good["c"], bad["c"] = np.array(-1, np.float32), np.array(1, np.float32)
    assert average.add("good", good, meta())
    assert not average.add("bad", bad, meta())
    assert average.refused == {"bad": "too bright"}
    np.testing.assert_allclose(seen, 0.001, rtol=1e-6)
    np.testing.assert_allclose(flat(average.mean()), flat(clipped(good, norm=0.001)), rtol=1e-6)


def test_what_is_no_update_is_never_judged(experiment: ExperimentConfig) -> None:
    def judge(update: Mapping[str, NDArray[np.float32]]) -> str | None:
        raise AssertionError("asked")

    average = RobustAverage(SHAPES, experiment, RobustConfig(reference=True), judge)
    assert not average.add("bad", {"a": np.zeros(1, np.float32)}, meta())
