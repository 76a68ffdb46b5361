"""What an audit does; the same on one machine and in a federated job."""

from __future__ import annotations

from dataclasses import dataclass

from custom.strict import require


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """How hard an audit tries.

    Attributes:
        model: in a job, name of the experiment whose newest completed run on the server is audited.
        seeds: of splits and noise, at least three.
        noise_levels: timesteps at which the model is asked, as shares of the schedule's T.
        patients: most members, and most held-outs, of each site; None takes all. They are drawn by a hash.
        images_per_patient: most images of each.
        reference_steps: gradient steps of each of the two reference models; 0 leaves calibrated attacks out.
        control_steps: gradient steps of a turn in which the positive control is overfitted; it takes up to six turns.
        gradient_levels: as ``noise_levels``, for gradient norms; empty leaves white-box attacks out.
        embedding_steps: gradient steps of the embedding in which copies are looked for.
        samples: samples that are screened for copies; 0 screens none.
    """

    model: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    noise_levels: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3)
    patients: int | None = None
    images_per_patient: int = 4
    reference_steps: int = 300
    control_steps: int = 300
    gradient_levels: tuple[float, ...] = (0.05, 0.2)
    embedding_steps: int = 1000
    samples: int = 96

    def __post_init__(self) -> None:
        distinct = len(set(self.seeds)) == len(self.seeds) >= 3
        require(distinct, argument="audit.seeds", value=self.seeds, remedy="give at least three different ones")
        for name, most in (("noise_levels", 0.9), ("gradient_levels", 0.9)):
            levels = getattr(self, name)
            rising = list(levels) == sorted(set(levels)) and all(0 < level <= most for level in levels)
            require(rising, argument=f"audit.{name}", value=levels, remedy=f"give ascending shares in (0, {most}]")
        require(len(self.noise_levels) > 0, argument="audit.noise_levels", value=(), remedy="give at least one")
        most_patients = self.patients
        enough = most_patients is None or most_patients >= 4
        require(enough, argument="audit.patients", value=most_patients, remedy="give at least 4, or null for all")
        for name, least in (
            ("images_per_patient", 1),
            ("reference_steps", 0),
            ("control_steps", 1),
            ("embedding_steps", 1),
            ("samples", 0),
        ):
            value = getattr(self, name)
            require(value >= least, argument=f"audit.{name}", value=value, remedy=f"give at least {least}")
