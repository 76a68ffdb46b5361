"""The way of an update into ciphertext and out of it: filters, sum, task, without a simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from custom.aggregators.encrypted_sum import EncryptedSum
from custom.codec import TaskHeader, decrypt_task, he_context, mean_reply, read_task, reply_meta, to_torch, update_reply
from custom.config import ExperimentConfig
from custom.controllers.diffusion_fedavg import DiffusionFedAvg
from custom.controllers.encrypted_fedavg import EncryptedFedAvg
from custom.diffusion.networks import Shapes
from custom.egress import EgressRefused, released_shapes
from custom.filters.egress_gate import EgressGate, passed
from custom.filters.encryption import CiphertextGate, PackUpdate, require_chain, require_encryption, sealed
from custom.he_contexts import CLIENT_CONTEXT, SERVER_CONTEXT, new_context, serialized
from custom.he_packing import FLOOD_STD, UPDATE, opened, packed_name
from custom.secure_config import SecureAggregationConfig
from custom.site_file import ServerConfig
from custom.stages import model_shapes
from custom.strict import ConfigError
from privacy.rng import SecureRandomness

ts = pytest.importorskip("tenseal")
encryptors = pytest.importorskip("nvflare.app_opt.he.model_encryptor")
decryptors = pytest.importorskip("nvflare.app_opt.he.model_decryptor")

METRICS = {"train_loss": 0.5, "held_out_loss": 0.4, "seconds": 1.0}
SAID = {"weight": 1.0, "metrics": METRICS}
Arrays = dict[str, Any]


@pytest.fixture
def encrypted(experiment: ExperimentConfig) -> ExperimentConfig:
    return replace(experiment, encryption="ckks")


@pytest.fixture
def shapes(experiment: ExperimentConfig) -> Shapes:
    return model_shapes(experiment)


@pytest.fixture(scope="module")
def client() -> Any:
    return new_context()


@pytest.fixture(scope="module")
def server(client: Any) -> Any:
    return ts.context_from(serialized(client, secret_key=False))


def update(shapes: Shapes, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.01, shape).astype(np.float32) for name, shape in shapes.items()}


def through_nvflares_encryptor(reply: Shareable, client: Any) -> Shareable:
    """As the job's filters do between gate and gate, with the context put in by hand."""
    packed_reply = PackUpdate().process(reply, FLContext())
    encryptor = encryptors.HEModelEncryptor(weigh_by_local_iter=False)
    encryptor.tenseal_context, encryptor.encrypt_layers = client, [True]
    context = FLContext()
    context.set_peer_context(FLContext())
    out: Shareable = encryptor.process(packed_reply, context)
    return out


def leaves(arrays: Arrays, client: Any, config: ExperimentConfig, weight: float = 1.0) -> Shareable:
    reply = update_reply(to_torch(arrays), weight=weight, metrics=METRICS)
    return sealed(through_nvflares_encryptor(reply, client), config)


def vector(client: Any, size: int, **options: Any) -> bytes:
    content: bytes = ts.ckks_vector(client, np.zeros(size), **options).serialize()
    return content


# ---- what leaves a site


def test_an_update_leaves_as_one_ciphertext_and_its_metrics(
    shapes: Shapes, encrypted: ExperimentConfig, client: Any
) -> None:
    dxo = from_shareable(leaves(update(shapes, 1), client, encrypted, weight=17.0))
    assert dxo.data_kind == DataKind.WEIGHT_DIFF
    assert set(dxo.data) == {UPDATE}
    assert type(dxo.data[UPDATE]) is bytes
    assert dxo.meta == {"weight": 1.0, MetaKey.INITIAL_METRICS: METRICS}, "neither weight nor NVFlare's own words"


def test_a_plain_update_does_not_pass_the_last_gate(shapes: Shapes, encrypted: ExperimentConfig) -> None:
    arrays = update(shapes, 1)
    with pytest.raises(EgressRefused, match="packed and encrypted"):
        sealed(update_reply(to_torch(arrays), weight=1.0, metrics=METRICS), encrypted)
    unencrypted = PackUpdate().process(update_reply(to_torch(arrays), weight=1.0, metrics=METRICS), FLContext())
    with pytest.raises(EgressRefused, match="not encrypted"):
        sealed(unencrypted, encrypted)
    for kind in (DataKind.WEIGHTS, DataKind.METRICS):
        with pytest.raises(EgressRefused, match="kind"):
            sealed(DXO(kind, data=arrays).to_shareable(), encrypted)


