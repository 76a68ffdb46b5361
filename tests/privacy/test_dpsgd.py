from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from privacy.accounting import SampledGaussian
from privacy.dpsgd import CLIP_MARGIN, PatientSGD, _norms, noisy_clipped_sum, release_share
from privacy.errors import InvalidPlan, PlanExhausted, WrongDraws
from privacy.gradients import per_patient_gradients
from privacy.plan import GRID_UNITS_PER_CLIP_NORM, AdaptiveClipping, DPConfig, DPPlan, SharedNoise, calibrate
from privacy.rng import Randomness, SecureRandomness, SeededRandomnessForTests
from privacy.skellam import sensitivity

RARE = 1e-6  # a correct step fails a statistical test by chance once in a million runs

ADAPTIVE = AdaptiveClipping(
    target_quantile=0.5, learning_rate=0.3, min_norm=0.01, max_norm=1e4, count_noise_multiplier=2.0
)


def make_plan(*, patients: int = 8, **changes: Any) -> DPPlan:
    values: dict[str, Any] = {
        "delta": 1e-3,
        "clip_norm": 1.0,
        "sampling_rate": 1.0,
        "steps_per_round": 10,
        "rounds": 1,
        "draws_per_patient": 3,
        "noise_multiplier": 1.5,
    }
    return calibrate(DPConfig(**{**values, **changes}), patients=patients)


