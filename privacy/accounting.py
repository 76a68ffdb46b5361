"""What happened to the patients' data (events), and what that costs (ε at δ). The two are kept apart.

The unit is the patient: two data sets are neighbours if one is the other plus one patient with all scans and slices.
``epsilon`` bounds what any sequence of the events below reveals about one patient to whoever sees all outputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from privacy.errors import InvalidPlan, UnknownEvent, require, require_count, require_number

NEIGHBOURS = "add or remove one patient with all scans and slices"

Accountant = Literal["none", "prv", "rdp"]

# Error that the PRV accountant may make and that is added to what it returns: ε and a share of δ
# (Gopi et al. 2021, arXiv:2106.02848, thm 5.5).
PRV_EPSILON_ERROR = 0.01
PRV_DELTA_ERROR = 1e-3
# Points of the discretised privacy loss: above, PRV takes seconds and gigabytes. It is reached at ε of several hundred.
PRV_MOST_POINTS = 1 << 22
# Rounding of the Fourier transforms is below 1e-13; the share of δ left to errors must not be.
PRV_LEAST_DELTA = 1e-9
# Below, integrals of the privacy loss lose their digits; ε is in the hundreds there.
PRV_LEAST_NOISE_MULTIPLIER = 0.3
# Integer orders only: Opacus' series for fractional orders need not end when σ is small. Up to 1000: binomials
# overflow beyond.
RDP_ORDERS = (*range(2, 65), 72, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512, 640, 768, 1000)
# Shares of δ for what goes wrong with sums under Skellam noise: a dither that makes one patient larger than counted,
# and noise that is not quite Skellam.
DITHER_DELTA_SHARE = 0.01
NOISE_DELTA_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class SampledGaussian:
    """Steps of DP-SGD: each takes a Poisson sample of the patients and adds Gaussian noise to their clipped sum.

    Attributes:
        sampling_rate: q, probability that a patient takes part in a step.
        noise_multiplier: σ, noise over L2 sensitivity.
        steps: that ran.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        require_number(self.sampling_rate, argument="sampling_rate")
        require(
            0 < self.sampling_rate <= 1, argument="sampling_rate", value=self.sampling_rate, remedy="give q in (0, 1]"
        )
        _require_noise(self.noise_multiplier)
        require_count(self.steps, argument="steps")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; :func:`event_from_json` gives an equal event back."""
        return {"mechanism": "sampled_gaussian", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class GaussianRelease:
    """One sum over all patients, each clipped, with Gaussian noise: for instance a mean image.

    Attributes:
        noise_multiplier: σ, noise over L2 sensitivity.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        _require_noise(self.noise_multiplier)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; :func:`event_from_json` gives an equal event back."""
        return {"mechanism": "gaussian_release", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class SampledSkellam:
    """Steps whose sums secure aggregation adds up: sampled, clipped, dithered to integers, with Skellam noise.

    A patient is at one hospital; whoever the bound holds against sees the integers' sum over all hospitals, no one
    hospital's (``privacy.skellam``). Sampled at rate 1 in one step it is a release over all patients.

    Attributes:
        sampling_rate: q, probability that a patient takes part in a step.
        noise_variance: of the noise in the sum that nobody knows, per coordinate, in grid units².
        clip: C, L2 bound per patient before dithering, in grid units: scale × the norm clipped to.
        dimensions: d, integers in the sum.
        steps: that ran.
    """

    sampling_rate: float
    noise_variance: float
    clip: float
    dimensions: int
    steps: int

    def __post_init__(self) -> None:
        require_number(self.sampling_rate, argument="sampling_rate")
        require(
            0 < self.sampling_rate <= 1, argument="sampling_rate", value=self.sampling_rate, remedy="give q in (0, 1]"
        )
        for name in ("noise_variance", "clip"):
            value = getattr(self, name)
            require_number(value, argument=name)
            require(value > 0, argument=name, value=value, remedy="give a positive number, in grid units")
        require_count(self.dimensions, argument="dimensions")
        require_count(self.steps, argument="steps")

    @property
    def noise_multiplier(self) -> float:
        """σ, noise over C; what dithering adds to the sensitivity is counted, but not in this."""
        return math.sqrt(self.noise_variance) / self.clip

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; :func:`event_from_json` gives an equal event back."""
        return {"mechanism": "sampled_skellam", **asdict(self)}


MechanismEvent = SampledGaussian | GaussianRelease | SampledSkellam


