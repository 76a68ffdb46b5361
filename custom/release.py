"""A model, or samples of it, leaves: only with an audit of that very model that every site's policy accepts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load

from custom.audit_evidence import claimed_privacy, model_identity
from custom.drawing import draw
from custom.export import NOMINAL_MM, export_samples
from custom.model_card import model_card
from custom.model_file import ModelFile
from custom.run_folder import file_sha256
from privacy.audit.decision import Decision, Verdict, decide
from privacy.audit.evidence import Evidence
from privacy.audit.policy import AuditPolicy
from privacy.audit.report.document import Audit, write_json
from privacy.errors import PrivacyError

Form = Literal["weights", "dicom"]

WORST_FIRST: tuple[Verdict, ...] = ("INVALID", "RED", "AMBER", "GREEN")


class ReleaseRefused(PrivacyError):
    """What keeps a model from being released."""


def check_release(
    evidence: Evidence,
    *,
    model_sha256: str,
    config_sha256: str,
    sites: Mapping[str, tuple[str, AuditPolicy]],
) -> None:
    """Let a release pass, or raise.

    Args:
        evidence: of the audit; the verdict is reached anew, by each site's own cut-offs.
        model_sha256: of the file that would be released.
        config_sha256: of its experiment.
        sites: by name the hash of the site's manifest as its data is today, and its policy.

    Raises:
        ReleaseRefused: an audit of another model, of other patients or of fewer sites; a site whose patients the audit
            covers and who is not asked; or a verdict that a site does not accept.
    """
    model = evidence.model
    for argument, theirs, ours in (
        ("audit: model_sha256", model.model_sha256, model_sha256),
        ("audit: config_sha256", model.config_sha256, config_sha256),
    ):
        remedy = f"the model's is {ours}; audit this very model"
        _demand(theirs == ours, argument, theirs, remedy)
    _demand(bool(sites), "--site", sorted(sites), "name every site that the audit covers")
    covered = {c.site: {d.manifest_sha256 for d in evidence.cohorts if d.site == c.site} for c in evidence.cohorts}
    unknown = [site for site, manifests in covered.items() if "" in manifests]
    remedy = "its counts were summed under masks, so no manifest is known; run fedct audit where the patients are"
    _demand(not unknown, "audit: manifest_sha256", unknown, remedy)
    missing = sorted(set(sites) - set(covered))
    _demand(not missing, "--site", missing, "the audit does not cover their patients; audit the model with them")
    unasked = sorted(set(covered) - set(sites))
    _demand(not unasked, "--site", sorted(sites), f"the model knows patients of {unasked}, too; name every site")
    for site, (manifest, policy) in sites.items():
        remedy = f"the data of {site} are others today than those that were audited; audit the model again"
        _demand(covered[site] == {manifest}, "audit: manifest_sha256", sorted(covered[site]), remedy)
        decision = decide(evidence, policy.rule)
        remedy = f"no policy can accept it: {decision.sentence}"
        _demand(decision.verdict != "INVALID", "verdict", decision.verdict, remedy)
        remedy = f"{site} accepts {list(policy.accept)} by its own cut-offs: {decision.sentence}"
        _demand(decision.verdict in policy.accept, "verdict", decision.verdict, remedy)


def release(
    model: ModelFile,
    file: Path,
    audit: Audit,
    out: Path,
    *,
    sites: Mapping[str, tuple[str, AuditPolicy]],
    form: Form,
    count: int,
    device: torch.device,
    progress: bool = False,
) -> list[int]:
    """Write the folder of a release, all of it or nothing.

    Args:
        model: as loaded from ``file``.
        file: model.safetensors.
        audit: of it.
        out: must not exist yet.
        sites: as in :func:`check_release`.
        form: ``weights``, or ``dicom`` for a synthetic set.
        count: samples of a synthetic set, before those are withheld that the audit names.
        device: where to compute.
        progress: show a bar on stderr.

    Returns:
        Samples that were withheld, ascending.

    Raises:
        ReleaseRefused: as :func:`check_release`; a checkpoint; a model that is not what the file holds; an audit that
            says of the model what it is not; a file that changes meanwhile; or samples that were not screened.
    """
    _demand(not out.exists(), "out", str(out), "choose a folder that is new")
    sha256 = file_sha256(file)
    check_release(audit.evidence, model_sha256=sha256, config_sha256=model.experiment.sha256, sites=sites)
    _demand_finished(model, file)
    _demand_loaded(model, file, sha256)
    _demand_true_claims(model, sha256, audit.evidence)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        withheld: list[int] = []
        if form == "weights":
            shutil.copyfile(file, part / "model.safetensors")
            remedy = "it was changed while it was copied; try again"
            _demand(file_sha256(part / "model.safetensors") == sha256, "model", file.name, remedy)
        else:
            withheld = _write_samples(model, audit.evidence, part / "samples", count, device, progress)
        write_json(part / "audit.json", audit)
        (part / "audit.json").chmod(0o644)  # it may leave, unlike a site's own
        strictest = _strictest(audit, sites)
        card = model_card(model, audit, strictest=strictest, form=form, withheld=len(withheld))
        (part / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        receipt = {
            "version": 1,
            "form": form,
            "sites": sorted(sites),
            "withheld": withheld,
            "files": {
                path.relative_to(part).as_posix(): file_sha256(path)
                for path in sorted(part.rglob("*"))
                if path.is_file()
            },
        }
        (part / "release.json").write_text(json.dumps(receipt, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        part.replace(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return withheld


def _write_samples(
    model: ModelFile, evidence: Evidence, folder: Path, count: int, device: torch.device, progress: bool
) -> list[int]:
    screened = min((copies.samples for copies in evidence.copies), default=0)
    _demand(screened > 0, "audit: copies", 0, "no samples were screened; audit with samples above 0")
    remedy = f"the audit screened samples 0 … {screened - 1}; ask for fewer, or audit more"
    _demand(1 <= count <= screened, "--count", count, remedy)
    withheld = sorted({sample for copies in evidence.copies for sample in copies.withhold if sample < count})
    _demand(len(withheld) < count, "--count", count, "every one of them is withheld as too close to a patient")
    images = draw(model, count=count, device=device, progress=progress).copy()
    images[withheld] = -1.0  # blank, so that none of them is ever on disk
    preprocess = model.experiment.preprocess
    # All are exported and the blank ones removed, so that names and DerivationDescription give a sample's true index.
    export_samples(
        images,
        folder,
        format="dicom",
        window_hu=preprocess.window_hu,
        spacing_mm=preprocess.spacing_mm or NOMINAL_MM,
        seed=model.experiment.seed,
    )
    for index in withheld:
        shutil.rmtree(folder / f"sample_{index:04d}")
    return withheld


def _demand_finished(model: ModelFile, file: Path) -> None:
    """A checkpoint holds what no audit attacks: the weights before averaging, and the server's optimiser."""
    averaged = all(torch.equal(tensor, model.ema[name]) for name, tensor in model.weights.items())
    remedy = "it is a checkpoint; give the model.safetensors of a completed run, and its audit"
    _demand(averaged and not model.optimizer, "model", file.name, remedy)


