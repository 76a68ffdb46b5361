"""Patient-level DP-SGD (Abadi et al. 2016, arXiv:1607.00133, alg. 1), one step at a time.

    sample patients → K draws each → gradient per patient → clip to C → sum → add noise σC → divide by qN → optimizer

Opacus' optimizer clips, sums and steps, and Opacus' accountant counts the steps that ran. Ours are the gradients
(``privacy.gradients``), the secure noise and the parts of adaptive clipping that Opacus leaves open. A loss arrives as
a callable: nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.accountants import PRVAccountant
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from privacy.accounting import SampledGaussian
from privacy.errors import InvalidPlan, PlanExhausted, WrongDraws, require, require_count
from privacy.gradients import PatientLoss, per_patient_gradients
from privacy.plan import GRID_UNITS_PER_CLIP_NORM, DPPlan
from privacy.rng import Randomness, SecureRandomness, with_gaussian_noise
from privacy.skellam import LARGEST, dithered, share_variance, skellam_noise

# Draw(patient indices [b]) → tensors [b, K, …], the arguments of the loss after the parameters.
Draw = Callable[[NDArray[np.int64]], Sequence[Tensor]]

# Clipping aims this much below C, so that float32's rounding and the noise's grid stay within C.
CLIP_MARGIN = 1e-5

_SMALL = 1 << 12  # numbers of a gradient below which the call takes longer than the work
_NORM_BLOCK = 1 << 8
_NOISE_BLOCK = 1 << 15  # numbers that stay in the cache


def noisy_clipped_sum(values: Tensor, *, clip_norm: float, noise_multiplier: float, randomness: Randomness) -> Tensor:
    """Release Σ clip(value of a patient) + N(0, (σC)²): for instance the sum of the patients' mean images.

    Whoever calls it charges ``GaussianRelease(noise_multiplier=…)`` first.

    Args:
        values: one per patient, over all the patient's scans, [P, …]; a value that is not finite counts as zero.
        clip_norm: C, L2 bound per patient.
        noise_multiplier: σ.
        randomness: of the noise.

    Returns:
        float64 of one value's shape, on the CPU.
    """
    total = _clipped_sum(values, clip_norm)
    return with_gaussian_noise(total, std=noise_multiplier * clip_norm, randomness=randomness)


def release_share(
    values: Tensor, *, clip_norm: float, plan: DPPlan, sites: int, randomness: Randomness
) -> NDArray[np.int64]:
    """One site's part of such a release over all sites, as integers with the site's share of the noise.

    Must leave under secure aggregation only: by itself it has too little noise. Whoever calls it charges
    ``plan.release_event`` first.

    Args:
        values: one per patient, [P, …].
        clip_norm: C.
        plan: with shared noise.
        sites: on the roster, which bounds what one may add.
        randomness: of dither and noise.

    Returns:
        int64 [d], in units of C / :data:`privacy.plan.GRID_UNITS_PER_CLIP_NORM`.
    """
    sigma = plan.config.release_noise_multiplier
    if sigma is None:
        raise InvalidPlan(argument="release_noise_multiplier", value=None, remedy="the plan has no such release")
    total = _clipped_sum(values, clip_norm).flatten()
    return _share(total, clip_norm=clip_norm, sigma=sigma, plan=plan, sites=sites, randomness=randomness)


def _clipped_sum(values: Tensor, clip_norm: float) -> Tensor:
    values = values.detach().to("cpu", torch.float64)
    if len(values):
        norms = _norms([values])
        factors = (clip_norm * (1 - CLIP_MARGIN) / norms).clamp(max=1.0)
        values = torch.where(_each(norms.isfinite(), values), values, 0.0)
        values = values * _each(factors.nan_to_num(0.0), values)
    return values.sum(dim=0)


def _share(
    total: Tensor, *, clip_norm: float, sigma: float, plan: DPPlan, sites: int, randomness: Randomness
) -> NDArray[np.int64]:
    """Round a clipped sum to the grid, bound it so that no sum over the sites wraps, and add this site's noise."""
    shared = plan.config.shared_noise
    if shared is None:
        raise InvalidPlan(argument="shared_noise", value=None, remedy="the plan's noise is each site's own")
    require_count(sites, argument="sites")
    integers = dithered(total.double().numpy(), scale=GRID_UNITS_PER_CLIP_NORM / clip_norm, randomness=randomness).clip(
        -(LARGEST // sites), LARGEST // sites
    )
    variance = share_variance((sigma * GRID_UNITS_PER_CLIP_NORM) ** 2, honest=shared.honest_sites)
    return integers + skellam_noise(integers.size, variance=variance, randomness=randomness)


class PatientSGD:
    """DP-SGD over one site's patients for one round of a plan.

    One patient changes the sum that the noise is added to by at most C, whatever the patient's scans hold and however
    many there are; the noise has standard deviation σC in every coordinate. Both are tested.

    Args:
        parameters: those that are trained, by name; exactly those of the optimizer.
        optimizer: takes the noisy mean gradient. What else it does must not look at data.
        loss: as in :func:`per_patient_gradients`.
        plan: the calibrated plan.
        patients: those that the site really has, sampled from.
        chunk_size: patients whose gradients are in memory at once; it does not change the result.
        clip_norm: where an adaptive clip norm stood after the last round; None for the plan's.
        randomness: of noise and sampling; None for a new secure stream.

    Raises:
        InvalidPlan: an impossible value, or an optimizer over other parameters.
    """

    def __init__(
        self,
        *,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        loss: PatientLoss,
        plan: DPPlan,
        patients: int,
        chunk_size: int,
        clip_norm: float | None = None,
        randomness: Randomness | None = None,
    ) -> None:
        require_count(patients, argument="patients")
        require_count(chunk_size, argument="chunk_size")
        require(
            clip_norm is None or plan.config.adaptive_clipping is not None,
            argument="clip_norm",
            value=clip_norm,
            remedy=f"leave it out: the plan's is fixed at {plan.config.clip_norm}",
        )
        managed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if {id(p) for p in managed} != {id(p) for p in parameters.values()} or not managed:
            raise InvalidPlan(
                argument="optimizer", value=f"{len(managed)} parameters", remedy="give it exactly the trained ones"
            )
        self._parameters = dict(parameters)
        self._loss = loss
        self._plan = plan
        self._patients = patients
        self._chunk_size = chunk_size
        self._randomness = SecureRandomness() if randomness is None else randomness
        self._optimizer = _PatientOptimizer(
            optimizer, plan, plan.config.clip_norm if clip_norm is None else clip_norm, self._randomness
        )
        self._accountant = PRVAccountant()
        self._optimizer.attach_step_hook(self._accountant.get_optimizer_hook_fn(plan.config.sampling_rate))

    @property
    def clip_norm(self) -> float:
        """C of the next step. With adaptive clipping it moves, but only by what was released with noise."""
        return self._optimizer.clip_norm

    @property
    def events(self) -> tuple[SampledGaussian, ...]:
        """The steps that ran, as the accountant saw them."""
        return tuple(
            SampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=steps)
            for sigma, q, steps in self._accountant.history
        )

    def step(self, draw: Draw) -> None:
        """Sample patients, and move the parameters once.

        A step that samples nobody adds its noise and counts like any other; ``draw`` is not called then.

        Args:
            draw: called with the indices of a chunk of the sampled patients, int64 [b]; returns tensors [b, K, …].

        Raises:
            PlanExhausted: the round's steps have run.
            WrongDraws: tensors of another shape than [b, K, …].
        """
        if sum(event.steps for event in self.events) >= self._plan.config.steps_per_round:
            raise PlanExhausted(
                argument="steps", value=self._plan.config.steps_per_round, remedy="the round's steps have run; send it"
            )
        if self._plan.config.shared_noise is not None:
            raise InvalidPlan(argument="shared_noise", value="a step here", remedy="send a share; the server steps")
        self._optimizer.begin()
        chunks = self._sampled()
        for number, chunk in enumerate(chunks, start=1):
            self._take(draw, chunk)
            self._optimizer.signal_skip_step(do_skip=number < len(chunks))
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def share(self, draw: Draw, *, sites: int) -> NDArray[np.int64]:
        """Sample patients, and return the clipped sum of their gradients as integers with the site's share of noise.

        The parameters stay as they are: the step is made with the sum over all sites. Must leave under secure
        aggregation only, after ``plan.round_event`` was charged.

        Args:
            draw: as for :meth:`step`.
            sites: on the roster, which bounds what one may add.

        Raises:
            WrongDraws: as :meth:`step`.
            InvalidPlan: a plan whose noise is each site's own.

        Returns:
            int64 [d], the parameters in order, in units of C / :data:`privacy.plan.GRID_UNITS_PER_CLIP_NORM`.
        """
        self._optimizer.begin()
        for chunk in self._sampled():
            self._take(draw, chunk)
            self._optimizer.clip_and_accumulate()
        total = torch.cat([parameter.summed_grad.flatten() for parameter in self._parameters.values()])  # type: ignore[attr-defined]
        self._optimizer.zero_grad(set_to_none=True)
        plan = self._plan
        return _share(
            total.cpu(),
            clip_norm=plan.config.clip_norm,
            sigma=plan.noise_multiplier,
            plan=plan,
            sites=sites,
            randomness=self._randomness,
        )

    def _sampled(self) -> list[NDArray[np.int64]]:
        """This step's patients in chunks, at least one: an empty one makes the sum zero."""
        sampled = self._randomness.poisson_sample(self._patients, self._plan.config.sampling_rate)
        return [sampled[start : start + self._chunk_size] for start in range(0, max(len(sampled), 1), self._chunk_size)]

    def _take(self, draw: Draw, chunk: NDArray[np.int64]) -> None:
        gradients = self._gradients(draw, chunk) if len(chunk) else self._no_gradients()
        for name, parameter in self._parameters.items():
            parameter.grad_sample = gradients[name]  # type: ignore[attr-defined]

    def _gradients(self, draw: Draw, chunk: NDArray[np.int64]) -> dict[str, Tensor]:
        draws = tuple(draw(chunk))
        wanted = (len(chunk), self._plan.config.draws_per_patient)
        for tensor in draws:
            if tuple(tensor.shape[:2]) != wanted:
                raise WrongDraws(
                    argument="draws", value=tuple(tensor.shape), remedy=f"give [{wanted[0]}, {wanted[1]}, …]"
                )
        return per_patient_gradients(self._loss, self._parameters, draws)

    def _no_gradients(self) -> dict[str, Tensor]:
        return {name: p.detach().new_zeros((0, *p.shape)) for name, p in self._parameters.items()}


