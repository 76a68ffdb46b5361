from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import InvalidPlan
from privacy.secagg.encoding import MOST_PARTIES_AT_16_BITS, Block, Encoding, IntegerEncoding, RingBits
from privacy.secagg.errors import EncodingRefused

BLOCKS = (Block(name="a", shape=(3, 2), bound=0.5), Block(name="b", shape=(), bound=100.0))
ENCODING = Encoding(blocks=BLOCKS, parties=3, max_weight=50.0)


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(0, 0.3, (3, 2)).astype(np.float32), "b": np.float32(rng.normal(0, 30))}


def clipped_mean(
    values: list[dict[str, np.ndarray]], weights: list[float], encoding: Encoding
) -> dict[str, np.ndarray]:
    """Slow and obvious: the weighted mean of the clipped values."""
    return {
        block.name: sum(
            min(w, encoding.max_weight) * np.clip(np.asarray(v[block.name], np.float64), -block.bound, block.bound)
            for v, w in zip(values, weights, strict=True)
        )
        / sum(min(w, encoding.max_weight) for w in weights)
        for block in encoding.blocks
    }


@given(
    parties=st.integers(2, 12),
    bits=st.sampled_from([16, 32]),
    seed=st.integers(0, 2**32 - 1),
    max_weight=st.floats(0.5, 1e5),
    data=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_the_decoded_mean_is_the_mean_of_the_clipped_values_within_the_bound(
    parties: int, bits: RingBits, seed: int, max_weight: float, data: st.DataObject
) -> None:
    if bits == 16 and parties > MOST_PARTIES_AT_16_BITS:
        parties = MOST_PARTIES_AT_16_BITS
    encoding = Encoding(blocks=BLOCKS, parties=parties, max_weight=max_weight, ring_bits=bits)
    present = data.draw(st.integers(1, parties))
    weights = data.draw(st.lists(st.floats(max_weight / 20, 2 * max_weight), min_size=present, max_size=present))
    values = [arrays(seed + i) for i in range(present)]
    total = np.zeros(encoding.size, encoding.dtype)
    for value, weight in zip(values, weights, strict=True):
        total += encoding.encode(value, weight=weight)
    means, weight = encoding.decode(total)
    used = sum(min(w, max_weight) for w in weights)
    assert weight == pytest.approx(used, abs=parties * max_weight / encoding.levels)
    for block in BLOCKS:
        limit = encoding.error_bound(block.bound, total_weight=used, parties=present)
        wanted = clipped_mean(values, weights, encoding)[block.name]
        assert np.abs(means[block.name] - wanted).max() <= limit
    if bits == 32:
        assert limit < 1e-4 * BLOCKS[-1].bound, "a bound that says nothing"


@given(parties=st.integers(1, 70_000), bits=st.sampled_from([16, 32]))
def test_no_sum_can_overflow(parties: int, bits: RingBits) -> None:
    if bits == 16 and parties > MOST_PARTIES_AT_16_BITS:
        with pytest.raises(InvalidPlan, match="ring_bits"):
            Encoding(blocks=BLOCKS, parties=parties, ring_bits=16)
        return
    encoding = Encoding(blocks=BLOCKS, parties=parties, ring_bits=bits)
    most = {"a": np.full((3, 2), 3e38, np.float32), "b": np.float32(-3e38)}
    vector = encoding.encode(most, weight=1e30).view(f"int{bits}").astype(object)
    largest = max(abs(int(v)) for v in vector)
    assert largest >= encoding.levels - 1
    assert parties * largest <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block", ["a", "b"])
def test_what_is_not_finite_is_refused(bad: float, block: str) -> None:
    values = arrays(0)
    values[block] = np.full_like(values[block], bad)
    with pytest.raises(EncodingRefused, match=f"{block} = 'NaN or infinity'"):
        ENCODING.encode(values, weight=1.0)


def test_other_arrays_than_declared_are_refused() -> None:
    for values in (arrays(0) | {"c": np.zeros(1)}, {"a": arrays(0)["a"]}):
        with pytest.raises(EncodingRefused, match="declared"):
            ENCODING.encode(values, weight=1.0)
    with pytest.raises(EncodingRefused, match="schema"):
        ENCODING.encode(arrays(0) | {"a": np.zeros((2, 3))}, weight=1.0)
    for weight in (0.0, -1.0, float("nan"), float("inf"), 3):
        with pytest.raises(EncodingRefused, match="weight"):
            ENCODING.encode(arrays(0), weight=weight)
    with pytest.raises(EncodingRefused, match="total"):
        ENCODING.decode(np.zeros(3, np.uint32))
    with pytest.raises(EncodingRefused, match="total weight"):
        ENCODING.decode(np.zeros(ENCODING.size, np.uint32))


@pytest.mark.parametrize("bits", [16, 32])
def test_encoding_onto_masks_is_encoding_and_adding(bits: RingBits) -> None:
    encoding = Encoding(blocks=(Block(name="long", shape=(200_003,), bound=0.5),), parties=3, ring_bits=bits)
    rng = np.random.default_rng(0)
    values = {"long": rng.normal(0, 0.3, 200_003).astype(np.float32)}
    masks = rng.integers(0, 2**bits, encoding.size, dtype=np.uint64).astype(encoding.dtype)
    wanted = masks + encoding.encode(values, weight=1.0)
    assert encoding.encode(values, weight=1.0, onto=masks) is masks
    np.testing.assert_array_equal(masks, wanted)
    for wrong in (masks[:-1], masks.astype(np.uint64)):
        with pytest.raises(EncodingRefused, match="onto"):
            encoding.encode(values, weight=1.0, onto=wrong)
    for place in (0, 70_000, 200_002):
        for bad in (np.nan, np.inf, -np.inf):
            spoilt = {"long": values["long"].copy()}
            spoilt["long"][place] = bad
            with pytest.raises(EncodingRefused, match="NaN or infinity"):
                encoding.encode(spoilt, weight=1.0, onto=masks)


@given(sites=st.integers(1, 5), seed=st.integers(0, 1000))
def test_integers_are_summed_as_they_are(sites: int, seed: int) -> None:
    encoding = IntegerEncoding(shapes=(("a", (3, 2)), ("b", ())), unit=0.25)
    rng = np.random.default_rng(seed)
    integers = rng.integers(-(2**31 // 5), 2**31 // 5, (sites, 7))
    total = np.sum([encoding.encode(one) for one in integers], axis=0, dtype=np.uint32)
    means, count = encoding.decode(total)
    assert count == sites
    np.testing.assert_allclose(means["a"].ravel(), integers[:, :6].sum(axis=0) * 0.25 / sites)
    np.testing.assert_allclose(means["b"], integers[:, 6].sum() * 0.25 / sites)


def test_what_are_no_integers_of_the_schema_is_refused() -> None:
    encoding = IntegerEncoding(shapes=(("a", (3,)),), unit=1.0)
    for wrong in (np.zeros(4, np.int64), np.zeros(3), np.zeros((3, 1), np.int64)):
        with pytest.raises(EncodingRefused, match="integers"):
            encoding.encode(wrong)
    for total in (np.zeros(3, np.uint32), np.zeros(4, np.uint16)):
        with pytest.raises(EncodingRefused, match="total"):
            encoding.decode(total)
    with pytest.raises(EncodingRefused, match="sites"):
        encoding.decode(np.zeros(4, np.uint32))


def test_the_weight_is_not_in_the_clear_but_in_the_vector() -> None:
    one, two = (ENCODING.encode(arrays(0), weight=w).view(np.int32).astype(float) for w in (10.0, 20.0))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6, atol=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"parties": 0}, "parties"),
        ({"max_weight": 0.0}, "max_weight"),
        ({"ring_bits": 64}, "ring_bits"),
        ({"blocks": (BLOCKS[0], BLOCKS[0])}, "blocks"),
    ],
)
def test_impossible_schemas_are_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidPlan, match=named):
        replace(ENCODING, **change)  # type: ignore[arg-type]
    with pytest.raises(InvalidPlan, match="bound"):
        Block(name="a", shape=(1,), bound=0.0)