def test_the_last_gate_looks_at_size_and_metrics(encrypted: ExperimentConfig, client: Any) -> None:
    short = DXO(DataKind.WEIGHT_DIFF, data={UPDATE: ts.ckks_vector(client, [1.0, 2.0])}, meta={"weight": 1.0})
    with pytest.raises(EgressRefused, match="2 numbers"):
        sealed(short.to_shareable(), encrypted)


def test_an_unknown_metric_does_not_leave_beside_ciphertext(
    shapes: Shapes, encrypted: ExperimentConfig, client: Any
) -> None:
    reply = update_reply(to_torch(update(shapes, 1)), weight=1.0, metrics={**METRICS, "age": 61.0})
    with pytest.raises(EgressRefused, match="metric"):
        sealed(through_nvflares_encryptor(reply, client), encrypted)


def test_an_error_is_reduced_to_its_code(encrypted: ExperimentConfig) -> None:
    reply = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    reply["error"] = "PATIENT_0017"
    out = sealed(PackUpdate().process(reply, FLContext()), encrypted)
    assert out.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "error" not in out


def test_the_mean_passes_the_gate_of_an_encrypted_job_only(
    shapes: Shapes, encrypted: ExperimentConfig, experiment: ExperimentConfig
) -> None:
    reply = mean_reply(update(shapes, 1))
    assert passed(reply, encrypted) is reply
    with pytest.raises(EgressRefused, match="weight"):
        passed(reply, experiment)
    too_long = mean_reply({name: array + np.float32(1e4) for name, array in update(shapes, 1).items()})
    with pytest.raises(EgressRefused, match="norm"):
        passed(too_long, encrypted)


# ---- a job that says it encrypts and does not


def chain() -> list[Any]:
    return [EgressGate(), PackUpdate(), encryptors.HEModelEncryptor(), CiphertextGate()]


def test_the_executor_accepts_the_jobs_filters_and_what_stands_behind_them() -> None:
    require_chain("train", chain())
    require_chain("train", [*chain(), EgressGate()])


@pytest.mark.parametrize("missing", range(4))
def test_the_executor_refuses_filters_with_one_missing(missing: int) -> None:
    found = chain()
    del found[missing]
    with pytest.raises(EgressRefused, match=r"jobs/ct_ddpm_he"):
        require_chain("train", found)


def test_the_executor_refuses_a_context_that_the_job_brings() -> None:
    found = chain()
    found[2] = encryptors.HEModelEncryptor(tenseal_context_file="../app/config/mine.tenseal")
    with pytest.raises(EgressRefused, match=CLIENT_CONTEXT):
        require_chain("train", found)


def test_the_executor_looks_at_what_nvflare_runs() -> None:
    context = FLContext()
    with pytest.raises(EgressRefused, match="train"):
        require_encryption("train", context)
    context.set_prop(FLContextKey.RUNNER, SimpleNamespace(task_result_filters={"train/out": chain()}))
    require_encryption("train", context)
    with pytest.raises(EgressRefused, match="release"):
        require_encryption("release", context)


# ---- the server's sum


