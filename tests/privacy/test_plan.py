from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from scipy import stats

from privacy.accounting import GaussianRelease, SampledGaussian, SampledSkellam, epsilon
from privacy.errors import InvalidPlan, PlanExhausted, Unreachable
from privacy.plan import SIGMA_PRECISION, AdaptiveClipping, DPConfig, DPPlan, SharedNoise, calibrate

ADAPTIVE = AdaptiveClipping(
    target_quantile=0.5, learning_rate=0.2, min_norm=0.01, max_norm=10.0, count_noise_multiplier=2.0
)


def config(**changes: Any) -> DPConfig:
    values: dict[str, Any] = {
        "delta": 1e-3,
        "clip_norm": 1.0,
        "sampling_rate": 0.15,
        "steps_per_round": 25,
        "rounds": 10,
        "draws_per_patient": 4,
        "target_epsilon": 8.0,
    }
    return DPConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def plan() -> DPPlan:
    return calibrate(config(), patients=200)


def test_calibration_meets_the_target_with_the_least_noise(plan: DPPlan) -> None:
    assert plan.epsilon <= 8.0
    assert plan.accountant == "prv"
    assert plan.noise_multiplier == pytest.approx(1.333, abs=0.003)
    less = plan.noise_multiplier * (1 - 2 * SIGMA_PRECISION)
    event = SampledGaussian(sampling_rate=0.15, noise_multiplier=less, steps=250)
    assert epsilon([event], 1e-3).epsilon > 8.0


def test_plan_says_what_runs(plan: DPPlan) -> None:
    assert plan.total_steps == 250
    assert plan.expected_patients == pytest.approx(30.0)
    assert plan.gradient_noise_multiplier == plan.noise_multiplier
    assert plan.events(10) == (SampledGaussian(sampling_rate=0.15, noise_multiplier=plan.noise_multiplier, steps=250),)
    assert plan.round_event.steps == 25
    assert plan.events(0) == ()
    assert plan.release_event is None
    with pytest.raises(PlanExhausted, match="rounds = 11"):
        plan.events(11)


def test_epsilon_by_round_is_what_the_rounds_cost(plan: DPPlan) -> None:
    assert len(plan.epsilon_by_round) == 10
    assert list(plan.epsilon_by_round) == sorted(set(plan.epsilon_by_round))
    for rounds in (1, 5, 10):
        assert plan.epsilon_by_round[rounds - 1] == pytest.approx(epsilon(plan.events(rounds), 1e-3).epsilon, abs=2e-3)


def test_noise_multiplier_gives_epsilon() -> None:
    plan = calibrate(config(target_epsilon=None, noise_multiplier=2.27, sampling_rate=0.2, rounds=20), patients=200)
    assert plan.noise_multiplier == 2.27
    assert plan.epsilon == pytest.approx(7.98, abs=0.01)


def test_release_before_training_is_inside_the_budget(plan: DPPlan) -> None:
    released = calibrate(config(release_noise_multiplier=3.0), patients=200)
    assert released.epsilon <= 8.0
    assert released.noise_multiplier > plan.noise_multiplier
    assert released.events(0) == (GaussianRelease(noise_multiplier=3.0),)
    assert released.release_event in released.events(10)
    assert "one noisy sum with σ = 3" in released.describe()
    with pytest.raises(Unreachable, match="release_noise_multiplier"):
        calibrate(config(target_epsilon=0.5, release_noise_multiplier=1.0), patients=200)


def test_adaptive_clipping_costs_noise_on_the_gradients(plan: DPPlan) -> None:
    adaptive = calibrate(config(adaptive_clipping=ADAPTIVE), patients=200)
    assert adaptive.noise_multiplier == plan.noise_multiplier  # the two releases together cost what one did
    sigma, count, gradient = adaptive.noise_multiplier, 2.0, adaptive.gradient_noise_multiplier
    assert gradient > sigma
    # Both are one Gaussian of the joint sensitivity: 1 (gradient) over σ_Δ, 1/2 (count) over σ_b.
    assert 1 / sigma**2 == pytest.approx(1 / gradient**2 + 0.5**2 / count**2)
    starved = dataclasses.replace(ADAPTIVE, count_noise_multiplier=0.6)
    with pytest.raises(InvalidPlan, match="count_noise_multiplier"):
        calibrate(config(adaptive_clipping=starved), patients=200)


