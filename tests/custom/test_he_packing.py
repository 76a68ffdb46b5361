from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from custom.egress import MEAN_IMAGE
from custom.he_packing import FLOOD_STD, UPDATE, opened, packed, packed_name, packed_size
from custom.stages import model_shapes
from custom.strict import ConfigError
from privacy.rng import SecureRandomness, SeededRandomnessForTests


@pytest.fixture
def shapes(experiment: ExperimentConfig) -> Shapes:
    return model_shapes(experiment)


def update(shapes: Shapes, seed: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.01, shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_sum_of_packed_updates_opens_to_their_weighted_mean(shapes: Shapes) -> None:
    sites = [(update(shapes, 1), 30.0), (update(shapes, 2), 1.0), (update(shapes, 3), 12.0)]
    total = sum(packed(dict(reversed(arrays.items())), weight) for arrays, weight in sites)
    assert len(total) == packed_size(shapes)
    mean = opened(total.tolist(), shapes, SeededRandomnessForTests(0))
    for name, shape in shapes.items():
        expected = sum(weight * arrays[name].astype(np.float64) for arrays, weight in sites) / 43
        assert mean[name].shape == shape
        assert mean[name].dtype == np.float32
        np.testing.assert_allclose(mean[name], expected, atol=6 * FLOOD_STD / 43 + 1e-9)


def test_what_is_opened_carries_fresh_noise_of_the_stated_size() -> None:
    shapes = {"w": (100_000,)}
    total = [*np.zeros(100_000), 1.0]
    first, second = (opened(total, shapes, SecureRandomness())["w"].astype(np.float64) for _ in range(2))
    assert first.std() == pytest.approx(FLOOD_STD, rel=0.02)
    assert (first - second).std() == pytest.approx(FLOOD_STD * np.sqrt(2), rel=0.02)
    for wrong in (2 / 3, 3 / 2):
        assert first.std() != pytest.approx(FLOOD_STD * wrong, rel=0.02)


@pytest.mark.parametrize("weight", [0.0, -1.0, 0.5, 1e13 + 0.3, float("nan"), float("inf")])
def test_a_sum_of_weights_that_is_none_is_another_key(weight: float) -> None:
    with pytest.raises(ConfigError, match="key"):
        opened([0.0, 0.0, weight], {"w": (2,)}, SeededRandomnessForTests(0))


def test_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be 3"):
        opened([0.0, 1.0], {"w": (2,)}, SeededRandomnessForTests(0))


def test_the_mean_image_has_a_name_of_its_own(shapes: Shapes) -> None:
    assert packed_name(shapes) == UPDATE
    assert packed_name({MEAN_IMAGE: (1, 16, 16)}) == MEAN_IMAGE
