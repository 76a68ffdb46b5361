from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from custom.codec import wire_bytes
from custom.egress import EgressRefused, check_masked
from custom.quantised import NUMBERS, SCALES, Bits, dequantised, fed_back, lost, packed_bytes, quantised

SHAPES = {"w": (3, 5), "b": (3,), "a": ()}  # not sorted; 19 numbers, of which b's begin in a byte's upper half
Arrays = dict[str, np.ndarray]
BITS = st.sampled_from([4, 8])


def update(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(0, 0.01, shape), np.float32) for name, shape in SHAPES.items()}


def through(arrays: Arrays, bits: Bits) -> Arrays:
    shapes = {name: array.shape for name, array in arrays.items()}
    return dequantised(quantised(arrays, bits=bits), shapes=shapes, bits=bits)


@given(
    bits=BITS,
    array=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
        | st.floats(-(2.0**-140), 2.0**-140, width=32),
    ),
)
@settings(deadline=None, max_examples=300)
def test_what_comes_back_is_within_half_a_step(bits: Bits, array: np.ndarray) -> None:
    wire = quantised({"x": array}, bits=bits)
    back = dequantised(wire, shapes={"x": array.shape}, bits=bits)["x"]
    assert type(back) is np.ndarray
    assert (back.dtype, back.shape) == (np.float32, array.shape)
    step = np.abs(array.astype(np.float64)).max(initial=0) / (2 ** (bits - 1) - 1)
    assert np.abs(back).max(initial=0) <= np.abs(array).max(initial=0)
    # float32 rounds scale, quotient and product; its least number is 2^-149.
    assert np.abs(back.astype(np.float64) - array).max(initial=0) <= step / 2 * (1 + 1e-4) + 128 * 2.0**-149


@pytest.mark.parametrize("bits", [4, 8])
def test_every_whole_number_comes_back_and_zeros_stay_zeros(bits: Bits) -> None:
    levels = 2 ** (bits - 1) - 1
    arrays = {"x": np.arange(-levels, levels + 1, dtype=np.float32) / 8, "zero": np.zeros((2, 3), np.float32)}
    back = through(arrays, bits)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
    assert quantised(arrays, bits=bits)[SCALES].tolist() == [0.125, 0.0]


@given(bits=BITS, value=st.floats(2.0**120, float(np.finfo(np.float32).max), width=32))
def test_the_largest_numbers_stay_finite(bits: Bits, value: float) -> None:
    back = through({"x": np.float32([value, -value])}, bits)["x"]
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back, [value, -value], rtol=1e-6)


def test_two_numbers_share_a_byte_the_first_in_the_low_half() -> None:
    wire = quantised({"x": np.float32([7, -1, -7])}, bits=4)
    assert wire[NUMBERS].tolist() == [0xF7, 0x09]
    assert quantised({"x": np.float32([127, -1, -127])}, bits=8)[NUMBERS].tolist() == [127, 255, 129]


def test_tensors_follow_each_other_in_the_sorted_order_of_names_also_within_a_byte() -> None:
    """The slow obvious reference: a number at a time."""
    arrays = update(5)
    for bits in (4, 8):
        wire, places = quantised(arrays, bits=bits), []
        for name, scale in zip(sorted(arrays), wire[SCALES], strict=True):
            places += [int(np.rint(value / scale)) for value in arrays[name].reshape(-1)]
        if bits == 8:
            expected = [place % 256 for place in places]
        else:
            halves = [place % 16 for place in places] + [0]
            expected = [halves[at] + 16 * halves[at + 1] for at in range(0, len(places), 2)]
        assert wire[NUMBERS].tolist() == expected
        assert list(through(arrays, bits)) == list(SHAPES), "and come back in the order of shapes"


@pytest.mark.parametrize("bits", [4, 8])
def test_the_bytes_are_an_eighth_or_a_quarter_and_a_scale_a_tensor(bits: Bits) -> None:
    arrays = {name: np.ones((64, 33), np.float32) for name in ("x", "y", "z")}
    wire = quantised(arrays, bits=bits)
    assert set(wire) == {NUMBERS, SCALES}
    assert wire[NUMBERS].nbytes * 32 == bits * sum(array.nbytes for array in arrays.values())
    assert wire[SCALES].nbytes == 4 * len(arrays)
    assert (wire[NUMBERS].dtype, wire[NUMBERS].ndim) == (np.uint8, 1)