@pytest.mark.parametrize("patients", [1000, 5000])
def test_delta_must_be_below_one_over_patients(patients: int) -> None:
    with pytest.raises(InvalidPlan, match="1/patients"):
        calibrate(config(), patients=patients)


def test_one_patient_fewer_is_fine() -> None:
    assert calibrate(config(), patients=999).patients == 999


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": float("nan")}, "delta"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": float("inf")}, "clip_norm"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.01}, "sampling_rate"),
        ({"steps_per_round": 0}, "steps_per_round"),
        ({"rounds": 1.5}, "rounds"),
        ({"rounds": True}, "rounds"),
        ({"draws_per_patient": 0}, "draws_per_patient"),
        ({"noise_multiplier": 1.0}, "exactly one"),
        ({"target_epsilon": None}, "exactly one"),
        ({"target_epsilon": -1.0}, "target_epsilon"),
        ({"target_epsilon": "8"}, "target_epsilon"),
        ({"target_epsilon": None, "noise_multiplier": 0.0}, "noise_multiplier"),
        ({"release_noise_multiplier": 0.0}, "release_noise_multiplier"),
        ({"adaptive_clipping": ADAPTIVE, "clip_norm": 11.0}, "clip_norm"),
    ],
)
def test_impossible_configurations_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidPlan, match=named):
        config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_quantile": 0.0},
        {"target_quantile": 1.0},
        {"learning_rate": 0.0},
        {"min_norm": 0.0},
        {"max_norm": 0.01},
        {"count_noise_multiplier": 0.0},
        {"count_noise_multiplier": None},
    ],
)
def test_impossible_adaptive_clipping_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlan, match=next(iter(changes))):
        dataclasses.replace(ADAPTIVE, **changes)


def test_plan_survives_json_and_is_frozen(plan: DPPlan) -> None:
    for original in (plan, calibrate(config(adaptive_clipping=ADAPTIVE, release_noise_multiplier=4.0), patients=200)):
        again = DPPlan.from_json(json.loads(json.dumps(original.to_json())))
        assert again == original
        assert again.sha256 == original.sha256
    assert calibrate(config(rounds=9), patients=200).sha256 != plan.sha256
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.noise_multiplier = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("noise_multiplier",), 0.5),
        (("noise_multiplier",), 1.32),
        (("epsilon_by_round",), [0.1] * 10),
        (("epsilon_by_round",), [1.0]),
        (("accountant",), "gdp"),
        (("accountant",), "rdp"),
        (("patients",), 1000),
        (("patients",), 0),
        (("config", "sampling_rate"), 0.5),
        (("config", "steps_per_round"), 50),
        (("config", "delta"), 1e-5),
        (("config", "target_epsilon"), 4.0),
        (("config", "unknown"), 1),
        (("unknown",), 1),
    ],
)
def test_an_edited_plan_is_refused(plan: DPPlan, where: tuple[str, ...], value: object) -> None:
    values = json.loads(json.dumps(plan.to_json()))
    inner = values
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(InvalidPlan):
        DPPlan.from_json(values)


