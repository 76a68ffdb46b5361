"""What the server of a federated audit makes of the sites' counts: agreements, and at the end the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from custom.audit_counts import (
    APPEARANCES,
    CLOSE,
    CONTROL,
    FLAGGED,
    IMAGES,
    MANIFEST,
    MATCHED,
    MATCHED_SCALE,
    METHODS,
    MOVED,
    P_VALUE,
    P_VALUE_SCALE,
    PATIENTS,
    SHOWN,
    Agreement,
    AttackChoice,
    AttackRanges,
    audit_of,
    column_name,
)
from custom.audit_evidence import EXPLANATIONS, claimed_privacy, model_identity, software
from custom.audit_scores import BLIND, DESCRIPTIONS, OVERFITTED, TARGET, layout
from custom.config import ExperimentConfig
from custom.model_file import ModelFile
from privacy.audit.errors import Unattackable
from privacy.audit.evidence import (
    AttackOutcome,
    BlindOutcome,
    CohortIdentity,
    ControlOutcome,
    CopyOutcome,
    Cost,
    Evidence,
    SiteRow,
    WorstPatients,
)
from privacy.audit.pooling import (
    PooledChoice,
    PooledCounts,
    agreed_range,
    choose_pooled,
    hidden_share,
    pooled_interval,
    pooled_outcome,
    pooled_roc,
    threshold_cell,
)
from privacy.audit.protocol import NEGATIVE_LEVEL, control_of, corrected, median_seed
from privacy.audit.statistics import combined_p

Sums = Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Collected:
    """What the sites sent in one task.

    Attributes:
        sums: over the sites.
        by_site: each site's own; empty under masks.
        sites: who answered.
    """

    sums: Sums
    by_site: Mapping[str, Sums]
    sites: tuple[str, ...]


class PooledAudit:
    """One federated audit at the server.

    Args:
        experiment: of the audit.
        model: that is audited.
        model_sha256: of its file.
    """

    def __init__(self, experiment: ExperimentConfig, model: ModelFile, model_sha256: str) -> None:
        self._experiment, self._model, self._sha256 = experiment, model, model_sha256
        self._config = audit_of(experiment)
        self._layout = layout(self._config, experiment)
        self._tuning: dict[tuple[str, str], list[float]] = {}

    def agree(self, ranges: Sums) -> Agreement:
        """The second grids; raises ``Unattackable`` if the sites counted nobody."""
        agreed = [
            AttackRanges(
                group=group,
                attack=attack,
                ranges=tuple(agreed_range(counts) for counts in ranges[column_name("range", group, attack)]),
            )
            for group, attack in self._columns()
        ]
        return Agreement(ranges=tuple(agreed))

    def choose(self, agreement: Agreement, tuning: Sums) -> Agreement:
        """The same with what the tuning halves decide. A blind classifier's log-odds need no choice."""
        choices = []
        for group, attack in self._columns():
            table = tuning[column_name("tune", group, attack)]
            if group == BLIND:
                found = [(PooledChoice(setting=0, trim=0, sign=1), 0.5)] * len(self._config.seeds)
            else:
                found = [choose_pooled(of_seed) for of_seed in table]
            self._tuning[group, attack] = [area for _, area in found]
            by_seed = tuple(choice for choice, _ in found)
            thresholds = tuple(
                threshold_cell(table[row, choice.setting, choice.trim], choice.sign)
                for row, choice in enumerate(by_seed)
            )
            choices.append(AttackChoice(group=group, attack=attack, by_seed=by_seed, thresholds=thresholds))
        return Agreement(ranges=agreement.ranges, choices=tuple(choices))

    def evidence(
        self,
        agreement: Agreement,
        tuning: Sums,
        report: Collected,
        copies: Collected | None,
        *,
        created: str,
        command: str,
        seconds: float,
    ) -> Evidence:
        """Everything, from the sums of all tasks.

        Raises:
            Unattackable: too few patients in a half.
        """
        sums = report.sums
        outcomes: dict[tuple[str, str], AttackOutcome] = {}
        for chosen in agreement.choices:
            found = self._attack(agreement, chosen, tuning, sums)
            if found is not None:
                outcomes[chosen.group, chosen.attack] = found
        attacks, strongest = corrected([found for (group, _), found in outcomes.items() if group == TARGET])
        held_out, members = (int(count) for count in sums[PATIENTS])
        halves = sums[column_name("patients", TARGET, attacks[strongest].name)][attacks[strongest].reported].sum(axis=1)
        return Evidence(
            created=created,
            command=command,
            software=software(),
            scope="federated",
            model=model_identity(self._model, self._sha256),
            cohorts=self._cohorts(report),
            tuning_members=members - int(halves[1]),
            tuning_held_out=held_out - int(halves[0]),
            report_members=int(halves[1]),
            report_held_out=int(halves[0]),
            blind=self._blind(outcomes.get((BLIND, "blind")), sums),
            attacks=attacks,
            strongest=strongest,
            controls=self._controls(outcomes, sums),
            copies=() if copies is None else self._copies(copies),
            inversions=(),
            privacy=claimed_privacy(self._model, lower_bounds=(), commitment=None),
            sites=self._sites(report, attacks[strongest]),
            costs=(Cost(part="all tasks, at the slowest site", evaluations_per_image=0.0, seconds=seconds),),
            suppressed=int(sums[MOVED]),
        )

    def _columns(self) -> list[tuple[str, str]]:
        return [(group, attack) for group, attacks in self._layout.items() for attack in attacks]

    def _attack(self, agreement: Agreement, chosen: AttackChoice, tuning: Sums, report: Sums) -> AttackOutcome | None:
        """None of a control or blind test for which the sites let too few patients count: then it was not run."""
        try:
            return self._outcome(agreement, chosen, tuning, report)
        except Unattackable:
            if chosen.group == TARGET:
                raise
            return None

    def _outcome(self, agreement: Agreement, chosen: AttackChoice, tuning: Sums, report: Sums) -> AttackOutcome:
        group, attack = chosen.group, chosen.attack
        settings = self._layout[group][attack]
        ranges = next(a.ranges for a in agreement.ranges if (a.group, a.attack) == (group, attack))
        table = tuning[column_name("tune", group, attack)]
        patients, slices = (report[column_name(kind, group, attack)] for kind in ("patients", "slices"))
        outcomes = tuple(
            pooled_outcome(
                PooledCounts(
                    tuning=table[row, choice.setting, choice.trim], patients=patients[row], slices=slices[row]
                ),
                choice,
                seed=seed,
                setting=settings[choice.setting],
                grid=ranges[choice.setting],
                tuning_auc=self._tuning[group, attack][row],
            )
            for row, (seed, choice) in enumerate(zip(self._config.seeds, chosen.by_seed, strict=True))
        )
        reported = median_seed(outcomes)
        sign, seed = chosen.by_seed[reported].sign, self._config.seeds[reported]
        above, share = hidden_share(patients[reported], sign)
        false_alarms = [outcome.points[0].fpr for outcome in outcomes]
        rate = float(np.mean([0.0 if found is None else found.estimate for found in false_alarms]))
        times = report[APPEARANCES]
        expected = float(sum(count * rate**often for often, count in enumerate(times) if often))
        p_value = combined_p([outcome.p_value for outcome in outcomes])
        return AttackOutcome(
            name=attack,
            **DESCRIPTIONS[attack]._asdict(),
            evaluations_per_image=0.0,
            seeds=outcomes,
            reported=reported,
            p_value=p_value,
            adjusted_p=p_value,
            roc=pooled_roc(patients[reported], sign, seed=seed),
            worst=WorstPatients(
                members=int(patients[reported][1].sum()),
                above_all_held_out=above,
                flagged_in_every_seed=int(report[column_name(FLAGGED, group, attack)]) if group == TARGET else 0,
                flagged_expected=expected,
                held_out_above_95th=share,
            ),
        )

    def _blind(self, outcome: AttackOutcome | None, sums: Sums) -> BlindOutcome | None:
        if outcome is None:
            return None
        held_out, members = (int(count) for count in sums[PATIENTS])
        return BlindOutcome(
            patient_auc=outcome.outcome.patient_auc,
            p_value=outcome.p_value,
            confounded=outcome.p_value < NEGATIVE_LEVEL,
            note=f"Each site fitted a classifier to its own images, cross-fitted by patient; {members} members against "
            f"{held_out} held-outs over all sites.",
        )

    def _controls(self, outcomes: Mapping[tuple[str, str], AttackOutcome], sums: Sums) -> tuple[ControlOutcome, ...]:
        controls = []
        for name in ("overfitted", "untrained", "shuffled"):
            of_group = [outcome for (group, _), outcome in outcomes.items() if group == name]
            if not of_group:
                continue
            found, strongest = corrected(of_group)
            counts = sums[column_name("patients", name, found[strongest].name)][found[strongest].reported]
            controls.append(
                control_of(
                    found,
                    strongest,
                    name=name,
                    positive=name == OVERFITTED,
                    members=int(counts[1].sum()),
                    non_members=int(counts[0].sum()),
                    explanation=f"{EXPLANATIONS[name]} Each site by itself; the figures are of the report halves.",
                )
            )
        return tuple(controls)

    def _copies(self, copies: Collected) -> tuple[CopyOutcome, ...]:
        """Pooled: a sample that is too close to a patient of any site is to be withheld.

        The sites' permutation p-values may depend on each other through the samples; twice their mean is valid under
        any dependence (Vovk & Wang 2020, arXiv:1212.4966, prop. 3), and a mean is all that masks let through.
        """
        found, sites = [], len(copies.sites)
        for method in METHODS:
            close = copies.sums[f"{CLOSE}/{method}"]
            p_value = float(copies.sums[f"{P_VALUE}/{method}"]) / P_VALUE_SCALE / sites
            found.append(
                CopyOutcome(
                    method=method,
                    samples=len(close),
                    copies=int((close > 0).sum()),
                    copies_matched=float(copies.sums[f"{MATCHED}/{method}"]) / MATCHED_SCALE / sites,
                    control_matched=float(copies.sums[f"{CONTROL}/{method}"]) / MATCHED_SCALE / sites,
                    p_value=min(1.0, 2 * p_value),
                    withhold=tuple(int(index) for index in np.flatnonzero(close > 0)),
                )
            )
        return tuple(found)

    def _cohorts(self, report: Collected) -> tuple[CohortIdentity, ...]:
        if not report.by_site:
            held_out, members = (int(count) for count in report.sums[PATIENTS])
            name = " + ".join(report.sites)
            images = int(report.sums[IMAGES])
            return (CohortIdentity(site=name, manifest_sha256="", members=members, held_out=held_out, images=images),)
        return tuple(
            CohortIdentity(
                site=site,
                manifest_sha256=bytes(counts[MANIFEST].astype(np.uint8)).hex(),
                members=int(counts[PATIENTS][1]),
                held_out=int(counts[PATIENTS][0]),
                images=int(counts[IMAGES]),
            )
            for site, counts in sorted(report.by_site.items())
        )

    def _sites(self, report: Collected, attack: AttackOutcome) -> tuple[SiteRow, ...]:
        """Per site, where the server has a site's own counts and its policy lets them be shown."""
        rows = []
        for site, counts in sorted(report.by_site.items()):
            patients = counts[column_name("patients", TARGET, attack.name)][attack.reported]
            held_out, members = (int(count) for count in patients.sum(axis=1))
            interval, note = None, ""
            if not int(counts[SHOWN]):
                note = "this site's policy keeps its own figures"
            else:
                try:
                    interval = pooled_interval(patients, attack.outcome.sign, seed=attack.outcome.seed)
                except Unattackable:
                    note = "too few patients"
            rows.append(SiteRow(site=site, members=members, held_out=held_out, patient_auc=interval, note=note))
        return tuple(rows)