@dataclass(frozen=True, kw_only=True)
class Spent:
    """A privacy cost.

    Attributes:
        epsilon: an upper bound at the δ asked for.
        accountant: ``prv`` (arXiv:2106.02848), ``rdp`` (arXiv:1702.07476, looser) where PRV cannot be computed or a
            sum has Skellam noise, or ``none`` where nothing happened.
    """

    epsilon: float
    accountant: Accountant


def event_from_json(values: Mapping[str, Any]) -> MechanismEvent:
    """Build an event from plain JSON types.

    Raises:
        UnknownEvent: no or another mechanism, or other fields than its own.
        InvalidPlan: an impossible value.
    """
    fields = dict(values)
    mechanism = fields.pop("mechanism", None)
    known = {
        "sampled_gaussian": SampledGaussian,
        "gaussian_release": GaussianRelease,
        "sampled_skellam": SampledSkellam,
    }
    if mechanism not in known:
        raise UnknownEvent(argument="mechanism", value=mechanism, remedy=f"known are {sorted(known)}")
    try:
        event: MechanismEvent = known[mechanism](**fields)
    except TypeError as error:
        raise UnknownEvent(argument="event", value=sorted(fields), remedy=f"give the fields of {mechanism}") from error
    return event


def epsilon(events: Iterable[MechanismEvent], delta: float) -> Spent:
    """Bound ε of all events together at δ.

    The theorem covers adaptive training, where each step sees the earlier outputs, for (q, σ, steps) that do not
    depend on those outputs. It says nothing if someone chooses σ after looking at a model.

    Args:
        events: what happened, in any order; no events cost nothing.
        delta: in (0, 1).

    Raises:
        UnknownEvent: an event that there is no theorem for.
        InvalidPlan: δ outside (0, 1), or events without a finite cost at it.
    """
    return epsilons([events], [delta])[0][0]


def epsilons(histories: Iterable[Iterable[MechanismEvent]], deltas: Iterable[float]) -> list[list[Spent]]:
    """:func:`epsilon` of several histories of the same mechanisms at several δ, with the slow part done once.

    Raises:
        UnknownEvent, InvalidPlan: as :func:`epsilon`.

    Returns:
        One list per history with one entry per δ.
    """
    deltas = tuple(deltas)
    for delta in deltas:
        require_number(delta, argument="delta")
        require(0 < delta < 1, argument="delta", value=delta, remedy="give a value in (0, 1)")
    return [list(row) for row in _epsilons(tuple(_merged(history) for history in histories), deltas)]


class _Skellam(NamedTuple):
    q: float
    variance: float
    clip: float
    dimensions: int


_Gaussian = tuple[float, float]  # (q, σ)
_Mechanism = _Gaussian | _Skellam
_History = tuple[tuple[_Mechanism, int], ...]  # each mechanism once, with its steps


def _merged(events: Iterable[MechanismEvent]) -> _History:
    """The same mechanisms in one canonical order; Gaussians without sampling are one Gaussian, Σ 1/σ² = 1/σ²."""
    steps: dict[_Mechanism, int] = {}
    precision = 0.0
    mechanism: _Mechanism
    for event in events:
        if type(event) is GaussianRelease:
            precision += 1 / event.noise_multiplier**2
        elif type(event) is SampledGaussian:
            if event.sampling_rate == 1:
                precision += event.steps / event.noise_multiplier**2
            else:
                mechanism = (float(event.sampling_rate), float(event.noise_multiplier))
                steps[mechanism] = steps.get(mechanism, 0) + event.steps
        elif type(event) is SampledSkellam:
            mechanism = _Skellam(
                float(event.sampling_rate), float(event.noise_variance), float(event.clip), event.dimensions
            )
            steps[mechanism] = steps.get(mechanism, 0) + event.steps
        else:
            raise UnknownEvent(
                argument="event",
                value=type(event).__name__,
                remedy="give a SampledGaussian, a GaussianRelease or a SampledSkellam",
            )
    if precision:
        steps[(1.0, 1 / math.sqrt(precision))] = 1
    return tuple(sorted(steps.items()))


@lru_cache(maxsize=256)
def _epsilons(histories: tuple[_History, ...], deltas: tuple[float, ...]) -> tuple[tuple[Spent, ...], ...]:
    if not any(histories):
        return tuple(tuple(Spent(epsilon=0.0, accountant="none") for _ in deltas) for _ in histories)
    try:
        bounds, accountant = _prv(histories, deltas), "prv"
    except _PrvFailed:
        bounds = [[_rdp(history, delta) if history else 0.0 for delta in deltas] for history in histories]
        accountant = "rdp"
    return tuple(
        tuple(
            Spent(epsilon=max(0.0, bound), accountant=accountant) if history else Spent(epsilon=0.0, accountant="none")  # type: ignore[arg-type]
            for bound in row
        )
        for history, row in zip(histories, bounds, strict=True)
    )


