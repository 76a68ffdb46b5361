from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from nvflare.apis.dxo import from_shareable
from torch import Tensor

from custom import tasks
from custom.aggregators.in_time_average import InTimeAverage
from custom.codec import masked_reply, reply_meta, to_torch, update_reply, wire_bytes
from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from custom.egress import EgressRefused, update_metrics
from custom.federation_config import PersonalConfig, RobustConfig, UpdatesConfig
from custom.filters.egress_gate import checked, passed
from custom.masked_vector import session_encoding, vector_forms
from custom.quantised import NUMBERS, SCALES, dequantised, packed_bytes, quantised
from custom.round_parts import every_update, update_shapes
from custom.secure_config import SecureAggregationConfig
from custom.stages import Span, stage_of
from custom.update_form import (
    BOUND_IN_RMS,
    FIRST_SHARE,
    LEAST_BOUND,
    few_bits,
    first_bounds,
    formed,
    may_stand_for,
    next_bounds,
    read,
)
from privacy.errors import InvalidPlan
from privacy.secagg.encoding import QuantisedEncoding, RingBits
from privacy.secagg.errors import EncodingRefused

Bits = Literal[4, 8]
METRICS = {"train_loss": 0.5, "held_out_loss": 0.4, "seconds": 1.0}
PARTS = (("conv_in.*", "down_blocks.*"), ("up_blocks.*", "out.*"))
SMALL: Shapes = {"w": (3, 5), "b": (2,), "a": ()}  # not sorted; odd sizes


def with_bits(
    experiment: ExperimentConfig,
    bits: Bits | None,
    *,
    ring: RingBits | None = None,
    parts: tuple[tuple[str, ...], ...] | None = None,
    robust: RobustConfig | None = None,
) -> ExperimentConfig:
    updates = None if bits is None and parts is None else UpdatesConfig(bits=bits, parts=parts)
    weighting: Literal["patients", "uniform"] = "patients" if ring is None and robust is None else "uniform"
    return replace(
        experiment,
        updates=updates,
        federation=replace(experiment.federation, weighting=weighting, robust=robust),
        secure_aggregation=None if ring is None else SecureAggregationConfig(ring_bits=ring),
    )


def difference(shapes: Shapes, seed: int = 0, scale: float = 0.01) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def bounds_of(shapes: Shapes, *values: float) -> NDArray[np.float32]:
    """Of every tensor, in the sorted order of names."""
    return np.resize(np.array(values, np.float32), len(shapes))


def same(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> None:
    assert set(one) == set(other)
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
        assert array.dtype == other[name].dtype


# ---- without few bits


def test_a_plain_update_leaves_as_it_is(experiment: ExperimentConfig) -> None:
    change = difference(SMALL)
    leaves = formed(change, {"w": torch.ones(3, 5)}, experiment)
    same(leaves.arrays, {name: tensor.numpy() for name, tensor in change.items()})
    assert leaves.lost == {}
    assert read(leaves.arrays, shapes=SMALL, config=experiment) is leaves.arrays


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_the_norm_is_bounded_over_all_tensors(experiment: ExperimentConfig, bits: Bits | None) -> None:
    config = with_bits(experiment, bits, robust=RobustConfig(clip_norm=0.5))
    change = difference(SMALL, scale=1.0)
    length = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in change.values()))
    assert length > 0.5
    leaves = formed(change, {}, config)
    sent = read(leaves.arrays, shapes=SMALL, config=config)
    step = 0.0 if bits is None else 0.5 / (2 ** (bits - 1) - 1)
    for name, tensor in change.items():
        np.testing.assert_allclose(sent[name], tensor.numpy() * 0.5 / length, atol=step / 2 + 1e-7)
    short = {name: tensor * 0.01 for name, tensor in change.items()}
    same(
        read(formed(short, {}, config).arrays, shapes=SMALL, config=config),
        read(formed(short, {}, with_bits(experiment, bits)).arrays, shapes=SMALL, config=config),
    )


# ---- few bits, plain


