"""The block of an experiment that asks for differential privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from custom.strict import require
from privacy.plan import AdaptiveClipping


@dataclass(frozen=True, kw_only=True)
class MeanImageConfig:
    """The patients' mean image, released with noise before training; the server warms the network up on it.

    After DP-FETA (arXiv:2504.01395). It is charged like any other release.

    Attributes:
        clip_norm: bound on the L2 norm of a patient's own mean image, air being 0 and the window's top 2.
        noise_multiplier: σ of the release.
        warm_up_steps: of the network on what was released, at the server.
    """

    clip_norm: float
    noise_multiplier: float
    warm_up_steps: int = 300

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("clip_norm", self.clip_norm, self.clip_norm > 0),
            ("noise_multiplier", self.noise_multiplier, self.noise_multiplier > 0),
            ("warm_up_steps", self.warm_up_steps, self.warm_up_steps >= 1),
        ):
            require(valid, argument=f"privacy.mean_image.{name}", value=value, remedy="give a positive number")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Patient-level DP-SGD. Exactly one of ``target_epsilon`` and ``noise_multiplier`` is given.

    Attributes:
        dp: ``local``: each site's noise is enough by itself, against the server too. ``central_secagg``: sites sum
            their clipped gradients under secure aggregation, each with a share of one noise, and the server makes the
            step; a round is one step.
        patients: N as it is made known, the same for all sites: sums over patients are divided by it, so that no
            site's own count leaves. A site with more patients weighs more.
        delta, clip_norm, sampling_rate, draws_per_patient, target_epsilon, noise_multiplier, adaptive_clipping: as in
            :class:`privacy.plan.DPConfig`.
        mean_image: a release before training, inside the same budget; None for none.
        trained: patterns (``fnmatch``) of the names of the parameters that are trained, such as ``*attn*`` or
            ``out.*``; all others keep the weights they start with.
    """

    patients: int
    delta: float
    clip_norm: float
    sampling_rate: float
    draws_per_patient: int = 1
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    adaptive_clipping: AdaptiveClipping | None = None
    mean_image: MeanImageConfig | None = None
    trained: tuple[str, ...] = ("*",)
    dp: Literal["local", "central_secagg"] = "local"

    def __post_init__(self) -> None:
        require(self.patients >= 1, argument="privacy.patients", value=self.patients, remedy="give at least 1")
        require(len(self.trained) > 0, argument="privacy.trained", value=self.trained, remedy="give a pattern")
