"""Whose images are attacked: members, whom the model was trained on, and held-outs, split by patient."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.audit.errors import Overlap, require

FEWEST_PATIENTS = 4  # of each kind: two in the tuning half and two in the report half


@dataclass(frozen=True, kw_only=True, eq=False)
class Population:
    """The images that an audit attacks, and who they belong to.

    Attributes:
        images: float32 [N, 1, *spatial] in [-1, 1].
        patient: int64 [N], index of an image's patient.
        member: bool [P], true for patients whom the model was trained on.
        site: int64 [P], index into ``sites``.
        sites: names of the sites.
        keys: [P], what tells a patient from all others: the pseudonym, which a site makes with a secret of its own.
            They decide the split and are written nowhere.

    Raises:
        Unattackable: shapes that do not fit, a patient without images, images that are not finite, or fewer than
            four members or held-outs.
        Overlap: a patient or an image on both sides of the split, or two patients under one key.
    """

    images: NDArray[np.float32]
    patient: NDArray[np.int64]
    member: NDArray[np.bool_]
    site: NDArray[np.int64]
    sites: tuple[str, ...]
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.keys)
        alike = self.images.ndim in (4, 5) and self.images.shape[:2] == (len(self.patient), 1)
        require(alike, "images", self.images.shape, "give float32 [N, 1, *spatial] with a patient for each")
        for name, values in (("member", self.member), ("site", self.site)):
            require(values.shape == (count,), name, values.shape, f"give one value for each of {count} keys")
        there = np.array_equal(np.unique(self.patient), np.arange(count))
        require(there, "patient", "not all of them have images", "leave out patients without an image")
        known = bool(np.isin(self.site, np.arange(len(self.sites))).all())
        require(known, "site", "beyond the list of sites", "give an index into sites")
        require(bool(np.isfinite(self.images).all()), "images", "not finite", "give finite images")
        for name, found in (("members", int(self.member.sum())), ("held-outs", int((~self.member).sum()))):
            require(
                found >= FEWEST_PATIENTS, name, found, f"an audit needs at least {FEWEST_PATIENTS} patients of each"
            )
        self._refuse_overlap()

    @property
    def sites_and_keys(self) -> list[tuple[str, str]]:
        """What tells a patient from all others across sites, [P]."""
        return [(self.sites[index], key) for index, key in zip(self.site, self.keys, strict=True)]

    def tuning_half(self, seed: int) -> NDArray[np.bool_]:
        """Patients on whom signs, timesteps and thresholds are chosen, bool [P]; the others are reported on.

        Half of each site's members and half of its held-outs, by SHA-256 of (seed, site, key): it depends on nothing
        else, so that sites that split for themselves split alike.
        """
        tuning = np.zeros(len(self.keys), dtype=np.bool_)
        names = self.sites_and_keys
        digests = [hashlib.sha256(f"{seed}\0{site}\0{key}".encode()).digest() for site, key in names]
        for site in range(len(self.sites)):
            for kind in (True, False):
                stratum = np.flatnonzero((self.site == site) & (self.member == kind)).tolist()
                ordered = sorted(stratum, key=lambda p: digests[p])
                tuning[ordered[: (len(ordered) + 1) // 2]] = True
        return tuning

    def _refuse_overlap(self) -> None:
        names = self.sites_and_keys
        twice = len(names) - len(set(names))
        if twice:
            raise Overlap(argument="keys", value=f"{twice} patients twice", remedy="each patient is on one side only")
        digests = [hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest() for image in self.images]
        of_members = self.member[self.patient]
        shared = {d for d, m in zip(digests, of_members, strict=True) if m} & {
            d for d, m in zip(digests, of_members, strict=True) if not m
        }
        if shared:
            raise Overlap(
                argument="images",
                value=f"{len(shared)} images of members equal images of held-outs",
                remedy="the two sides must have no scan in common: mend the cohort, then audit",
            )


def joined(populations: Sequence[Population]) -> Population:
    """The sites' populations as one; raises like :class:`Population`."""
    patients = np.cumsum([0, *(len(p.keys) for p in populations)])
    sites = np.cumsum([0, *(len(p.sites) for p in populations)])
    return Population(
        images=np.concatenate([p.images for p in populations]),
        patient=np.concatenate([p.patient + start for p, start in zip(populations, patients, strict=False)]),
        member=np.concatenate([p.member for p in populations]),
        site=np.concatenate([p.site + start for p, start in zip(populations, sites, strict=False)]),
        sites=tuple(name for p in populations for name in p.sites),
        keys=tuple(key for p in populations for key in p.keys),
    )