@pytest.mark.parametrize("bits", [4, 8])
def test_few_bits_arrive_in_the_average_as_what_they_stand_for(experiment: ExperimentConfig, bits: Bits) -> None:
    """A site's executor, its gate, the server's average."""
    config = with_bits(experiment, bits)
    shapes = update_shapes(config, 0)
    average, sums, total = InTimeAverage(shapes, config), dict[str, NDArray[Any]](), 0.0
    for site, weight in enumerate((3.0, 5.0)):
        change = difference(shapes, seed=site)
        leaves = formed(change, {}, config)
        reply = passed(update_reply(to_torch(leaves.arrays), weight=weight, metrics=METRICS), config)
        dxo = from_shareable(reply)
        assert {name: array.dtype for name, array in dxo.data.items()} == {NUMBERS: np.uint8, SCALES: np.float32}
        assert average.add(f"site {site}", dxo.data, reply_meta(dxo.meta)), average.refused
        stands_for = dequantised(leaves.arrays, shapes=shapes, bits=bits)
        for name, array in stands_for.items():
            sums[name] = sums.get(name, 0) + weight * array.astype(np.float64)
            largest = float(change[name].abs().max())
            assert np.abs(array - change[name].numpy()).max() <= 0.5001 * largest / (2 ** (bits - 1) - 1)
            np.testing.assert_allclose(leaves.lost[name].numpy(), change[name].numpy() - array, atol=1e-9)
        total += weight
    for name, array in average.mean().items():
        np.testing.assert_allclose(array, sums[name] / total, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [4, 8])
def test_few_bits_cost_an_eighth_or_a_quarter_and_a_scale_a_tensor(experiment: ExperimentConfig, bits: Bits) -> None:
    config = with_bits(experiment, bits)
    shapes = update_shapes(config, 0)
    change = difference(shapes)
    leaves, whole = formed(change, {}, config).arrays, formed(change, {}, experiment).arrays
    sent, plain = (sum(array.nbytes for array in arrays.values()) for arrays in (leaves, whole))
    assert plain == 4 * sum(math.prod(shape) for shape in shapes.values())
    assert sent == math.ceil(plain * bits / 32) + 4 * len(shapes)
    assert wire_bytes(leaves) < sent + 2048, "whatever the number of tensors"
    assert wire_bytes(whole) > plain + 256 * len(shapes)


@pytest.mark.parametrize("bits", [4, 8])
def test_of_parts_in_turn_each_passes_the_gate(experiment: ExperimentConfig, bits: Bits) -> None:
    """Of few bits no names leave: the gate knows a part by its size, and the server which one it has asked for."""
    config = with_bits(experiment, bits, parts=PARTS)
    shapes = [update_shapes(config, number) for number in range(2)]
    leaves = [formed(difference(each), {}, config).arrays for each in shapes]
    for number in range(2):
        passed(update_reply(to_torch(leaves[number]), weight=2.0, metrics=METRICS), config)
        average = InTimeAverage(shapes[number], config)
        assert not average.add("other part", leaves[1 - number], {"weight": 2.0, "metrics": METRICS})
        assert "must be a" in average.refused["other part"]
        assert average.add("its part", leaves[number], {"weight": 2.0, "metrics": METRICS}), average.refused
    refuse(formed(difference(shapes[0] | shapes[1]), {}, config).arrays, config)
    less = dict(list(shapes[0].items())[1:])
    refuse(formed(difference(less), {}, config).arrays, config)
    # As many numbers as a part has, and one tensor fewer.
    merged: Shapes = {"all": (sum(math.prod(shape) for shape in less.values()),)}
    first = next(iter(shapes[0].items()))
    assert packed_bytes({first[0]: first[1], **merged}, bits=bits) == packed_bytes(shapes[0], bits=bits)
    refuse(formed(difference({first[0]: first[1], **merged}), {}, config).arrays, config)


def refuse(arrays: Mapping[str, NDArray[Any]], config: ExperimentConfig) -> None:
    with pytest.raises(EgressRefused):
        passed(update_reply(to_torch(arrays), weight=2.0, metrics=METRICS), config)


