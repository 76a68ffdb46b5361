"""What an audit's evidence says of the model itself, whoever scored it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata

from custom.diffusion.schedule import build_schedule
from custom.job_plan import privacy_plan
from custom.model_file import ModelFile
from privacy.audit.bounds import EpsilonBound
from privacy.audit.evidence import ClaimedPrivacy, ModelIdentity

# What was done in each control, for the report.
EXPLANATIONS = {
    "overfitted": "The model, trained further on a few images of some held-out patients until it knows them by "
    "heart, then attacked: those against as many others.",
    "untrained": "The network before any training, with the same members and held-outs: it cannot remember anyone.",
    "shuffled": "The model itself, with membership dealt out at random among each site's patients.",
}


def model_identity(model: ModelFile, model_sha256: str) -> ModelIdentity:
    """What was attacked."""
    return ModelIdentity(
        experiment=model.experiment.name,
        model_sha256=model_sha256,
        config_sha256=model.experiment.sha256,
        schedule_sha256=build_schedule(model.experiment.schedule).sha256,
        rounds_done=model.rounds_done,
    )


def claimed_privacy(
    model: ModelFile, *, lower_bounds: Sequence[EpsilonBound], commitment: str | None
) -> ClaimedPrivacy | None:
    """What the model's plan claims; None without differential privacy."""
    plan = privacy_plan(model.experiment)
    if plan is None:
        return None
    ceiling = plan.membership_ceiling()
    return ClaimedPrivacy(
        epsilon=plan.epsilon,
        delta=plan.config.delta,
        plan_sha256=plan.sha256,
        ceiling_auc=ceiling.auc,
        ceiling_tpr_at_1_percent=ceiling.tpr_at_1_percent_fpr,
        lower_bounds=tuple(lower_bounds),
        commitment=commitment,
    )


def software() -> tuple[tuple[str, str], ...]:
    """Name and version of what computed an audit."""
    packages = ("fedct", "torch", "monai", "numpy", "scipy", "scikit-learn")
    return (("python", platform.python_version()), *((name, metadata.version(name)) for name in packages))