@given(
    bits=BITS,
    sizes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=9),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_packed_bytes_are_those_of_the_numbers_and_tensors_do_not_mix(
    bits: Bits, sizes: list[list[int]], seed: int
) -> None:
    """Each tensor comes back as it does alone, whatever stands before it in a byte."""
    rng, shapes = np.random.default_rng(seed), {f"t{place}": tuple(shape) for place, shape in enumerate(sizes)}
    arrays = {name: np.asarray(rng.normal(0, 10.0 ** rng.integers(-5, 5), s), np.float32) for name, s in shapes.items()}
    assert packed_bytes(shapes, bits=bits) == quantised(arrays, bits=bits)[NUMBERS].size
    together = through(arrays, bits)
    for name, array in arrays.items():
        np.testing.assert_array_equal(together[name], through({name: array}, bits)[name])


@pytest.mark.parametrize("bits", [4, 8])
def test_what_the_wire_adds_does_not_grow_with_the_tensors(bits: Bits) -> None:
    """As many arrays as tensors cost half a kilobyte each."""
    over = {}
    for count in (1, 300):
        wire = quantised({f"layer.{place}": np.ones(1000, np.float32) for place in range(count)}, bits=bits)
        over[count] = wire_bytes(wire) - sum(array.nbytes for array in wire.values())
    assert 0 < over[1] < 2048
    assert abs(over[300] - over[1]) < 64


def test_scales_stand_in_the_sorted_order_of_names() -> None:
    arrays = {"w": np.float32([7.0]), "a": np.float32([14.0])}
    wire = quantised(arrays, bits=4)
    assert wire[SCALES].tolist() == [2.0, 1.0]
    assert list(through(arrays, 4)) == ["w", "a"]


@given(bits=BITS, rounds=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_over_the_rounds_nothing_is_lost_but_the_last_residual(bits: Bits, rounds: int, seed: int) -> None:
    total, arrived = (dict.fromkeys(SHAPES, 0.0) for _ in range(2))
    residual: Arrays = {}
    for round_number in range(rounds):
        difference = update(seed + round_number)
        wanted = fed_back(difference, residual)
        sent = through(wanted, bits)
        residual = lost(wanted, sent)
        for name in SHAPES:
            total[name] = total[name] + difference[name].astype(np.float64)
            arrived[name] = arrived[name] + sent[name].astype(np.float64)
    for name, shape in SHAPES.items():
        assert type(residual[name]) is np.ndarray
        assert (residual[name].dtype, residual[name].shape) == (np.float32, shape)
        np.testing.assert_allclose(arrived[name] + residual[name], total[name], atol=1e-7)


def test_with_the_feedback_small_differences_arrive_and_without_they_do_not() -> None:
    """Beside a large number a small one is rounded to zero in every round."""
    difference = {"x": np.float32([1.0, 0.05])}
    without, arrived, residual = np.zeros(2), np.zeros(2), {}
    for _ in range(100):
        without += through(difference, 4)["x"]
        wanted = fed_back(difference, residual)
        sent = through(wanted, 4)
        residual = lost(wanted, sent)
        arrived += sent["x"]
    assert without[1] == 0
    np.testing.assert_allclose(arrived, [100.0, 5.0], atol=0.1)


def test_a_residual_waits_until_its_tensor_is_sent_again() -> None:
    residual = {"w": np.float32([1.0]), "b": np.float32([2.0])}
    wanted = fed_back({"w": np.float32([0.5]), "new": np.float32([3.0])}, residual)
    assert {name: array.tolist() for name, array in wanted.items()} == {"w": [1.5], "new": [3.0]}
    residual |= lost(wanted, {"w": np.float32([1.25])})
    assert {name: array.tolist() for name, array in residual.items()} == {"w": [0.25], "b": [2.0]}


def test_another_model_s_residual_is_refused() -> None:
    with pytest.raises(ValueError, match=r"residual of 'w'.*\(1,\).*\(2,\).*drop it"):
        fed_back({"w": np.zeros(2, np.float32)}, {"w": np.zeros(1, np.float32)})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_sent(bad: float) -> None:
    arrays = update(0)
    arrays["w"][1, 1] = bad
    with pytest.raises(EgressRefused, match="'w': holds NaN or infinity"):
        quantised(arrays, bits=8)


def put(name: str, value: Any) -> Callable[[Arrays], object]:
    return lambda wire: wire.update({name: value})


def set_at(name: str, place: int, value: float) -> Callable[[Arrays], object]:
    return lambda wire: wire[name].__setitem__(place, value)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (put("more", np.zeros(1, np.uint8)), "must be 'numbers' and 'scales'; 1 entries beside them"),
        (lambda wire: wire.pop(NUMBERS), "must be 'numbers' and 'scales'; 0 entries"),
        (lambda wire: wire.pop(SCALES), "must be 'numbers' and 'scales'; 0 entries"),
        (put(NUMBERS, [0] * 19), "numbers: must be a uint8"),
        (lambda wire: wire.update(numbers=wire[NUMBERS].view(np.int8)), "numbers: must be a uint8"),
        (lambda wire: wire.update(numbers=wire[NUMBERS].astype(np.float32)), "numbers: must be a uint8"),
        (lambda wire: wire.update(numbers=wire[NUMBERS][:-1]), "numbers: must be a uint8"),
        (lambda wire: wire.update(numbers=np.append(wire[NUMBERS], np.uint8(0))), "numbers: must be a uint8"),
        (lambda wire: wire.update(numbers=wire[NUMBERS][None]), "numbers: must be a uint8"),
        (put(SCALES, [1.0, 1.0, 1.0]), "scales: must be a float32"),
        (lambda wire: wire.update(scales=wire[SCALES].astype(np.float64)), "scales: must be a float32"),
        (lambda wire: wire.update(scales=wire[SCALES][:2]), "scales: must be a float32"),
        (set_at(SCALES, 0, np.nan), "scales: must be finite"),
        (set_at(SCALES, 1, np.inf), "scales: must be finite"),
        (set_at(SCALES, 2, -1e-9), "scales: must be finite"),
        (set_at(SCALES, 0, np.nextafter(np.float32(3.4028235e38 / 7), np.float32(np.inf))), "scales: must be finite"),
        (set_at(SCALES, 2, 0.0), "'w': numbers under a scale of zero"),
    ],
)
def test_what_quantised_cannot_have_made_is_refused(spoil: Callable[[Arrays], object], said: str, bits: Bits) -> None:
    wire = quantised(update(0), bits=bits)
    dequantised(wire, shapes=SHAPES, bits=bits)
    spoil(wire)
    with pytest.raises(EgressRefused, match=said):
        dequantised(wire, shapes=SHAPES, bits=bits)


