from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply

from custom.audit_config import AuditConfig
from custom.audit_counts import AUDIT_TASKS, audit_shapes
from custom.codec import counts_reply, metrics_reply, to_torch, update_reply
from custom.config import ExperimentConfig
from custom.diffusion.networks import Shapes
from custom.egress import (
    BUDGET_SPENT,
    EVALUATION_METRICS,
    MEAN_IMAGE,
    POLICY_CODES,
    EgressRefused,
    check_metrics,
    check_update,
    mean_image_shape,
    statistics_that_leave,
)
from custom.filters.egress_gate import passed
from custom.stages import model_shapes

Arrays = dict[str, Any]


@pytest.fixture
def shapes(experiment: ExperimentConfig) -> Shapes:
    return model_shapes(experiment)


@pytest.fixture
def arrays(shapes: Shapes) -> Arrays:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.01, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def meta() -> dict[str, Any]:
    return {"weight": 4.0, "metrics": {"train_loss": 0.5, "held_out_loss": 0.4, "seconds": 1.0}}


def first(arrays: Arrays) -> str:
    return next(iter(arrays))


def with_nan(arrays: Arrays) -> None:
    arrays[first(arrays)].flat[0] = np.nan


def with_infinity(arrays: Arrays) -> None:
    arrays[first(arrays)].flat[-1] = np.inf


def with_extra(arrays: Arrays) -> None:
    arrays["patient"] = np.zeros(3, np.float32)


def without_one(arrays: Arrays) -> None:
    del arrays[first(arrays)]


def misshapen(arrays: Arrays) -> None:
    arrays[first(arrays)] = arrays[first(arrays)][:-1]


def in_double(arrays: Arrays) -> None:
    arrays[first(arrays)] = arrays[first(arrays)].astype(np.float64)


def as_list(arrays: Arrays) -> None:
    arrays[first(arrays)] = arrays[first(arrays)].tolist()


def too_long(arrays: Arrays) -> None:
    arrays[first(arrays)] += 1e4


def in_a_subclass(arrays: Arrays) -> None:
    class Carrier(np.ndarray):
        note = "anything may travel with a subclass"

    arrays[first(arrays)] = arrays[first(arrays)].view(Carrier)


BAD_ARRAYS = [
    with_nan, with_infinity, with_extra, without_one, misshapen, in_double, as_list, too_long, in_a_subclass
]  # fmt: skip


def test_a_proper_update_passes(
    arrays: Arrays, meta: dict[str, Any], shapes: Shapes, experiment: ExperimentConfig
) -> None:
    check_update(arrays, meta, shapes=shapes, config=experiment)


@pytest.mark.parametrize("spoil", BAD_ARRAYS)
def test_bad_arrays_are_refused(
    spoil: Callable[[Arrays], None],
    arrays: Arrays,
    meta: dict[str, Any],
    shapes: Shapes,
    experiment: ExperimentConfig,
) -> None:
    spoil(arrays)
    with pytest.raises(EgressRefused, match=r"tensor|norm"):
        check_update(arrays, meta, shapes=shapes, config=experiment)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", 4.5),
        ("weight", 0.0),
        ("weight", float("nan")),
        ("weight", 4),
        ("weight", 1e300),
        ("weight", float("inf")),
        ("weight", "4"),
        ("weight", None),
        ("metrics", None),
        ("metrics", {}),
        ("metrics", {"train_loss": 0.5, "seconds": 1.0}),
        ("metrics", {"train_loss": float("nan")}),
        ("metrics", {"train_loss": "0.5"}),
        ("metrics", {"train_loss": True}),
        ("metrics", {"age": 61.0}),
        ("metrics", {"train_loss": [0.5, 0.6]}),
        ("note", "seen in March"),
    ],
)
def test_bad_meta_is_refused(
    key: str, value: object, arrays: Arrays, meta: dict[str, Any], shapes: Shapes, experiment: ExperimentConfig
) -> None:
    meta[key] = value
    with pytest.raises(EgressRefused, match=r"meta|weight|metric") as refusal:
        check_update(arrays, meta, shapes=shapes, config=experiment)
    assert "March" not in str(refusal.value)


