"""What a site demands before a job may train on its patients; the site writes it and no job can change it.

Every rule is a floor under privacy: a job may ask for more, never for less. δ and ε are those of patient-level
differential privacy: two data sets are neighbours if one has a patient, with all scans, whom the other lacks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from privacy.errors import PrivacyError, require, require_count, require_number
from privacy.plan import DPPlan
from privacy.secagg.rules import Floor, Rules

# Every rule that can refuse a job, as PolicyRefused.rule names it.
RULES = (
    "required",
    "secure_aggregation.required",
    "secure_aggregation.peers",
    "secure_aggregation.min_survivors",
    "secure_aggregation.colluding_sites",
    "shared_noise",
    "budgets.per_job.epsilon",
    "budgets.per_job.delta",
    "budgets.total.delta",
    "min_patients",
    "max_rounds",
    "min_noise_multiplier",
    "max_clip_norm",
    "may_leave",
)


class PolicyRefused(PrivacyError):
    """A job asks for less privacy than the site demands.

    Args:
        rule: the rule of the policy, as its attribute is called.
        value: what the job asks for.
        limit: what the site demands.
        remedy: what to do next.
    """

    def __init__(self, *, rule: str, value: object, limit: object, remedy: str) -> None:
        super().__init__(argument=rule, value=value, remedy=f"the site's policy is {limit}: {remedy}")
        self.rule = rule
        self.limit = limit


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A ceiling on (ε, δ) of the patient.

    Attributes:
        epsilon: positive.
        delta: between 0 and 1, and below 1 / patients when it is applied.

    Raises:
        InvalidPlan: an impossible value (a ValueError).
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        for argument, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            require_number(value, argument=argument)
            require(value > 0, argument=argument, value=value, remedy="give a positive number")
        require(self.delta < 1, argument="delta", value=self.delta, remedy="give a number below 1 / patients")


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """The site's ceilings.

    Attributes:
        per_job: for all runs of one job together.
        total: for everything that the site ever releases under its ledger.

    Raises:
        InvalidPlan: a job that may spend more than the total (a ValueError).
    """

    per_job: Budget
    total: Budget

    def __post_init__(self) -> None:
        for argument in ("epsilon", "delta"):
            one, all_jobs = getattr(self.per_job, argument), getattr(self.total, argument)
            remedy = f"lower it: the total of all jobs is {all_jobs:g}"
            require(one <= all_jobs, argument=f"per_job.{argument}", value=one, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class PrivacyPolicy:
    """The site's demands.

    Attributes:
        required: refuse training without differential privacy.
        budgets: what may be spent; the ledger holds every release against them.
        min_patients: a job that trains on fewer is refused.
        max_rounds: each round is a release; None sets no limit.
        min_noise_multiplier: floor under σ of the steps and of the release before training.
        max_clip_norm: ceiling on the steps' C, with adaptive clipping on the highest it can reach; None sets no limit.
            At a given σ it changes no ε: it bounds how far one patient moves the model, noise or not.
        may_leave: names of the statistics that may leave beside the model update.
        shared_noise: let a job count the noise that other sites add to a sum under secure aggregation: what this site
            sends then has too little noise by itself.
        secure_aggregation: with whom this site sums under masks and on which terms, and whether nothing else may leave;
            None lets no job do so.

    Raises:
        InvalidPlan: an impossible value (a ValueError).
    """

    required: bool
    budgets: Budgets
    min_patients: int = 2
    max_rounds: int | None = None
    min_noise_multiplier: float = 0.0
    max_clip_norm: float | None = None
    may_leave: tuple[str, ...] = ()
    shared_noise: bool = False
    secure_aggregation: Floor | None = None

    def __post_init__(self) -> None:
        require_count(self.min_patients, argument="min_patients")
        if self.max_rounds is not None:
            require_count(self.max_rounds, argument="max_rounds")
        noise = self.min_noise_multiplier
        require_number(noise, argument="min_noise_multiplier")
        require(noise >= 0, argument="min_noise_multiplier", value=noise, remedy="give 0 or a positive number")
        if self.max_clip_norm is not None:
            require_number(self.max_clip_norm, argument="max_clip_norm")
            remedy = "give a positive number or none"
            require(self.max_clip_norm > 0, argument="max_clip_norm", value=self.max_clip_norm, remedy=remedy)
        names = type(self.may_leave) is tuple and all(type(name) is str and name for name in self.may_leave)
        require(names, argument="may_leave", value=self.may_leave, remedy="give a tuple of names")

    def check(
        self,
        plan: DPPlan | None,
        *,
        patients: int,
        rounds: int,
        leaves: Collection[str],
        secure_aggregation: Rules | None = None,
    ) -> None:
        """Let a job pass before it trains, or raise.

        Args:
            plan: the job's calibrated plan; None for a job without differential privacy.
            patients: number of patients it would train on, exactly.
            rounds: number of rounds it asks for.
            leaves: names of the statistics it would send beside the update.
            secure_aggregation: the job's rules; None for a job that sends its updates without masks.

        Raises:
            PolicyRefused: naming the rule, the job's value, the site's limit and the remedy. What earlier jobs spent
                is the ledger's to know: see :meth:`privacy.ledger.Ledger.reserve`.
        """
        private = plan is not None or not self.required
        remedy = "give the job its block for differential privacy"
        _demand(private, "required", "no differential privacy", "differential privacy is required", remedy)
        self.check_masks(secure_aggregation)
        _at_least("min_patients", patients, self.min_patients, "add patients")
        if self.max_rounds is not None:
            _at_most("max_rounds", rounds, self.max_rounds, "ask for fewer rounds")
        self._check_leaves(leaves)
        if plan is not None:
            self._check_plan(plan, patients)

    def check_audit(self, *, patients: int, leaves: Collection[str], secure_aggregation: Rules | None = None) -> None:
        """Let a federated audit pass before it scores a patient, or raise; nothing is trained in one.

        Args:
            patients: number of patients whom it would attack, exactly.
            leaves: names of the statistics it would send, without noise.
            secure_aggregation: the job's rules; None for one that sends without masks.

        Raises:
            PolicyRefused: as :meth:`check`.
        """
        self.check_masks(secure_aggregation)
        _at_least("min_patients", patients, self.min_patients, "add patients")
        self._check_leaves(leaves)

    def _check_leaves(self, leaves: Collection[str]) -> None:
        extra = sorted(set(leaves) - set(self.may_leave))
        _demand(not extra, "may_leave", extra, f"only {sorted(self.may_leave)}", "turn the others off in the job")

    def check_masks(self, rules: Rules | None) -> None:
        """Let a job pass for its secure aggregation, or for its lack of it, or raise; part of :meth:`check`.

        Raises:
            PolicyRefused: naming the rule.
        """
        floor = self.secure_aggregation
        if rules is None:
            remedy = "give the job its block for secure aggregation, and the controller that goes with it"
            free = floor is None or not floor.required
            _demand(
                free, "secure_aggregation.required", "no secure aggregation", "secure aggregation is required", remedy
            )
            return
        remedy = "the site must name all sites that it sums with"
        _demand(floor is not None, "secure_aggregation.peers", "secure aggregation", "no peers are named", remedy)
        for name in ("min_survivors", "colluding_sites"):
            least = getattr(floor, name)
            _at_least(f"secure_aggregation.{name}", getattr(rules, name), least, "raise it in the job")

    def _check_plan(self, plan: DPPlan, patients: int) -> None:
        config, per_job, total = plan.config, self.budgets.per_job, self.budgets.total
        alone = config.shared_noise is None or self.shared_noise
        remedy = "let each site's noise be enough by itself (privacy.dp = local)"
        _demand(alone, "shared_noise", "one noise for all sites", "no reliance on other sites' noise", remedy)
        remedy = "the site must lower it below 1 / patients: above, publishing one patient whole would keep it"
        _demand(total.delta * patients < 1, "budgets.total.delta", f"{patients} patients", f"{total.delta:g}", remedy)
        _at_most("budgets.per_job.delta", config.delta, per_job.delta, "lower the job's delta")
        remedy = "ask for a smaller epsilon, fewer steps or a lower sampling rate"
        _at_most("budgets.per_job.epsilon", plan.epsilon, per_job.epsilon, remedy)
        if self.max_rounds is not None:
            _at_most("max_rounds", config.rounds, self.max_rounds, "plan fewer rounds")
        for event in plan.events(config.rounds):
            remedy = "add noise: ask for a smaller epsilon or a larger noise multiplier"
            _at_least("min_noise_multiplier", event.noise_multiplier, self.min_noise_multiplier, remedy)
        if self.max_clip_norm is not None:
            adaptive = config.adaptive_clipping
            highest = config.clip_norm if adaptive is None else adaptive.max_norm
            _at_most("max_clip_norm", highest, self.max_clip_norm, "lower the job's clip_norm or its max_norm")


def _at_most(rule: str, value: float, limit: float, remedy: str) -> None:
    _demand(value <= limit, rule, value, f"at most {limit:g}", remedy)


def _at_least(rule: str, value: float, limit: float, remedy: str) -> None:
    _demand(value >= limit, rule, value, f"at least {limit:g}", remedy)


def _demand(holds: bool, rule: str, value: object, limit: object, remedy: str) -> None:
    """Raise unless the comparison held; NaN holds in none, and so is refused."""
    if not holds:
        raise PolicyRefused(rule=rule, value=value, limit=limit, remedy=remedy)
