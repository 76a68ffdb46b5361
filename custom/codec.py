"""What stands in NVFlare's messages, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.decomposers.numpy_decomposers import NumpyArrayDecomposer
from nvflare.fuel.utils import fobs
from torch import Tensor

from custom.config import EXPERIMENT_FILE, ExperimentConfig
from custom.egress import METRICS, WEIGHT
from custom.he_contexts import REMEDY, check_context, tenseal
from custom.he_packing import ALGORITHM
from custom.strict import ConfigError, build
from privacy.secagg.encoding import Vector
from privacy.secagg.messages import Advert, Revealed, Roster, Sealed, Session, Signed, Survivors

if TYPE_CHECKING:  # only an audit needs it, and every task imports this file
    from custom.audit_counts import Agreement

ENCRYPTOR = "nvflare.app_opt.he.model_encryptor.HEModelEncryptor"

# Under secure aggregation: the message of a task in its meta, and the masked vector in a reply.
MESSAGE = "secagg"
# In a task of an audit: what the sites have agreed on.
AGREEMENT = "audit"
MASKED = "masked"
RESULTS = "results"  # folder in a job's workspace at the server

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class TaskHeader:
    """What every task says of itself.

    Attributes:
        run_id: names the run at the sites; a resumed run keeps it.
        round_number: from 0; the evaluation after the last round bears the number of rounds.
        config_sha256: of the server's experiment; a site with another one refuses.
        schedule_sha256: of the server's noise schedule, likewise.
    """

    run_id: str
    round_number: int
    config_sha256: str
    schedule_sha256: str


@dataclass(frozen=True, kw_only=True)
class ToSite:
    """The server's part of secure aggregation in a task: about the running session, and about the next one.

    Attributes:
        session: that is running.
        boxes: of those who shared, with the work to be done.
        survivors: to be signed.
        signatures: upon which shares are revealed.
        opening: the next session; a site answers with its advert, or, given the roster, with its boxes.
        roster: of the next session.
    """

    session: Session | None = None
    boxes: tuple[Sealed, ...] | None = None
    survivors: Survivors | None = None
    signatures: tuple[Signed, ...] | None = None
    opening: Session | None = None
    roster: Roster | None = None


@dataclass(frozen=True, kw_only=True)
class FromSite:
    """A site's answer to :class:`ToSite`, beside its masked vector.

    Attributes:
        advert: for the next session.
        boxes: for the next session, sealed to each peer.
        signed: the running session's survivors.
        revealed: of the running session, one share of each peer.
    """

    advert: Advert | None = None
    boxes: tuple[Sealed, ...] | None = None
    signed: Signed | None = None
    revealed: tuple[Revealed, ...] | None = None


def task_model(
    arrays: Arrays, header: TaskHeader, message: ToSite | None = None, agreement: Agreement | None = None
) -> FLModel:
    """A task from the server: named arrays, a header, and what secure aggregation and an audit have to say."""
    return FLModel(
        params=dict(arrays),
        params_type=ParamsType.FULL,
        current_round=header.round_number,
        meta={"task": asdict(header)}
        | ({} if message is None else {MESSAGE: asdict(message)})
        | ({} if agreement is None else {AGREEMENT: asdict(agreement)}),
    )


def read_task(shareable: Shareable) -> tuple[Arrays, TaskHeader, ToSite]:
    """The task as a site sees it; raises ``ConfigError`` or ``ValueError`` if it is malformed."""
    dxo = from_shareable(shareable)
    if dxo.data_kind != DataKind.WEIGHTS:
        raise ValueError(f"task data kind = {dxo.data_kind!r}: must be {DataKind.WEIGHTS}")
    message = build(ToSite, dxo.meta.get(MESSAGE, {}), MESSAGE)
    return dxo.data, build(TaskHeader, dxo.meta.get("task"), "task"), message


def read_agreement(shareable: Shareable) -> Agreement:
    """What the sites of an audit have agreed on so far; raises ``ConfigError`` if it is malformed."""
    from custom.audit_counts import Agreement

    return build(Agreement, from_shareable(shareable).meta.get(AGREEMENT, {}), AGREEMENT)


def counts_reply(counts: Mapping[str, NDArray[np.int64]]) -> Shareable:
    """A site's answer to a task of an audit."""
    reply: Shareable = DXO(DataKind.WEIGHTS, data=dict(counts)).to_shareable()
    return reply


def content_of(reply: Shareable) -> tuple[dict[str, NDArray[Any]], dict[str, float], float]:
    """Arrays, metrics and weight of a plain reply, as they go under the masks."""
    dxo = from_shareable(reply)
    if dxo.data_kind == DataKind.METRICS:
        return {}, dxo.data, 1.0
    return dxo.data, dxo.meta[MetaKey.INITIAL_METRICS], dxo.meta[WEIGHT]


def masked_reply(vector: Vector) -> Shareable:
    """A site's answer to a task with work in it, under secure aggregation."""
    reply: Shareable = DXO(DataKind.WEIGHTS, data={MASKED: vector}).to_shareable()
    return reply


