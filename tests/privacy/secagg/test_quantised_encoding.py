from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from federation import SESSION, Sent, aggregate, names
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masking import looks_uniform, unrelated

from privacy.errors import InvalidPlan
from privacy.secagg.encoding import Block, Encoding, QuantisedEncoding, RingBits
from privacy.secagg.errors import EncodingRefused, TooFew
from privacy.secagg.masking import CipherName, add_masks
from privacy.secagg.rules import Rules

Bits = Literal[4, 8]

BLOCKS = (Block(name="a", shape=(3, 2), bound=0.5), Block(name="b", shape=(), bound=100.0))
ENCODING = QuantisedEncoding(blocks=BLOCKS, bits=4, parties=18, ring_bits=8)
RULES = Rules(min_survivors=2)
# The most parties for bits of a number and of the ring; a ring of 32 bits holds more than there are anywhere.
MOST: dict[tuple[Bits, RingBits], int] = {(4, 8): 18, (8, 8): 1, (4, 16): 4681, (8, 16): 258, (4, 32): 5000}
RINGS = st.sampled_from(sorted(MOST))


def encoding(bits: Bits, ring_bits: RingBits, parties: int, size: int = 6) -> QuantisedEncoding:
    block = Block(name="x", shape=(size,), bound=0.25)
    return QuantisedEncoding(blocks=(block,), bits=bits, parties=parties, ring_bits=ring_bits)


@given(
    ring=RINGS,
    data=st.data(),
    reals=st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=7, max_size=7)),
)
@settings(deadline=None, max_examples=200)
def test_the_sum_over_the_sites_is_that_of_their_whole_numbers(
    ring: tuple[Bits, RingBits], data: st.DataObject, reals: list[list[float]]
) -> None:
    bits, ring_bits = ring
    reals = (reals or [[0.0] * 7])[: MOST[ring]]
    parties = data.draw(st.integers(len(reals), MOST[ring]))
    schema = QuantisedEncoding(blocks=BLOCKS, bits=bits, parties=parties, ring_bits=ring_bits)
    values = [{"a": np.float32(row[:6]).reshape(3, 2), "b": np.float32(row[6])} for row in reals]
    integers = [schema.integers(value) for value in values]
    total = np.sum([schema.encode(each) for each in integers], axis=0, dtype=schema.dtype)
    signed = total.view(f"int{ring_bits}")
    np.testing.assert_array_equal(signed[:-1], np.sum(integers, axis=0))
    assert signed[-1] == len(reals)
    means, sites = schema.decode(total)
    assert sites == len(reals)
    for block in BLOCKS:
        clipped = [np.clip(np.asarray(v[block.name], np.float64), -block.bound, block.bound) for v in values]
        half = block.bound / schema.levels / 2
        assert np.abs(means[block.name] - np.mean(clipped, axis=0)).max() <= half * (1 + 1e-9)
        sent = [schema.values(each)[block.name] for each in integers]
        assert {each.dtype for each in sent} == {np.dtype(np.float32)}
        np.testing.assert_allclose(np.mean(sent, axis=0, dtype=np.float64), means[block.name], atol=half * 1e-4)


@given(ring=RINGS, data=st.data(), sign=st.sampled_from([-1, 1]))
@settings(deadline=None)
def test_no_sum_can_overflow(ring: tuple[Bits, RingBits], data: st.DataObject, sign: int) -> None:
    bits, ring_bits = ring
    parties = data.draw(st.integers(1, MOST[ring]) | st.just(MOST[ring]))
    schema = encoding(bits, ring_bits, parties)
    integers = schema.integers({"x": np.full(6, sign * 3e38, np.float32)})
    assert (integers == sign * schema.levels).all()
    total = np.multiply(schema.encode(integers), parties, dtype=schema.dtype, casting="unsafe")
    means, sites = schema.decode(total)
    assert sites == parties
    np.testing.assert_allclose(means["x"], sign * 0.25, rtol=1e-12)


