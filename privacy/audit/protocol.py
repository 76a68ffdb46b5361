"""From scores to outcomes: choose on one half of the patients, measure on the other, several times over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from privacy.audit.errors import require
from privacy.audit.evidence import (
    Access,
    AttackOutcome,
    ControlOutcome,
    Roc,
    SeedOutcome,
    SiteRow,
    WorstPatients,
)
from privacy.audit.population import FEWEST_PATIENTS, Population
from privacy.audit.statistics import (
    Interval,
    OperatingPoint,
    auc,
    clustered_auc_interval,
    combined_p,
    holm,
    mann_whitney_p,
    operating_point,
    roc_band,
    trimmed_mean_by_patient,
)

FEWEST_SEEDS = 3
TARGET_FPRS = (0.1, 0.01)
TRIMS = (0.0, 0.1, 0.25, 0.45)  # from the mean to nearly the median of a patient's images
RESAMPLES = 1000
POSITIVE_LEVEL, NEGATIVE_LEVEL = 0.05, 0.01


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """One attack's statistics of every image.

    Attributes:
        name: as :attr:`AttackOutcome.name`, and so for title, paper, access, statistic and evaluations_per_image.
        title: …
        paper: …
        access: …
        statistic: …
        evaluations_per_image: …
        settings: what the columns stand for, such as ``t=100``.
        scores: float64 [seeds, N, settings]; whether high or low means a member is found out on the tuning half.
    """

    name: str
    title: str
    paper: str
    access: Access
    statistic: str
    evaluations_per_image: float
    settings: tuple[str, ...]
    scores: NDArray[np.float64]

    def __post_init__(self) -> None:
        shape, finite = self.scores.shape, bool(np.isfinite(self.scores).all())
        fits = self.scores.ndim == 3 and shape[2] == len(self.settings) and finite
        require(fits, f"scores of {self.name}", shape, "give finite [seeds, N, settings]")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the tuning half decides.

    Attributes:
        setting: index of the column.
        trim: share dropped at each end of a patient's images.
        sign: 1 or -1.
        auc: that it reaches on the tuning half.
    """

    setting: int
    trim: float
    sign: int
    auc: float


def choose(scores: NDArray[np.float64], population: Population, tuning: NDArray[np.bool_]) -> Choice:
    """Column, trim and sign with the highest patient-level AUC on the tuning half; the first of equals.

    Args:
        scores: float64 [N, settings].
        population: whose.
        tuning: bool [P].
    """
    best: Choice | None = None
    for setting in range(scores.shape[1]):
        for trim in TRIMS:
            of_patient = by_patient(scores[:, setting], population, trim)
            area = auc(of_patient[tuning], population.member[tuning])
            sign = 1 if area >= 0.5 else -1
            found = Choice(setting=setting, trim=trim, sign=sign, auc=max(area, 1 - area))
            if best is None or found.auc > best.auc:
                best = found
    assert best is not None  # noqa: S101 - there is at least one setting and one trim
    return best


def by_patient(scores: NDArray[np.float64], population: Population, trim: float) -> NDArray[np.float64]:
    """Trimmed mean over each patient's images, [P]."""
    return trimmed_mean_by_patient(scores, population.patient, len(population.keys), trim)


def assess(
    scored: Sequence[Scored], population: Population, seeds: Sequence[int]
) -> tuple[tuple[AttackOutcome, ...], int]:
    """Every attack's outcome, and which is the strongest on tuning data.

    Args:
        scored: the attacks' statistics, with one row of scores for each seed.
        population: whose images.
        seeds: of the splits, at least three.

    Raises:
        Unattackable: too few seeds, no attack, or scores that do not fit.
    """
    require(len(set(seeds)) >= FEWEST_SEEDS, "seeds", tuple(seeds), f"give at least {FEWEST_SEEDS} different ones")
    require(len(scored) > 0, "attacks", 0, "give at least one")
    return corrected([_assessed(attack, population, seeds) for attack in scored])


def corrected(outcomes: Sequence[AttackOutcome]) -> tuple[tuple[AttackOutcome, ...], int]:
    """The outcomes with p-values corrected for their number, and which is the strongest on tuning data."""
    adjusted = holm([outcome.p_value for outcome in outcomes])
    attacks = tuple(replace(outcome, adjusted_p=p) for outcome, p in zip(outcomes, adjusted, strict=True))
    strongest = max(range(len(attacks)), key=lambda index: attacks[index].outcome.tuning_auc)
    return attacks, strongest


