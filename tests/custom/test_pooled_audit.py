"""Three sites' counts against one machine that holds all images: the same numbers, and nothing but counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from custom import tasks
from custom.audit_config import AuditConfig
from custom.audit_counts import AUDIT_TASKS, Agreement, audit_shapes, column_name
from custom.audit_scores import BLIND, TARGET, Scorer, blind_group, layout, population_of
from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.egress import EgressRefused, check_counts
from custom.model_file import ModelFile
from custom.pooled_evidence import Collected, PooledAudit
from custom.site_audit import SiteAudit
from custom.strict import ConfigError, build
from medical_data.cohort import Cohort
from privacy.audit.attacks import GREY_BOX
from privacy.audit.errors import Unattackable
from privacy.audit.evidence import Evidence
from privacy.audit.policy import AuditPolicy
from privacy.audit.population import joined
from privacy.audit.protocol import TRIMS, by_patient

CPU = torch.device("cpu")
SITES = ("a", "b", "c")
MEMBERS, HELD_OUT, IMAGES = 8, 12, 2


def cohort_of(site: int) -> Cohort:
    """Discs of many sizes, each patient's own."""
    rng = np.random.default_rng(site)
    y, x = np.mgrid[-1:1:16j, -1:1:16j]
    patients = MEMBERS + HELD_OUT
    radius, level = rng.uniform(0.4, 0.8, patients), rng.uniform(-0.5, 0.5, patients)
    images = np.stack(
        [
            np.where(x**2 + y**2 < radius[p] ** 2, level[p], -1.0) + rng.normal(0, 0.02, x.shape)
            for p in range(patients)
            for _ in range(IMAGES)
        ]
    )
    return Cohort(
        images=images.clip(-1, 1).astype(np.float32)[:, None],
        patient=np.repeat(np.arange(patients, dtype=np.int32), IMAGES),
        pseudonyms=tuple(f"{site}-{p}" for p in range(patients)),
        held_out=np.arange(patients) >= MEMBERS,
        manifest_sha256=f"{site}" * 64,
    )


COHORTS = {site: cohort_of(index) for index, site in enumerate(SITES)}


@pytest.fixture(scope="module")
def asked(experiment: ExperimentConfig) -> ExperimentConfig:
    audit = AuditConfig(
        model="small",
        noise_levels=(0.05, 0.2),
        images_per_patient=IMAGES,
        reference_steps=0,
        control_steps=30,
        gradient_levels=(0.1,),
        embedding_steps=3,
        samples=12,
    )
    return replace(experiment, name="audit", audit=audit)


@pytest.fixture(scope="module")
def model(experiment: ExperimentConfig) -> ModelFile:
    network = build_network(experiment.network, spatial_dims=2, seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # its last layer starts at zero: an untrained one predicts nothing
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    weights = dict(network.state_dict())
    return ModelFile(experiment=experiment, rounds_done=2, weights=weights, ema=weights)


@dataclass
class Federation:
    """All tasks of one audit, in process, through JSON where a message would be."""

    asked: ExperimentConfig
    model: ModelFile
    home: Path
    policy: AuditPolicy
    masked: bool = False

    def run(self) -> tuple[dict[str, Collected], Agreement, Evidence]:
        pooled = PooledAudit(self.asked, self.model, "0" * 64)
        weights = {name: tensor.numpy() for name, tensor in self.model.ema.items()}
        samples = np.random.default_rng(5).integers(0, 256, (12, 1, 16, 16)).astype(np.uint8)
        found = {}
        agreement = Agreement()
        arrays: Mapping[str, NDArray[np.generic]]
        for task in AUDIT_TASKS:
            arrays = {tasks.AUDIT_RANGE: weights, tasks.AUDIT_COPIES: {tasks.SAMPLES: samples}}.get(task, {})
            told = build(Agreement, json.loads(json.dumps(asdict(agreement))), "audit")
            by_site = {}
            for site, cohort in COHORTS.items():
                audit = SiteAudit(self.home / site, site, self.asked, "run", self.policy, masked=self.masked)
                by_site[site] = audit.answer(task, cohort, arrays, told, CPU)
                check_counts(by_site[site], shapes=audit_shapes(self.asked, task))
            sums = {name: sum(c[name] for c in by_site.values()) for name in audit_shapes(self.asked, task)}
            found[task] = Collected(sums=sums, by_site={} if self.masked else by_site, sites=SITES)
            if task == tasks.AUDIT_RANGE:
                agreement = pooled.agree(found[task].sums)
            elif task == tasks.AUDIT_TUNE:
                agreement = pooled.choose(agreement, found[task].sums)
        evidence = pooled.evidence(
            agreement,
            found[tasks.AUDIT_TUNE].sums,
            found[tasks.AUDIT_REPORT],
            found[tasks.AUDIT_COPIES],
            created="2026-01-01",
            command="…",
            seconds=1.0,
        )
        return found, agreement, evidence


@pytest.fixture(scope="module")
def plain(
    asked: ExperimentConfig, model: ModelFile, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Collected], Agreement, Evidence]:
    policy = AuditPolicy(min_count=1, per_site_tables=True)
    return Federation(asked, model, tmp_path_factory.mktemp("plain"), policy).run()