def test_the_sum_opens_to_the_plain_weighted_mean(
    shapes: Shapes, encrypted: ExperimentConfig, client: Any, server: Any
) -> None:
    sites = {"a": (update(shapes, 1), 3.0), "b": (update(shapes, 2), 1.0), "c": (update(shapes, 3), 7.0)}
    total = EncryptedSum(shapes, encrypted, server)
    for site, (arrays, weight) in sites.items():
        dxo = from_shareable(leaves(arrays, client, encrypted, weight))
        assert total.add(site, dxo.data, reply_meta(dxo.meta)), total.refused
    name, content = total.ciphertext()
    with pytest.raises(ValueError, match="secret_key"):
        ts.ckks_vector_from(server, content).decrypt()
    header = TaskHeader(run_id="r", round_number=0, config_sha256="a", schedule_sha256="b")
    task = FLModelUtils.to_shareable(decrypt_task(name, content, header))
    decryptor = decryptors.HEModelDecryptor()
    decryptor.tenseal_context = client
    arrays, read, _ = read_task(decryptor.process(task, FLContext()))
    assert read == header
    mean = opened(arrays[UPDATE], shapes, SecureRandomness())  # type: ignore[arg-type]
    total.open_with(from_shareable(passed(mean_reply(mean), encrypted)).data)
    for tensor in shapes:
        expected = sum(weight * update[tensor].astype(np.float64) for update, weight in sites.values()) / 11
        np.testing.assert_allclose(total.mean()[tensor], expected, atol=6 * FLOOD_STD / 11)
    assert total.accepted == dict.fromkeys(sites, METRICS)


def plain(data: Arrays, client: Any, size: int) -> None:
    data[UPDATE] = np.zeros(size, np.float32)


def plain_beside(data: Arrays, client: Any, size: int) -> None:
    data["conv_in.bias"] = np.zeros(3, np.float32)


def renamed(data: Arrays, client: Any, size: int) -> None:
    data["mean_image"] = data.pop(UPDATE)


def another_size(data: Arrays, client: Any, size: int) -> None:
    data[UPDATE] = vector(client, size - 1)


def another_scale(data: Arrays, client: Any, size: int) -> None:
    data[UPDATE] = vector(client, size, scale=2.0**70)


def multiplied(data: Arrays, client: Any, size: int) -> None:
    weak = ts.context_from(serialized(client, secret_key=True))
    weak.global_scale = 2.0**40
    product = ts.ckks_vector(weak, np.zeros(size)) * 2.0
    data[UPDATE] = product.serialize()


def other_parameters(data: Arrays, client: Any, size: int) -> None:
    context = ts.context(
        ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40], encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC
    )
    context.global_scale = 2.0**40
    data[UPDATE] = vector(context, size)


def noise(data: Arrays, client: Any, size: int) -> None:
    data[UPDATE] = np.random.default_rng(0).bytes(1000)


def cut(data: Arrays, client: Any, size: int) -> None:
    data[UPDATE] = data[UPDATE][: len(data[UPDATE]) // 2]


def empty(data: Arrays, client: Any, size: int) -> None:
    data[UPDATE] = b""


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (plain, "not encrypted"),
        (plain_beside, "'conv_in.bias': not encrypted"),
        (renamed, "must be 'update'"),
        (another_size, "numbers encrypted"),
        (another_scale, "fresh ciphertext"),
        (multiplied, "fresh ciphertext"),
        (other_parameters, "no ciphertext"),
        (noise, "no ciphertext"),
        (cut, "no ciphertext"),
        (empty, "0 numbers"),
    ],
)
def test_a_reply_that_is_no_ciphertext_of_this_job_is_refused_by_name(
    spoil: Callable[[Arrays, Any, int], None],
    reason: str,
    shapes: Shapes,
    encrypted: ExperimentConfig,
    client: Any,
    server: Any,
) -> None:
    good = from_shareable(leaves(update(shapes, 1), client, encrypted)).data
    size = sum(int(np.prod(shape)) for shape in shapes.values()) + 1
    for total in (EncryptedSum(shapes, encrypted, server), EncryptedSum(shapes, encrypted, server)):
        bad = dict(good)
        spoil(bad, client, size)
        assert not total.add("bad", bad, SAID)
        assert reason in total.refused["bad"]
        assert total.add("good", good, SAID), "the others count"


def test_meta_is_checked_and_a_second_reply_refused(
    shapes: Shapes, encrypted: ExperimentConfig, client: Any, server: Any
) -> None:
    data = from_shareable(leaves(update(shapes, 1), client, encrypted)).data
    total = EncryptedSum(shapes, encrypted, server)
    for meta in ({**SAID, "weight": 17.0}, {**SAID, "note": "x"}, {**SAID, "metrics": {"age": 61.0}}, {}):
        assert not total.add("a", data, meta)
    assert not total.add("a", None, SAID)
    with pytest.raises(ValueError, match="accepted = 0"):
        total.ciphertext()
    assert total.add("a", data, SAID)
    assert not total.add("a", data, SAID)
    assert "second" in total.refused["a"]


