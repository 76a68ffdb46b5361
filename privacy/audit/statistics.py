"""AUC, operating points, intervals.

Scores are float64 and higher means more likely a member; who scores at least a threshold is called a member. Images of
one patient are not independent: what is measured over images has intervals that resample patients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privacy.audit.errors import require

# Most entries of a [resamples, scores] array that is held at once.
_CHUNK_ENTRIES = 1 << 21
# What a product of a rate and a count may fall short of an integer by rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and its confidence interval.

    Attributes:
        estimate: within the interval.
        low: lower end.
        high: upper end.

    Raises:
        Unattackable: a number that is not finite, or an estimate outside.
    """

    estimate: float
    low: float
    high: float

    def __post_init__(self) -> None:
        value = (self.estimate, self.low, self.high)
        require(all(map(math.isfinite, value)), "estimate, low, high", value, "give finite numbers")
        require(self.low <= self.estimate <= self.high, "estimate, low, high", value, "give low ≤ estimate ≤ high")


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """How many members are found where few non-members are called members.

    Attributes:
        target_fpr: false positive rate that the threshold was chosen for.
        resolvable: whether the report half can tell the rate at all; only then is there a ``tpr``.
        threshold: from the tuning half; who scores at least that is called a member. None if there was nothing to
            choose it from.
        tpr: true positive rate on the report half with its Clopper–Pearson interval.
        fpr: realised false positive rate on the report half, likewise.
        members: how many the report half has.
        non_members: how many the report half has.
        note: why it is not resolvable; else empty.

    Raises:
        Unattackable: a rate outside (0, 1), or fields that contradict each other.
    """

    target_fpr: float
    resolvable: bool
    threshold: float | None
    tpr: Interval | None
    fpr: Interval | None
    members: int
    non_members: int
    note: str

    def __post_init__(self) -> None:
        _require_rate(self.target_fpr, "target_fpr")
        known = None not in (self.threshold, self.tpr, self.fpr)
        remedy = "a resolvable point has threshold, tpr, fpr and no note; another has no tpr and a note"
        fits = known and not self.note if self.resolvable else self.tpr is None and bool(self.note)
        require(fits, "resolvable", self.resolvable, remedy)
        for name, count in (("members", self.members), ("non_members", self.non_members)):
            require(count >= 0, name, count, "give a count")