def test_pooled_counts_are_those_of_one_machine(
    plain: tuple[dict[str, Collected], Agreement, Evidence], asked: ExperimentConfig, model: ModelFile
) -> None:
    """The grey-box attacks score an image by itself: one machine with all images counts exactly the same."""
    found, agreement, evidence = plain
    assert asked.audit is not None
    population = joined([population_of(cohort, site, asked.audit) for site, cohort in COHORTS.items()])
    scorer = Scorer(model, asked.audit, device=CPU, progress=False)
    scored = {s.name: s for s in scorer._grey_box(scorer.network, population, tuple(GREY_BOX), "…")}
    ranges = {(r.group, r.attack): r.ranges for r in agreement.ranges}
    checked = 0
    for chosen in agreement.choices:
        if chosen.group != TARGET or chosen.attack not in GREY_BOX:
            continue
        for row, (seed, choice) in enumerate(zip(asked.audit.seeds, chosen.by_seed, strict=True)):
            grid = ranges[TARGET, chosen.attack][choice.setting]
            values = scored[chosen.attack].scores[row][:, choice.setting]
            report = ~population.tuning_half(seed)
            cells = grid.cells(by_patient(values, population, TRIMS[choice.trim]))
            for kind in (0, 1):
                there = report & (population.member == bool(kind))
                sums = found[tasks.AUDIT_REPORT].sums
                counts = sums[column_name("patients", TARGET, chosen.attack)][row, kind]
                assert np.array_equal(counts, np.bincount(cells[there], minlength=len(counts)))
                slices = sums[column_name("slices", TARGET, chosen.attack)][row, kind]
                assert np.array_equal(
                    slices, np.bincount(grid.cells(values)[there[population.patient]], minlength=len(slices))
                )
                checked += 1
    assert checked == len(GREY_BOX) * len(asked.audit.seeds) * 2
    assert evidence.report_members == len(SITES) * MEMBERS // 2
    assert evidence.report_held_out == len(SITES) * HELD_OUT // 2
    assert evidence.suppressed == 0


def test_evidence_is_whole(plain: tuple[dict[str, Collected], Agreement, Evidence], asked: ExperimentConfig) -> None:
    from privacy.audit.decision import DecisionRule
    from privacy.audit.report.document import audit_of

    _, _, evidence = plain
    assert asked.audit is not None
    wanted = layout(asked.audit, asked)
    assert [attack.name for attack in evidence.attacks] == list(wanted[TARGET])
    assert {control.name for control in evidence.controls} == {"overfitted", "untrained", "shuffled"}
    assert [copies.method for copies in evidence.copies] == ["embedding", "pixels"]
    assert [cohort.site for cohort in evidence.cohorts] == list(SITES)
    assert [cohort.manifest_sha256 for cohort in evidence.cohorts] == ["0" * 64, "1" * 64, "2" * 64]
    assert all(row.patient_auc is not None for row in evidence.sites)
    assert audit_of(evidence, DecisionRule()).decision.verdict in ("INVALID", "RED", "AMBER")  # too few for GREEN


def test_layout_is_what_a_site_scores(asked: ExperimentConfig, model: ModelFile) -> None:
    assert asked.audit is not None
    population = population_of(COHORTS["a"], "a", asked.audit)
    groups = Scorer(model, asked.audit, device=CPU, progress=False).scoreboard(population).groups
    groups = {**groups, BLIND: blind_group(population, asked.audit)}
    found = {name: {s.name: s.settings for s in group.scored} for name, group in groups.items()}
    assert found == layout(asked.audit, asked)


def test_every_count_that_leaves_stands_for_enough_patients(
    asked: ExperimentConfig, model: ModelFile, tmp_path: Path
) -> None:
    found, _, evidence = Federation(asked, model, tmp_path, AuditPolicy(min_count=3)).run()
    for task in (tasks.AUDIT_RANGE, tasks.AUDIT_TUNE, tasks.AUDIT_REPORT):
        for counts in found[task].by_site.values():
            for name, array in counts.items():
                if name.startswith(("range/", "tune/", "patients/", "flagged/")):
                    assert not np.isin(array, [1, 2]).any(), (task, name)
    assert evidence.suppressed > 0
    assert all(row.patient_auc is None for row in evidence.sites)  # the policy keeps them


