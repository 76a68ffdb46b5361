from __future__ import annotations

import random

import pytest
import shamirs
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import InvalidPlan
from privacy.secagg.shamir import PRIME, SHARE_BYTES, combine, split

secret_bytes = st.binary(min_size=32, max_size=32)


def is_prime(n: int) -> bool:
    """Miller and Rabin, 40 rounds."""
    d, r = n - 1, 0
    while d % 2 == 0:
        d, r = d // 2, r + 1
    for _ in range(40):
        x = pow(random.Random(r).randrange(2, n - 1), d, n)
        if x in (1, n - 1):
            continue
        for _ in range(r - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def test_the_modulus_is_prime_and_holds_every_secret() -> None:
    assert is_prime(PRIME)
    assert not is_prime(PRIME - 2)
    assert PRIME > 2**256


@given(secret=secret_bytes, parties=st.integers(1, 20), data=st.data())
@settings(deadline=None)
def test_any_t_shares_recover_the_secret(secret: bytes, parties: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, parties))
    shares = dict(enumerate(split(secret, threshold=threshold, parties=parties), start=1))
    some = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert combine({number: shares[number] for number in some}) == secret


@given(secret=secret_bytes, parties=st.integers(2, 12), data=st.data())
@settings(deadline=None)
def test_fewer_than_t_fit_every_secret(secret: bytes, parties: int, data: st.DataObject) -> None:
    """Perfect secrecy: with one more share of one's choice, t-1 shares give any secret that one likes."""
    threshold = data.draw(st.integers(2, parties))
    shares = dict(enumerate(split(secret, threshold=threshold, parties=parties), start=1))
    known = {number: int.from_bytes(shares[number], "big") for number in range(1, threshold)}
    other = data.draw(st.integers(0, 2**256 - 1))
    last = _evaluated([(0, other), *known.items()], threshold)
    wrong = {x: y.to_bytes(SHARE_BYTES, "big") for x, y in known.items()} | {
        threshold: last.to_bytes(SHARE_BYTES, "big")
    }
    assert int.from_bytes(combine(wrong), "big") == other


def _evaluated(points: list[tuple[int, int]], at: int) -> int:
    total = 0
    for i, (xi, yi) in enumerate(points):
        term = yi
        for j, (xj, _) in enumerate(points):
            if i != j:
                term = term * (at - xj) * pow(xi - xj, -1, PRIME) % PRIME
        total = (total + term) % PRIME
    return total


@given(secret=secret_bytes, parties=st.integers(2, 12), data=st.data())
@settings(deadline=None, max_examples=30)
def test_another_library_recovers_what_we_split_and_we_what_it_splits(
    secret: bytes, parties: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, parties))
    ours = split(secret, threshold=threshold, parties=parties)
    theirs = [shamirs.share(i, int.from_bytes(y, "big"), PRIME) for i, y in enumerate(ours, start=1)]
    assert shamirs.interpolate(theirs[:threshold]) == int.from_bytes(secret, "big")
    dealt = shamirs.shares(int.from_bytes(secret, "big"), parties, modulus=PRIME, threshold=threshold)
    assert combine({s.index: s.value.to_bytes(SHARE_BYTES, "big") for s in dealt[:threshold]}) == secret


def test_what_is_no_share_is_refused() -> None:
    shares = dict(enumerate(split(bytes(32), threshold=2, parties=3), start=1))
    with pytest.raises(InvalidPlan, match="party 1"):
        combine(shares | {1: b"\xff" * SHARE_BYTES})
    with pytest.raises(InvalidPlan, match="party 1"):
        combine({})
    with pytest.raises(InvalidPlan, match="party 1"):
        combine({0: shares[1]})
    with pytest.raises(InvalidPlan, match="threshold"):
        split(bytes(32), threshold=4, parties=3)
    with pytest.raises(InvalidPlan, match="32 bytes"):
        split(bytes(31), threshold=2, parties=3)