def test_a_set_of_tensors_is_found_by_names_or_of_few_bits_by_sizes(experiment: ExperimentConfig) -> None:
    few, other = with_bits(experiment, 4), with_bits(experiment, 8)
    plain = {name: tensor.numpy() for name, tensor in difference(SMALL).items()}
    wire = quantised(plain, bits=4)
    assert may_stand_for(wire, SMALL, few)
    assert may_stand_for(plain, SMALL, experiment)
    assert not may_stand_for(wire, SMALL, other), "as many scales, twice the bytes"
    assert not may_stand_for(wire, SMALL, experiment)
    assert not may_stand_for(wire, SMALL | {"more": ()}, few)
    assert not may_stand_for(wire, {"w": (3, 5), "b": (3,)}, few)
    assert not may_stand_for(wire, {"w": (3, 5), "b": (4,), "a": ()}, few)
    assert not may_stand_for({NUMBERS: wire[NUMBERS]}, SMALL, few)
    assert not may_stand_for(wire | {"w": plain["w"]}, SMALL, few)
    assert not may_stand_for(plain, SMALL | {"more": ()}, experiment)


@pytest.mark.parametrize(("bits", "ring"), [(4, None), (8, None), (4, 8), (8, 16)])
def test_over_the_rounds_nothing_is_lost_but_what_is_still_owed(
    experiment: ExperimentConfig, bits: Bits, ring: RingBits | None
) -> None:
    config = with_bits(experiment, bits, ring=ring)
    bounds = None if ring is None else bounds_of(SMALL, 0.02)
    wanted = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SMALL.items()}
    sent = {name: np.zeros(shape) for name, shape in SMALL.items()}
    owed: dict[str, Tensor] = {}
    for number in range(12):
        change = difference(SMALL, seed=number)
        leaves = formed(change, owed, config, bounds)
        owed = leaves.lost
        for name, array in read(leaves.arrays, shapes=SMALL, config=config).items():
            wanted[name] += change[name].double()
            sent[name] += array
            np.testing.assert_allclose(sent[name] + owed[name].numpy(), wanted[name].numpy(), atol=1e-6)


def test_what_a_resting_part_owes_waits(experiment: ExperimentConfig) -> None:
    config = with_bits(experiment, 4)
    owed = {"w": torch.full((3, 5), 0.5), "rests": torch.ones(2)}
    leaves = formed(difference(SMALL), owed, config)
    assert set(leaves.lost) == {*SMALL, "rests"}
    assert leaves.lost["rests"] is owed["rests"]
    sent = read(leaves.arrays, shapes=SMALL, config=config)
    assert sent["w"].mean() > 0.4, "what was owed was sent"


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_does_not_leave(experiment: ExperimentConfig, bad: float, clip_norm: float | None) -> None:
    robust = None if clip_norm is None else RobustConfig(clip_norm=clip_norm)
    change = difference(SMALL)
    change["b"][1] = bad
    with np.errstate(invalid="ignore"), pytest.raises(EgressRefused, match="NaN"):
        formed(change, {}, with_bits(experiment, 8, robust=robust))
    with np.errstate(invalid="ignore"), pytest.raises((EgressRefused, EncodingRefused), match="NaN"):
        formed(change, {}, with_bits(experiment, 8, ring=16, robust=robust), bounds_of(SMALL, 1.0))


# ---- the gate


def float32_in_a_job_of_few_bits(experiment: ExperimentConfig) -> tuple[ExperimentConfig, dict[str, Any]]:
    config = with_bits(experiment, 8)
    return config, {name: tensor.numpy() for name, tensor in difference(update_shapes(config, 0)).items()}


def few_bits_in_a_plain_job(experiment: ExperimentConfig) -> tuple[ExperimentConfig, dict[str, Any]]:
    return experiment, dict(formed(difference(update_shapes(experiment, 0)), {}, with_bits(experiment, 8)).arrays)


def of_eight_bits_in_a_job_of_four(experiment: ExperimentConfig) -> tuple[ExperimentConfig, dict[str, Any]]:
    config = with_bits(experiment, 4)
    return config, dict(formed(difference(update_shapes(config, 0)), {}, with_bits(experiment, 8)).arrays)


