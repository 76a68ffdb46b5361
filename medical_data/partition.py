"""Spreading patients over sites for studies: always whole patients, every patient once, no site empty.

Each function returns the assignment as int64 [P]: the index of the site, 0 to S - 1, that holds patient p.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from medical_data.errors import MedicalDataError

Assignment = NDArray[np.int64]

# Dirichlet draws that leave a site empty are drawn again, as is usual (Li et al., ICDE 2022), this many
# times.
DIRICHLET_DRAWS = 1000


class PartitionRefused(MedicalDataError):
    """No partition of that kind gives every site a patient."""


def natural(origins: Sequence[Hashable]) -> Assignment:
    """Each patient stays where it comes from.

    Args:
        origins: [P] the hospital (scanner, study) of each patient; sites are numbered in order of appearance.

    Raises:
        PartitionRefused: there is no patient.
    """
    _check(patients=len(origins), sites=1)
    site_of: dict[Hashable, int] = {}
    return np.array([site_of.setdefault(origin, len(site_of)) for origin in origins], dtype=np.int64)


def iid(patients: int, *, sites: int, seed: int) -> Assignment:
    """Uniformly at random, sizes that differ by one at most.

    Raises:
        PartitionRefused: fewer patients than sites.
    """
    _check(patients=patients, sites=sites)
    return np.random.default_rng(seed).permutation(np.arange(patients, dtype=np.int64) % sites)


def dirichlet(labels: Sequence[Hashable], *, sites: int, alpha: float, seed: int) -> Assignment:
    """Skewed labels: each label is spread over the sites by proportions drawn from Dir(alpha).

    After Hsu, Qi & Brown 2019 (arXiv:1909.06335) with the label-wise draw of Li et al. 2022
    (arXiv:2102.02079). A small ``alpha`` gives sites of few labels, a large one approaches :func:`iid` in
    expectation.

    Args:
        labels: [P] the label of each patient.
        sites: number of sites.
        alpha: concentration, positive.
        seed: of the draws.

    Raises:
        PartitionRefused: fewer patients than sites, alpha not positive and finite, or no draw out of
            ``DIRICHLET_DRAWS`` gave every site a patient.
    """
    _check(patients=len(labels), sites=sites)
    if not (np.isfinite(alpha) and alpha > 0):
        raise PartitionRefused(attribute="alpha", value=alpha, remedy="give a positive concentration")
    rng = np.random.default_rng(seed)
    codes = natural(labels)
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    assignment = np.empty(len(labels), dtype=np.int64)
    for _ in range(DIRICHLET_DRAWS):
        for of_label in members:
            proportions = rng.dirichlet(np.full(sites, alpha))
            cuts = np.round(np.cumsum(proportions)[:-1] * of_label.size).astype(np.int64)
            assignment[rng.permutation(of_label)] = np.searchsorted(cuts, np.arange(of_label.size), side="right")
        if np.unique(assignment).size == sites:
            return assignment
    raise PartitionRefused(
        attribute="alpha",
        value=alpha,
        remedy=f"{DIRICHLET_DRAWS} draws left one of {sites} sites "
        f"empty: raise alpha, take fewer sites or more patients than {len(labels)}",
    )


def by_quantity(patients: int, *, fractions: Sequence[float], seed: int) -> Assignment:
    """Random patients, as many for each site as its fraction says (largest remainder), one at least.

    Args:
        patients: number of patients P.
        fractions: [S] share of each site, positive; scaled to sum to one. See :func:`power_law`.
        seed: of the draw.

    Raises:
        PartitionRefused: fewer patients than sites, or a fraction that is not positive and finite.
    """
    _check(patients=patients, sites=len(fractions))
    shares = np.asarray(fractions, dtype=float)
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise PartitionRefused(attribute="fractions", value=list(fractions), remedy="give positive numbers")
    # One patient a site beforehand; the quotas of the others are what is missing to the exact shares.
    missing = np.maximum(shares / shares.sum() * patients - 1.0, 0.0)
    rest = patients - len(shares)
    quotas = missing * (rest / missing.sum()) if rest else np.zeros(len(shares))
    counts = np.floor(quotas).astype(np.int64)
    by_remainder = np.argsort(counts - quotas, kind="stable")
    counts[by_remainder[: rest - counts.sum()]] += 1
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(shares), dtype=np.int64), counts + 1))


def power_law(sites: int, *, exponent: float) -> NDArray[np.float64]:
    """Shares of sites that fall like rank^-exponent (0 is equal): float64 [S] summing to one.

    Raises:
        PartitionRefused: no site, or an exponent that is negative or not finite.
    """
    _check(patients=sites, sites=sites)
    if not (np.isfinite(exponent) and exponent >= 0):
        raise PartitionRefused(attribute="exponent", value=exponent, remedy="give zero or a positive number")
    shares = np.arange(1, sites + 1, dtype=float) ** -exponent
    return np.asarray(shares / shares.sum())


def _check(*, patients: int, sites: int) -> None:
    if sites < 1:
        raise PartitionRefused(attribute="sites", value=sites, remedy="give one site at least")
    if patients < sites:
        raise PartitionRefused(attribute="patients", value=patients, remedy=f"{sites} sites need as many patients")