def test_a_control_for_which_too_few_patients_count_was_not_run(
    asked: ExperimentConfig, model: ModelFile, tmp_path: Path
) -> None:
    from privacy.audit.decision import DecisionRule, decide

    _, _, evidence = Federation(asked, model, tmp_path, AuditPolicy(min_count=4)).run()
    assert "overfitted" not in {control.name for control in evidence.controls}
    decision = decide(evidence, DecisionRule())
    assert decision.verdict == "INVALID"
    assert "positive control" in {reason.test for reason in decision.reasons}


def test_under_masks_no_site_merges_and_none_is_shown(
    asked: ExperimentConfig, model: ModelFile, tmp_path: Path
) -> None:
    from custom.secure_config import SecureAggregationConfig

    masked = replace(asked, secure_aggregation=SecureAggregationConfig())
    found, _, evidence = Federation(masked, model, tmp_path, AuditPolicy(min_count=3), masked=True).run()
    assert evidence.suppressed == 0
    assert evidence.sites == ()
    assert "manifest_sha256" not in found[tasks.AUDIT_REPORT].sums


def test_a_site_with_too_few_patients_does_not_take_part(
    asked: ExperimentConfig, model: ModelFile, tmp_path: Path
) -> None:
    few = COHORTS["a"]
    keep = few.patient < 6
    small = replace(
        few,
        images=few.images[keep],
        patient=few.patient[keep],
        pseudonyms=few.pseudonyms[:6],
        held_out=np.array([False, False, False, True, True, True]),
    )
    site = SiteAudit(tmp_path, "a", asked, "run", AuditPolicy(), masked=False)
    weights = {name: tensor.numpy() for name, tensor in model.ema.items()}
    with pytest.raises(Unattackable, match="at least 4 patients"):
        site.answer(tasks.AUDIT_RANGE, small, weights, Agreement(), CPU)


def test_a_later_task_without_the_first_is_refused(asked: ExperimentConfig, tmp_path: Path) -> None:
    site = SiteAudit(tmp_path, "a", asked, "run", AuditPolicy(), masked=False)
    with pytest.raises(ConfigError, match="start the audit anew"):
        site.answer(tasks.AUDIT_TUNE, COHORTS["a"], {}, Agreement(), CPU)


def test_a_repeated_attempt_at_a_masked_sum_is_answered(
    asked: ExperimentConfig, model: ModelFile, tmp_path: Path
) -> None:
    """Its first attempt may have failed; the sessions see to it that one of them is unmasked."""
    from custom.secure_config import SecureAggregationConfig

    masked = replace(asked, secure_aggregation=SecureAggregationConfig())
    site = SiteAudit(tmp_path, "a", masked, "run", AuditPolicy(), masked=True)
    weights = {name: tensor.numpy() for name, tensor in model.ema.items()}
    once, again = (site.answer(tasks.AUDIT_RANGE, COHORTS["a"], weights, Agreement(), CPU) for _ in range(2))
    assert all(np.array_equal(once[name], again[name]) for name in once)


def test_no_task_is_answered_twice(asked: ExperimentConfig, model: ModelFile, tmp_path: Path) -> None:
    """Two grids whose edges differ a little would tell whose score lies between them."""
    federation = Federation(asked, model, tmp_path, AuditPolicy())
    _, agreement, _ = federation.run()
    weights = {name: tensor.numpy() for name, tensor in model.ema.items()}
    for task in AUDIT_TASKS:
        site = SiteAudit(tmp_path / "a", "a", asked, "run", AuditPolicy(), masked=False)
        with pytest.raises(ConfigError, match="answered once"):
            site.answer(task, COHORTS["a"], weights, agreement, CPU)


def test_scores_do_not_outlive_the_audit(asked: ExperimentConfig, model: ModelFile, tmp_path: Path) -> None:
    Federation(asked, model, tmp_path, AuditPolicy()).run()
    assert not list(tmp_path.rglob("scores.npz"))
    assert list((tmp_path / "a" / "pictures").rglob("nearest_copies.png"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda counts: counts | {"more": np.array(1)},
        lambda counts: {name: counts[name] for name in list(counts)[1:]},
        lambda counts: {name: array.astype(np.float64) for name, array in counts.items()},
        lambda counts: {name: array - 1 for name, array in counts.items()},
        lambda counts: {name: array + 10**8 for name, array in counts.items()},
        lambda counts: {name: array.ravel()[:1] for name, array in counts.items()},
    ],
)
def test_what_is_no_count_does_not_leave(asked: ExperimentConfig, spoil: object) -> None:
    shapes = audit_shapes(asked, tasks.AUDIT_REPORT)
    counts = {name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()}
    check_counts(counts, shapes=shapes)
    with pytest.raises(EgressRefused, match="counts"):
        check_counts(spoil(counts), shapes=shapes)  # type: ignore[operator]