class _PatientOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' DP optimizer with secure noise, a clip that holds for every input, and adaptive clipping.

    Opacus 1.6's own AdaClip optimizer is not used: it divides by the number of patients that happened to be sampled,
    which is private under Poisson sampling; it counts unclipped patients without centring (sensitivity 1, where
    theorem 1 of arXiv:1905.03871 needs 1/2); its noise on the count is not secure; and it fails on an empty sample.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, plan: DPPlan, clip_norm: float, randomness: Randomness
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=clip_norm * (1 - CLIP_MARGIN),
            expected_batch_size=plan.expected_patients,
        )
        self._plan = plan
        self._randomness = randomness
        self._unclipped = 0.0  # Σ (b_i - 1/2) over the step's patients, b_i = 1 if the patient is not clipped
        self.clip_norm = clip_norm

    def begin(self) -> None:
        """Forget whatever a step that failed half-way has left: nothing of it was released."""
        self._step_skip_queue.clear()
        self._is_last_step_skipped = False
        self._unclipped = 0.0
        self.zero_grad()

    def clip_and_accumulate(self) -> None:
        """Clip each patient; one whose gradient or its norm overflows contributes nothing rather than NaN."""
        gradients = _side_by_side(self.grad_samples)
        norms = _norms(gradients)
        finite = norms.isfinite()
        self._unclipped += float((norms <= self.max_grad_norm).sum()) - 0.5 * len(norms)
        if not bool(finite.all()):
            gradients = [torch.where(finite[:, None], gradient, 0.0) for gradient in gradients]
        factors = (self.max_grad_norm / norms).nan_to_num(0.0).clamp(max=1.0).to(gradients[0].dtype)
        total = torch.cat([factors @ gradient for gradient in gradients])
        sums = [summed.view_as(p) for p, summed in zip(self.params, self._split(total), strict=True)]
        if self.params[0].summed_grad is not None:
            torch._foreach_add_(sums, [p.summed_grad for p in self.params])
        for p, summed in zip(self.params, sums, strict=True):
            p.summed_grad = summed

    def add_noise(self) -> None:
        """Set ``p.grad`` to the sum of clipped gradients plus N(0, (σ_Δ C)²), then move C if it is adaptive."""
        total = torch.cat([p.summed_grad.flatten() for p in self.params])
        std = self._plan.gradient_noise_multiplier * self.clip_norm
        for block in torch.split(total, _NOISE_BLOCK):
            block.copy_(with_gaussian_noise(block, std=std, randomness=self._randomness))
        for p, noisy in zip(self.params, self._split(total), strict=True):
            p.grad = noisy.view_as(p)
        self._adapt()

    def _split(self, total: Tensor) -> Sequence[Tensor]:
        return torch.split(total, [p.numel() for p in self.params])

    def scale_grad(self) -> None:
        """Divide by qN."""
        torch._foreach_div_([p.grad for p in self.params], self.expected_batch_size)

    def _adapt(self) -> None:
        """C ← C exp(-η (b̃ - γ)), arXiv:1905.03871, alg. 1, with b̃ = 1/2 + (Σ (b_i - 1/2) + N(0, σ_b²)) / qN."""
        adaptive = self._plan.config.adaptive_clipping
        if adaptive is not None:
            count = torch.tensor(self._unclipped, dtype=torch.float64)
            std = adaptive.count_noise_multiplier
            noisy = float(with_gaussian_noise(count, std=std, randomness=self._randomness))
            share = 0.5 + noisy / self._plan.expected_patients
            log_norm = math.log(self.clip_norm) - adaptive.learning_rate * (share - adaptive.target_quantile)
            bounded = min(
                max(log_norm, math.log(adaptive.min_norm)), math.log(adaptive.max_norm)
            )  # exp cannot overflow
            self.clip_norm = min(max(math.exp(bounded), adaptive.min_norm), adaptive.max_norm)
            self.max_grad_norm = self.clip_norm * (1 - CLIP_MARGIN)


