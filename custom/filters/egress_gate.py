"""The gate at a site's boundary, as an NVFlare result filter.

With secure aggregation nothing but masked vectors and the protocol's own messages pass it.
"""

from __future__ import annotations

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, ReturnCode, Shareable, make_reply

from custom.codec import MASKED, experiment_of, read_answer, reply_meta
from custom.config import ExperimentConfig
from custom.egress import (
    BUDGET_SPENT,
    POLICY_CODES,
    SECAGG_REFUSED,
    EgressRefused,
    check_arrays,
    check_counts,
    check_masked,
    check_metrics,
    check_update,
    evaluation_metrics,
    released_shapes,
)
from custom.masked_vector import vector_forms
from custom.update_form import may_stand_for, read

# All that a DXO puts into a Shareable; NVFlare adds its own routing headers after the filters.
ENTRIES = frozenset({"DXO", ReservedHeaderKey.HEADERS})
HEADERS = frozenset({ReservedHeaderKey.CONTENT_TYPE})
CODES = frozenset(
    {value for name, value in vars(ReturnCode).items() if name.isupper()}
    | {BUDGET_SPENT, SECAGG_REFUSED, *POLICY_CODES.values()}
)


class EgressGate(Filter):
    """Passes what :mod:`custom.egress` lists and raises on the rest, which makes NVFlare send an error instead."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Check one reply.

        Raises:
            EgressRefused: something in it is not on the list.
        """
        return passed(shareable, experiment_of(fl_ctx))


def passed(reply: Shareable, config: ExperimentConfig) -> Shareable:
    """The reply if all of it may leave; an error reply is reduced to its code, and an unknown code to ``ERROR``.

    Raises:
        EgressRefused: something in it is not on the list.
    """
    code = reply.get_return_code()
    if code != ReturnCode.OK:
        return make_reply(code if code in CODES else ReturnCode.ERROR)
    if config.secure_aggregation is None:
        return checked(reply, config)
    dxo = _dxo(reply)
    if dxo.data_kind != DataKind.WEIGHTS or dxo.meta or not isinstance(dxo.data, dict):
        raise EgressRefused(f"data kind {dxo.data_kind!r}: under secure aggregation nothing leaves without a mask")
    if MASKED not in dxo.data:
        answer = read_answer(dxo.data)
        for names in ([box.recipient for box in answer.boxes or ()], [share.peer for share in answer.revealed or ()]):
            if len(set(names)) < len(names):
                raise EgressRefused("message: more than one entry for a peer; remove them")
        return reply
    if set(dxo.data) != {MASKED}:
        raise EgressRefused(f"reply: {len(dxo.data) - 1} entries beside the masked vector; remove them")
    check_masked(dxo.data[MASKED], forms=vector_forms(config))
    return reply


def checked(reply: Shareable, config: ExperimentConfig) -> Shareable:
    """The reply if all of it is on the list, as it leaves without masks or goes under them.

    Raises:
        EgressRefused: something in it is not on the list.
    """
    dxo = _dxo(reply)
    if config.audit is not None:
        if dxo.data_kind != DataKind.WEIGHTS or dxo.meta:
            raise EgressRefused(f"data kind {dxo.data_kind!r}: from an audit nothing leaves but counts")
        from custom.audit_counts import AUDIT_TASKS, audit_shapes

        named = [shapes for task in AUDIT_TASKS if set(shapes := audit_shapes(config, task)) == set(dxo.data)]
        if not named:
            raise EgressRefused("counts: must be all of one task's, under their names, and nothing else")
        check_counts(dxo.data, shapes=named[0])
    elif dxo.data_kind == DataKind.WEIGHT_DIFF:
        *others, last = released_shapes(config)
        shapes = next((shapes for shapes in others if may_stand_for(dxo.data, shapes, config)), last)
        if config.encryption is not None and not dxo.meta:  # the mean, opened for the server
            check_arrays(dxo.data, shapes=shapes, max_norm=config.federation.max_update_norm)
        else:
            arrays = read(dxo.data, shapes=shapes, config=config)
            check_update(arrays, reply_meta(dxo.meta), shapes=shapes, config=config)
    elif dxo.data_kind == DataKind.METRICS:
        if dxo.meta:
            raise EgressRefused("meta: metrics leave without meta; remove it")
        check_metrics(dxo.data, allowed=evaluation_metrics(config))
    else:
        raise EgressRefused(f"data kind {dxo.data_kind!r}: only a weight difference or metrics may leave")
    return reply


def _dxo(reply: Shareable) -> DXO:
    beside = set(reply) - ENTRIES
    headers = set(reply.get(ReservedHeaderKey.HEADERS, {})) - HEADERS
    if beside or headers:
        raise EgressRefused(f"reply: {len(beside)} entries and {len(headers)} headers beside the data; remove them")
    if reply.get_header(ReservedHeaderKey.CONTENT_TYPE) != "DXO":
        raise EgressRefused("reply: no data in it; answer with a DXO or with an error code")
    return from_shareable(reply)