def without_scales(experiment: ExperimentConfig) -> tuple[ExperimentConfig, dict[str, Any]]:
    config = with_bits(experiment, 4)
    arrays = dict(formed(difference(update_shapes(config, 0)), {}, config).arrays)
    del arrays[SCALES]
    return config, arrays


def without_numbers(experiment: ExperimentConfig) -> tuple[ExperimentConfig, dict[str, Any]]:
    config = with_bits(experiment, 4)
    arrays = dict(formed(difference(update_shapes(config, 0)), {}, config).arrays)
    del arrays[NUMBERS]
    return config, arrays


def under_the_names_of_tensors(experiment: ExperimentConfig) -> tuple[ExperimentConfig, dict[str, Any]]:
    config = with_bits(experiment, 4)
    shapes = update_shapes(config, 0)
    arrays = dict(formed(difference(shapes), {}, config).arrays)
    packed = {name: np.zeros(packed_bytes({name: shape}, bits=4), np.uint8) for name, shape in shapes.items()}
    return config, packed | {SCALES: arrays[SCALES]}


def with_one_more_array(experiment: ExperimentConfig) -> tuple[ExperimentConfig, dict[str, Any]]:
    config = with_bits(experiment, 4)
    arrays = dict(formed(difference(update_shapes(config, 0)), {}, config).arrays)
    return config, arrays | {"patient": np.zeros(3, np.float32)}


def with_a_scale_that_is_no_number(experiment: ExperimentConfig) -> tuple[ExperimentConfig, dict[str, Any]]:
    config = with_bits(experiment, 4)
    arrays = dict(formed(difference(update_shapes(config, 0)), {}, config).arrays)
    arrays[SCALES] = np.full_like(arrays[SCALES], np.nan)
    return config, arrays


def longer_than_the_job_allows(experiment: ExperimentConfig) -> tuple[ExperimentConfig, dict[str, Any]]:
    config = with_bits(experiment, 4)
    return config, dict(formed(difference(update_shapes(config, 0), scale=1e3), {}, config).arrays)


def with_one_more_tensor(experiment: ExperimentConfig) -> tuple[ExperimentConfig, dict[str, Any]]:
    config = with_bits(experiment, 4)
    return config, dict(formed(difference(update_shapes(config, 0) | {"patient": (3,)}), {}, config).arrays)


@pytest.mark.parametrize(
    "made",
    [
        float32_in_a_job_of_few_bits,
        few_bits_in_a_plain_job,
        of_eight_bits_in_a_job_of_four,
        without_scales,
        without_numbers,
        under_the_names_of_tensors,
        with_one_more_array,
        with_a_scale_that_is_no_number,
        longer_than_the_job_allows,
        with_one_more_tensor,
    ],
)
def test_the_gate_and_the_server_refuse_what_the_job_does_not_send(
    experiment: ExperimentConfig, made: Callable[[ExperimentConfig], tuple[ExperimentConfig, dict[str, Any]]]
) -> None:
    config, arrays = made(experiment)
    with pytest.raises(EgressRefused):
        passed(update_reply(to_torch(arrays), weight=2.0, metrics=METRICS), config)
    average = InTimeAverage(update_shapes(config, 0), config)
    assert not average.add("a", arrays, {"weight": 2.0, "metrics": METRICS})
    assert "a" in average.refused


# ---- few bits under masks


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    sites=st.integers(1, 18),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_under_masks_what_leaves_is_held_exactly_and_the_sum_is_the_mean_of_it(
    experiment: ExperimentConfig, bits: Bits, sites: int, scale: float, seed: int
) -> None:
    ring: RingBits = 8 if bits == 4 else 16
    config = with_bits(experiment, bits, ring=ring)
    bounds = bounds_of(SMALL, scale, 0.37 * scale, 2.9 * scale)
    schema = few_bits(SMALL, config, bounds, parties=sites)
    total, sent = np.zeros(schema.size, schema.dtype), []
    for site in range(sites):
        leaves = formed(difference(SMALL, seed=seed + site, scale=scale), {}, config, bounds)
        assert all(array.dtype == np.float32 for array in leaves.arrays.values())
        whole = schema.integers(leaves.arrays)
        same(schema.values(whole), leaves.arrays)
        total += schema.encode(whole)
        sent.append(leaves.arrays)
    means, count = schema.decode(total)
    assert count == sites
    for name, mean in means.items():
        expected = np.mean([arrays[name].astype(np.float64) for arrays in sent], axis=0)
        np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-6 * scale)


