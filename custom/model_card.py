"""MODEL_CARD.md: what travels with a released model or with samples of it."""

from __future__ import annotations

from typing import Literal

from custom.model_file import ModelFile
from privacy.audit.decision import Decision
from privacy.audit.report.annex import LIMITS
from privacy.audit.report.document import Audit

_WHAT = {
    "weights": "The weights of a diffusion model of CT images (`model.safetensors`, its configuration inside).",
    "dicom": "Synthetic CT {images} drawn from a diffusion model (`samples/`, DICOM, marked as SyntheticData). They "
    "are no patient's scans.",
}


def model_card(
    model: ModelFile, audit: Audit, *, strictest: Decision, form: Literal["weights", "dicom"], withheld: int
) -> str:
    """The card, which says nothing of the patients that audit.json does not say.

    Args:
        model: that is released.
        audit: of it.
        strictest: the worst verdict by the audit's cut-offs and by each site's.
        form: in which.
        withheld: samples that were left out.
    """
    evidence, decision, experiment = audit.evidence, audit.decision, model.experiment
    patients = "\n".join(f"- {c.site}: {c.members} patients were among the audited members" for c in evidence.cohorts)
    worse = ""
    if strictest.verdict != decision.verdict:
        worse = (
            f"\nBy the cut-offs of a site below it is **{strictest.verdict}**, which this site accepts. "
            f"{strictest.sentence}\n\n{_reasons(strictest)}\n"
        )
    claimed = "no differential privacy: no bound holds for any patient"
    if evidence.privacy is not None:
        claimed = f"ε = {evidence.privacy.epsilon:.2f}, δ = {evidence.privacy.delta:g}, for a patient of one site"
    left_out = (
        "\nFrom weights nothing can be withheld: whoever has them can draw every sample, the too close ones too.\n"
    )
    if form == "dicom":
        left_out = f"\n{withheld} samples were withheld because they are too close to a patient.\n"
    preprocess = experiment.preprocess
    size = "×".join([str(preprocess.size)] * preprocess.spatial_dims)
    low, high = preprocess.window_hu
    images, unit, lengths = "slices", "pixels", "every body is scaled to the frame, so lengths mean nothing"
    if preprocess.spacing_mm is not None:
        voxel = "×".join(f"{mm:g}" for mm in preprocess.spacing_mm)
        images, unit = "volumes", "voxels"
        lengths = (
            f"a voxel is {voxel} mm (D×H×W) and lengths are true: no body is scaled, a volume shows a patch of one"
        )
    return f"""# {experiment.name}

{_WHAT[form].format(images=images)}
{left_out}
## What it is

- {size} {unit}, window {low:g} to {high:g} HU; {lengths}
- trained in {model.rounds_done} rounds over the sites below; no scan left its site
- privacy that is claimed: {claimed}

## Trained on

{patients}

## Use

Meant for research on methods, teaching, and tests of software. Not meant for diagnosis, for any decision about a
patient, or as a stand-in for a population: what the samples show is not how often it occurs.

## Privacy audit

**{decision.verdict}.** {decision.sentence}

{_reasons(decision)}
{worse}
What an audit cannot say:

{chr(10).join(f"- {limit}" for limit in LIMITS)}

## To verify

`release.json` holds the SHA-256 of every file; `audit.json` that of the model ({evidence.model.model_sha256}), of its
configuration ({evidence.model.config_sha256}) and of the sites' manifests. The audit was made with

    {evidence.command}

## Licence

The code is Apache-2.0. The terms for these {"weights" if form == "weights" else "images"} are the sites' to state.
"""


def _reasons(decision: Decision) -> str:
    return "\n".join(f"- {r.verdict}: {r.test}: {r.found} (cut-off: {r.cut_off})" for r in decision.reasons)