def stage_reply(answer: FromSite) -> Shareable:
    """A site's answer to :data:`custom.tasks.SECAGG`."""
    reply: Shareable = DXO(DataKind.WEIGHTS, data=asdict(answer)).to_shareable()
    return reply


def read_answer(data: Any) -> FromSite:
    """What :func:`stage_reply` wrote; raises ``ConfigError`` if it is malformed."""
    return build(FromSite, data, MESSAGE)


def update_reply(update: Mapping[str, Tensor], *, weight: float, metrics: Mapping[str, float]) -> Shareable:
    """A site's answer to ``train`` or ``release``: float32 arrays or few bits, the aggregation weight and metrics."""
    arrays = {name: tensor.numpy() for name, tensor in update.items()}
    reply: Shareable = DXO(
        DataKind.WEIGHT_DIFF, data=arrays, meta={WEIGHT: weight, MetaKey.INITIAL_METRICS: dict(metrics)}
    ).to_shareable()
    return reply


def wire_bytes(arrays: Arrays) -> int:
    """Bytes of an update's or a task's named arrays as NVFlare serialises them."""
    fobs.register(NumpyArrayDecomposer)
    flare_decomposers.register()
    return len(fobs.dumps(DXO(DataKind.WEIGHT_DIFF, data=dict(arrays)).to_shareable()))


def encrypted_reply(name: str, vector: object, *, metrics: Mapping[str, float]) -> Shareable:
    """An update as one vector, on its way into ciphertext or encrypted; its weight is inside, 1 is said of it."""
    reply: Shareable = DXO(
        DataKind.WEIGHT_DIFF, data={name: vector}, meta={WEIGHT: 1.0, MetaKey.INITIAL_METRICS: dict(metrics)}
    ).to_shareable()
    return reply


def decrypt_task(name: str, ciphertext: bytes, header: TaskHeader) -> FLModel:
    """The task to open a sum, in the words that NVFlare's HEModelDecryptor looks for."""
    task = task_model({}, header)
    task.params = {name: ciphertext}
    task.meta |= {MetaKey.PROCESSED_KEYS: {name: True}, MetaKey.PROCESSED_ALGORITHM: ALGORITHM}
    return task


def mean_reply(mean: Mapping[str, NDArray[np.float32]]) -> Shareable:
    """A site's answer to ``decrypt``: float32 arrays and nothing beside them."""
    reply: Shareable = DXO(DataKind.WEIGHT_DIFF, data=dict(mean)).to_shareable()
    return reply


def metrics_reply(metrics: Mapping[str, float]) -> Shareable:
    """A site's answer to ``evaluate``: metrics alone."""
    reply: Shareable = DXO(DataKind.METRICS, data=dict(metrics)).to_shareable()
    return reply


def reply_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A reply's meta in the words of :mod:`custom.egress`."""
    return {METRICS if key == MetaKey.INITIAL_METRICS else key: value for key, value in meta.items()}


def to_numpy(weights: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """Weights by name as float32 arrays that own their memory."""
    return {name: tensor.detach().cpu().float().numpy().copy() for name, tensor in weights.items()}


def to_torch(arrays: Arrays) -> dict[str, Tensor]:
    """Arrays by name as tensors that own their memory."""
    return {name: torch.tensor(array) for name, array in arrays.items()}


def experiment_of(fl_ctx: FLContext) -> ExperimentConfig:
    """The experiment of the running job, from the folder that NVFlare deployed."""
    workspace = fl_ctx.get_engine().get_workspace()
    return ExperimentConfig.load(Path(workspace.get_app_config_dir(fl_ctx.get_job_id())) / EXPERIMENT_FILE)


def he_context(fl_ctx: FLContext, name: str, *, secret_key: bool) -> Any:
    """The TenSEAL context in this node's startup folder, which NVFlare holds against the kit's signature.

    Args:
        fl_ctx: the running job's.
        name: the file's.
        secret_key: whether it must hold one; otherwise it must not.

    Raises:
        ConfigError: no TenSEAL, no such file, a wrong signature, or a context that this job cannot use safely.
    """
    tenseal()
    from nvflare.app_opt.he.homomorphic_encrypt import load_tenseal_context_from_workspace

    try:
        context = load_tenseal_context_from_workspace(name, fl_ctx)
    except ValueError as error:  # no such file, or a wrong signature
        raise ConfigError(f"{name} = {error}; make it: {REMEDY}") from error
    except TypeError as error:  # NVFlare's way to say that there is no startup folder
        raise ConfigError(f"{name} = no startup folder; make it: {REMEDY}") from error
    check_context(context, name, secret_key=secret_key)
    return context


def results_folder(fl_ctx: FLContext) -> Path:
    """Where the server puts what whoever handed in the job may download: NVFlare archives the job's own folder."""
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())) / RESULTS


def workspace_root(fl_ctx: FLContext) -> Path:
    """The NVFlare workspace of this server or site, which holds ``local/``."""
    return Path(fl_ctx.get_engine().get_workspace().get_root_dir())
