"""A whole audit on one machine that holds the sites' images: scores, protocol, controls, copies, evidence."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from custom.audit_config import AuditConfig
from custom.audit_copies import copy_outcome, gallery, screened
from custom.audit_evidence import EXPLANATIONS, claimed_privacy, model_identity, software
from custom.audit_scores import OVERFITTED, SHUFFLED, TARGET, UNTRAINED, Scoreboard, Scorer, population_of
from custom.canary_run import CanaryFindings
from custom.curious_server import CuriousFindings, watch
from custom.drawing import draw
from custom.model_file import ModelFile, load_model
from custom.run_folder import file_sha256
from medical_data.cohort import Cohort
from privacy.audit.blind import blind_test
from privacy.audit.errors import Unattackable
from privacy.audit.evidence import BlindOutcome, CohortIdentity, ControlOutcome, Cost, Evidence
from privacy.audit.memorization import CopyScreen
from privacy.audit.population import Population, joined
from privacy.audit.protocol import assess, control, site_rows
from privacy.audit.report.gallery import Gallery


@dataclass(frozen=True, kw_only=True, eq=False)
class Audited:
    """What an audit on one machine gives.

    Attributes:
        evidence: for everyone who may read the report.
        gallery: for the sites' own eyes; None if no samples were screened.
    """

    evidence: Evidence
    gallery: Gallery | None


def audit_model(
    file: Path,
    cohorts: Mapping[str, Cohort],
    config: AuditConfig,
    *,
    device: torch.device,
    created: str,
    command: str,
    canaries: CanaryFindings | None = None,
    updates: bool = False,
    progress: bool = False,
) -> Audited:
    """Attack a model with the members and held-outs of the sites that trained it.

    Args:
        file: model.safetensors.
        cohorts: by site.
        config: how hard to try.
        device: where to compute.
        created: date, for the report.
        command: to run it again, for the report.
        canaries: what a run with canaries found, if there was one.
        updates: also attack by the updates of a few more rounds, as a curious server could.
        progress: show bars on stderr.

    Raises:
        Overlap: a patient or an image on both sides of the split.
        Unattackable: too few patients, or a model that cannot be scored.
        ConfigError: no such model.
    """
    model = load_model(file)
    population = joined([population_of(cohort, site, config) for site, cohort in cohorts.items()])
    board = Scorer(model, config, device=device, progress=progress).scoreboard(population)
    target = board.groups[TARGET]
    curious = CuriousFindings(scored=(), inversions=())
    if updates:
        curious = watch(model, cohorts, population, config, device=device, progress=progress)
    scored = (*target.scored, *curious.scored)
    attacks, strongest = assess(scored, population, config.seeds)
    blind, blind_cost = _blind(population, config)
    screens, nearest, copy_cost = _copies(model, population, config, device, progress)
    tuning = population.tuning_half(attacks[strongest].outcome.seed)
    member = population.member
    evidence = Evidence(
        created=created,
        command=command,
        software=software(),
        scope="central",
        model=model_identity(model, file_sha256(file)),
        cohorts=tuple(_identity(site, cohort, population) for site, cohort in cohorts.items()),
        tuning_members=int((tuning & member).sum()),
        tuning_held_out=int((tuning & ~member).sum()),
        report_members=int((~tuning & member).sum()),
        report_held_out=int((~tuning & ~member).sum()),
        blind=blind,
        attacks=attacks,
        strongest=strongest,
        controls=_controls(board, config),
        copies=tuple(copy_outcome(screen) for screen in screens),
        inversions=curious.inversions,
        privacy=claimed_privacy(
            model,
            lower_bounds=() if canaries is None else canaries.bounds,
            commitment=None if canaries is None else canaries.commitment,
        ),
        sites=site_rows(scored[strongest], attacks[strongest], population, population.sites),
        costs=(*board.costs, blind_cost, *copy_cost),
    )
    return Audited(evidence=evidence, gallery=nearest)


def _blind(population: Population, config: AuditConfig) -> tuple[BlindOutcome | None, Cost]:
    """None where there are too few patients for it, which makes the audit invalid."""
    started = time.monotonic()
    try:
        found = blind_test(population.images, population.patient, population.member, seed=config.seeds[0])
    except Unattackable:
        return None, Cost(part="blind test", evaluations_per_image=0.0, seconds=time.monotonic() - started)
    outcome = BlindOutcome(patient_auc=found.auc, p_value=found.p_value, confounded=found.confounded, note=found.note)
    return outcome, Cost(part="blind test", evaluations_per_image=0.0, seconds=time.monotonic() - started)


def _controls(board: Scoreboard, config: AuditConfig) -> tuple[ControlOutcome, ...]:
    return tuple(
        control(
            board.groups[name].scored,
            board.groups[name].population,
            config.seeds,
            name=name,
            positive=name == OVERFITTED,
            explanation=EXPLANATIONS[name],
        )
        for name in (OVERFITTED, UNTRAINED, SHUFFLED)
        if name in board.groups
    )


def _copies(
    model: ModelFile, population: Population, config: AuditConfig, device: torch.device, progress: bool
) -> tuple[tuple[CopyScreen, ...], Gallery | None, tuple[Cost, ...]]:
    if not config.samples:
        return (), None, ()
    started = time.monotonic()
    samples = draw(model, count=config.samples, device=device, progress=progress)
    screens = screened(samples, population, config, device=device, progress=progress)
    cost = Cost(part="copy screen", evaluations_per_image=0.0, seconds=time.monotonic() - started)
    return screens, gallery(screens, samples, population), (cost,)


def _identity(site: str, cohort: Cohort, population: Population) -> CohortIdentity:
    index = population.sites.index(site)
    here = population.site == index
    return CohortIdentity(
        site=site,
        manifest_sha256=cohort.manifest_sha256,
        members=int((here & population.member).sum()),
        held_out=int((here & ~population.member).sum()),
        images=int(here[population.patient].sum()),
    )
