"""From what is wanted to what runs: a frozen configuration becomes one calibrated, frozen plan.

The guarantee of a plan, as a theorem: let D and D′ be neighbours, that is, one is the other plus one patient with all
scans and slices. For every set of outcomes, all that training on D releases in the plan's rounds lies in it with a
probability of at most e^ε times that of D′, plus δ. It holds against whoever sees the site's updates, the model or its
samples, whatever else they know, and rests on Poisson sampling, clipping and noise done as the plan says
(``privacy.dpsgd``) with secret randomness (``privacy.rng``). It does not cover a patient whose scans count as two
patients: the guarantees of two sites compose.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

from privacy.accounting import (
    NEIGHBOURS,
    Accountant,
    GaussianRelease,
    MechanismEvent,
    SampledGaussian,
    SampledSkellam,
    Spent,
    epsilon,
    epsilons,
)
from privacy.errors import InvalidPlan, PlanExhausted, Unreachable, require, require_count, require_number

# Relative width to which σ is calibrated; the σ taken always keeps the target.
SIGMA_PRECISION = 1e-4
# Difference of ε between two machines' arithmetic that a plan on disk may show.
EPSILON_TOLERANCE = 1e-3
# δ at which the privacy curve is read for the membership ceiling, beside the plan's own.
_SMALL_DELTAS = (1e-8, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.17, 0.23, 0.3)
CURVE_DELTAS = (*_SMALL_DELTAS, 0.38, 0.46, 0.54, 0.62, 0.7, 0.78, 0.86, 0.93)

# Grid units of shared noise to a clip norm: rounding to them costs about 1 % of ε at a million coordinates.
GRID_UNITS_PER_CLIP_NORM = 4096.0

# Name of the release before training in a ledger; those of the rounds: `round_release`.
RELEASE_BEFORE_TRAINING = "before-training"


def round_release(round_number: int) -> str:
    """Name of a round's release in a ledger; rounds count from 0."""
    return f"round-{round_number:04d}"