def test_bounds_are_those_of_the_names_in_sorted_order_and_what_lies_beyond_is_owed(
    experiment: ExperimentConfig,
) -> None:
    config = with_bits(experiment, 4, ring=8)
    bounds = np.array([0.7, 0.07, 0.007], np.float32)  # of a, b, w
    change = {"w": torch.full((3, 5), 0.01), "b": torch.tensor([0.05, -0.02]), "a": torch.tensor(-9.0)}
    leaves = formed(change, {}, config, bounds)
    np.testing.assert_allclose(leaves.arrays["a"], -0.7, rtol=1e-6)
    np.testing.assert_allclose(leaves.arrays["b"], [0.05, -0.02], rtol=1e-5)
    np.testing.assert_allclose(leaves.arrays["w"], 0.007, rtol=1e-6)
    np.testing.assert_allclose(leaves.lost["a"], -8.3, rtol=1e-6)
    np.testing.assert_allclose(leaves.lost["w"], 0.003, rtol=1e-4)


@pytest.mark.parametrize(
    "bounds",
    [
        np.ones(2, np.float32),
        np.ones(4, np.float32),
        np.ones((3, 1), np.float32),
        np.ones(3, np.float64),
        np.ones(3, np.int32),
        [1.0, 1.0, 1.0],
        np.array([1.0, 0.0, 1.0], np.float32),
        np.array([1.0, -1.0, 1.0], np.float32),
        np.array([1.0, np.nan, 1.0], np.float32),
        np.array([1.0, np.inf, 1.0], np.float32),
        None,
    ],
    ids=str,
)
def test_bounds_that_are_none_are_refused(experiment: ExperimentConfig, bounds: Any) -> None:
    with pytest.raises(EgressRefused, match="bounds"):
        formed(difference(SMALL), {}, with_bits(experiment, 4, ring=8), bounds)


def test_more_sites_than_the_ring_holds_are_refused(experiment: ExperimentConfig) -> None:
    few_bits(SMALL, with_bits(experiment, 4, ring=8), None, parties=18)
    with pytest.raises(InvalidPlan, match="18 parties"):
        few_bits(SMALL, with_bits(experiment, 4, ring=8), None, parties=19)


def test_the_first_bounds_are_a_share_of_the_way_that_adamw_can_go(experiment: ExperimentConfig) -> None:
    stage, span = stage_of(experiment, 0), Span(first=1, steps=4)
    rates = sum(stage.learning_rate(step) for step in (1, 2, 3, 4))
    bounds = first_bounds(SMALL, stage, span)
    assert set(bounds) == set(SMALL)
    for bound in bounds.values():
        assert float(bound) == pytest.approx(FIRST_SHARE * rates)
        assert bound > 0


def test_the_next_bounds_are_of_the_mean_s_size(experiment: ExperimentConfig) -> None:
    mean = {
        "w": np.array([[3e-3, -4e-3]], np.float32),
        "zero": np.zeros(5, np.float32),
        "huge": np.full(2, 1e30, np.float32),
    }
    bounds = next_bounds(mean)
    assert float(bounds["w"]) == pytest.approx(BOUND_IN_RMS * math.sqrt(12.5e-6))
    assert float(bounds["zero"]) == pytest.approx(LEAST_BOUND)
    assert float(bounds["huge"]) == pytest.approx(4e30)
    in_order = np.array([float(bounds[name]) for name in sorted(mean)], np.float32)
    shapes = {name: array.shape for name, array in mean.items()}
    few_bits(shapes, with_bits(experiment, 4, ring=8), in_order, parties=2)


