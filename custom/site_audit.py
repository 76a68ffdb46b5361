"""A site's part of a federated audit: it scores its own patients and lets counts go."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from custom import tasks
from custom.atomic import write_atomically
from custom.audit_copies import screened
from custom.audit_counts import (
    APPEARANCES,
    CLOSE,
    CONTROL,
    FLAGGED,
    IMAGES,
    MANIFEST,
    MATCHED,
    MATCHED_SCALE,
    MOVED,
    P_VALUE,
    P_VALUE_SCALE,
    PATIENTS,
    SHOWN,
    Agreement,
    AttackChoice,
    audit_of,
    column_name,
)
from custom.audit_scores import (
    BLIND,
    TARGET,
    Group,
    Scorer,
    blind_group,
    layout,
    population_of,
    populations,
    rebuilt,
)
from custom.config import ExperimentConfig
from custom.model_file import ModelFile
from custom.pictures import grids
from custom.strict import ConfigError
from medical_data.cohort import Cohort
from privacy.audit.policy import AuditPolicy
from privacy.audit.pooling import COARSE_CELLS, FINE_CELLS, coarse_cells, counted
from privacy.audit.population import Population
from privacy.audit.protocol import TRIMS, by_patient

Counts = dict[str, NDArray[np.int64]]


class SiteAudit:
    """What a site remembers between the tasks of one audit is the scores of its images, in its own folder.

    Without masks each task is answered once (with them, one sum of it is all that is ever unmasked): whoever could ask
    again, with edges moved a little, would learn single scores from the differences of counts, however many patients
    stand behind each.

    Args:
        home: the site's.
        site: its name, which decides the split with the pseudonyms.
        experiment: of the audit.
        run_id: names it.
        policy: the site's.
        masked: whether counts leave under masks only: then the server sees no single site's, and none is merged.
    """

    def __init__(
        self, home: Path, site: str, experiment: ExperimentConfig, run_id: str, policy: AuditPolicy, *, masked: bool
    ) -> None:
        self._folder = home / "audit" / run_id
        self._pictures = home / "pictures" / experiment.name / run_id
        self._site, self._experiment, self._policy = site, experiment, policy
        self._config = audit_of(experiment)
        self._masked, self._least = masked, 1 if masked else policy.min_count

    def answer(
        self,
        task: str,
        cohort: Cohort,
        arrays: Mapping[str, NDArray[Any]],
        agreement: Agreement,
        device: torch.device,
    ) -> Counts:
        """The counts that answer a task.

        Args:
            task: one of the four.
            cohort: the site's.
            arrays: the model's weights in the first task, uint8 samples [S, 1, *spatial] in the last.
            agreement: what the sites have agreed on so far.
            device: where to compute.

        Raises:
            Unattackable: too few patients, or statistics that cannot be had.
            ConfigError: a task before the first one, a task for the second time, or an agreement that does not fit.
        """
        if not self._masked:
            self._answer_once(task)
        population = population_of(cohort, self._site, self._config)
        if task == tasks.AUDIT_COPIES:
            self._scores.unlink(missing_ok=True)
            return self._copies(arrays[tasks.SAMPLES].astype(np.float32) / 127.5 - 1, population, device)
        if task == tasks.AUDIT_RANGE:
            weights = {name: torch.tensor(array) for name, array in arrays.items()}
            model = ModelFile(experiment=self._experiment, rounds_done=0, weights=weights, ema=weights)
            scorer = Scorer(model, self._config, device=device, progress=False)
            groups = {**scorer.scoreboard(population).groups, BLIND: blind_group(population, self._config)}
            self._keep(groups)
            return self._ranges(groups)
        settings = layout(self._config, self._experiment)
        groups = rebuilt(populations(population, self._experiment.seed), self._kept(), settings)
        if task == tasks.AUDIT_TUNE:
            return self._tuning(groups, agreement)
        counts = self._report(groups, agreement)
        if self._experiment.secure_aggregation is None:
            counts[MANIFEST] = np.frombuffer(bytes.fromhex(cohort.manifest_sha256), np.uint8).astype(np.int64)
        if not self._masked:
            self._scores.unlink()
        return counts

    def _ranges(self, groups: Mapping[str, Group]) -> Counts:
        counts: Counts = {}
        for name, group in groups.items():
            tuning = group.population.tuning_half(self._config.seeds[0])
            for scored in group.scored:
                rows = []
                for column in range(len(scored.settings)):
                    values = by_patient(scored.scores[0][:, column], group.population, 0.0)[tuning]
                    cells = coarse_cells(values)
                    rows.append(counted(cells, np.arange(len(cells)), size=COARSE_CELLS, least=self._least)[0])
                counts[column_name("range", name, scored.name)] = np.stack(rows)
        return counts

    def _tuning(self, groups: Mapping[str, Group], agreement: Agreement) -> Counts:
        counts: Counts = {}
        for agreed in agreement.ranges:
            group, scored = _found(groups, agreed.group, agreed.attack)
            member = group.population.member
            shape = (len(self._config.seeds), len(scored.settings), len(TRIMS), 2, FINE_CELLS)
            table = np.zeros(shape, dtype=np.int64)
            for row, seed in enumerate(self._config.seeds):
                tuning = group.population.tuning_half(seed)
                for column, grid in enumerate(agreed.ranges):
                    for place, trim in enumerate(TRIMS):
                        cells = grid.cells(by_patient(scored.scores[row][:, column], group.population, trim))
                        table[row, column, place] = self._by_kind(cells, np.arange(len(cells)), member, tuning)[0]
            counts[column_name("tune", agreed.group, agreed.attack)] = table
        return counts

    def _report(self, groups: Mapping[str, Group], agreement: Agreement) -> Counts:
        ranges = {(agreed.group, agreed.attack): agreed.ranges for agreed in agreement.ranges}
        counts: Counts = {}
        moved = 0
        for chosen in agreement.choices:
            group, scored = _found(groups, chosen.group, chosen.attack)
            population = group.population
            patients, slices, cells_of_patients = [], [], []
            for row, (seed, choice) in enumerate(zip(self._config.seeds, chosen.by_seed, strict=True)):
                grid = ranges[chosen.group, chosen.attack][choice.setting]
                values = scored.scores[row][:, choice.setting]
                cells = grid.cells(by_patient(values, population, TRIMS[choice.trim]))
                report = ~population.tuning_half(seed)
                of_patients, lost = self._by_kind(cells, np.arange(len(cells)), population.member, report)
                of_images, _ = self._by_kind(
                    grid.cells(values),
                    population.patient,
                    population.member[population.patient],
                    report[population.patient],
                )
                patients.append(of_patients)
                slices.append(of_images)
                cells_of_patients.append(cells)
                moved += lost
            counts[column_name("patients", chosen.group, chosen.attack)] = np.stack(patients)
            counts[column_name("slices", chosen.group, chosen.attack)] = np.stack(slices)
            if chosen.group == TARGET:
                flagged = self._flagged(cells_of_patients, chosen, population)
                counts[column_name(FLAGGED, chosen.group, chosen.attack)] = np.array(flagged)
        population = groups[TARGET].population
        members = int(population.member.sum())
        halves = np.stack([~population.tuning_half(seed) for seed in self._config.seeds])
        times = halves.sum(axis=0)[population.member]
        counts[APPEARANCES] = np.bincount(times, minlength=len(self._config.seeds) + 1).astype(np.int64)
        counts[PATIENTS] = np.array([len(population.member) - members, members])
        counts[IMAGES] = np.array(len(population.images))
        counts[SHOWN] = np.array(int(self._policy.per_site_tables))
        counts[MOVED] = np.array(moved)
        return counts

    def _copies(self, samples: NDArray[np.float32], population: Population, device: torch.device) -> Counts:
        """Which samples are too close to one of the site's patients; the nearest pairs are for its own eyes only."""
        screens = screened(samples, population, self._config, device=device, progress=False)
        counts: Counts = {}
        for screen in screens:
            close = np.zeros(len(samples), dtype=np.int64)
            close[list(screen.withhold)] = 1
            counts[f"{CLOSE}/{screen.method}"] = close
            counts[f"{MATCHED}/{screen.method}"] = np.array(round(screen.copies_train_matched * MATCHED_SCALE))
            counts[f"{CONTROL}/{screen.method}"] = np.array(round(screen.copies_held_out_matched * MATCHED_SCALE))
            counts[f"{P_VALUE}/{screen.method}"] = np.array(round(screen.p_value * P_VALUE_SCALE))
        nearest = screens[0].nearest
        if samples.ndim == 4:
            train = population.images[population.member[population.patient]]
            grids(
                [
                    ("nearest members (real)", train[[near.train for near in nearest]]),
                    ("samples", samples[[near.sample for near in nearest]]),
                ],
                self._pictures / "nearest_copies.png",
                window_hu=self._experiment.preprocess.window_hu,
                columns=4,
            )
        return counts

    def _by_kind(
        self,
        cells: NDArray[np.int64],
        patient: NDArray[np.int64],
        member: NDArray[np.bool_],
        half: NDArray[np.bool_],
    ) -> tuple[NDArray[np.int64], int]:
        """Counts of held-outs and members in one half, int64 [2, FINE_CELLS], and how many were moved."""
        found = [
            counted(
                cells[half & (member == kind)], patient[half & (member == kind)], size=FINE_CELLS, least=self._least
            )
            for kind in (False, True)
        ]
        return np.stack([counts for counts, _ in found]), sum(moved for _, moved in found)

    def _flagged(self, cells: list[NDArray[np.int64]], chosen: AttackChoice, population: Population) -> int:
        """Members called members under every seed in whose report half they are; 0 if fewer than may be told."""
        flagged, seen = population.member.copy(), np.zeros(len(population.member), dtype=np.bool_)
        for row, seed in enumerate(self._config.seeds):
            report = ~population.tuning_half(seed)
            sign, threshold = chosen.by_seed[row].sign, chosen.thresholds[row]
            flagged &= ~report | (sign * cells[row] >= sign * threshold)
            seen |= report
        count = int((flagged & seen).sum())
        return count if count >= self._least else 0

    def _keep(self, groups: Mapping[str, Group]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        arrays = {f"{name}/{s.name}": s.scores for name, group in groups.items() for s in group.scored}
        stream = io.BytesIO()
        np.savez(stream, **arrays)  # type: ignore[arg-type]
        write_atomically(self._scores, stream.getvalue())
        self._scores.chmod(0o600)

    def _kept(self) -> dict[str, NDArray[np.float64]]:
        if not self._scores.is_file():
            raise ConfigError("audit = no scores of this run here: its first task comes first; start the audit anew")
        with np.load(self._scores, allow_pickle=False) as arrays:
            return dict(arrays)

    @property
    def _scores(self) -> Path:
        return self._folder / "scores.npz"

    def _answer_once(self, task: str) -> None:
        """Note before anything is computed that a task is being answered, which survives a crash."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            (self._folder / f"{task}.asked").touch(exist_ok=False)
        except FileExistsError:
            raise ConfigError(f"{task} = asked before in this audit: each is answered once; start it anew") from None


def _found(groups: Mapping[str, Group], group: str, attack: str) -> tuple[Group, Any]:
    for scored in groups[group].scored if group in groups else ():
        if scored.name == attack:
            return groups[group], scored
    raise ConfigError(f"audit agreement = {group}/{attack}: unknown; server and site must run the same fedct version")