class _PrvFailed(Exception):
    """PRV cannot bound this history here; RDP can."""


def _prv(histories: Sequence[_History], deltas: Sequence[float]) -> list[list[float]]:
    """Upper bounds by numerical composition of privacy loss variables, arXiv:2106.02848, alg. 1, from Opacus' parts."""
    import numpy as np
    from opacus.accountants.analysis.prv import (
        Domain,
        PoissonSubsampledGaussianPRV,
        TruncatedPrivacyRandomVariable,
        compose_heterogeneous,
        discretize,
    )
    from scipy.integrate import IntegrationWarning

    most: dict[_Gaussian, int] = {}
    for history in histories:
        for mechanism, steps in history:
            if isinstance(mechanism, _Skellam):
                raise _PrvFailed
            most[mechanism] = max(most.get(mechanism, 0), steps)
    delta_error = PRV_DELTA_ERROR * min(deltas)
    if min(deltas) < PRV_LEAST_DELTA or min(sigma for _, sigma in most) < PRV_LEAST_NOISE_MULTIPLIER:
        raise _PrvFailed

    # Remark 5.6: where the composed loss and each single loss have all but a share of δ of their mass. Opacus' own
    # function takes fractional orders, which may not end.
    total = sum(most.values())
    tails = [_rdp(tuple(most.items()), delta_error / 4)]
    tails += [_rdp(((mechanism, 1),), delta_error / (8 * total)) for mechanism in most]
    length = max(*tails, PRV_EPSILON_ERROR) + 3
    mesh = PRV_EPSILON_ERROR / math.sqrt(total * math.log(12 / delta_error) / 2)
    if not 2 * length / mesh < PRV_MOST_POINTS:
        raise _PrvFailed
    try:
        # Logarithms of 0 at q = 1 and below the loss' support are meant: they give a cdf of 0.
        with warnings.catch_warnings(), np.errstate(divide="ignore"):
            warnings.simplefilter("error", IntegrationWarning)
            domain = Domain.create_aligned(-length, length, mesh)
            losses: dict[_Mechanism, Any] = {
                (q, sigma): discretize(
                    TruncatedPrivacyRandomVariable(PoissonSubsampledGaussianPRV(q, sigma), domain.t_min, domain.t_max),
                    domain,
                )
                for q, sigma in most
            }
            bounds = []
            for history in histories:
                if not history:
                    bounds.append([0.0] * len(deltas))
                    continue
                loss = compose_heterogeneous([losses[m] for m, _ in history], [steps for _, steps in history])
                bounds.append([float(loss.compute_epsilon(d, delta_error, PRV_EPSILON_ERROR)[2]) for d in deltas])
    except (RuntimeError, ValueError, FloatingPointError, OverflowError, IntegrationWarning) as error:
        raise _PrvFailed from error
    if not all(math.isfinite(bound) for row in bounds for bound in row):
        raise _PrvFailed
    return bounds


def _rdp(history: _History, delta: float) -> float:
    """Upper bound by Rényi divergences, arXiv:1908.10530, sec. 3.3, and arXiv:1905.09982, thm 21.

    Steps with Skellam noise leave less of δ to the divergences. Against one in which no dither made the patient too
    large and the noise is exact, a step on one of two neighbours has a statistical distance of β, and both have one of
    γ = d · NOISE_DISTANCE. So P(S) ≤ e^ε Q(S) + δ′ of the former becomes δ = δ′ + Σ β + (1 + e^ε) Σ γ.
    """
    import numpy as np
    from opacus.accountants.analysis.rdp import get_privacy_spent

    from privacy.skellam import NOISE_DISTANCE

    skellam = {mechanism: steps for mechanism, steps in history if isinstance(mechanism, _Skellam)}
    left, highest = delta, math.inf
    if skellam:
        left = delta * (1 - DITHER_DELTA_SHARE - NOISE_DELTA_SHARE)
        distance = NOISE_DISTANCE * sum(steps * mechanism.dimensions for mechanism, steps in skellam.items())
        highest = math.log(NOISE_DELTA_SHARE) + math.log(delta) - math.log(2 * distance)  # 1 + e^ε ≤ 2 e^ε
    beta = DITHER_DELTA_SHARE * delta / max(1, sum(skellam.values()))
    rdp = np.sum([steps * np.asarray(_divergences(mechanism, beta)) for mechanism, steps in history], axis=0)
    with warnings.catch_warnings():
        # An optimum at the end of the orders makes the bound loose, not wrong.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        bound, _ = get_privacy_spent(orders=RDP_ORDERS, rdp=rdp, delta=left)
    if math.isnan(bound):
        raise InvalidPlan(argument="events", value=history, remedy="they have no finite cost")
    if not max(0.0, bound) <= highest:
        remedy = f"they have no finite cost at delta = {delta:g}: give more noise, fewer steps or a larger delta"
        raise InvalidPlan(argument="events", value=history, remedy=remedy)
    return float(bound)