def test_uniform_weighting_lets_no_patient_count_leave(
    arrays: Arrays, meta: dict[str, Any], shapes: Shapes, experiment: ExperimentConfig
) -> None:
    uniform = replace(experiment, federation=replace(experiment.federation, weighting="uniform"))
    with pytest.raises(EgressRefused, match="uniform"):
        check_update(arrays, meta, shapes=shapes, config=uniform)
    check_update(arrays, meta | {"weight": 1.0}, shapes=shapes, config=uniform)


def test_metrics_of_one_task_are_not_those_of_the_other() -> None:
    check_metrics({"effnet_kid": 0.1}, allowed=EVALUATION_METRICS)
    with pytest.raises(EgressRefused):
        check_metrics({"train_loss": 0.1}, allowed=EVALUATION_METRICS)


# ---- the gate, on NVFlare's own messages


def reply_of(arrays: Arrays, meta: dict[str, Any]) -> Shareable:
    return update_reply(to_torch(arrays), weight=meta["weight"], metrics=meta["metrics"])


def test_gate_passes_what_the_executor_sends(
    arrays: Arrays, meta: dict[str, Any], experiment: ExperimentConfig
) -> None:
    reply = reply_of(arrays, meta)
    assert passed(reply, experiment) is reply
    figures = metrics_reply({"held_out_loss": 0.4})
    assert passed(figures, experiment) is figures


def test_gate_refuses_other_kinds_and_what_lies_beside(
    arrays: Arrays, meta: dict[str, Any], experiment: ExperimentConfig
) -> None:
    for kind in (DataKind.WEIGHTS, DataKind.COLLECTION, DataKind.APP_DEFINED, DataKind.STATISTICS):
        with pytest.raises(EgressRefused, match="kind"):
            passed(DXO(kind, data=arrays).to_shareable(), experiment)
    reply = reply_of(arrays, meta)
    reply["log"] = "IM0001.dcm"
    with pytest.raises(EgressRefused, match="beside"):
        passed(reply, experiment)
    reply = reply_of(arrays, meta)
    reply.set_header("file", "IM0001.dcm")
    with pytest.raises(EgressRefused, match="header"):
        passed(reply, experiment)
    with pytest.raises(EgressRefused, match="meta"):
        passed(DXO(DataKind.METRICS, data={"held_out_loss": 1.0}, meta={"n": 3}).to_shareable(), experiment)
    extra = {"weight": 4.0, MetaKey.INITIAL_METRICS: meta["metrics"], "file": "a"}
    with pytest.raises(EgressRefused, match="meta"):
        passed(DXO(DataKind.WEIGHT_DIFF, data=arrays, meta=extra).to_shareable(), experiment)


def test_gate_refuses_a_reply_without_data(experiment: ExperimentConfig) -> None:
    with pytest.raises(EgressRefused, match="reply"):
        passed(make_reply(ReturnCode.OK), experiment)


def test_gate_reduces_an_error_to_its_code(experiment: ExperimentConfig) -> None:
    reply = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    reply["error"] = "cannot open PATIENT_0017.dcm"
    out = passed(reply, experiment)
    assert out.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "error" not in out


@pytest.mark.parametrize("code", [BUDGET_SPENT, *POLICY_CODES.values(), ReturnCode.TASK_ABORTED])
def test_gate_passes_the_codes_it_knows(code: str, experiment: ExperimentConfig) -> None:
    assert passed(make_reply(code), experiment).get_return_code() == code


@pytest.mark.parametrize("code", ["PATIENT_0017", "", 17, "ok"])
def test_gate_passes_no_other_code(code: Any, experiment: ExperimentConfig) -> None:
    assert passed(make_reply(code), experiment).get_return_code() == ReturnCode.ERROR


