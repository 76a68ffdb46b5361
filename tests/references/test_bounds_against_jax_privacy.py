"""Our lower bounds against google-deepmind/jax_privacy's auditing module, at given counts.

Their threshold search is another (all thresholds on the same canaries, with a Bonferroni correction); compared is what
both make of counts: the number of guesses, of right guesses and of canaries, or the four counts at one threshold.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from privacy.audit.bounds import (
    clopper_pearson_epsilon_of_counts,
    fdp_epsilon_of_counts,
    gaussian_epsilon,
    one_run_epsilon_of_counts,
    one_run_p_value,
)

pytest.importorskip("dp_accounting", reason="Google's dp-accounting is not installed")

COUNTS = [
    (100, 100, 75),
    (1000, 100, 75),
    (1000, 100, 100),
    (50, 20, 11),
    (400, 1, 1),
    (2000, 1500, 1300),
    (60, 60, 31),
]
DELTAS = [1e-6, 1e-4, 1e-3]
CONFIDENCES = [0.9, 0.95, 0.99]


@pytest.fixture(scope="module")
def auditing() -> Iterator[ModuleType]:
    """The one file: the package itself imports JAX, which this project does not install."""
    package = importlib.util.find_spec("jax_privacy")
    if package is None or not package.submodule_search_locations:
        pytest.skip("jax_privacy is not installed")
    file = f"{next(iter(package.submodule_search_locations))}/auditing.py"
    spec = importlib.util.spec_from_file_location("jax_privacy_auditing", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


@pytest.mark.parametrize(("m", "r", "v"), COUNTS)
@pytest.mark.parametrize("delta", [0.0, *DELTAS])
def test_p_values(auditing: ModuleType, m: int, r: int, v: int, delta: float) -> None:
    for epsilon in (0.0, 0.3, 1.0, 4.0):
        ours = one_run_p_value(canaries=m, guesses=r, correct=v, epsilon=epsilon, delta=delta)
        assert ours == pytest.approx(auditing._one_run_p_value(m, r, v, epsilon, delta), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize(("m", "r", "v"), COUNTS)
@pytest.mark.parametrize("delta", [0.0, *DELTAS])
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_one_run(auditing: ModuleType, m: int, r: int, v: int, delta: float, confidence: float) -> None:
    theirs = auditing._epsilon_one_run(0, m, r, v, 1 - confidence, delta)
    ours = one_run_epsilon_of_counts(canaries=m, guesses=r, correct=v, delta=delta, confidence=confidence)
    assert ours == pytest.approx(theirs, abs=5e-6)


@pytest.mark.parametrize(("m", "r", "v"), COUNTS)
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_fdp(auditing: ModuleType, m: int, r: int, v: int, delta: float, confidence: float) -> None:
    theirs = auditing._epsilon_one_run_fdp(0, m, r, v, 1 - confidence, delta)
    ours = fdp_epsilon_of_counts(
        canaries=m, guesses=r, correct=v, delta=delta, confidence=confidence, trade_off="gaussian"
    )
    assert ours == pytest.approx(theirs, abs=5e-5)  # they bisect ε through a root of their own


@pytest.mark.parametrize("scenario", range(12))
@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.02])
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_clopper_pearson(auditing: ModuleType, scenario: int, delta: float, confidence: float) -> None:
    rng = np.random.default_rng(scenario)
    members, non_members = int(rng.integers(5, 200)), int(rng.integers(5, 200))
    inside, outside = rng.normal(scenario / 3, 1, members), rng.normal(0, 1, non_members)
    threshold = float(rng.normal(1, 1))
    auditor = auditing.CanaryScoreAuditor(inside, outside)
    at: Any = auditing.Explicit(threshold)
    theirs = auditor.epsilon_clopper_pearson(1 - confidence, delta, one_sided=False, threshold_strategy=at)
    ours = clopper_pearson_epsilon_of_counts(
        true_positives=int((inside >= threshold).sum()),
        members=members,
        false_positives=int((outside >= threshold).sum()),
        non_members=non_members,
        delta=delta,
        confidence=confidence,
    )
    assert ours == pytest.approx(float(theirs), abs=1e-9)


def test_scenarios_show_something(auditing: ModuleType) -> None:
    """Two zeros agree too easily: most of the cases above are above 0."""
    shown = [auditing._epsilon_one_run(0, m, r, v, 0.05, 1e-6) > 0.1 for m, r, v in COUNTS]
    assert sum(shown) >= 4


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("delta", DELTAS)
def test_gaussian_epsilon(epsilon: float, delta: float) -> None:
    import dp_accounting

    sigma = dp_accounting.get_sigma_gaussian(epsilon, delta)
    assert gaussian_epsilon(1 / sigma, delta) == pytest.approx(epsilon, rel=1e-5)