def _divergences(mechanism: _Mechanism, beta: float) -> tuple[float, ...]:
    """Rényi divergences of one step at RDP_ORDERS, between neighbours and in both directions."""
    if isinstance(mechanism, _Skellam):
        return _skellam_divergences(mechanism, beta)
    return _gaussian_divergences(mechanism)


@lru_cache(maxsize=4096)
def _gaussian_divergences(mechanism: _Gaussian) -> tuple[float, ...]:
    from opacus.accountants.analysis.rdp import compute_rdp

    q, sigma = mechanism
    return tuple(float(r) for r in compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=list(RDP_ORDERS)))


@lru_cache(maxsize=4096)
def _skellam_divergences(mechanism: _Skellam, beta: float) -> tuple[float, ...]:
    """Those that hold unless the dither, with probability β, makes the patient larger than its bound.

    Let Q be the integers' sum plus noise without the patient and P with it, for one dither and one sample of the other
    patients. Between P and Q, of integer order l ≥ 2 (Agarwal et al. 2021, arXiv:2110.04995, thm 3.5)

        ρ(l) ≤ l Δ₂²/(2μ) + min(((2l - 1) Δ₂² + 6 Δ₁)/(4μ²), 3 Δ₁/(2μ)).

    A sampled step gives P′ = (1 - q) Q + q P. By the binomial theorem

        e^((α - 1) D_α(P′‖Q)) = E_Q (1 - q + q P/Q)^α = Σ_l C(α, l) (1 - q)^(α - l) q^l e^((l - 1) ρ(l)).

    D_α(Q‖P′) is no larger, as for Gaussians (Mironov et al. 2019, arXiv:1908.10530, thm 5), so that the factor 3 of
    Zhu and Wang 2019, thm 5, is not needed. Let r = P/Q; reflection, x ↦ Δ - x up to a shift, swaps P and Q, so that
    2 E_Q f(r) = E_Q [f(r) + r f(1/r)] for every f. Take f(r) = u^α - u^(1 - α), u = 1 - q + q r, whose mean is the
    difference to bound, and v = 1 - q + q/r, t = α - 1/2. For r ≥ 1 (the other case is the same) f(r) + r f(1/r) ≥ 0
    means √u sinh(t ln u) ≥ r √v sinh(-t ln v). At t = 1/2 both sides are q (r - 1)/2; from there the left one grows
    faster in proportion, since ln u ≥ -ln v (as u v ≥ 1) and x coth(t x) rises with x. ∎

    Over all dithers and samples P′ and Q are mixtures with the same weights, whose divergence is no larger.
    """
    import numpy as np
    from scipy.special import gammaln, logsumexp

    from privacy.skellam import sensitivity

    q, variance, clip, dimensions = mechanism
    l1, l2 = sensitivity(clip=clip, dimensions=dimensions, beta=beta)
    order = np.arange(RDP_ORDERS[-1] + 1.0)
    near, far = ((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance)
    rho = order * l2**2 / (2 * variance) + np.minimum(near, far)
    rho[:2] = 0.0  # E_Q (P/Q)^l = 1
    if q == 1:
        return tuple(float(rho[alpha]) for alpha in RDP_ORDERS)
    divergences = []
    for alpha in RDP_ORDERS:
        term = order[: alpha + 1]
        choose = gammaln(alpha + 1) - gammaln(term + 1) - gammaln(alpha - term + 1)
        logs = choose + (alpha - term) * math.log1p(-q) + term * math.log(q) + (term - 1) * rho[: alpha + 1]
        divergences.append(max(0.0, float(logsumexp(logs))) / (alpha - 1))
    return tuple(divergences)


def _require_noise(noise_multiplier: object) -> None:
    require_number(noise_multiplier, argument="noise_multiplier")
    require(
        noise_multiplier > 0,  # type: ignore[operator]
        argument="noise_multiplier",
        value=noise_multiplier,
        remedy="give a positive σ: nothing is private without noise",
    )