def test_under_masks_few_bits_have_no_metrics_beside_them(experiment: ExperimentConfig) -> None:
    config = with_bits(experiment, 4, ring=8)
    assert update_metrics(config) == frozenset()
    assert update_metrics(with_bits(experiment, 4)) == set(METRICS)
    assert update_metrics(with_bits(experiment, None, ring=16)) == set(METRICS)
    shapes = update_shapes(config, 0)
    leaves = formed(difference(shapes), {}, config, bounds_of(shapes, 0.01))
    checked(update_reply(to_torch(leaves.arrays), weight=1.0, metrics={}), config)
    with pytest.raises(EgressRefused, match="metric"):
        checked(update_reply(to_torch(leaves.arrays), weight=1.0, metrics=METRICS), config)
    with pytest.raises(EgressRefused, match="weight"):
        checked(update_reply(to_torch(leaves.arrays), weight=2.0, metrics={}), config)


@pytest.mark.parametrize(("bits", "ring"), [(4, 8), (4, 16), (8, 16), (8, 32)])
def test_an_update_has_the_ring_of_the_job_and_the_figures_have_one_that_holds_them(
    experiment: ExperimentConfig, bits: Bits, ring: RingBits
) -> None:
    config = with_bits(experiment, bits, ring=ring, parts=PARTS)
    evaluate = session_encoding(config, tasks.EVALUATE, 0, parties=3)
    sizes = [1 + sum(math.prod(shape) for shape in update_shapes(config, number).values()) for number in range(2)]
    assert vector_forms(config) == {*((size, ring) for size in sizes), (evaluate.size, 32)}
    assert len(every_update(config)) == 2
    train = session_encoding(config, tasks.TRAIN, 1, parties=3, bounds=bounds_of(update_shapes(config, 1), 0.1))
    assert isinstance(train, QuantisedEncoding)
    assert (train.size, train.dtype, train.bits) == (sizes[1], np.dtype(f"uint{ring}"), bits)


def test_without_few_bits_all_vectors_have_the_job_s_ring(experiment: ExperimentConfig) -> None:
    config = with_bits(experiment, None, ring=16, parts=PARTS)
    assert {ring for _, ring in vector_forms(config)} == {16}
    assert len(vector_forms(config)) == 3


def test_figures_of_personal_models_have_room_in_the_vector(experiment: ExperimentConfig) -> None:
    config = with_bits(experiment, 4, ring=8)
    plain = session_encoding(config, tasks.EVALUATE, 0, parties=2).size
    more = session_encoding(replace(config, personal=PersonalConfig()), tasks.EVALUATE, 0, parties=2).size
    assert more == plain + 4  # two figures, and whether each is there


def test_a_masked_job_of_four_bits_lets_ring_vectors_leave_and_nothing_else(experiment: ExperimentConfig) -> None:
    config = with_bits(experiment, 4, ring=8)
    shapes = update_shapes(config, 0)
    bounds = bounds_of(shapes, 0.01)
    leaves = formed(difference(shapes), {}, config, bounds)
    schema = few_bits(shapes, config, bounds, parties=2)
    masks = np.random.default_rng(0).integers(0, 256, schema.size, np.uint8)
    vector = schema.encode(schema.integers(leaves.arrays)) + masks
    assert vector.dtype == np.uint8
    assert from_shareable(passed(masked_reply(vector), config)).data["masked"] is vector
    (figures,) = (size for size, ring in vector_forms(config) if ring == 32)
    passed(masked_reply(np.zeros(figures, np.uint32)), config)
    for bad in (
        vector[:-1],
        vector.astype(np.uint16),
        vector.astype(np.uint32),
        vector.view(np.int8),
        vector.astype(np.float32),
        np.zeros(figures, np.uint8),
        np.zeros(schema.size, np.uint32),
        vector[None],
        vector.tolist(),
    ):
        with pytest.raises(EgressRefused, match="masked vector"):
            passed(masked_reply(bad), config)
    for arrays in (leaves.arrays, quantised(leaves.arrays, bits=4)):  # without a mask
        with pytest.raises(EgressRefused, match="mask"):
            passed(update_reply(to_torch(arrays), weight=1.0, metrics={}), config)