def test_a_plan_with_a_missing_part_is_refused(plan: DPPlan) -> None:
    for key in plan.to_json():
        values = plan.to_json()
        del values[key]
        with pytest.raises(InvalidPlan):
            DPPlan.from_json(values)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_membership_ceiling_is_that_of_the_gaussian_mechanism(sigma: float) -> None:
    """With q = 1 and one step the best attack is known: a threshold on one normal variable shifted by μ = 1/σ."""
    one = config(target_epsilon=None, noise_multiplier=sigma, sampling_rate=1.0, rounds=1, steps_per_round=1)
    ceiling = calibrate(one, patients=200).membership_ceiling()
    tpr, auc = stats.norm.cdf(stats.norm.ppf(0.01) + 1 / sigma), stats.norm.cdf(1 / sigma / 2**0.5)
    assert tpr <= ceiling.tpr_at_1_percent_fpr <= tpr + 0.02
    assert auc <= ceiling.auc <= auc + 0.02


def test_membership_ceiling_is_lower_than_what_the_one_pair_says(plan: DPPlan) -> None:
    ceiling = plan.membership_ceiling()
    assert ceiling.tpr_at_1_percent_fpr < 0.4  # (8, 1e-3) alone allows 1.0
    assert 0.5 < ceiling.auc < 0.93
    stricter = calibrate(config(target_epsilon=1.0), patients=200).membership_ceiling()
    assert stricter.tpr_at_1_percent_fpr < ceiling.tpr_at_1_percent_fpr
    assert stricter.auc < ceiling.auc


def test_dry_run_says_everything(plan: DPPlan) -> None:
    text = plan.describe()
    for part in ("(7.99", "0.001", "PRV", "1.33", "250 in total", "30 expected", "one patient with all scans"):
        assert part in text.replace("(8.000", "(7.99")
    assert "TPR ≤ 0.36" in text
    assert "AUC ≤ 0.91" in text
    assert "two sites" in text
    assert text.count("\n") < 15
    rdp = calibrate(config(target_epsilon=None, noise_multiplier=0.1), patients=200)
    assert "RDP accountant" in rdp.describe()


SHARED = SharedNoise(honest_sites=2, dimensions=700_000, release_dimensions=1024)


@pytest.fixture(scope="module")
def shared() -> DPPlan:
    wanted = config(shared_noise=SHARED, release_noise_multiplier=4.0, steps_per_round=1, rounds=50)
    return calibrate(wanted, patients=200)


def test_shared_noise_is_accounted_as_the_sum_s(shared: DPPlan) -> None:
    """About one per cent for the grid, and what Rényi divergences lose against PRV."""
    alone = calibrate(config(release_noise_multiplier=4.0, steps_per_round=1, rounds=50), patients=200)
    assert shared.accountant == "rdp"
    assert shared.epsilon <= 8.0
    assert 1.0 < shared.noise_multiplier / alone.noise_multiplier < 1.25
    event = shared.round_event
    assert isinstance(event, SampledSkellam)
    assert event.noise_multiplier == pytest.approx(shared.noise_multiplier)
    assert (event.dimensions, event.steps) == (700_000, 1)
    release = shared.release_event
    assert isinstance(release, SampledSkellam)
    assert (release.sampling_rate, release.dimensions, release.noise_multiplier) == (1.0, 1024, pytest.approx(4.0))
    assert shared.epsilon == pytest.approx(epsilon(shared.releases().values(), 1e-3).epsilon)


def test_a_plan_with_shared_noise_says_on_what_it_rests(shared: DPPlan) -> None:
    assert "noise of 2 sites in each sum" in shared.describe()
    assert shared.membership_ceiling().auc < 1
    assert DPPlan.from_json(json.loads(json.dumps(shared.to_json()))) == shared


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"adaptive_clipping": ADAPTIVE}, "adaptive_clipping"),
        ({"release_noise_multiplier": None}, "release_dimensions"),
        ({"shared_noise": dataclasses.replace(SHARED, release_dimensions=None)}, "release_dimensions"),
    ],
)
def test_shared_noise_that_cannot_be_meant_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidPlan, match=named):
        config(**{"shared_noise": SHARED, "release_noise_multiplier": 4.0, **changes})
    for field in ("honest_sites", "dimensions", "release_dimensions"):
        with pytest.raises(InvalidPlan, match=field):
            dataclasses.replace(SHARED, **{field: 0})