@dataclass(frozen=True, kw_only=True)
class AdaptiveClipping:
    """The clip norm follows a quantile of the patients' gradient norms (Andrew et al. 2021, arXiv:1905.03871).

    Attributes:
        target_quantile: share of patients that should not be clipped.
        learning_rate: η of the geometric update C ← C exp(-η (unclipped share - target)).
        min_norm: C never falls below.
        max_norm: C never rises above.
        count_noise_multiplier: σ_b, standard deviation of the noise on the count of unclipped patients; the paper
            advises 1/20 of the expected patients per step.
    """

    target_quantile: float
    learning_rate: float
    min_norm: float
    max_norm: float
    count_noise_multiplier: float

    def __post_init__(self) -> None:
        for field in fields(self):
            require_number(getattr(self, field.name), argument=f"adaptive_clipping.{field.name}")
        for name, value, valid, remedy in (
            ("target_quantile", self.target_quantile, 0 < self.target_quantile < 1, "give a share in (0, 1)"),
            ("learning_rate", self.learning_rate, self.learning_rate > 0, "give a positive rate"),
            ("min_norm", self.min_norm, self.min_norm > 0, "give a positive norm"),
            ("max_norm", self.max_norm, self.max_norm > self.min_norm, f"give more than min_norm = {self.min_norm}"),
            ("count_noise_multiplier", self.count_noise_multiplier, self.count_noise_multiplier > 0, "give > 0"),
        ):
            require(valid, argument=f"adaptive_clipping.{name}", value=value, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class SharedNoise:
    """All sites' sums are added under secure aggregation, and each site gives a share of one noise (Skellam).

    The guarantee then holds against whoever sees the sums over all sites, the model or its samples, and rests on
    secure aggregation and on the honest sites: what a site sends by itself has too little noise.

    Attributes:
        honest_sites: sites in every sum that neither tell their share of the noise nor leave it out.
        dimensions: integers in a step's sum.
        release_dimensions: integers in the release before training; None without one.
    """

    honest_sites: int
    dimensions: int
    release_dimensions: int | None = None

    def __post_init__(self) -> None:
        require_count(self.honest_sites, argument="shared_noise.honest_sites")
        require_count(self.dimensions, argument="shared_noise.dimensions")
        if self.release_dimensions is not None:
            require_count(self.release_dimensions, argument="shared_noise.release_dimensions")


@dataclass(frozen=True, kw_only=True)
class DPConfig:
    """What is wanted of patient-level DP-SGD. Exactly one of ``target_epsilon`` and ``noise_multiplier`` is given.

    Attributes:
        delta: δ; must lie below 1/patients.
        clip_norm: C, bound on the L2 norm of a patient's gradient; with adaptive clipping where it starts.
        sampling_rate: q, probability that a patient takes part in a step.
        steps_per_round: optimizer steps that a site makes in a round.
        rounds: in total.
        draws_per_patient: K draws of (slice, timestep, noise), averaged before the clip; they cost no privacy
            (noise multiplicity, arXiv:2210.09929, sec. 3.2).
        target_epsilon: ε after the last round; σ follows.
        noise_multiplier: σ; ε follows.
        adaptive_clipping: or None for a fixed clip norm.
        release_noise_multiplier: σ of one noisy sum released before training, such as the mean image of DP-FETA
            (arXiv:2504.01395), inside the same budget; None for no release.
        shared_noise: the noise is on the sum over all sites; None if each site's is enough by itself.

    Raises:
        InvalidPlan: an impossible value.
    """

    delta: float
    clip_norm: float
    sampling_rate: float
    steps_per_round: int
    rounds: int
    draws_per_patient: int = 1
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    adaptive_clipping: AdaptiveClipping | None = None
    release_noise_multiplier: float | None = None
    shared_noise: SharedNoise | None = None

    def __post_init__(self) -> None:
        for name in ("delta", "clip_norm", "sampling_rate"):
            require_number(getattr(self, name), argument=name)
        for name in ("steps_per_round", "rounds", "draws_per_patient"):
            require_count(getattr(self, name), argument=name)
        require(0 < self.delta < 1, argument="delta", value=self.delta, remedy="give a value in (0, 1/patients)")
        require(self.clip_norm > 0, argument="clip_norm", value=self.clip_norm, remedy="give a positive norm")
        require(
            0 < self.sampling_rate <= 1, argument="sampling_rate", value=self.sampling_rate, remedy="give q in (0, 1]"
        )
        require(
            (self.target_epsilon is None) != (self.noise_multiplier is None),
            argument="target_epsilon, noise_multiplier",
            value=(self.target_epsilon, self.noise_multiplier),
            remedy="give exactly one of the two",
        )
        for name in ("target_epsilon", "noise_multiplier", "release_noise_multiplier"):
            value = getattr(self, name)
            if value is not None:
                require_number(value, argument=name)
                require(value > 0, argument=name, value=value, remedy="give a positive number")
        adaptive = self.adaptive_clipping
        require(
            adaptive is None or adaptive.min_norm <= self.clip_norm <= adaptive.max_norm,
            argument="clip_norm",
            value=self.clip_norm,
            remedy="give a norm between adaptive_clipping.min_norm and max_norm",
        )
        shared = self.shared_noise
        if shared is not None:
            remedy = "leave it out: the noise is shared over one clip norm"
            require(adaptive is None, argument="adaptive_clipping", value=adaptive, remedy=remedy)
            alike = (self.release_noise_multiplier is None) == (shared.release_dimensions is None)
            remedy = "give both or neither"
            value = (self.release_noise_multiplier, shared.release_dimensions)
            argument = "release_noise_multiplier, shared_noise.release_dimensions"
            require(alike, argument=argument, value=value, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class MembershipCeiling:
    """What no attack can exceed that decides whether one given patient was among a site's patients.

    Attributes:
        tpr_at_1_percent_fpr: true positive rate where one in a hundred non-members is called a member.
        auc: area under the ROC curve.
    """

    tpr_at_1_percent_fpr: float
    auc: float


@dataclass(frozen=True, kw_only=True)
class DPPlan:
    """What runs. Sampler, clipper, noise and accountant all read this; :func:`calibrate` makes it.

    Attributes:
        config: what was wanted.
        patients: N as it is made known: it scales the update and is therefore public. The guarantee does not
            depend on its being exact; a site that hides its count gives a rounded one.
        noise_multiplier: σ that the accountant counts per step.
        epsilon_by_round: ε after each round, at ``config.delta``; the release before training is in all of them.
        accountant: whose bound that is.

    Raises:
        InvalidPlan: δ ≥ 1/patients, or an ε that the events do not have.
    """

    config: DPConfig
    patients: int
    noise_multiplier: float
    epsilon_by_round: tuple[float, ...]
    accountant: Accountant

    def __post_init__(self) -> None:
        require_count(self.patients, argument="patients")
        require(
            self.config.delta * self.patients < 1,
            argument="delta",
            value=self.config.delta,
            remedy=f"give less than 1/patients = {1 / self.patients:.3g}: a mechanism that publishes one patient "
            "in the clear has δ = 1/patients",
        )
        require_number(self.noise_multiplier, argument="noise_multiplier")
        wanted = self.config.noise_multiplier
        require(
            self.noise_multiplier > 0 and wanted in (None, self.noise_multiplier),
            argument="noise_multiplier",
            value=self.noise_multiplier,
            remedy=f"the configuration says {wanted}",
        )
        adaptive = self.config.adaptive_clipping
        require(
            adaptive is None or 2 * adaptive.count_noise_multiplier > self.noise_multiplier,
            argument="adaptive_clipping.count_noise_multiplier",
            value=adaptive and adaptive.count_noise_multiplier,
            remedy=f"give more than σ/2 = {self.noise_multiplier / 2:.3g}: the count alone spends the budget",
        )
        by_round = self.epsilon_by_round
        require(
            len(by_round) == self.config.rounds and list(by_round) == sorted(by_round),
            argument="epsilon_by_round",
            value=by_round,
            remedy=f"give {self.config.rounds} values that do not fall",
        )
        spent = epsilon(self.events(self.config.rounds), self.config.delta)
        require(
            self.accountant == spent.accountant and abs(self.epsilon - spent.epsilon) <= EPSILON_TOLERANCE,
            argument="epsilon",
            value=self.epsilon,
            remedy=f"these events cost {spent.epsilon:.4f} by {spent.accountant}: calibrate again",
        )
        target = self.config.target_epsilon
        require(
            target is None or self.epsilon <= target,
            argument="epsilon",
            value=self.epsilon,
            remedy=f"the target is {target}: calibrate again",
        )

    @property
    def epsilon(self) -> float:
        """ε after the last round, at ``config.delta``."""
        return self.epsilon_by_round[-1]

    @property
    def total_steps(self) -> int:
        """Steps over all rounds."""
        return self.config.rounds * self.config.steps_per_round

    @property
    def expected_patients(self) -> float:
        """qN, the expected patients of a step, by which the noisy sum is divided."""
        return self.config.sampling_rate * self.patients

    @property
    def gradient_noise_multiplier(self) -> float:
        """σ of the noise on the gradients: above ``noise_multiplier`` where the clip norm's count takes a share.

        σ_Δ = (σ⁻² - (2σ_b)⁻²)^(-1/2), arXiv:1905.03871, thm 1.
        """
        adaptive = self.config.adaptive_clipping
        if adaptive is None:
            return self.noise_multiplier
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * adaptive.count_noise_multiplier) ** -2)

    @property
    def round_event(self) -> MechanismEvent:
        """What one round is charged."""
        return _steps(self.config, self.noise_multiplier, self.config.steps_per_round)

    @property
    def release_event(self) -> GaussianRelease | SampledSkellam | None:
        """What the release before training is charged, if there is one."""
        return _release(self.config)

    def releases(self) -> dict[str, MechanismEvent]:
        """Every release of the plan by its name, in order: what a site's ledger sets aside before training."""
        rounds: dict[str, MechanismEvent] = {
            round_release(number): self.round_event for number in range(self.config.rounds)
        }
        return rounds if self.release_event is None else {RELEASE_BEFORE_TRAINING: self.release_event, **rounds}

    def events(self, rounds: int) -> tuple[MechanismEvent, ...]:
        """What has happened after so many rounds.

        Raises:
            PlanExhausted: more rounds than the plan has.
        """
        if not 0 <= rounds <= self.config.rounds:
            raise PlanExhausted(argument="rounds", value=rounds, remedy=f"the plan has {self.config.rounds}")
        return _events(self.config, self.noise_multiplier, rounds)

    def membership_ceiling(self) -> MembershipCeiling:
        """Bound every membership attack, from the whole privacy curve and not from the one pair (ε, δ).

        Each (ε, δ) of the curve bounds the ROC curve: TPR ≤ e^ε FPR + δ and 1 - FPR ≤ e^ε (1 - TPR) + δ
        (Kairouz et al. 2015, arXiv:1311.0776, thm 2.1). The least of all is concave, so the midpoint rule bounds
        its area from above.
        """
        deltas = sorted({self.config.delta, *CURVE_DELTAS})
        curve = _curve(self.events(self.config.rounds), deltas)
        cells = 2000
        area = sum(_highest_tpr((i + 0.5) / cells, curve) for i in range(cells)) / cells
        return MembershipCeiling(tpr_at_1_percent_fpr=_highest_tpr(0.01, curve), auc=area)

    def describe(self) -> str:
        """The dry run: what will happen and what it costs, for people."""
        config, ceiling = self.config, self.membership_ceiling()
        lines = [
            f"Patient-level differential privacy: (ε, δ) = ({self.epsilon:.3f}, {config.delta:g}) "
            f"after {config.rounds} rounds, bound by the {self.accountant.upper()} accountant",
            f"  neighbouring data sets   {NEIGHBOURS}",
            f"  holds against            {_seen(config)}; N = {self.patients} and this plan are public",
            f"  noise multiplier σ       {self.noise_multiplier:.4f}"
            + (f" (on gradients {self.gradient_noise_multiplier:.4f})" if config.adaptive_clipping else ""),
            f"  clip norm C              {config.clip_norm:g}"
            + (" to start with, then adaptive" if config.adaptive_clipping else ""),
            f"  patients per step        q N = {config.sampling_rate:g} · {self.patients} = {self.expected_patients:g} "
            f"expected, {config.draws_per_patient} draws each",
            f"  steps                    {config.steps_per_round} a round, {self.total_steps} in total",
        ]
        if self.release_event is not None:
            lines.append(f"  before training          one noisy sum with σ = {self.release_event.noise_multiplier:g}")
        lines += [
            "  ε by round               " + " ".join(f"{value:.3f}" for value in self.epsilon_by_round),
            f"  membership ceiling       TPR ≤ {ceiling.tpr_at_1_percent_fpr:.3f} at FPR 1 %, AUC ≤ {ceiling.auc:.3f}, "
            "for any attack on one patient (from the privacy curve)",
            "  not covered              a patient scanned at two sites counts at both: the guarantees compose, "
            f"with equal plans to (ε, δ) = ({2 * self.epsilon:.3f}, {2 * config.delta:g})",
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_json` gives an equal plan back."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DPPlan:
        """Build from plain JSON types. ε is computed anew, so that an edited plan is refused.

        Raises:
            InvalidPlan: an unknown, missing or impossible value.
        """
        fields_of_plan = dict(values)
        try:
            config = dict(fields_of_plan.pop("config"))
            if config.get("shared_noise") is not None:
                config["shared_noise"] = SharedNoise(**config["shared_noise"])
            if config.get("adaptive_clipping") is not None:
                config["adaptive_clipping"] = AdaptiveClipping(**config["adaptive_clipping"])
            by_round = tuple(float(value) for value in fields_of_plan.pop("epsilon_by_round"))
            return cls(config=DPConfig(**config), epsilon_by_round=by_round, **fields_of_plan)
        except (KeyError, TypeError) as error:
            remedy = "give what to_json wrote"
            raise InvalidPlan(argument="plan", value=type(error).__name__, remedy=remedy) from error

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def calibrate(config: DPConfig, *, patients: int) -> DPPlan:
    """Find the least noise that keeps the target, and what it costs by round.

    Args:
        config: what is wanted.
        patients: N, as :attr:`DPPlan.patients`.

    Raises:
        InvalidPlan: δ ≥ 1/patients, or adaptive clipping whose count alone spends the budget.
        Unreachable: the release before training alone costs more than the target.
    """
    require_count(patients, argument="patients")
    sigma = config.noise_multiplier if config.noise_multiplier is not None else _least_sigma(config)
    spent = [row[0] for row in epsilons([_events(config, sigma, r + 1) for r in range(config.rounds)], [config.delta])]
    # The discretised bound may fall by a rounding error where a round costs next to nothing; a maximum stays a bound.
    by_round = [max(s.epsilon for s in spent[: r + 1]) for r in range(config.rounds)]
    return DPPlan(
        config=config,
        patients=patients,
        noise_multiplier=sigma,
        epsilon_by_round=tuple(by_round),
        accountant=spent[-1].accountant,
    )


def _events(config: DPConfig, sigma: float, rounds: int) -> tuple[MechanismEvent, ...]:
    """The release, if any, and so many rounds at σ."""
    release = _release(config)
    events: list[MechanismEvent] = [] if release is None else [release]
    if rounds:
        events.append(_steps(config, sigma, rounds * config.steps_per_round))
    return tuple(events)


def _steps(config: DPConfig, sigma: float, steps: int) -> MechanismEvent:
    shared, rate = config.shared_noise, config.sampling_rate
    if shared is None:
        return SampledGaussian(sampling_rate=rate, noise_multiplier=sigma, steps=steps)
    return _skellam(rate, sigma, shared.dimensions, steps)


def _release(config: DPConfig) -> GaussianRelease | SampledSkellam | None:
    sigma, shared = config.release_noise_multiplier, config.shared_noise
    if sigma is None:
        return None
    if shared is None or shared.release_dimensions is None:
        return GaussianRelease(noise_multiplier=sigma)
    return _skellam(1.0, sigma, shared.release_dimensions, 1)


def _skellam(rate: float, sigma: float, dimensions: int, steps: int) -> SampledSkellam:
    return SampledSkellam(
        sampling_rate=rate,
        noise_variance=(sigma * GRID_UNITS_PER_CLIP_NORM) ** 2,
        clip=GRID_UNITS_PER_CLIP_NORM,
        dimensions=dimensions,
        steps=steps,
    )


def _seen(config: DPConfig) -> str:
    shared = config.shared_noise
    if shared is None:
        return "whoever sees this site's updates, the model or its samples"
    return (
        "whoever sees the sums over all sites, the model or its samples, and does not know the noise of "
        f"{shared.honest_sites} sites in each sum"
    )


def _curve(events: tuple[MechanismEvent, ...], deltas: Sequence[float]) -> list[tuple[float, float]]:
    """(ε, δ) wherever there is a finite ε; every point that is left out only loosens what is read from the curve."""
    try:
        return [(s.epsilon, d) for s, d in zip(epsilons([events], deltas)[0], deltas, strict=True)]
    except InvalidPlan:
        curve = []
        for delta in deltas:
            with suppress(InvalidPlan):
                curve.append((epsilon(events, delta).epsilon, delta))
        return curve


def _least_sigma(config: DPConfig) -> float:
    """Least σ, to :data:`SIGMA_PRECISION`, whose ε is at most the target: bisection on the accountant itself."""
    target = config.target_epsilon
    assert target is not None  # noqa: S101 - the configuration has one or the other

    def spent(sigma: float) -> Spent:
        try:
            return epsilon(_events(config, sigma, config.rounds), config.delta)
        except InvalidPlan:  # so little noise that no finite cost is proven
            return Spent(epsilon=math.inf, accountant="rdp")

    high = 1.0
    while spent(high).epsilon > target:
        high *= 2
        if high > 1e6:
            raise Unreachable(
                argument="target_epsilon",
                value=target,
                remedy="raise it, or release_noise_multiplier: no noise on the steps is enough",
            )
    low = high / 2
    while spent(low).epsilon <= target:
        low, high = low / 2, low
    while high / low > 1 + SIGMA_PRECISION:
        middle = math.sqrt(low * high)
        if spent(middle).epsilon <= target:
            high = middle
        else:
            low = middle
    return high


def _highest_tpr(fpr: float, curve: list[tuple[float, float]]) -> float:
    bounds = (
        min(math.exp(min(epsilon, 700.0)) * fpr + delta, 1 - math.exp(-epsilon) * (1 - delta - fpr))
        for epsilon, delta in curve
    )
    return max(fpr, min(1.0, *bounds))