def _side_by_side(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [B, …] as matrices [B, n] in the same order, small ones joined: fewer and larger operations."""
    runs: list[list[Tensor]] = []
    columns = _SMALL
    for matrix in (gradient.flatten(1) for gradient in gradients):
        if columns >= _SMALL or matrix.shape[1] >= _SMALL:
            runs.append([])
            columns = 0
        runs[-1].append(matrix)
        columns += matrix.shape[1]
    return [torch.cat(run, dim=1) if len(run) > 1 else run[0] for run in runs]


def _norms(values: Sequence[Tensor]) -> Tensor:
    """Joint L2 norm of each patient's tensors, float64 [B].

    In blocks: summed in one go, float32 can make a million equal numbers 1e-3 too short, far beyond the margin.
    """
    blocks: list[Tensor] = []
    for value in values:
        flat = value.flatten(1)
        whole = flat.shape[1] // _NORM_BLOCK
        body, rest = flat.tensor_split([whole * _NORM_BLOCK], dim=1)
        blocks.append(torch.linalg.vector_norm(body.reshape(len(flat), whole, _NORM_BLOCK), dim=2))
        blocks.append(torch.linalg.vector_norm(rest, dim=1, keepdim=True))
    joint: Tensor = torch.linalg.vector_norm(torch.cat(blocks, dim=1).double(), dim=1)
    return joint


def _each(per_patient: Tensor, values: Tensor) -> Tensor:
    """[B] shaped to broadcast against [B, …]."""
    return per_patient.view(-1, *(1,) * (values.ndim - 1))