def linear_loss(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The gradient of a draw is the draw itself: x [K, d] → [K]."""
    return x @ parameters["w"]


class Run:
    """One site whose patients' gradients are given; reads back the noisy sum of each step."""

    def __init__(self, plan: DPPlan, slices: Tensor, *, randomness: Randomness, **arguments: Any) -> None:
        self.slices = slices  # [P, K, d]
        self.w = nn.Parameter(torch.zeros(slices.shape[2], dtype=slices.dtype))
        self.plan = plan
        self.asked: list[int] = []
        arguments = {"patients": max(len(slices), 1), "chunk_size": 4, **arguments}
        self.sgd = PatientSGD(
            parameters={"w": self.w},
            optimizer=torch.optim.SGD([self.w], lr=1.0),
            loss=linear_loss,
            plan=plan,
            randomness=randomness,
            **arguments,
        )

    def draw(self, patients: NDArray[np.int64]) -> Sequence[Tensor]:
        self.asked += patients.tolist()
        return (self.slices[patients],)

    def noisy_sum(self) -> Tensor:
        before = self.w.detach().clone()
        self.sgd.step(self.draw)
        return (before - self.w.detach()) * self.plan.expected_patients


def difference(one: Tensor, other: Tensor, plan: DPPlan, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the patients of ``one`` add to the sum beyond those of ``other``, the noise being the same."""
    sums = [Run(plan, s.to(dtype), randomness=SeededRandomnessForTests(7)).noisy_sum() for s in (one, other)]
    return (sums[0] - sums[1]).double()


# ---- the noise


def noise_fits(sums: Tensor, std: float) -> bool:
    """Two-sided χ² test that the values are N(0, std²)."""
    statistic = float((sums.double() / std).square().sum())
    tail = min(stats.chi2.cdf(statistic, sums.numel()), stats.chi2.sf(statistic, sums.numel()))
    return bool(2 * tail > RARE)


@pytest.mark.parametrize("clip_norm", [0.2, 5.0])
@pytest.mark.parametrize("adaptive", [None, ADAPTIVE])
def test_noise_has_the_plans_sigma_and_no_other(clip_norm: float, adaptive: AdaptiveClipping | None) -> None:
    def sums(sigma: float) -> Tensor:
        plan = make_plan(clip_norm=clip_norm, noise_multiplier=sigma, adaptive_clipping=adaptive)
        return Run(plan, torch.zeros(8, 3, 20_000), randomness=SecureRandomness()).noisy_sum()

    plan = make_plan(clip_norm=clip_norm, adaptive_clipping=adaptive)
    std = plan.gradient_noise_multiplier * clip_norm
    assert noise_fits(sums(1.5), std)
    assert stats.kstest(sums(1.5).numpy() / std, "norm").pvalue > RARE
    assert not noise_fits(sums(1.5 * 2 / 3), std)
    assert not noise_fits(sums(1.5 * 3 / 2), std)


def test_noise_is_fresh_in_every_step_and_every_run() -> None:
    run = Run(make_plan(), torch.zeros(8, 3, 5000), randomness=SecureRandomness())
    again = Run(make_plan(), torch.zeros(8, 3, 5000), randomness=SecureRandomness())
    one, two, three = run.noisy_sum(), run.noisy_sum(), again.noisy_sum()
    for a, b in ((one, two), (one, three), (two, three)):
        assert stats.pearsonr(a.numpy(), b.numpy()).pvalue > RARE


def test_randomness_is_secure_unless_a_test_hands_over_another() -> None:
    w = nn.Parameter(torch.zeros(3))
    sgd = PatientSGD(
        parameters={"w": w},
        optimizer=torch.optim.SGD([w], lr=1.0),
        loss=linear_loss,
        plan=make_plan(),
        patients=8,
        chunk_size=2,
    )
    assert type(sgd._randomness) is SecureRandomness
    assert type(sgd._optimizer._randomness) is SecureRandomness


# ---- a share of one noise over all sites


def make_shared(honest: int = 2, sigma: float = 1.5, dimensions: int = 20_000, **changes: Any) -> DPPlan:
    shared = SharedNoise(honest_sites=honest, dimensions=dimensions)
    return make_plan(noise_multiplier=sigma, shared_noise=shared, **changes)


def share_of(slices: Tensor, plan: DPPlan, randomness: Randomness) -> NDArray[np.int64]:
    run = Run(plan, slices, randomness=randomness)
    return run.sgd.share(run.draw, sites=3)


def test_honest_shares_together_have_the_plans_noise_and_one_alone_has_not() -> None:
    plan = make_shared()
    std = plan.noise_multiplier * GRID_UNITS_PER_CLIP_NORM
    shares = [share_of(torch.zeros(8, 3, 20_000), plan, SecureRandomness()) for _ in range(2)]
    together = torch.from_numpy(shares[0] + shares[1])
    assert noise_fits(together, std)
    assert not noise_fits(together, std * 2 / 3)
    assert not noise_fits(together, std * 3 / 2)
    assert noise_fits(torch.from_numpy(shares[0]), std / math.sqrt(2))
    assert stats.pearsonr(shares[0], shares[1]).pvalue > RARE


def test_a_share_is_the_clipped_sum_on_the_grid() -> None:
    plan = make_shared(dimensions=5)
    slices = torch.linspace(-1, 1, 8 * 3 * 5).reshape(8, 3, 5)
    one, other = (share_of(s, plan, SeededRandomnessForTests(7)) for s in (slices, slices * 0))
    gradients = slices.mean(dim=1)
    wanted = (gradients * (plan.config.clip_norm / gradients.norm(dim=1, keepdim=True)).clamp(max=1.0)).sum(dim=0)
    found = (one - other) / GRID_UNITS_PER_CLIP_NORM * plan.config.clip_norm
    np.testing.assert_allclose(found, wanted, atol=1 / GRID_UNITS_PER_CLIP_NORM + 2e-5 * 8)


def test_a_plan_with_shared_noise_makes_no_step_here_and_one_without_gives_no_share() -> None:
    run = Run(make_shared(dimensions=5), torch.zeros(8, 3, 5), randomness=SecureRandomness())
    with pytest.raises(InvalidPlan, match="shared_noise"):
        run.sgd.step(run.draw)
    run = Run(make_plan(), torch.zeros(8, 3, 5), randomness=SecureRandomness())
    with pytest.raises(InvalidPlan, match="shared_noise"):
        run.sgd.share(run.draw, sites=3)


def test_shares_of_a_release_add_up_to_its_noise() -> None:
    shared = SharedNoise(honest_sites=3, dimensions=5, release_dimensions=30_000)
    plan = make_plan(shared_noise=shared, release_noise_multiplier=4.0)
    shares = [
        release_share(torch.zeros(4, 30_000), clip_norm=13.0, plan=plan, sites=3, randomness=SecureRandomness())
        for _ in range(3)
    ]
    together = torch.from_numpy(np.sum(shares, axis=0))
    assert noise_fits(together, 4.0 * GRID_UNITS_PER_CLIP_NORM)
    assert not noise_fits(together, 4.0 * GRID_UNITS_PER_CLIP_NORM * 3 / 2)
    with pytest.raises(InvalidPlan, match="release_noise_multiplier"):
        release_share(torch.zeros(4, 5), clip_norm=1.0, plan=make_shared(), sites=3, randomness=SecureRandomness())


# ---- one patient's influence

ADVERSARIAL = st.one_of(
    st.floats(-1e3, 1e3),
    st.sampled_from([1e-30, 1e18, -1e18, 1e30, 3e38, math.inf, -math.inf, math.nan]),
)


@settings(max_examples=30, deadline=None)
@given(
    patient=st.lists(st.lists(ADVERSARIAL, min_size=5, max_size=5), min_size=3, max_size=3),
    clip_norm=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_one_patient_changes_a_share_by_no_more_than_was_counted(patient: list[list[float]], clip_norm: float) -> None:
    plan = make_shared(dimensions=5, clip_norm=clip_norm)
    others = torch.linspace(-1, 1, 7 * 3 * 5).reshape(7, 3, 5)
    with_patient = torch.cat([others, torch.tensor(patient)[None]])
    one, other = (share_of(slices, plan, SeededRandomnessForTests(7)) for slices in (with_patient, others))
    _, most = sensitivity(clip=GRID_UNITS_PER_CLIP_NORM, dimensions=5, beta=1e-9)
    assert np.linalg.norm(one - other) <= most


@settings(max_examples=40, deadline=None)
@given(
    patient=st.lists(st.lists(ADVERSARIAL, min_size=5, max_size=5), min_size=3, max_size=3),
    clip_norm=st.sampled_from([0.01, 1.0, 30.0]),
    position=st.integers(0, 4),
)
def test_one_patient_moves_the_sum_by_at_most_c(patient: list[list[float]], clip_norm: float, position: int) -> None:
    plan = make_plan(clip_norm=clip_norm)
    others = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    with_patient = torch.cat([others[:position], torch.tensor([patient]).double(), others[position:]])
    moved = difference(with_patient, others, plan)
    assert bool(moved.isfinite().all())
    assert float(moved.norm()) <= clip_norm
    in_float32 = difference(with_patient, others, plan, torch.float32)  # the reading itself rounds here
    assert float(in_float32.norm()) <= clip_norm + 1e-5 * (plan.expected_patients + 10) * clip_norm


@pytest.mark.parametrize("slices", [1, 10, 200])
def test_number_of_slices_gives_no_more_influence(slices: int) -> None:
    plan = make_plan(draws_per_patient=slices)
    others = torch.zeros(4, slices, 5)
    moved = difference(torch.cat([others, torch.full((1, slices, 5), 100.0)]), others, plan)
    assert 0.999 < float(moved.norm()) <= 1.0


def test_clipping_by_slice_would_fail_the_test_of_influence() -> None:
    """The property can be broken: with slices as the unit, a patient of three moves the sum by 3 C."""
    plan = make_plan(draws_per_patient=1)
    others = torch.zeros(4, 1, 5)
    moved = difference(torch.cat([others, torch.full((3, 1, 5), 100.0)]), others, plan)
    assert float(moved.norm()) > 2.9


@pytest.mark.parametrize("value", [0.1, 0.3, 1.1, 1.9])
def test_a_norm_is_exact_within_the_clips_margin_whatever_the_size(value: float) -> None:
    """A patient whose norm comes out too short moves the sum by more than C."""
    gradients = [torch.full((1, n), value) for n in (1_200_000, 600, 7)]
    exact = float(torch.linalg.vector_norm(torch.cat(gradients, dim=1).double()))
    in_one_go = float(torch.linalg.vector_norm(torch.cat(gradients, dim=1)))
    assert abs(float(_norms(gradients)) / exact - 1) < CLIP_MARGIN / 5
    assert abs(in_one_go / exact - 1) > CLIP_MARGIN


def test_a_small_gradient_is_not_clipped() -> None:
    others = torch.zeros(4, 3, 5)
    patient = torch.tensor([[0.1, 0.2, 0.0, 0.0, 0.1]]).expand(1, 3, 5)
    torch.testing.assert_close(
        difference(torch.cat([others, patient]), others, make_plan()), patient[0, 0].double(), atol=1e-8, rtol=1e-6
    )


def test_which_slices_belong_to_which_patient_matters() -> None:
    slices = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2)) * 3
    base = Run(make_plan(), slices, randomness=SeededRandomnessForTests(0)).noisy_sum()
    within = Run(make_plan(), slices[:, [2, 0, 1]], randomness=SeededRandomnessForTests(0)).noisy_sum()
    across = slices.reshape(12, 5)[torch.randperm(12, generator=torch.Generator().manual_seed(3))].reshape(4, 3, 5)
    shuffled = Run(make_plan(), across, randomness=SeededRandomnessForTests(0)).noisy_sum()
    torch.testing.assert_close(base, within, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(base, shuffled, atol=1e-2)


# ---- the sample


def test_patients_are_sampled_at_the_plans_rate() -> None:
    plan = make_plan(patients=30, sampling_rate=0.2, steps_per_round=400)
    run = Run(plan, torch.zeros(30, 3, 2), randomness=SecureRandomness())
    for _ in range(400):
        run.sgd.step(run.draw)
    counts = np.bincount(run.asked, minlength=30)
    assert stats.binomtest(int(counts.sum()), 400 * 30, 0.2).pvalue > RARE
    assert min(stats.binomtest(int(count), 400, 0.2).pvalue for count in counts) > RARE / 30


def test_a_step_that_samples_nobody_adds_noise_and_counts() -> None:
    plan = make_plan(sampling_rate=1e-9)
    run = Run(plan, torch.ones(8, 3, 20_000), randomness=SecureRandomness())
    noisy = run.noisy_sum()
    assert run.asked == []
    # the sum is divided by q N = 8e-9 and read back
    assert noise_fits(noisy, plan.noise_multiplier)
    assert run.sgd.events == (SampledGaussian(sampling_rate=1e-9, noise_multiplier=1.5, steps=1),)


def test_a_step_that_samples_nobody_is_fine_with_adaptive_clipping() -> None:
    plan = make_plan(sampling_rate=1e-9, patients=900, adaptive_clipping=ADAPTIVE)
    run = Run(plan, torch.ones(8, 3, 4), randomness=SecureRandomness())
    run.noisy_sum()
    assert plan.config.adaptive_clipping is not None
    assert ADAPTIVE.min_norm <= run.sgd.clip_norm <= ADAPTIVE.max_norm


def test_the_denominator_is_the_plans_and_not_the_samples() -> None:
    """Dividing by the patients sampled would release their number."""
    plan = make_plan(patients=100)  # what is made known; 8 patients are really there
    slices = torch.full((8, 3, 5), 0.1)
    run = Run(plan, slices, randomness=SeededRandomnessForTests(0))
    run.sgd.step(run.draw)
    noise = Run(plan, torch.zeros(8, 3, 5), randomness=SeededRandomnessForTests(0))
    noise.sgd.step(noise.draw)
    torch.testing.assert_close(noise.w - run.w, torch.full((5,), 8 * 0.1 / 100), atol=1e-6, rtol=1e-4)


# ---- memory, failures, limits


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunks_do_not_change_the_result(chunk_size: int) -> None:
    slices = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(4)) * 2
    for adaptive in (None, ADAPTIVE):
        plan = make_plan(adaptive_clipping=adaptive)
        whole = Run(plan, slices, randomness=SeededRandomnessForTests(0), chunk_size=7)
        parts = Run(plan, slices, randomness=SeededRandomnessForTests(0), chunk_size=chunk_size)
        for _ in range(3):
            torch.testing.assert_close(parts.noisy_sum(), whole.noisy_sum(), atol=1e-5, rtol=1e-5)
        assert parts.sgd.clip_norm == whole.sgd.clip_norm
        assert parts.sgd.events == whole.sgd.events
        assert parts.asked == whole.asked


def test_no_more_than_a_chunk_is_asked_for_at_once() -> None:
    asked: list[int] = []
    run = Run(make_plan(), torch.zeros(7, 3, 5), randomness=SecureRandomness(), chunk_size=3)

    def draw(patients: NDArray[np.int64]) -> Sequence[Tensor]:
        asked.append(len(patients))
        return run.draw(patients)

    run.sgd.step(draw)
    assert asked == [3, 3, 1]
    assert run.w.grad_sample is None  # type: ignore[attr-defined]
    assert run.w.summed_grad is None  # type: ignore[attr-defined]


def test_a_step_that_failed_leaves_nothing_behind() -> None:
    slices = torch.ones(7, 3, 5)
    run = Run(make_plan(), slices, randomness=SeededRandomnessForTests(0), chunk_size=3)

    def failing(patients: NDArray[np.int64]) -> Sequence[Tensor]:
        if 3 in patients:
            raise OSError("disk")
        return run.draw(patients)

    with pytest.raises(OSError, match="disk"):
        run.sgd.step(failing)
    assert run.sgd.events == ()
    clean = Run(make_plan(), slices, randomness=SeededRandomnessForTests(0), chunk_size=3)
    torch.testing.assert_close(run.noisy_sum(), clean.noisy_sum())


def test_accountant_covers_exactly_the_steps_that_ran_and_the_plan_ends_them() -> None:
    plan = make_plan(steps_per_round=4)
    run = Run(plan, torch.zeros(8, 3, 5), randomness=SecureRandomness())
    assert run.sgd.events == ()
    for done in range(1, 5):
        run.sgd.step(run.draw)
        assert run.sgd.events == (SampledGaussian(sampling_rate=1.0, noise_multiplier=1.5, steps=done),)
    before = run.w.detach().clone()
    with pytest.raises(PlanExhausted, match="steps = 4"):
        run.sgd.step(run.draw)
    assert torch.equal(run.w.detach(), before)
    assert run.sgd.events == (plan.round_event,)


@pytest.mark.parametrize("shape", [(8, 2, 5), (7, 3, 5)])
def test_draws_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    run = Run(make_plan(), torch.zeros(8, 3, 5), randomness=SecureRandomness(), chunk_size=8)
    with pytest.raises(WrongDraws, match=r"give \[8, 3, …\]"):
        run.sgd.step(lambda _: (torch.zeros(shape),))


def test_other_parameters_than_the_optimizers_are_refused() -> None:
    w, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    for managed in ([other], [w, other]):
        with pytest.raises(InvalidPlan, match="optimizer"):
            PatientSGD(
                parameters={"w": w},
                optimizer=torch.optim.SGD(managed, lr=1.0),
                loss=linear_loss,
                plan=make_plan(),
                patients=8,
                chunk_size=2,
            )


@pytest.mark.parametrize(("name", "value"), [("patients", 0), ("chunk_size", 0), ("clip_norm", 2.0)])
def test_impossible_arguments_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidPlan, match=name):
        Run(make_plan(), torch.zeros(8, 3, 5), randomness=SecureRandomness(), **{name: value})


def test_a_loss_that_draws_its_own_noise_is_refused() -> None:
    def noisy(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return (x + torch.randn_like(x)) @ parameters["w"]

    with pytest.raises(RuntimeError, match="random operation"):
        per_patient_gradients(noisy, {"w": torch.zeros(5)}, [torch.zeros(2, 3, 5)])


# ---- adaptive clipping


def test_adaptive_clip_norm_finds_the_quantile() -> None:
    norms = torch.linspace(1, 100, 200)
    slices = (norms[:, None] * nn.functional.one_hot(torch.zeros(200, dtype=torch.long), 3))[:, None, :].float()
    for quantile in (0.3, 0.7):
        adaptive = AdaptiveClipping(
            target_quantile=quantile, learning_rate=0.5, min_norm=0.1, max_norm=1000.0, count_noise_multiplier=5.0
        )
        plan = make_plan(patients=200, draws_per_patient=1, steps_per_round=40, adaptive_clipping=adaptive)
        run = Run(plan, slices, randomness=SeededRandomnessForTests(3), chunk_size=200)
        for _ in range(40):
            run.sgd.step(run.draw)
        assert run.sgd.clip_norm == pytest.approx(100 * quantile, rel=0.15)


def test_one_patient_moves_the_count_by_one_half() -> None:
    """The sensitivity in theorem 1 of arXiv:1905.03871, whether the patient is clipped or not."""
    plan = make_plan(adaptive_clipping=ADAPTIVE)
    others = torch.full((7, 3, 5), 0.01)
    for size, sign in ((0.01, 1), (100.0, -1)):
        logs = []
        for slices in (others, torch.cat([others, torch.full((1, 3, 5), size)])):
            run = Run(plan, slices, randomness=SeededRandomnessForTests(0))
            run.noisy_sum()
            logs.append(math.log(run.sgd.clip_norm))
        moved = (logs[0] - logs[1]) / ADAPTIVE.learning_rate * plan.expected_patients
        assert moved == pytest.approx(sign * 0.5, abs=1e-6)


def test_opacus_adaclip_divides_by_the_private_sample_size() -> None:
    """Why its optimizer is not used. If this fails, they mended it."""
    import inspect

    from opacus.optimizers import AdaClipDPOptimizer

    assert "self.unclipped_num / self.sample_size" in inspect.getsource(AdaClipDPOptimizer.update_max_grad_norm)


def test_adaptive_clip_norm_goes_on_where_the_last_round_ended() -> None:
    plan = make_plan(adaptive_clipping=ADAPTIVE)
    slices = torch.full((8, 3, 5), 100.0)
    assert Run(plan, slices, randomness=SecureRandomness(), clip_norm=3.0).sgd.clip_norm == 3.0
    moved = difference(torch.full((1, 3, 5), 100.0), torch.zeros(1, 3, 5), plan)
    assert float(moved.norm()) == pytest.approx(1.0, rel=1e-4)


# ---- one release before training


def test_noisy_sum_clips_each_patient_and_adds_the_noise() -> None:
    images = torch.zeros(50, 100, 100)
    images[:25] = 1.0  # norm 100, clipped to 22
    noisy = noisy_clipped_sum(images, clip_norm=22.0, noise_multiplier=3.0, randomness=SecureRandomness())
    assert noisy.shape == (100, 100)
    expected = 25 * 22 / 100
    assert noise_fits(noisy - expected, 66.0)
    assert not noise_fits(noisy - expected, 44.0)
    assert not noise_fits(noisy - expected, 99.0)


@settings(max_examples=20, deadline=None)
@given(patient=st.lists(ADVERSARIAL, min_size=6, max_size=6))
def test_one_patient_moves_the_released_sum_by_at_most_c(patient: list[float]) -> None:
    def release(values: Tensor) -> Tensor:
        seeded = SeededRandomnessForTests(1)
        return noisy_clipped_sum(values, clip_norm=2.0, noise_multiplier=1.0, randomness=seeded)

    others = torch.ones(3, 6)
    moved = release(torch.cat([others, torch.tensor([patient])])) - release(others)
    assert bool(moved.isfinite().all())
    assert float(moved.norm()) <= 2.0
    assert release(others[:0]).shape == (6,)
