from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest

from custom.aggregators.in_time_average import InTimeAverage
from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from custom.stages import model_shapes


@pytest.fixture
def shapes(experiment: ExperimentConfig) -> Shapes:
    return model_shapes(experiment)


def update(shapes: Shapes, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.01, shape).astype(np.float32) for name, shape in shapes.items()}


def meta(weight: float) -> dict[str, Any]:
    return {"weight": weight, "metrics": {"train_loss": 1.0, "held_out_loss": 1.0, "seconds": 1.0}}


def test_mean_is_weighted_and_free_of_the_order_of_arrival(shapes: Shapes, experiment: ExperimentConfig) -> None:
    sites = {"a": (update(shapes, 1), 3.0), "b": (update(shapes, 2), 1.0), "c": (update(shapes, 3), 7.0)}
    means = []
    for order in permutations(sites):
        average = InTimeAverage(shapes, experiment)
        assert all(average.add(site, sites[site][0], meta(sites[site][1])) for site in order)
        means.append(average.mean())
    for name in shapes:
        expected = sum(w * u[name].astype(np.longdouble) for u, w in sites.values()) / 11
        for mean in means:
            np.testing.assert_allclose(mean[name], expected.astype(np.float64), rtol=2e-7, atol=1e-12)
            assert mean[name].dtype == np.float32


def test_a_bad_reply_is_refused_by_name_and_the_others_count(shapes: Shapes, experiment: ExperimentConfig) -> None:
    average = InTimeAverage(shapes, experiment)
    good, bad = update(shapes, 1), update(shapes, 2)
    bad[next(iter(bad))].flat[0] = np.nan
    assert not average.add("bad", bad, meta(2.0))
    assert not average.add("empty", None, meta(2.0))
    assert average.add("good", good, meta(2.0))
    assert not average.add("good", good, meta(2.0))
    assert set(average.accepted) == {"good"}
    assert "NaN" in average.refused["bad"]
    assert "second" in average.refused["good"]
    np.testing.assert_array_equal(average.mean()[next(iter(good))], good[next(iter(good))])


def test_nothing_accepted_is_no_mean(shapes: Shapes, experiment: ExperimentConfig) -> None:
    with pytest.raises(ValueError, match="no update"):
        InTimeAverage(shapes, experiment).mean()
