"""Members and held-outs: the split, and the refusal of anything on both sides of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.audit.errors import Overlap, Unattackable
from privacy.audit.population import Population, joined


def population(members: int = 6, held_out: int = 5, *, site: str = "a", images: int = 2, seed: int = 0) -> Population:
    rng = np.random.default_rng(seed)
    patients = members + held_out
    return Population(
        images=rng.uniform(-1, 1, (patients * images, 1, 8, 8)).astype(np.float32),
        patient=np.repeat(np.arange(patients), images),
        member=np.arange(patients) < members,
        site=np.zeros(patients, dtype=np.int64),
        sites=(site,),
        keys=tuple(f"p{patient}" for patient in range(patients)),
    )


def test_a_shared_image_is_refused() -> None:
    one = population()
    images = one.images.copy()
    images[-1] = images[0]
    with pytest.raises(Overlap, match="1 images of members equal"):
        replace(one, images=images)


def test_the_same_image_twice_on_one_side_is_no_overlap() -> None:
    one = population()
    images = one.images.copy()
    images[1] = images[0]
    replace(one, images=images)


def test_a_patient_on_both_sides_is_refused() -> None:
    one = population()
    with pytest.raises(Overlap, match="1 patients twice"):
        replace(one, keys=("p0", *one.keys[:-1]))


def test_sites_may_use_the_same_pseudonym() -> None:
    both = joined([population(site="a"), population(site="b", seed=1)])
    assert both.sites == ("a", "b")
    assert len(both.keys) == 22
    assert np.array_equal(both.patient[-2:], [21, 21])
    assert both.site[-1] == 1


def test_the_same_scans_at_two_sites_are_refused_if_they_are_on_both_sides() -> None:
    first, second = population(site="a"), population(site="b")
    joined([first, second])  # twice a member, or twice held out
    with pytest.raises(Overlap, match="images of members equal images of held-outs"):
        joined([first, replace(second, member=~second.member)])


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"patient": np.zeros(22, dtype=np.int64)}, "patient"),
        ({"member": np.ones(11, dtype=np.bool_)}, "held-outs"),
        ({"member": np.zeros(11, dtype=np.bool_)}, "members"),
        ({"member": np.ones(3, dtype=np.bool_)}, "member"),
        ({"site": np.full(11, 4)}, "site"),
        ({"images": np.full((22, 1, 8, 8), np.nan, dtype=np.float32)}, "images"),
        ({"images": np.zeros((22, 8, 8), dtype=np.float32)}, "images"),
    ],
)
def test_what_cannot_be_attacked_is_refused(change: dict[str, object], argument: str) -> None:
    with pytest.raises(Unattackable) as caught:
        replace(population(), **change)  # type: ignore[arg-type]
    assert caught.value.argument == argument


@settings(max_examples=40, deadline=None)
@given(members=st.integers(4, 30), held_out=st.integers(4, 30), seed=st.integers(0, 1000))
def test_halves_are_halves_of_members_and_of_held_outs(members: int, held_out: int, seed: int) -> None:
    one = population(members, held_out, images=1)
    tuning = one.tuning_half(seed)
    for kind, count in ((True, members), (False, held_out)):
        assert tuning[one.member == kind].sum() == (count + 1) // 2


def test_a_site_splits_by_itself_as_all_sites_together_do() -> None:
    sites = [population(site="a"), population(7, 9, site="b", seed=1)]
    alone = np.concatenate([one.tuning_half(5) for one in sites])
    assert np.array_equal(alone, joined(sites).tuning_half(5))


def test_seeds_split_differently_and_the_order_of_patients_does_not_matter() -> None:
    one = population(20, 20)
    assert not np.array_equal(one.tuning_half(0), one.tuning_half(1))
    backwards = replace(
        one, patient=one.patient[::-1].copy(), images=one.images[::-1].copy(), keys=one.keys, member=one.member
    )
    assert np.array_equal(one.tuning_half(0), backwards.tuning_half(0))
