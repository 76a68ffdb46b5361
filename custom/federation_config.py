"""The blocks of an experiment that say who takes part, how updates become a model, and what an update is.

All of them are switches of the same executor and controllers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from custom.strict import require


@dataclass(frozen=True, kw_only=True)
class AvailabilityConfig:
    """Which sites are there in a round; for jobs that study a federation whose sites come and go.

    Exactly one of the two is given.

    Attributes:
        probability: with which each site is there, drawn (seeded) for each round; where fewer than
            ``federation.min_responses`` would be, the next ones in the draw are there, too.
        schedule: the sites that are there in round 1, 2, …; begins again after its end.
    """

    probability: float | None = None
    schedule: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        one = (self.probability is None) != (self.schedule is None)
        remedy = "give probability or schedule, and not both"
        require(one, argument="federation.availability", value=self.probability, remedy=remedy)
        if self.probability is not None:
            likely, remedy = 0 < self.probability <= 1, "give a probability in (0, 1]"
            require(likely, argument="federation.availability.probability", value=self.probability, remedy=remedy)
        if self.schedule is not None:
            there = len(self.schedule) > 0 and all(self.schedule)
            remedy = "name at least one site for each round"
            require(there, argument="federation.availability.schedule", value=self.schedule, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class ServerOptimizerConfig:
    """The server's step along the sites' mean difference, as if it were a negative gradient (arXiv:2003.00295).

    Attributes:
        name: ``momentum`` is FedAvgM (arXiv:1909.06335), ``nesterov`` the same with Nesterov's (arXiv:2311.08105),
            ``adam`` is FedAdam.
        learning_rate: of the server; FedAvg is a rate of 1 without momentum.
        momentum: β, or Adam's β₁.
        second_momentum: Adam's β₂.
        epsilon: Adam's, which FedAdam's paper calls τ.
    """

    name: Literal["momentum", "nesterov", "adam"]
    learning_rate: float = 1.0
    momentum: float = 0.9
    second_momentum: float = 0.99
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        for name, least in (("learning_rate", 0.0), ("epsilon", 0.0)):
            value, remedy = getattr(self, name), "give a positive number"
            require(value > least, argument=f"federation.server_optimizer.{name}", value=value, remedy=remedy)
        for name in ("momentum", "second_momentum"):
            value, remedy = getattr(self, name), "give a decay in (0, 1)"
            require(0 < value < 1, argument=f"federation.server_optimizer.{name}", value=value, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class RobustConfig:
    """What keeps some malicious sites from deciding the model.

    Attributes:
        rule: how updates, or under secure aggregation the groups' means, become one: ``mean``, the coordinates'
            ``median`` or ``trimmed_mean`` (arXiv:1803.01498), or ``multi_krum`` (NeurIPS 2017, Blanchard et al.).
        malicious: f, as many updates (or groups) as may be malicious; what is trimmed at each end, and Krum's f.
        clip_norm: L2 norm to which every update is scaled down: by the server, and under secure aggregation by the site
            itself; None leaves it at ``max_update_norm``, beyond which an update is refused.
        groups: under secure aggregation, into how many (seeded) groups the sites of a round are drawn, each with a sum
            of its own; None without.
        reference: whether the server drops an update with which the model's loss on the server's own public images,
            ``reference`` in the server's table, gets worse by more than ``reference_tolerance`` in a band of timesteps.
        reference_tolerance: as a share of the loss.
    """

    rule: Literal["mean", "median", "trimmed_mean", "multi_krum"] = "mean"
    malicious: int = 0
    clip_norm: float | None = None
    groups: int | None = None
    reference: bool = False
    reference_tolerance: float = 0.5

    def __post_init__(self) -> None:
        counted = self.malicious >= 0 and (self.rule in ("mean", "median") or self.malicious > 0)
        remedy = f"give at least {0 if self.rule in ('mean', 'median') else 1} for {self.rule}"
        require(counted, argument="federation.robust.malicious", value=self.malicious, remedy=remedy)
        clipped, remedy = self.clip_norm is None or self.clip_norm > 0, "give a positive norm"
        require(clipped, argument="federation.robust.clip_norm", value=self.clip_norm, remedy=remedy)
        remedy = f"give at least {self.fewest}: a rule over fewer lets one of them decide"
        grouped = self.groups is None or self.groups >= max(2, self.fewest)
        require(grouped, argument="federation.robust.groups", value=self.groups, remedy=remedy)
        remedy = "give a positive share"
        tolerance = self.reference_tolerance
        require(tolerance > 0, argument="federation.robust.reference_tolerance", value=tolerance, remedy=remedy)
        useful = self.rule != "mean" or self.clip_norm is not None or self.reference
        require(useful, argument="federation.robust", value=self.rule, remedy="leave it out: it asks for nothing")

    @property
    def fewest(self) -> int:
        """Updates (or groups) without which the rule means nothing."""
        f = self.malicious
        return {"mean": 1, "median": max(3, 2 * f + 1), "trimmed_mean": 2 * f + 1, "multi_krum": 2 * f + 3}[self.rule]


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Rounds, who takes part, and what the server accepts.

    Attributes:
        rounds: rounds in total, those of an autoencoder included.
        clients_per_round: sites drawn (seeded) for each round; ``None`` draws all.
        min_responses: accepted replies below which a round is void and the run fails.
        round_timeout_s: seconds after which a round goes on without the sites that are silent.
        max_update_norm: bound on the L2 norm of a site's weight difference; a longer one is refused.
        weighting: ``patients`` weights a site by its training patients (the count leaves the site),
            ``uniform`` gives every site the same weight (nothing leaves).
        server_ema: decay per round of the server's exponential moving average of the global model.
        availability: which sites are there in a round; None: all that are connected.
        server_optimizer: of the server's step along the mean difference; None adds it (FedAvg).
        control_variates: SCAFFOLD (arXiv:1910.06378): sites correct their steps by how their drift differs from all
            sites'; an update is twice as long.
        robust: against malicious sites; None: the weighted mean of what passes the checks.
    """

    rounds: int
    clients_per_round: int | None = None
    min_responses: int = 2
    round_timeout_s: int = 3600
    max_update_norm: float = 1000.0
    weighting: Literal["patients", "uniform"] = "patients"
    server_ema: float = 0.0
    availability: AvailabilityConfig | None = None
    server_optimizer: ServerOptimizerConfig | None = None
    control_variates: bool = False
    robust: RobustConfig | None = None

    def __post_init__(self) -> None:
        require(self.rounds >= 1, argument="federation.rounds", value=self.rounds, remedy="give at least 1")
        require(
            self.min_responses >= 1,
            argument="federation.min_responses",
            value=self.min_responses,
            remedy="give at least 1",
        )
        require(
            self.clients_per_round is None or self.clients_per_round >= self.min_responses,
            argument="federation.clients_per_round",
            value=self.clients_per_round,
            remedy=f"draw at least min_responses = {self.min_responses} sites, or null for all",
        )
        require(
            self.round_timeout_s >= 1,
            argument="federation.round_timeout_s",
            value=self.round_timeout_s,
            remedy="give at least 1 second",
        )
        require(
            self.max_update_norm > 0,
            argument="federation.max_update_norm",
            value=self.max_update_norm,
            remedy="give a positive norm",
        )
        require(
            0 <= self.server_ema < 1,
            argument="federation.server_ema",
            value=self.server_ema,
            remedy="give a decay in [0, 1)",
        )
        least, there = self.min_responses, self.availability
        remedy = f"name at least min_responses = {least} sites for each round"
        enough = there is None or there.schedule is None or all(len(set(names)) >= least for names in there.schedule)
        require(enough, argument="federation.availability.schedule", value=there and there.schedule, remedy=remedy)
        fewest = 1 if self.robust is None or self.robust.groups is not None else self.robust.fewest
        remedy = f"give at least {fewest}: federation.robust.rule means nothing over fewer updates"
        require(least >= fewest, argument="federation.min_responses", value=least, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class UpdatesConfig:
    """Rounds that cost fewer bytes. Under secure aggregation the ring takes the whole numbers as they are.

    Attributes:
        parts: patterns (``fnmatch``) of the tensors that leave after a round, one set for each round in turn, such
            as ``[["down_blocks.*", "conv_in.*"], ["up_blocks.*", "out.*"]]``; None sends all in every round. After
            arXiv:2406.12575.
        train: ``sent``: what does not leave rests; ``all``: it is trained too, and waits at the site for its turn, with
            what earlier rounds have made of it.
        bits: of a number in an update; what rounding loses is added to the site's next one (error feedback, after
            arXiv:2407.14730 and arXiv:1901.09847). None sends float32.
    """

    parts: tuple[tuple[str, ...], ...] | None = None
    bits: Literal[4, 8] | None = None
    train: Literal["sent", "all"] = "sent"

    def __post_init__(self) -> None:
        chosen, remedy = self.parts is not None or self.train == "sent", "leave it out without updates.parts"
        require(chosen, argument="updates.train", value=self.train, remedy=remedy)
        useful, remedy = self.parts is not None or self.bits is not None, "leave it out: it asks for nothing"
        require(useful, argument="updates", value=None, remedy=remedy)
        if self.parts is not None:
            filled = len(self.parts) > 0 and all(self.parts)
            require(filled, argument="updates.parts", value=self.parts, remedy="name at least one tensor in each part")


@dataclass(frozen=True, kw_only=True)
class PersonalConfig:
    """A model of its own for every site, made from the global one; it never leaves (docs/heterogeneity.md).

    At most one of ``parts`` and ``below_timestep`` is given; with neither a site's model is the global one, fine-tuned.

    Attributes:
        parts: patterns (``fnmatch``) of the denoiser's tensors that are the site's own after the first rounds.
        below_timestep: the site's own denoiser takes the timesteps below, which the sites then stop to train together.
        shared_rounds: the first so many rounds train and send everything, so that the global model is whole.
        fine_tune_steps: of a site's own model after the last round.
    """

    parts: tuple[str, ...] | None = None
    below_timestep: int | None = None
    shared_rounds: int = 1
    fine_tune_steps: int = 100

    def __post_init__(self) -> None:
        one, remedy = self.parts is None or self.below_timestep is None, "give parts or below_timestep, not both"
        require(one, argument="personal.below_timestep", value=self.below_timestep, remedy=remedy)
        named = self.parts is None or len(self.parts) > 0
        require(named, argument="personal.parts", value=self.parts, remedy="name at least one tensor")
        inside = self.below_timestep is None or self.below_timestep >= 1
        require(inside, argument="personal.below_timestep", value=self.below_timestep, remedy="give at least 1")
        for name in ("shared_rounds", "fine_tune_steps"):
            value, remedy = getattr(self, name), "give at least 1"
            require(value >= 1, argument=f"personal.{name}", value=value, remedy=remedy)

    @property
    def split(self) -> bool:
        """Whether something of the denoiser is the site's own before the end."""
        return self.parts is not None or self.below_timestep is not None