@pytest.mark.parametrize(("bits", "ring_bits"), [(4, 8), (8, 8), (4, 16), (8, 16)])
def test_one_party_more_than_the_ring_holds_is_refused(bits: Bits, ring_bits: RingBits) -> None:
    most = MOST[bits, ring_bits]
    encoding(bits, ring_bits, most)
    with pytest.raises(InvalidPlan, match=f"ring_bits = {ring_bits}.*larger ring.* {most} parties"):
        encoding(bits, ring_bits, most + 1)
    overflown = (most + 1) * encoding(bits, ring_bits, most).levels
    assert overflown > 2 ** (ring_bits - 1) - 1, "refused for nothing"


@pytest.mark.parametrize("bits", [4, 8])
def test_whole_multiples_of_the_step_come_back_as_they_were(bits: Bits) -> None:
    schema = encoding(bits, 16, 3, size=2**bits - 1)
    every = np.arange(-schema.levels, schema.levels + 1)
    sent = schema.values(every)
    np.testing.assert_array_equal(schema.integers(sent), every)
    assert sent["x"].max() == 0.25
    means, _ = schema.decode(schema.encode(every))
    np.testing.assert_allclose(means["x"], sent["x"], rtol=1e-6)


def test_the_vector_has_the_ring_s_bytes_and_a_place_for_the_count() -> None:
    for ring_bits in (8, 16, 32):
        vector = replace(ENCODING, ring_bits=ring_bits).encode(np.zeros(7, np.int64))
        assert vector.nbytes == 8 * ring_bits // 8
        assert vector.tolist() == [0] * 7 + [1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block", ["a", "b"])
def test_what_is_not_finite_is_refused(bad: float, block: str) -> None:
    values = {"a": np.zeros((3, 2), np.float32), "b": np.zeros((), np.float32)}
    values[block] = np.full_like(values[block], bad)
    with pytest.raises(EncodingRefused, match=f"{block} = 'NaN or infinity'"):
        ENCODING.integers(values)


def test_other_arrays_than_declared_are_refused() -> None:
    values = {"a": np.zeros((3, 2)), "b": np.zeros(())}
    for wrong in (values | {"c": np.zeros(1)}, {"a": values["a"]}):
        with pytest.raises(EncodingRefused, match="declared"):
            ENCODING.integers(wrong)
    with pytest.raises(EncodingRefused, match="schema"):
        ENCODING.integers(values | {"a": np.zeros((2, 3))})


def test_numbers_that_are_not_the_schema_s_are_refused() -> None:
    for wrong in (np.zeros(8, np.int64), np.zeros(7), np.zeros(7, np.int32), np.zeros((7, 1), np.int64)):
        for take in (ENCODING.encode, ENCODING.values):
            with pytest.raises(EncodingRefused, match="give int64"):
                take(wrong)
    for beyond in (8, -8, -(2**63)):
        integers = np.zeros(7, np.int64)
        integers[3] = beyond
        for take in (ENCODING.encode, ENCODING.values):
            with pytest.raises(EncodingRefused, match="too large"):
                take(integers)


def test_totals_that_cannot_be_are_refused() -> None:
    for total in (np.zeros(7, np.uint8), np.zeros(8, np.uint16), np.zeros(8, np.int8)):
        with pytest.raises(EncodingRefused, match="total"):
            ENCODING.decode(total)
    for sites in (0, 19, 127, 128, 255):
        with pytest.raises(EncodingRefused, match="sites"):
            ENCODING.decode(np.array([0] * 7 + [sites], np.uint8))
    assert ENCODING.decode(np.array([7] * 7 + [1], np.uint8))[1] == 1
    for beyond in (8, 256 - 8):
        with pytest.raises(EncodingRefused, match="sites"):
            ENCODING.decode(np.array([7] * 6 + [beyond, 1], np.uint8))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"parties": 0}, "parties"),
        ({"parties": 2.0}, "parties"),
        ({"bits": 2}, "bits"),
        ({"ring_bits": 64}, "ring_bits"),
        ({"blocks": (BLOCKS[0], BLOCKS[0])}, "blocks"),
    ],
)
def test_impossible_schemas_are_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidPlan, match=named):
        replace(ENCODING, **change)  # type: ignore[arg-type]


