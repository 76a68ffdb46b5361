"""Lower bounds on ε, from canaries whose inclusion a fair coin decided.

What all of them need: the coins are independent and fair, they were fixed before training
(``privacy.audit.canaries``), and the scores were computed without looking at them; what was chosen to make the scores
good was chosen on other canaries. "At confidence 1 - α" then means: of all audits of a mechanism that is (ε, δ)-DP when
one canary is added or removed, a share of at most α reports more than ε.

    one_run_epsilon          one training run, any (ε, δ)-DP mechanism
    fdp_epsilon              one training run, through the mechanism's whole trade-off curve
    clopper_pearson_epsilon  true and false positive rates, for scores that are independent of each other

Each has a twin ``…_of_counts`` for who has counts and no scores. Several bounds at confidence 1 - α each hold together
at 1 - (their number) α.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv, expit, log_ndtr, ndtr, ndtri

from privacy.audit.errors import Unattackable

# Width to which the largest refuted ε or μ is bisected; what is returned is the refuted end.
BISECTION_WIDTH = 1e-9

# Guesses as shares of the canaries: (called in, called out).
GUESS_SHARES = ((0.4, 0.4), (0.2, 0.2), (0.1, 0.1), (0.05, 0.05), (0.2, 0.0), (0.05, 0.0))

# (highest scores that are called in, lowest scores that are called out)
Guesses: TypeAlias = tuple[int, int]
TradeOff: TypeAlias = Literal["gaussian", "approximate"]


@dataclass(frozen=True, kw_only=True)
class EpsilonBound:
    """What canaries showed: a mechanism with less than this ε gives such scores in at most 1 - confidence of all runs.

    Attributes:
        method: which theorem.
        epsilon: ≥ 0, for one canary added or removed; 0 if nothing was shown.
        delta: δ at which.
        confidence: 1 - α, over coins and training.
        members: canaries that were trained on, of those that were counted.
        non_members: those that were not.
        detail: guesses or threshold behind the bound, for people.
    """

    method: str
    epsilon: float
    delta: float
    confidence: float
    members: int
    non_members: int
    detail: str


def guess_grid(canaries: int) -> tuple[Guesses, ...]:
    """Guesses to try on so many canaries: ``GUESS_SHARES`` of them, at least one a side that guesses.

    It depends on nothing else, so that choosing among its entries costs no more than their number.

    Raises:
        Unattackable: fewer than 2 canaries.
    """
    _require_count(canaries, argument="canaries", least=2, most=None)
    sides = (tuple(max(1, int(share * canaries)) if share else 0 for share in pair) for pair in GUESS_SHARES)
    return tuple(dict.fromkeys((k_plus, k_minus) for k_plus, k_minus in sides))


def correct_guesses(scores: NDArray[np.floating], included: NDArray[np.bool_], guesses: Guesses) -> int:
    """How many are right if the k₊ highest scores are called in and the k₋ lowest out.

    Scores that tie at a border are guessed as wrongly as they can be: never more right guesses than any order of the
    ties that does not look at the coins would give.

    Args:
        scores: [M], higher for what looks included.
        included: the coins, bool [M].
        guesses: (k₊, k₋), fixed without looking at the coins.

    Raises:
        Unattackable: scores or coins that cannot be audited, or more guesses than canaries.
    """
    _require_scores(scores, included)
    _require_guesses(guesses, canaries=len(scores))
    k_plus, k_minus = guesses
    ranked = included[np.lexsort((included, -scores.astype(np.float64)))]  # within ties: excluded first
    return int(ranked[:k_plus].sum()) + k_minus - int(ranked[len(ranked) - k_minus :].sum())


def one_run_p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound on the probability of so many right guesses under (ε, δ)-DP.

    With W ~ Binomial(r, e^ε/(1 + e^ε)) and v of r guesses right on m canaries

        p = P[W ≥ v] + 2 m δ max_{1≤i≤v} P[v > W ≥ v - i]/i

    (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, main theorem in the form of its appendix D). It holds for every
    mechanism that is (ε, δ)-DP under adding or removing one canary and for every rule that makes r guesses from its
    output, however the canaries influence each other.

    Raises:
        Unattackable: counts, ε or δ that cannot be.
    """
    _require_counts(canaries=canaries, guesses=guesses, correct=correct)
    _require_delta(delta)
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise Unattackable(argument="epsilon", value=epsilon, remedy="give a finite number of at least 0")
    return _one_run_p_value(canaries, guesses, correct, epsilon, delta)