def auc(scores: NDArray[np.float64], member: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the probability that a member scores higher than a non-member; a tie counts half.

    Args:
        scores: float64 [P].
        member: bool [P].

    Raises:
        Unattackable: scores that are not finite, shapes that differ, or one kind only.
    """
    _require_scores(scores, member)
    members = int(member.sum())
    pairs = members * (len(member) - members)
    return float((stats.rankdata(scores)[member].sum() - members * (members + 1) / 2) / pairs)


def clustered_auc_interval(
    scores: NDArray[np.float64],
    patient: NDArray[np.int64],
    member: NDArray[np.bool_],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int,
) -> Interval:
    """AUC over images with an interval that resamples patients: members and non-members separately, with all images.

    The percentile bootstrap is too narrow where nearly all pairs are ordered rightly, and a point where all are. So the
    interval is widened to exclude no more than complete separation would. Of k = min(members, non-members) disjoint
    pairs of patients, each is ordered rightly with probability AUC, so that all are with AUC^k; complete separation
    therefore excludes, at confidence 1 - α/2, only AUC < L = (α/2)^(1/k), which is Clopper–Pearson for k of k. No
    better bound holds for every distribution. Where all resamples agree on another value t, such as 1/2 for scores that
    are all alike, the same argument leaves [t L, t L + 1 - L]. This part is exact if patients have equally many images.

    Args:
        scores: float64 [N], one of each image.
        patient: int64 [N], an image's patient; ``arange(P)`` for one score per patient.
        member: bool [P].
        confidence: of the two-sided interval.
        resamples: of patients.
        seed: of the resampling.

    Raises:
        Unattackable: as :func:`auc`; a patient without images, or fewer than two members or non-members.
    """
    _require_patients(patient, scores, len(member))
    _require_rate(confidence, "confidence")
    estimate = auc(scores, member[patient])
    counts = _resampled_patients(member, resamples, seed)
    areas = _weighted_aucs(scores, patient, member, counts)
    alpha = 1 - confidence
    low, high = (float(q) for q in np.quantile(areas, [alpha / 2, 1 - alpha / 2]))
    pairs = min(int(member.sum()), int((~member).sum()))
    separated = (alpha / 2) ** (1 / pairs)
    if low == high:
        low, high = estimate * separated, estimate * separated + 1 - separated
    low, high = min(low, separated, estimate), max(high, 1 - separated, estimate)
    return Interval(estimate=estimate, low=low, high=high)


def mann_whitney_p(scores: NDArray[np.float64], member: NDArray[np.bool_]) -> float:
    """One-sided p-value of members scoring higher; exact if a side has at most eight and there are no ties.

    Args:
        scores: float64 [P], independent of each other.
        member: bool [P].

    Raises:
        Unattackable: as :func:`auc`.
    """
    _require_scores(scores, member)
    if np.ptp(scores) == 0:
        return 1.0
    return float(stats.mannwhitneyu(scores[member], scores[~member], alternative="greater", method="auto").pvalue)


def clopper_pearson(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Exact two-sided interval of a binomial proportion (Clopper & Pearson 1934).

    Raises:
        Unattackable: no trials, or successes that are not among them.
    """
    require(trials >= 1 and 0 <= successes <= trials, "successes, trials", (successes, trials), "give 0 ≤ k ≤ n, n ≥ 1")
    _require_rate(confidence, "confidence")
    low, high = _clopper_pearson(np.array(successes), trials, confidence)
    return Interval(estimate=successes / trials, low=float(low), high=float(high))


def least_trials(rate: float, confidence: float = 0.95) -> int:
    """Least n for which no event among n shows, at one-sided confidence, a rate of at most ``rate``: (1 - rate)^n ≤ α.

    Raises:
        Unattackable: a rate or a confidence outside (0, 1).
    """
    _require_rate(rate, "rate")
    _require_rate(confidence, "confidence")
    return math.ceil(math.log1p(-confidence) / math.log1p(-rate))


def operating_point(
    tuning_scores: NDArray[np.float64],
    tuning_member: NDArray[np.bool_],
    report_scores: NDArray[np.float64],
    report_member: NDArray[np.bool_],
    *,
    fpr: float,
) -> OperatingPoint:
    """True positive rate at a false positive rate, with the threshold from one half and the rates from the other.

    The threshold is the lowest whose false positive rate on the tuning half is at most ``fpr``; of those with the same
    counts there, the midpoint between the neighbouring tuning scores. The point is not resolvable if the report half
    has fewer non-members than :func:`least_trials`, or if it shows that the threshold did not transfer.

    Args:
        tuning_scores: float64 [T].
        tuning_member: bool [T].
        report_scores: float64 [R].
        report_member: bool [R].
        fpr: target, in (0, 1).

    Raises:
        Unattackable: as :func:`auc`, for either half.
    """
    _require_rate(fpr, "fpr")
    _require_scores(tuning_scores, tuning_member)
    _require_scores(report_scores, report_member)
    threshold = _threshold(tuning_scores, tuning_member, fpr)
    called = report_scores >= threshold
    members, non_members = int(report_member.sum()), int((~report_member).sum())
    realised = clopper_pearson(int(called[~report_member].sum()), non_members)
    needed = least_trials(fpr)
    note = ""
    if non_members < needed:
        note = f"not resolvable with n={non_members}: needs {needed} held-out patients in the report half"
    elif realised.low > fpr:
        note = (
            f"not resolvable: the threshold did not transfer: a false positive rate of {realised.estimate:.3g} "
            f"(at least {realised.low:.3g}) in the report half instead of {fpr:g}"
        )
    return OperatingPoint(
        target_fpr=fpr,
        resolvable=not note,
        threshold=threshold,
        tpr=None if note else clopper_pearson(int(called[report_member].sum()), members),
        fpr=realised,
        members=members,
        non_members=non_members,
        note=note,
    )


def combined_p(p_values: Sequence[float]) -> float:
    """One p-value from dependent ones of one hypothesis: twice the median, at most 1.

    Valid under any dependence (Rüger 1978; Vovk & Wang 2020, arXiv:1212.4966).

    Raises:
        Unattackable: none, or one outside [0, 1].
    """
    _require_p_values(p_values)
    return min(1.0, 2 * float(np.median(p_values)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for how many hypotheses are tested, under any dependence (Holm 1979), in the order given.

    Raises:
        Unattackable: none, or one outside [0, 1].
    """
    _require_p_values(p_values)
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return [float(value) for value in adjusted]


def roc_curve(scores: NDArray[np.float64], member: NDArray[np.bool_], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Highest true positive rate of a threshold whose false positive rate is at most that of the grid, [G].

    Args:
        scores: float64 [P].
        member: bool [P].
        grid: false positive rates in [0, 1], float64 [G].

    Raises:
        Unattackable: as :func:`auc`, or a grid beyond [0, 1].
    """
    _require_scores(scores, member)
    _require_grid(grid)
    once = np.ones((1, len(member)), dtype=np.int64)
    curve: NDArray[np.float64] = _weighted_roc(scores, member, once, grid)[0]
    return curve


def roc_band(
    scores: NDArray[np.float64],
    member: NDArray[np.bool_],
    grid: NDArray[np.float64],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The curve of :func:`roc_curve` and a pointwise band, each [G]: rate, low, high.

    Percentiles of the curves of resampled patients, and nowhere narrower than the Clopper–Pearson interval of the rate
    at a threshold that is known beforehand: where all resamples agree, percentiles alone would claim certainty.

    Args:
        scores: float64 [P], one of each patient.
        member: bool [P].
        grid: false positive rates in [0, 1], float64 [G].
        confidence: of the two-sided band, at each rate by itself.
        resamples: of patients.
        seed: of the resampling.

    Raises:
        Unattackable: as :func:`roc_curve`, or fewer than two members or non-members.
    """
    _require_rate(confidence, "confidence")
    tpr = roc_curve(scores, member, grid)
    curves = _weighted_roc(scores, member, _resampled_patients(member, resamples, seed), grid)
    alpha = 1 - confidence
    low, high = np.quantile(curves, [alpha / 2, 1 - alpha / 2], axis=0)
    members = int(member.sum())
    fixed_low, fixed_high = _clopper_pearson(np.rint(tpr * members), members, confidence)
    return tpr, np.minimum(low, fixed_low), np.maximum(high, fixed_high)


def trimmed_mean_by_patient(
    scores: NDArray[np.float64], patient: NDArray[np.int64], patients: int, trim: float
) -> NDArray[np.float64]:
    """Mean over each patient's images without the ⌊trim · n⌋ lowest and as many highest of n, [P].

    Args:
        scores: float64 [N].
        patient: int64 [N].
        patients: P.
        trim: in [0, 0.5).

    Raises:
        Unattackable: scores that are not finite, a patient without images, or a trim outside [0, 0.5).
    """
    require(0 <= trim < 0.5, "trim", trim, "give a share in [0, 0.5)")
    _require_patients(patient, scores, patients)
    order = np.lexsort((scores, patient))
    scores, patient = scores[order], patient[order]
    images = np.bincount(patient, minlength=patients)
    cut = np.minimum(np.floor(trim * images + _ROUNDING).astype(np.int64), (images - 1) // 2)
    rank = np.arange(len(scores)) - (np.cumsum(images) - images)[patient]
    kept = (rank >= cut[patient]) & (rank < (images - cut)[patient])
    means: NDArray[np.float64] = np.bincount(patient[kept], scores[kept], minlength=patients) / (images - 2 * cut)
    return means


def _threshold(scores: NDArray[np.float64], member: NDArray[np.bool_], fpr: float) -> float:
    """Just above the first non-member, from the top, who must not be called a member: halfway to the next score."""
    others = np.sort(scores[~member])[::-1]
    barred = others[math.floor(fpr * len(others) + _ROUNDING)]
    above = scores[scores > barred]
    if not len(above):
        return float(np.nextafter(barred, np.inf))
    following = above.min()
    midpoint = barred / 2 + following / 2
    return float(midpoint if barred < midpoint <= following else following)


def _resampled_patients(member: NDArray[np.bool_], resamples: int, seed: int) -> NDArray[np.int64]:
    """How often each patient is drawn, [resamples, P]: members first, then non-members, as many as there are."""
    require(resamples >= 1, "resamples", resamples, "give at least one")
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, len(member)), dtype=np.int64)
    for name, side in (("members", member), ("non-members", ~member)):
        patients = int(side.sum())
        require(patients >= 2, name, patients, "resampling needs at least two patients of each kind")
        counts[:, side] = rng.multinomial(patients, np.full(patients, 1 / patients), size=resamples)
    return counts


def _weighted_aucs(
    scores: NDArray[np.float64], patient: NDArray[np.int64], member: NDArray[np.bool_], counts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """AUC over images where patient p counts ``counts[b, p]`` times, [B], as Mann–Whitney's U over the pairs."""
    order = np.argsort(scores)
    of_image = patient[order]
    ours = member[of_image]
    ties = _tie_starts(scores[order])
    areas = np.empty(len(counts))
    chunk = max(1, _CHUNK_ENTRIES // len(scores))
    for start in range(0, len(counts), chunk):
        weights = counts[start : start + chunk, of_image]
        members = np.add.reduceat(weights * ours, ties, axis=1)
        others = np.add.reduceat(weights * ~ours, ties, axis=1)
        below = np.cumsum(others, axis=1) - others
        doubled = (members * (2 * below + others)).sum(axis=1)
        areas[start : start + chunk] = doubled / (2 * members.sum(axis=1) * others.sum(axis=1))
    return areas


def _weighted_roc(
    scores: NDArray[np.float64], member: NDArray[np.bool_], counts: NDArray[np.int64], grid: NDArray[np.float64]
) -> NDArray[np.float64]:
    """True positive rates at the grid's false positive rates where patient p counts ``counts[b, p]`` times, [B, G]."""
    order = np.argsort(-scores)
    ours = member[order]
    ties = _tie_starts(scores[order])
    members, others = int(ours.sum()), int((~ours).sum())
    allowed = np.floor(grid * others + _ROUNDING)
    curves = np.empty((len(counts), len(grid)))
    for row, weights in zip(curves, counts, strict=True):
        weights = weights[order]
        found = np.cumsum(np.add.reduceat(weights * ours, ties))
        alarms = np.cumsum(np.add.reduceat(weights * ~ours, ties))
        row[:] = np.append(0, found)[np.searchsorted(alarms, allowed, side="right")]
    return curves / members


def _tie_starts(ordered: NDArray[np.float64]) -> NDArray[np.int64]:
    """Where each run of equal scores starts."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def _clopper_pearson(
    successes: NDArray[np.float64], trials: int, confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    tail, failures = (1 - confidence) / 2, trials - successes
    low = np.where(successes > 0, stats.beta.ppf(tail, np.maximum(successes, 1), failures + 1), 0.0)
    high = np.where(failures > 0, stats.beta.ppf(1 - tail, successes + 1, np.maximum(failures, 1)), 1.0)
    return low, high


def _require_scores(scores: NDArray[np.float64], member: NDArray[np.bool_]) -> None:
    fits = scores.ndim == 1 and scores.shape == member.shape and member.dtype == np.bool_
    require(fits, "scores, member", (scores.shape, member.shape, str(member.dtype)), "give [P] scores and bool [P]")
    require(bool(np.isfinite(scores).all()), "scores", "not finite", "leave out attacks whose scores overflow")
    require(bool(member.any() and not member.all()), "member", "one kind only", "give members and non-members")


def _require_patients(patient: NDArray[np.int64], scores: NDArray[np.float64], patients: int) -> None:
    fits = scores.ndim == 1 and scores.shape == patient.shape
    require(fits, "scores, patient", (scores.shape, patient.shape), "give a score and a patient for each image")
    require(bool(np.isfinite(scores).all()), "scores", "not finite", "leave out attacks whose scores overflow")
    there = np.unique(patient)
    everyone = np.array_equal(there, np.arange(patients))
    require(everyone, "patient", f"{len(there)} patients", f"give images of each patient from 0 to {patients - 1}")


def _require_grid(grid: NDArray[np.float64]) -> None:
    within = grid.ndim == 1 and bool(((grid >= 0) & (grid <= 1)).all())
    require(within, "grid", "beyond [0, 1]", "give false positive rates")


def _require_p_values(p_values: Sequence[float]) -> None:
    valid = len(p_values) > 0 and all(0 <= p <= 1 for p in p_values)
    require(valid, "p_values", tuple(p_values), "give at least one, each in [0, 1]")


def _require_rate(value: float, argument: str) -> None:
    require(0 < value < 1, argument, value, "give a value in (0, 1)")
