"""Sites that misbehave: what a broken or compromised site could send past its own gates.

And a filter that looks at what an honest one sends.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from nvflare.apis.dxo import DataKind, MetaKey, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.filter import Filter
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.fuel.f3.connection import BytesAlike
from nvflare.fuel.f3.drivers.socket_conn import SocketConnection

from custom import tasks
from custom.codec import read_task, update_reply
from custom.executors import diffusion_trainer
from custom.executors.diffusion_trainer import DiffusionTrainer
from custom.study.attackers import poisoned_update
from custom.training import LocalUpdate


class Recorder(Filter):
    """Keeps a copy of every reply as it leaves the site, behind all other filters.

    Args:
        folder: where; one pickle a reply, named after the site.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = Path(folder)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Write it down and let it pass."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{fl_ctx.get_identity_name()}.{uuid.uuid4().hex}.pickle"
        file.write_bytes(pickle.dumps(dict(shareable)))
        return shareable


class WireMeter(FLComponent):
    """Writes down the length of every frame that this process hands to a TCP socket, from the start of the job.

    Args:
        folder: where; one file a process, a line a frame.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        file = Path(folder) / f"{os.getpid()}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        sent, lock = SocketConnection.send_frame, threading.Lock()

        def metered(connection: SocketConnection, frame: BytesAlike) -> None:
            with lock, file.open("a") as stream:
                stream.write(f"{len(frame)}\n")
            sent(connection, frame)

        SocketConnection.send_frame = metered


class Careless(Executor):
    """Answers ``train`` with a well-formed update and no mask, and asks no policy.

    The update is a constant, one hundredth of the number at the end of the site's name.
    """

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Do as the job says."""
        if task_name != tasks.TRAIN:
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        arrays, _, _ = read_task(shareable)
        value = int(fl_ctx.get_identity_name().split("-")[-1]) / 100
        difference = {name: torch.full(array.shape, value) for name, array in arrays.items()}
        metrics = {"train_loss": 1.0, "held_out_loss": 1.0, "seconds": 1.0}
        return update_reply(difference, weight=1.0, metrics=metrics)


def kill_site() -> None:
    """Kill the provisioned site whose job this process does, itself last; its watchdog lives and starts it again."""
    parent = os.getppid()
    command = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    if b"nvflare.private.fed.app.client.client_train" not in command:
        raise RuntimeError(f"parent = {command}: not a provisioned site's")
    for process in (parent, os.getpid()):
        os.kill(process, signal.SIGKILL)


@contextmanager
def flipped_updates(scale: float) -> Iterator[None]:
    """While it lasts a round in this process ends with -scale times its update, before any gate and any mask."""
    honest = diffusion_trainer.train_round

    def train(**arguments: object) -> LocalUpdate:
        update = honest(**arguments)
        return replace(update, difference=poisoned_update("sign_flip", update.difference, scale=scale))

    diffusion_trainer.train_round = train
    try:
        yield
    finally:
        diffusion_trainer.train_round = honest


class FaultySite(DiffusionTrainer):
    """Behaves as the site's name says; ``good-…`` is honest.

    Args:
        error_round: the round (from 0) in which ``error-…`` answers with an error, and ``late-…`` is killed after its
            work is done and before the reply leaves; they are honest in others.
        asked: a file; the first ``shy-…`` of a run that is asked to open an encrypted sum writes it and errs.
        fell: name of a provisioned site all of whose processes are killed when it is first asked to train.
        scale: of what ``flipped-…`` sends: so many times its update, with the opposite sign.
    """

    def __init__(self, error_round: int = 0, asked: str = "", fell: str = "", scale: float = 1.0) -> None:
        super().__init__()
        self._error_round = error_round
        self._asked = Path(asked)
        self._fell = fell
        self._scale = scale

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Do the task, then spoil the reply."""
        fault = fl_ctx.get_identity_name().split("-")[0]
        its_round = task_name == "train" and from_shareable(shareable).meta["task"]["round_number"] == self._error_round
        if task_name == "train":
            if fl_ctx.get_identity_name() == self._fell:
                kill_site()
            if fault == "silent":
                while not abort_signal.triggered:
                    time.sleep(0.2)
                return make_reply(ReturnCode.TASK_ABORTED)
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "error" and its_round:
                return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        if task_name == "decrypt" and fault == "shy" and not self._asked.exists():
            self._asked.write_text(fl_ctx.get_identity_name())
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        with flipped_updates(self._scale) if fault == "flipped" else nullcontext():
            reply = super().execute(task_name, shareable, fl_ctx, abort_signal)
        if fault == "late" and its_round:
            os.kill(os.getpid(), signal.SIGKILL)
        if reply.get_return_code() != ReturnCode.OK or task_name != "train":
            return reply
        arrays = from_shareable(reply).data
        name = next(iter(arrays))
        if fault == "nan":
            arrays[name] = np.full_like(arrays[name], np.nan)
        elif fault == "shape":
            arrays[name] = arrays[name][..., :1].copy()
        elif fault == "extra":
            arrays["patients"] = np.zeros(3, np.float32)
        elif fault == "full":
            reply["DXO"]["kind"] = DataKind.WEIGHTS
        elif fault == "mute":
            from_shareable(reply).meta[MetaKey.INITIAL_METRICS].clear()
        elif fault == "huge":
            arrays[name] = arrays[name] + np.float32(1e6)
        return reply