def median_seed(outcomes: Sequence[SeedOutcome]) -> int:
    """Index of the seed whose figures are shown: the one with the median patient-level AUC."""
    ranked = sorted(range(len(outcomes)), key=lambda index: outcomes[index].patient_auc.estimate)
    return ranked[len(ranked) // 2]


def _assessed(attack: Scored, population: Population, seeds: Sequence[int]) -> AttackOutcome:
    shape = (len(seeds), len(population.patient), len(attack.settings))
    require(attack.scores.shape == shape, f"scores of {attack.name}", attack.scores.shape, f"give {shape}")
    choices = [
        choose(attack.scores[index], population, population.tuning_half(seed)) for index, seed in enumerate(seeds)
    ]
    outcomes = [
        _measured(attack, attack.scores[index], population, seed, choices[index]) for index, seed in enumerate(seeds)
    ]
    p_value = combined_p([outcome.p_value for outcome in outcomes])
    reported = median_seed(outcomes)
    patient = [
        choice.sign * by_patient(attack.scores[index][:, choice.setting], population, choice.trim)
        for index, choice in enumerate(choices)
    ]
    halves = [population.tuning_half(seed) for seed in seeds]
    return AttackOutcome(
        name=attack.name,
        title=attack.title,
        paper=attack.paper,
        access=attack.access,
        statistic=attack.statistic,
        evaluations_per_image=attack.evaluations_per_image,
        seeds=tuple(outcomes),
        reported=reported,
        p_value=p_value,
        adjusted_p=p_value,
        roc=_roc(patient[reported], population, halves[reported], seeds[reported]),
        worst=worst_patients(patient, population.member, halves, [o.points[0] for o in outcomes], reported),
    )


def _measured(
    attack: Scored, scores: NDArray[np.float64], population: Population, seed: int, choice: Choice
) -> SeedOutcome:
    tuning = population.tuning_half(seed)
    images = choice.sign * scores[:, choice.setting]
    patients = choice.sign * by_patient(scores[:, choice.setting], population, choice.trim)
    member, report = population.member, ~tuning
    of_report = report[population.patient]
    everyone = np.arange(len(member))
    return SeedOutcome(
        seed=seed,
        setting=attack.settings[choice.setting],
        sign=choice.sign,
        trim=choice.trim,
        tuning_auc=choice.auc,
        patient_auc=clustered_auc_interval(
            patients[report], np.arange(int(report.sum())), member[report], resamples=RESAMPLES, seed=seed
        ),
        slice_auc=clustered_auc_interval(
            images[of_report], *_renumbered(population.patient[of_report], member), resamples=RESAMPLES, seed=seed
        ),
        p_value=mann_whitney_p(patients[report], member[report]),
        points=_points(patients, everyone, member, tuning),
        slice_points=_points(images, population.patient, member, tuning),
    )


def _renumbered(patient: NDArray[np.int64], member: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Patients numbered from 0 without gaps, and who of them are members."""
    there, numbers = np.unique(patient, return_inverse=True)
    return numbers.astype(np.int64), member[there]


def _points(
    scores: NDArray[np.float64], patient: NDArray[np.int64], member: NDArray[np.bool_], tuning: NDArray[np.bool_]
) -> tuple[OperatingPoint, ...]:
    of, half = member[patient], tuning[patient]
    return tuple(operating_point(scores[half], of[half], scores[~half], of[~half], fpr=fpr) for fpr in TARGET_FPRS)


def _roc(scores: NDArray[np.float64], population: Population, tuning: NDArray[np.bool_], seed: int) -> Roc:
    report = ~tuning
    member = population.member[report]
    least = 1 / int((~member).sum())
    grid = np.unique(np.concatenate([np.geomspace(least, 1, 40), [0.01, 0.1]]).clip(least, 1))
    tpr, low, high = roc_band(scores[report], member, grid, resamples=RESAMPLES, seed=seed)
    return Roc(
        fpr=tuple(map(float, grid)),
        tpr=tuple(map(float, tpr)),
        low=tuple(map(float, low)),
        high=tuple(map(float, high)),
    )


def worst_patients(
    scores: Sequence[NDArray[np.float64]],
    member: NDArray[np.bool_],
    halves: Sequence[NDArray[np.bool_]],
    points: Sequence[OperatingPoint],
    reported: int,
) -> WorstPatients:
    """The most exposed members.

    Args:
        scores: of each seed, float64 [P], high means member.
        member: bool [P].
        halves: of each seed, bool [P], true for the tuning half.
        points: of each seed, at the first target false positive rate.
        reported: which seed's report half is described.
    """
    report = ~halves[reported]
    ours, others = scores[reported][report & member], scores[reported][report & ~member]
    flagged = np.ones(len(member), dtype=np.bool_)
    expected = np.ones(len(member))
    seen = np.zeros(len(member), dtype=np.bool_)
    for values, tuning, point in zip(scores, halves, points, strict=True):
        if point.threshold is None or point.fpr is None:
            continue
        flagged &= tuning | (values >= point.threshold)
        expected *= np.where(tuning, 1.0, point.fpr.estimate)
        seen |= ~tuning
    return WorstPatients(
        members=len(ours),
        above_all_held_out=int((ours > others.max()).sum()),
        flagged_in_every_seed=int((flagged & seen & member).sum()),
        flagged_expected=float(expected[seen & member].sum()),
        held_out_above_95th=float((others >= np.quantile(ours, 0.95)).mean()),
    )


def control(
    scored: Sequence[Scored],
    population: Population,
    seeds: Sequence[int],
    *,
    name: str,
    positive: bool,
    explanation: str,
) -> ControlOutcome:
    """Attack a model of which the answer is known, with everything fixed beforehand and so on all patients.

    Of each attack the statistic is the mean, over its settings, of a patient's rank among all patients, and low means
    member, as the papers expect. Nothing is chosen, so no half is set aside: a control has few patients as it is.

    Raises:
        Unattackable: no attack, or scores that do not fit.
    """
    require(len(scored) > 0, "attacks", 0, "give at least one")
    member = population.member
    p_values, areas = [], []
    for attack in scored:
        fits = attack.scores.shape[:2] == (len(seeds), len(population.patient))
        require(fits, f"scores of {attack.name}", attack.scores.shape, f"give {len(seeds)} seeds of all images")
        of_seeds = [-_mean_ranks(of_seed, population) for of_seed in attack.scores]
        p_values.append(combined_p([mann_whitney_p(values, member) for values in of_seeds]))
        found = [
            clustered_auc_interval(values, np.arange(len(member)), member, resamples=RESAMPLES, seed=seed)
            for values, seed in zip(of_seeds, seeds, strict=True)
        ]
        areas.append(sorted(found, key=lambda interval: interval.estimate)[len(found) // 2])
    return _control_outcome(
        max(areas, key=lambda interval: interval.estimate),
        min(holm(p_values)),
        name=name,
        positive=positive,
        members=int(member.sum()),
        non_members=int((~member).sum()),
        explanation=explanation,
    )


def _mean_ranks(scores: NDArray[np.float64], population: Population) -> NDArray[np.float64]:
    """Mean over the settings of each patient's rank, [P]."""
    ranks = [rankdata(by_patient(scores[:, column], population, 0.0)) for column in range(scores.shape[1])]
    mean: NDArray[np.float64] = np.mean(ranks, axis=0)
    return mean


def control_of(
    attacks: Sequence[AttackOutcome],
    strongest: int,
    *,
    name: str,
    positive: bool,
    members: int,
    non_members: int,
    explanation: str,
) -> ControlOutcome:
    """The same from outcomes of the protocol, as a federated audit has them."""
    return _control_outcome(
        attacks[strongest].outcome.patient_auc,
        min(attack.adjusted_p for attack in attacks),
        name=name,
        positive=positive,
        members=members,
        non_members=non_members,
        explanation=explanation,
    )


def _control_outcome(
    patient_auc: Interval,
    p_value: float,
    *,
    name: str,
    positive: bool,
    members: int,
    non_members: int,
    explanation: str,
) -> ControlOutcome:
    """A positive control is passed if the corrected p-value is below 5 %, a negative one if it is not below 1 %.

    A false alarm of a negative control would void the audit, so it is rarer.
    """
    level = POSITIVE_LEVEL if positive else NEGATIVE_LEVEL
    return ControlOutcome(
        name=name,
        kind="positive" if positive else "negative",
        patient_auc=patient_auc,
        p_value=p_value,
        level=level,
        members=members,
        non_members=non_members,
        passed=(p_value < level) == positive,
        explanation=explanation,
    )


def site_rows(
    scored: Scored, attack: AttackOutcome, population: Population, shown: Iterable[str]
) -> tuple[SiteRow, ...]:
    """The reported seed's patient-level AUC at each site that lets it be shown.

    Args:
        scored: the attack's statistics.
        attack: its outcome over all sites, which says what was chosen.
        population: whose images.
        shown: names of the sites whose figures may be told.
    """
    outcome = attack.outcome
    scores = scored.scores[attack.reported][:, scored.settings.index(outcome.setting)]
    patients = outcome.sign * by_patient(scores, population, outcome.trim)
    report = ~population.tuning_half(outcome.seed)
    rows = []
    for index, site in enumerate(population.sites):
        here = report & (population.site == index)
        members, held_out = int((here & population.member).sum()), int((here & ~population.member).sum())
        interval, note = None, ""
        if site not in set(shown):
            note = "this site's policy keeps its own figures"
        elif min(members, held_out) < FEWEST_PATIENTS // 2:
            note = "too few patients"
        else:
            interval = clustered_auc_interval(
                patients[here],
                np.arange(int(here.sum())),
                population.member[here],
                resamples=RESAMPLES,
                seed=outcome.seed,
            )
        rows.append(SiteRow(site=site, members=members, held_out=held_out, patient_auc=interval, note=note))
    return tuple(rows)


def shuffled(population: Population, seed: int) -> Population:
    """The same images with membership dealt out at random within each site: nothing can be remembered of it."""
    rng = np.random.default_rng(seed)
    member = population.member.copy()
    for site in range(len(population.sites)):
        here = np.flatnonzero(population.site == site)
        member[here] = rng.permutation(member[here])
    return replace(population, member=member)