def _demand_loaded(model: ModelFile, file: Path, sha256: str) -> None:
    """Samples are drawn from the model in memory, and the audit knows the file by its hash."""
    content = file.read_bytes()
    held = load(content)
    same = held.keys() == model.ema.keys() and all(torch.equal(held[name], model.ema[name]) for name in held)
    remedy = "the file was changed after it was loaded; try again"
    _demand(same and hashlib.sha256(content).hexdigest() == sha256, "model", file.name, remedy)


def _demand_true_claims(model: ModelFile, model_sha256: str, evidence: Evidence) -> None:
    """What the audit says of the model beside its hashes, above all ε, must be so: the card repeats it."""
    remedy = "the model itself says otherwise; audit it again"
    _demand(evidence.model == model_identity(model, model_sha256), "audit: model", evidence.model.experiment, remedy)
    said = evidence.privacy
    bounds, commitment = ((), None) if said is None else (said.lower_bounds, said.commitment)
    claimed = claimed_privacy(model, lower_bounds=bounds, commitment=commitment)
    _demand(said == claimed, "audit: privacy", None if said is None else said.epsilon, remedy)


def _strictest(audit: Audit, sites: Mapping[str, tuple[str, AuditPolicy]]) -> Decision:
    """The worst verdict, by the audit's own rule or a site's; the audit's own if none is worse."""
    decisions = [audit.decision, *(decide(audit.evidence, policy.rule) for _, policy in sites.values())]
    return min(decisions, key=lambda decision: WORST_FIRST.index(decision.verdict))


def _demand(holds: bool, argument: str, value: object, remedy: str) -> None:
    if not holds:
        raise ReleaseRefused(argument=argument, value=value, remedy=remedy)