def one_run_epsilon_of_counts(*, canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """:func:`one_run_epsilon` for one number of guesses that was fixed beforehand.

    Raises:
        Unattackable: counts, δ or confidence that cannot be.
    """
    _require_counts(canaries=canaries, guesses=guesses, correct=correct)
    _require_delta(delta)
    _require_confidence(confidence)
    alpha = 1 - confidence
    return _largest(lambda epsilon: _one_run_p_value(canaries, guesses, correct, epsilon, delta) <= alpha)


def one_run_epsilon(
    scores: NDArray[np.floating],
    included: NDArray[np.bool_],
    *,
    delta: float,
    confidence: float,
    guesses: Sequence[Guesses],
) -> EpsilonBound:
    """Lower bound on ε from one training run (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846).

    The largest ε that :func:`one_run_p_value` refutes. Every refuted ε is a lower bound, and so is the largest: of the
    right guesses that refute any ε' ≥ ε, the fewest already have a probability of at most α under (ε', δ)-DP, which
    (ε, δ)-DP implies. The best of several numbers of guesses is taken at α over their number (Bonferroni).

    Randomness: independent fair coins. The canaries may influence each other's scores.

    Args:
        scores: [M], higher for what looks included; computed without looking at the coins.
        included: the coins, bool [M].
        delta: δ in [0, 1).
        confidence: 1 - α in (0.5, 1).
        guesses: (k₊, k₋) to try, fixed without looking at the coins, such as :func:`guess_grid`.

    Raises:
        Unattackable: scores, coins or settings that cannot be audited.
    """

    def of_counts(total: int, correct: int, confidence: float) -> float:
        return one_run_epsilon_of_counts(
            canaries=len(scores), guesses=total, correct=correct, delta=delta, confidence=confidence
        )

    return _best_guesses(
        scores,
        included,
        of_counts,
        method="one training run, (ε, δ)",
        delta=delta,
        confidence=confidence,
        guesses=guesses,
    )


def fdp_epsilon_of_counts(
    *, canaries: int, guesses: int, correct: int, delta: float, confidence: float, trade_off: TradeOff
) -> float:
    """:func:`fdp_epsilon` for one number of guesses that was fixed beforehand.

    Raises:
        Unattackable: counts, δ, confidence or trade-off that cannot be.
    """
    _require_counts(canaries=canaries, guesses=guesses, correct=correct)
    _require_delta(delta)
    _require_confidence(confidence)
    alpha = 1 - confidence

    def refuted(curve: Callable[[float], float]) -> bool:
        return _least_mass(curve, canaries, guesses, correct, alpha) > 1

    if trade_off == "approximate":
        return _largest(lambda epsilon: refuted(_approximate_curve(epsilon, delta)))
    if trade_off == "gaussian":
        if delta == 0:
            raise Unattackable(argument="delta", value=delta, remedy="give δ > 0: no Gaussian has an ε at δ = 0")
        return gaussian_epsilon(_largest(lambda mu: refuted(_gaussian_curve(mu))), delta)
    raise Unattackable(argument="trade_off", value=trade_off, remedy="give 'gaussian' or 'approximate'")


def fdp_epsilon(
    scores: NDArray[np.floating],
    included: NDArray[np.bool_],
    *,
    delta: float,
    confidence: float,
    guesses: Sequence[Guesses],
    trade_off: TradeOff,
) -> EpsilonBound:
    """Lower bound on ε from one training run and a trade-off curve (Mahloujifar, Melis and Chaudhuri 2024).

    Let f be a symmetric trade-off curve and f̄ = 1 - f. Under f-DP the probabilities p_j of j right guesses of r on m
    canaries obey (arXiv:2410.22235, theorem on bounded guesses, two choices a canary)

        Σ_{j≥i} (j/m) p_j ≤ f̄(Σ_{j≥i-1} ((r - j)/m) p_j)  for every i:

    flipping the coin of a canary that was guessed right leaves one right guess fewer. Where no distribution with
    P[≥ v right] ≥ α obeys them, v right guesses refute f.

    "approximate" takes the curve of (ε, δ)-DP: a bound for every mechanism. "gaussian" takes that of the Gaussian
    mechanism N(0, 1) against N(μ, 1) and reports the ε that it has at δ: larger, and a bound only for mechanisms whose
    claim is that whole curve. It says nothing against a claim of (ε, δ) alone: randomised response keeps its ε
    and is no Gaussian mechanism.

    Randomness: independent fair coins. The canaries may influence each other's scores.

    Args:
        scores: [M], higher for what looks included; computed without looking at the coins.
        included: the coins, bool [M].
        delta: δ in [0, 1); above 0 for "gaussian".
        confidence: 1 - α in (0.5, 1).
        guesses: (k₊, k₋) to try, fixed without looking at the coins; the best is taken at α over their number.
        trade_off: "gaussian" or "approximate".

    Raises:
        Unattackable: scores, coins or settings that cannot be audited.
    """

    def of_counts(total: int, correct: int, confidence: float) -> float:
        return fdp_epsilon_of_counts(
            canaries=len(scores),
            guesses=total,
            correct=correct,
            delta=delta,
            confidence=confidence,
            trade_off=trade_off,
        )

    return _best_guesses(
        scores,
        included,
        of_counts,
        method=f"one training run, {'Gaussian' if trade_off == 'gaussian' else '(ε, δ)'} trade-off curve",
        delta=delta,
        confidence=confidence,
        guesses=guesses,
    )


def clopper_pearson_epsilon_of_counts(
    *,
    true_positives: int,
    members: int,
    false_positives: int,
    non_members: int,
    delta: float,
    confidence: float,
) -> float:
    """:func:`clopper_pearson_epsilon` for one threshold that was fixed beforehand.

    Raises:
        Unattackable: counts, δ or confidence that cannot be.
    """
    _require_count(members, argument="members", least=1, most=None)
    _require_count(non_members, argument="non_members", least=1, most=None)
    _require_count(true_positives, argument="true_positives", least=0, most=members)
    _require_count(false_positives, argument="false_positives", least=0, most=non_members)
    _require_delta(delta)
    _require_confidence(confidence)
    found = _clopper_pearson_logs(
        np.array([true_positives]), members, np.array([false_positives]), non_members, delta, 1 - confidence
    )
    return max(0.0, float(found[0]))


def clopper_pearson_epsilon(
    scores: NDArray[np.floating],
    included: NDArray[np.bool_],
    *,
    delta: float,
    confidence: float,
    rng: np.random.Generator,
) -> EpsilonBound:
    """Lower bound on ε from the true and false positive rates at one threshold.

    (ε, δ)-DP bounds every test: TPR ≤ e^ε FPR + δ and 1 - FPR ≤ e^ε (1 - TPR) + δ (Kairouz et al. 2015,
    arXiv:1311.0776, thm 2.1). With TPR at its lower and FPR at its upper one-sided Clopper-Pearson limit, each at α/2,

        ε ≥ max(ln((TPR - δ)/FPR), ln((1 - FPR - δ)/(1 - TPR)))

    at confidence 1 - α (in the manner of Jagielski et al. 2020, arXiv:2006.07709; both directions use the same
    two limits). The threshold is the best of one half of the canaries, drawn without looking at scores; the rates
    are counted on the other half alone.

    Randomness: the scores of members are independent with one TPR, those of non-members with one FPR. That is so where
    every score comes from a training of its own; canaries of one run influence each other, and then this is an
    estimate and :func:`one_run_epsilon` the theorem.

    Args:
        scores: [M], higher for what looks included.
        included: which are members, bool [M].
        delta: δ in [0, 1).
        confidence: 1 - α in (0.5, 1).
        rng: draws the halves.

    Raises:
        Unattackable: scores or settings that cannot be audited, or fewer than 2 canaries of a kind.
    """
    _require_scores(scores, included)
    _require_delta(delta)
    _require_confidence(confidence)
    halves = [rng.permutation(np.flatnonzero(included == kind)) for kind in (True, False)]
    fewest = min(len(canaries) for canaries in halves)
    if fewest < 2:
        raise Unattackable(argument="included", value=f"{fewest} of a kind", remedy="give at least 2 of each kind")
    (choosing_in, counted_in), (choosing_out, counted_out) = (
        (scores[canaries[: len(canaries) // 2]], scores[canaries[len(canaries) // 2 :]]) for canaries in halves
    )
    thresholds = np.unique(np.concatenate([choosing_in, choosing_out]))
    logs = _clopper_pearson_logs(
        _at_least(choosing_in, thresholds),
        len(choosing_in),
        _at_least(choosing_out, thresholds),
        len(choosing_out),
        delta,
        1 - confidence,
    )
    threshold = thresholds[int(np.argmax(logs))]
    true_positives, false_positives = (
        int(_at_least(counted, thresholds=np.array([threshold]))[0]) for counted in (counted_in, counted_out)
    )
    return EpsilonBound(
        method="true and false positive rates, Clopper-Pearson",
        epsilon=clopper_pearson_epsilon_of_counts(
            true_positives=true_positives,
            members=len(counted_in),
            false_positives=false_positives,
            non_members=len(counted_out),
            delta=delta,
            confidence=confidence,
        ),
        delta=delta,
        confidence=confidence,
        members=len(counted_in),
        non_members=len(counted_out),
        detail=f"{true_positives} of {len(counted_in)} members and {false_positives} of {len(counted_out)} non-members "
        f"at or above the threshold of the other {len(choosing_in) + len(choosing_out)} canaries",
    )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at δ of a mechanism that is μ-GDP, such as a Gaussian one with noise multiplier 1/μ.

    The root of δ = Φ(-ε/μ + μ/2) - e^ε Φ(-ε/μ - μ/2) (Balle and Wang 2018, arXiv:1805.06530, thm 8;
    Dong et al. 2022, arXiv:1905.02383, cor. 2.13); 0 if δ is more than ε = 0 needs.

    Raises:
        Unattackable: μ is negative or not finite, or δ is not in (0, 1).
    """
    if not (math.isfinite(mu) and mu >= 0):
        raise Unattackable(argument="mu", value=mu, remedy="give a finite number of at least 0")
    if not 0 < delta < 1:
        raise Unattackable(argument="delta", value=delta, remedy="give a value in (0, 1)")

    def excess(epsilon: float) -> float:
        first, second = log_ndtr(-epsilon / mu + mu / 2), epsilon + log_ndtr(-epsilon / mu - mu / 2)
        gap = min(second - first, -np.finfo(np.float64).tiny)  # below 0, whatever rounding makes of it
        return float(first + np.log(-np.expm1(gap)) - math.log(delta))

    if mu == 0 or excess(0.0) <= 0:
        return 0.0
    highest = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # there Φ(-ε/μ + μ/2) ≤ e^(-ln(1/δ))/2
    return float(brentq(excess, 0.0, highest, xtol=1e-12))


def _one_run_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    q = expit(epsilon)
    if v == 0:
        return 1.0
    beta = betainc(v, r - v + 1, q)  # P[W ≥ v]
    if delta == 0:
        return float(beta)
    i = np.arange(1, v + 1)
    at_least = np.ones(v)  # P[W ≥ v - i]
    at_least[:-1] = betainc(v - i[:-1], r - v + i[:-1] + 1, q)
    return min(1.0, float(beta + 2 * m * delta * np.max((at_least - beta) / i)))


def _least_mass(curve: Callable[[float], float], m: int, r: int, v: int, alpha: float) -> float:
    """Least Σ_j p_j of all p that obey the constraints of :func:`fdp_epsilon` and Σ_{j≥v} p_j ≥ α; stops above 1.

    From i = v down: all of α lies on v, then each p_i is the least that its constraint asks for. Let
    W_t(i) = Σ_{j≥i} (j - t) p_j, least at i = v. If W_t(i + 1) is least for all t ≤ i + 1, then so is W_t(i) for all
    t ≤ i: it is W_t(i + 1) where p_i = 0 will do, and otherwise, with h = Σ_{j≥i} (r - j) p_j/m,

        W_t(i) = ((r - t) W_i(i + 1) + (i - t) m h)/(r - i),

    which grows with W_i(i + 1) and with h, and the least h grows with Σ_{j>i} j p_j = W_0(i + 1). The mass is
    the limit of W_t/(-t). ∎

    Args:
        curve: f̄⁻¹, what f̄ must at least be given for the value y.
    """
    right, wrong = alpha * v / m, alpha * (r - v) / m  # Σ_{j≥i} (j/m) p_j and Σ_{j≥i} ((r - j)/m) p_j
    for i in range(v - 1, -1, -1):
        needed = curve(right)
        if needed <= wrong:  # then p_i = 0, and so are all below
            break
        right += i / (r - i) * (needed - wrong)
        wrong = needed
        if (right + wrong) * m > r:
            break
    return (right + wrong) * m / r


def _gaussian_curve(mu: float) -> Callable[[float], float]:
    return lambda y: float(ndtr(ndtri(y) - mu))


def _approximate_curve(epsilon: float, delta: float) -> Callable[[float], float]:
    """f̄(x) = min(1, e^ε x + δ, 1 - e^-ε (1 - δ - x)), inverted."""
    fewer, more = math.exp(-epsilon), math.exp(min(epsilon, 700.0))
    return lambda y: max(0.0, fewer * (y - delta), 1 - delta - more * (1 - y))


def _largest(refuted: Callable[[float], bool]) -> float:
    """Largest value that is refuted, to within ``BISECTION_WIDTH`` below; 0 if none is."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > BISECTION_WIDTH:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _best_guesses(
    scores: NDArray[np.floating],
    included: NDArray[np.bool_],
    of_counts: Callable[[int, int, float], float],
    *,
    method: str,
    delta: float,
    confidence: float,
    guesses: Sequence[Guesses],
) -> EpsilonBound:
    """The best of all guesses, each at α over their number."""
    _require_scores(scores, included)
    _require_delta(delta)
    _require_confidence(confidence)
    if not guesses:
        raise Unattackable(argument="guesses", value=0, remedy="give at least one (k₊, k₋)")
    each = 1 - (1 - confidence) / len(guesses)
    found = []
    for pair in guesses:
        correct = correct_guesses(scores, included, pair)
        found.append((of_counts(sum(pair), correct, each), correct, pair))
    epsilon, correct, (k_plus, k_minus) = max(found, key=lambda entry: entry[0])
    return EpsilonBound(
        method=method,
        epsilon=epsilon,
        delta=delta,
        confidence=confidence,
        members=int(included.sum()),
        non_members=int((~included).sum()),
        detail=f"{correct} of {k_plus + k_minus} guesses right ({k_plus} in, {k_minus} out), "
        f"the best of {len(guesses)} at α/{len(guesses)}",
    )


def _clopper_pearson_logs(
    true_positives: NDArray[np.intp],
    members: int,
    false_positives: NDArray[np.intp],
    non_members: int,
    delta: float,
    alpha: float,
) -> NDArray[np.float64]:
    """The better of the two logarithms of :func:`clopper_pearson_epsilon` at each threshold; -inf if neither exists."""
    fnr = _highest_rate(members - true_positives, members, alpha / 2)
    fpr = _highest_rate(false_positives, non_members, alpha / 2)
    with np.errstate(divide="ignore"):
        forward = np.log(np.maximum(1 - fnr - delta, 0)) - np.log(fpr)
        backward = np.log(np.maximum(1 - fpr - delta, 0)) - np.log(fnr)
    better: NDArray[np.float64] = np.maximum(forward, backward)
    return better


def _highest_rate(count: NDArray[np.intp], trials: int, alpha: float) -> NDArray[np.float64]:
    """Clopper and Pearson 1934: the rate at which so few occur with probability α."""
    below = np.minimum(count, trials - 1)
    highest: NDArray[np.float64] = np.where(count < trials, betaincinv(below + 1, trials - below, 1 - alpha), 1.0)
    return highest


def _at_least(scores: NDArray[np.floating], thresholds: NDArray[np.floating]) -> NDArray[np.intp]:
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")


def _require_scores(scores: NDArray[np.floating], included: NDArray[np.bool_]) -> None:
    for name, array, kind, remedy in (
        ("scores", scores, np.floating, "give floating-point numbers [M]"),
        ("included", included, np.bool_, "give the coins as bool [M]"),
    ):
        if not (isinstance(array, np.ndarray) and array.ndim == 1 and np.issubdtype(array.dtype, kind)):
            found = (array.dtype, array.shape) if isinstance(array, np.ndarray) else type(array).__name__
            raise Unattackable(argument=name, value=found, remedy=remedy)
    if len(scores) != len(included) or len(scores) == 0:
        sizes = (len(scores), len(included))
        raise Unattackable(argument="scores, included", value=sizes, remedy="give one score and one coin a canary")
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise Unattackable(argument="scores", value=f"{bad} not finite", remedy="give finite scores")


def _require_guesses(guesses: Guesses, *, canaries: int) -> None:
    k_plus, k_minus = guesses
    _require_count(k_plus, argument="k₊", least=0, most=canaries)
    _require_count(k_minus, argument="k₋", least=0, most=canaries)
    _require_count(k_plus + k_minus, argument="k₊ + k₋", least=1, most=canaries)


def _require_counts(*, canaries: int, guesses: int, correct: int) -> None:
    _require_count(canaries, argument="canaries", least=1, most=None)
    _require_count(guesses, argument="guesses", least=1, most=canaries)
    _require_count(correct, argument="correct", least=0, most=guesses)


def _require_count(value: int, *, argument: str, least: int, most: int | None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise Unattackable(argument=argument, value=value, remedy=f"give an integer, {limits}")


def _require_delta(delta: float) -> None:
    if not 0 <= delta < 1:
        raise Unattackable(argument="delta", value=delta, remedy="give a value in [0, 1)")


def _require_confidence(confidence: float) -> None:
    if not 0.5 < confidence < 1:
        raise Unattackable(argument="confidence", value=confidence, remedy="give 1 - α in (0.5, 1), such as 0.95")