def test_a_mean_is_taken_only_if_it_can_be_one(shapes: Shapes, encrypted: ExperimentConfig, server: Any) -> None:
    total = EncryptedSum(shapes, encrypted, server)
    with pytest.raises(ValueError, match="no site has opened"):
        total.mean()
    first = next(iter(shapes))
    nan = update(shapes, 1)
    nan[first] = np.full_like(nan[first], np.nan)
    for bad in (None, {}, nan, {**update(shapes, 1), first: np.zeros(1, np.float32)}):
        with pytest.raises(EgressRefused):
            total.open_with(bad)
    total.open_with(update(shapes, 1))
    assert set(total.mean()) == set(shapes)


# ---- contexts and configuration


@pytest.mark.parametrize(("name", "secret"), [(CLIENT_CONTEXT, True), (SERVER_CONTEXT, False)])
def test_a_missing_context_names_the_command(name: str, secret: bool) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*fedct simulator-keys"):
        he_context(FLContext(), name, secret_key=secret)


def test_what_an_encrypted_experiment_must_not_ask_for(experiment: ExperimentConfig) -> None:
    for spoiled, argument in (
        ({"min_responses": 1}, "min_responses"),
        ({"max_update_norm": 2000.0}, "max_update_norm"),
    ):
        federation = replace(experiment.federation, **spoiled)  # type: ignore[arg-type]
        replace(experiment, federation=federation)
        with pytest.raises(ConfigError, match=argument):
            replace(experiment, federation=federation, encryption="ckks")
    with pytest.raises(ConfigError, match="encryption"):
        ExperimentConfig.from_json({**experiment.to_json(), "encryption": "rot13"})
    assert ExperimentConfig.from_json({**experiment.to_json(), "encryption": "ckks"}).encryption == "ckks"


def test_privacy_and_encryption_go_together(private_experiment: ExperimentConfig, client: Any, server: Any) -> None:
    """The mean image before training, and updates without metrics."""
    config = replace(private_experiment, encryption="ckks")
    for released in ({"mean_image": np.ones((1, 16, 16), np.float32)}, update(model_shapes(config), 1)):
        reply = update_reply(to_torch(released), weight=1.0, metrics={})
        dxo = from_shareable(sealed(through_nvflares_encryptor(passed(reply, config), client), config))
        total = EncryptedSum({name: array.shape for name, array in released.items()}, config, server)
        assert total.add("a", dxo.data, reply_meta(dxo.meta)), total.refused


def test_updates_of_both_stages_leave_encrypted(latent_experiment: ExperimentConfig, client: Any, server: Any) -> None:
    config = replace(latent_experiment, encryption="ckks")
    for shapes in released_shapes(config):
        released = update(shapes, 1)
        reply = leaves(released, client, config)
        dxo = from_shareable(reply)
        assert set(dxo.data) == {packed_name(shapes)}
        total = EncryptedSum(shapes, config, server)
        assert total.add("a", dxo.data, reply_meta(dxo.meta)), total.refused
    assert len({packed_name(shapes) for shapes in released_shapes(config)}) == 2


def test_each_workflow_refuses_the_others_experiment(
    experiment: ExperimentConfig, encrypted: ExperimentConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = ServerConfig(runs=tmp_path, kit=tmp_path)
    monkeypatch.setattr("custom.controllers.encrypted_fedavg.he_context", lambda *_, **__: None)
    DiffusionFedAvg()._check(experiment, server)
    EncryptedFedAvg()._check(encrypted, server)
    with pytest.raises(ConfigError, match="encryption"):
        DiffusionFedAvg()._check(encrypted, server)
    with pytest.raises(ConfigError, match="encryption"):
        EncryptedFedAvg()._check(experiment, server)


def test_masks_and_encryption_are_two_ways_of_which_a_job_takes_one(encrypted: ExperimentConfig) -> None:
    with pytest.raises(ConfigError, match="secure_aggregation"):
        replace(encrypted, secure_aggregation=SecureAggregationConfig())