@pytest.mark.parametrize(
    ("bits", "byte", "said"),
    [(8, 0x80, "hold -128"), (4, 0x08, "hold -8"), (4, 0x81, "must be zero"), (4, 0x11, "must be zero")],
)
def test_codes_that_no_rounding_makes_are_refused(bits: Bits, byte: int, said: str) -> None:
    """The last byte of 19 numbers; at 4 bits its upper half is empty."""
    wire = quantised(update(0), bits=bits)
    wire[NUMBERS][-1] = byte
    with pytest.raises(EgressRefused, match=f"numbers.*{said}"):
        dequantised(wire, shapes=SHAPES, bits=bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_made_of_other_tensors_is_refused(bits: Bits) -> None:
    for shapes in ({"w": (3, 5), "b": (4,)}, {"w": (3, 5), "b": (3,)}, SHAPES | {"more": (2,)}, SHAPES | {"b": (5,)}):
        wire = quantised({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, bits=bits)
        with pytest.raises(EgressRefused, match=r"(numbers|scales): must be"):
            dequantised(wire, shapes=SHAPES, bits=bits)


def test_a_refusal_names_no_unknown_name() -> None:
    wire = quantised(update(0), bits=8) | {"John Doe": np.zeros(1, np.uint8)}
    with pytest.raises(EgressRefused) as refused:
        dequantised(wire, shapes=SHAPES, bits=8)
    assert "John" not in str(refused.value)


def test_masked_bytes_may_leave_in_a_ring_of_eight_bits_only() -> None:
    check_masked(np.zeros(9, np.uint8), forms={(9, 8)})
    for wrong in (np.zeros(9, np.int8), np.zeros(9, np.uint16), np.zeros(8, np.uint8), bytes(9)):
        with pytest.raises(EgressRefused, match="unsigned integers of the ring, 9 of 8 bits"):
            check_masked(wrong, forms={(9, 8)})
    with pytest.raises(EgressRefused, match="16 bits"):
        check_masked(np.zeros(9, np.uint8), forms={(9, 16)})