# ---- under differential privacy


@pytest.fixture
def mean_image() -> Arrays:
    return {MEAN_IMAGE: np.zeros((1, 16, 16), np.float32)}


def test_what_was_noised_leaves_and_no_statistic_beside_it(
    arrays: Arrays, mean_image: Arrays, private_experiment: ExperimentConfig, experiment: ExperimentConfig
) -> None:
    assert statistics_that_leave(private_experiment) == frozenset()
    assert {"weight", "train_loss", "effnet_kid"} < statistics_that_leave(experiment)
    bare = {"weight": 1.0, "metrics": {}}
    for released in (arrays, mean_image):
        reply = reply_of(released, bare)
        assert passed(reply, private_experiment) is reply
        for name in ("train_loss", "held_out_loss", "seconds"):
            with pytest.raises(EgressRefused, match="metric"):
                passed(reply_of(released, {"weight": 1.0, "metrics": {name: 0.5}}), private_experiment)
        for weight in (4.0, 0.5):
            with pytest.raises(EgressRefused, match="weight"):
                passed(reply_of(released, {"weight": weight, "metrics": {}}), private_experiment)


@pytest.mark.parametrize("name", sorted(EVALUATION_METRICS))
def test_no_figure_of_an_evaluation_leaves(name: str, private_experiment: ExperimentConfig) -> None:
    assert passed(metrics_reply({}), private_experiment)
    with pytest.raises(EgressRefused, match="metric"):
        passed(metrics_reply({name: 0.5}), private_experiment)


@pytest.mark.parametrize("spoil", [with_nan, misshapen, in_double, with_extra, in_a_subclass])
def test_bad_mean_image_are_refused(
    spoil: Callable[[Arrays], None], mean_image: Arrays, private_experiment: ExperimentConfig
) -> None:
    spoil(mean_image)
    with pytest.raises(EgressRefused, match=r"tensor"):
        check_update(
            mean_image,
            {"weight": 1.0, "metrics": {}},
            shapes=mean_image_shape(private_experiment) or {},
            config=private_experiment,
        )


def test_mean_image_leave_only_where_the_job_plans_them(
    mean_image: Arrays, meta: dict[str, Any], private_experiment: ExperimentConfig, experiment: ExperimentConfig
) -> None:
    assert private_experiment.privacy is not None
    without = replace(private_experiment, privacy=replace(private_experiment.privacy, mean_image=None))
    for config, said in ((experiment, meta), (without, {"weight": 1.0, "metrics": {}})):
        with pytest.raises(EgressRefused, match="tensor"):
            passed(reply_of(mean_image, said), config)


# ---- an audit


def test_from_an_audit_nothing_leaves_but_the_counts_of_one_task(experiment: ExperimentConfig) -> None:
    audited = replace(experiment, audit=AuditConfig(model="small", samples=4))
    shapes = {task: audit_shapes(audited, task) for task in AUDIT_TASKS}
    counts = {
        task: {name: np.zeros(shape, dtype=np.int64) for name, shape in of.items()} for task, of in shapes.items()
    }
    for arrays in counts.values():
        reply = counts_reply(arrays)
        assert passed(reply, audited) is reply
    one, other, *_ = counts.values()
    for wrong in (
        DXO(DataKind.WEIGHTS, data={**one, **other}),
        DXO(DataKind.WEIGHTS, data={}),
        DXO(DataKind.WEIGHTS, data=one, meta={"patients": 3}),
        DXO(DataKind.WEIGHT_DIFF, data=one),
        DXO(DataKind.METRICS, data={"held_out_loss": 1.0}),
        DXO(DataKind.WEIGHTS, data={name: array.astype(np.float64) for name, array in one.items()}),
    ):
        with pytest.raises(EgressRefused):
            passed(wrong.to_shareable(), audited)
    with pytest.raises(EgressRefused):
        passed(counts_reply(one), experiment)  # outside of an audit
