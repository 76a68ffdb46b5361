"""The way of an update into ciphertext: gate, packing, NVFlare's encryptor, and a gate that lets nothing else leave."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReturnCode, Shareable, make_reply

from custom.codec import ENCRYPTOR, encrypted_reply, experiment_of, reply_meta
from custom.config import ExperimentConfig
from custom.egress import METRICS, WEIGHT, EgressRefused, check_meta, released_shapes
from custom.filters.egress_gate import CODES, EgressGate
from custom.he_contexts import CLIENT_CONTEXT, tenseal
from custom.he_packing import packed, packed_name, packed_size


class PackUpdate(Filter):
    """Turns a gated update and its weight into the one vector that is encrypted; an error reply passes."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Pack one reply.

        Raises:
            EgressRefused: no update in it.
        """
        if shareable.get_return_code() != ReturnCode.OK:
            return shareable
        # NVFlare's encryptor logs the range of the plain numbers at INFO, and a site may stream its log to the server.
        logging.getLogger(ENCRYPTOR).setLevel(logging.WARNING)
        dxo = from_shareable(shareable)
        if dxo.data_kind != DataKind.WEIGHT_DIFF:
            raise EgressRefused(f"data kind {dxo.data_kind!r}: only a weight difference can be encrypted")
        meta = reply_meta(dxo.meta)
        vector = packed(dxo.data, meta[WEIGHT])
        return encrypted_reply(packed_name(dxo.data), vector, metrics=meta[METRICS])


class CiphertextGate(Filter):
    """Passes ciphertext, as bytes without its context, and raises on the rest; stands behind the encryptor."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Check one reply.

        Raises:
            EgressRefused: something in it is not encrypted, or not on the list.
        """
        return sealed(shareable, experiment_of(fl_ctx))


def sealed(reply: Shareable, config: ExperimentConfig) -> Shareable:
    """The reply made anew from nothing but the ciphertext and the metrics; an error reply is reduced to its code.

    Raises:
        EgressRefused: a plain tensor, another name, size or kind, or unknown metrics.
    """
    code = reply.get_return_code()
    if code != ReturnCode.OK:
        return make_reply(code if code in CODES else ReturnCode.ERROR)
    dxo = from_shareable(reply)
    if dxo.data_kind != DataKind.WEIGHT_DIFF:
        raise EgressRefused(f"data kind {dxo.data_kind!r}: only an encrypted weight difference may leave")
    expected = {packed_name(shapes): packed_size(shapes) for shapes in released_shapes(config)}
    if len(dxo.data) != 1 or not set(dxo.data) <= set(expected):
        raise EgressRefused(f"tensors: must be one of {sorted(expected)}, packed and encrypted")
    ((name, vector),) = dxo.data.items()
    if type(vector) is not tenseal().CKKSVector:
        raise EgressRefused(f"tensor {name!r}: not encrypted; put NVFlare's HEModelEncryptor before this gate")
    if vector.size() != expected[name]:
        raise EgressRefused(f"tensor {name!r}: {vector.size()} numbers encrypted, must be {expected[name]}")
    said = {key: value for key, value in reply_meta(dxo.meta).items() if key in (WEIGHT, METRICS)}
    check_meta(said, config=config, encrypted=True)
    return encrypted_reply(name, vector.serialize(), metrics=said[METRICS])


def require_encryption(task: str, fl_ctx: FLContext) -> None:
    """Refuse to answer a task whose reply would not pass through the encryptor, before anything is computed.

    The job's own configuration names its filters, so the executor looks at those that NVFlare has built.

    Raises:
        EgressRefused: they do not begin as they must.
    """
    runner = fl_ctx.get_prop(FLContextKey.RUNNER)
    filters = getattr(runner, "task_result_filters", {})
    require_chain(task, filters.get(f"{task}{FilterKey.DELIMITER}{FilterKey.OUT}", []))


def require_chain(task: str, chain: Sequence[Filter]) -> None:
    """The rule of :func:`require_encryption` for one chain of filters."""
    wanted = [f"{kind.__module__}.{kind.__qualname__}" for kind in (EgressGate, PackUpdate)]
    wanted += [ENCRYPTOR, f"{CiphertextGate.__module__}.{CiphertextGate.__qualname__}"]
    found = [f"{type(item).__module__}.{type(item).__qualname__}" for item in chain]
    if found[: len(wanted)] != wanted:
        raise EgressRefused(
            f"filters on {task!r}: {found}; an encrypted job's begin with {wanted}: see jobs/ct_ddpm_he"
        )
    file = getattr(chain[2], "tenseal_context_file", None)
    if file != CLIENT_CONTEXT:
        raise EgressRefused(f"tenseal_context_file on {task!r}: a job may name no other than {CLIENT_CONTEXT}")