def test_eight_bits_hold_no_real_numbers() -> None:
    with pytest.raises(InvalidPlan, match=r"ring_bits = 8.*16 or 32.*QuantisedEncoding"):
        Encoding(blocks=BLOCKS, parties=2, ring_bits=8)


# ---- masks and sessions in a ring of 8 bits


@pytest.mark.parametrize("cipher", ["aes", "chacha"])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 2**17, 2**17 + 32, 300_007])
def test_masks_of_bytes_are_the_cipher_s_own_stream(cipher: CipherName, size: int) -> None:
    key = bytes(range(32))
    algorithm = (
        Cipher(algorithms.AES256(key), modes.CTR(bytes(16)))
        if cipher == "aes"
        else Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None)
    )
    wanted = np.frombuffer(algorithm.encryptor().update(bytes(size)), np.uint8)
    vector = np.zeros(size, np.uint8)
    add_masks(vector, [(key, cipher, 1)])
    np.testing.assert_array_equal(vector, wanted)
    add_masks(vector, [(key, cipher, 1), (key, cipher, -1), (key, cipher, -1)])
    assert not vector.any()


def quantised_vectors(parties: tuple[str, ...], schema: QuantisedEncoding) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        party: rng.integers(-schema.levels, schema.levels + 1, schema.size - 1, dtype=np.int64) for party in parties
    }


@pytest.mark.parametrize(
    ("bits", "ring_bits", "count", "on_disk"), [(4, 8, 18, False), (4, 8, 3, True), (8, 16, 4, False)]
)
def test_masks_cancel_and_the_survivors_mean_is_decoded(
    bits: Bits, ring_bits: RingBits, count: int, on_disk: bool
) -> None:
    """With somebody gone at each stage if there are enough."""
    parties = names(count)
    schema = encoding(bits, ring_bits, count, size=1001)
    integers = quantised_vectors(parties, schema)
    stages = ("boxes", "masked", "signature", "revealed")
    silent = {stage: {parties[i]} for i, stage in enumerate(stages)} if count > 4 else {"masked": {parties[0]}}
    total, survived = aggregate(
        {party: schema.encode(integers[party]) for party in parties},
        rules=RULES,
        silent=silent,
        ring_bits=ring_bits,
        ciphers={parties[-1]: "chacha"},
        on_disk=on_disk,
    )
    assert len(survived) == (count - 2 if count > 4 else count - 1)
    means, sites = schema.decode(total)
    assert sites == len(survived)
    wanted = np.sum([integers[party] for party in survived], axis=0) * 0.25 / schema.levels / len(survived)
    np.testing.assert_allclose(means["x"], wanted, atol=1e-12)


def test_all_sites_at_their_bounds_do_not_wrap() -> None:
    parties = names(18)
    schema = encoding(4, 8, 18)
    most = schema.encode(np.full(6, -7, np.int64))
    total, _ = aggregate(dict.fromkeys(parties, most), rules=RULES, ring_bits=8)
    assert schema.decode(total)[0]["x"].tolist() == [-0.25] * 6


def test_with_too_few_left_nothing_is_decoded() -> None:
    parties = names(4)
    vectors = {party: encoding(4, 8, 4).encode(np.zeros(6, np.int64)) for party in parties}
    with pytest.raises(TooFew):
        aggregate(vectors, rules=RULES, silent={"revealed": set(parties[:2])}, ring_bits=8)


def test_masked_bytes_of_one_vector_look_uniform_and_have_nothing_in_common() -> None:
    parties = names(2)
    schema = encoding(4, 8, 2, size=400_003)
    vector = schema.encode(quantised_vectors(parties, schema)[parties[0]])
    # Four bytes a word: the test is for numbers that are nearly continuous.
    assert not looks_uniform(vector.view(np.uint32)), "a test that everything passes says nothing"
    first, second = Sent(), Sent()
    aggregate(dict.fromkeys(parties, vector), rules=RULES, ring_bits=8, sent=first)
    again = replace(SESSION, nonce="again")
    aggregate(dict.fromkeys(parties, vector), rules=RULES, ring_bits=8, sent=second, session=again)
    for party in parties:
        assert unrelated(first.masked[party].view(np.uint32), second.masked[party].view(np.uint32))
