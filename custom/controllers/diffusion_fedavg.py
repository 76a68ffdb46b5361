"""The server's side of a run: FedAvg over diffusion models, with a receipt at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReturnCode, Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.workflows.fedavg import FedAvg

from custom import tasks
from custom.aggregators.in_time_average import InTimeAverage
from custom.aggregators.robust_average import RobustAverage
from custom.client_sampling import drawn_sites
from custom.codec import (
    Arrays,
    TaskHeader,
    experiment_of,
    reply_meta,
    results_folder,
    task_model,
    to_numpy,
    to_torch,
    workspace_root,
)
from custom.config import ExperimentConfig
from custom.controllers.skip_list import SkipList
from custom.device import use
from custom.diffusion.networks import Shapes
from custom.diffusion.schedule import build_schedule
from custom.drawing import draw
from custom.egress import BUDGET_SPENT, MEAN_IMAGE, EgressRefused, check_metrics, evaluation_metrics, mean_image_shape
from custom.job_plan import privacy_plan
from custom.model_file import ModelFile, initial_model, save_model
from custom.named_models import frozen_autoencoder, start_weights
from custom.pictures import grey_levels, sample_grid, viewable
from custom.reference_check import ReferenceCheck
from custom.round_parts import round_parts, update_shapes
from custom.run_folder import RUN_ID, RoundRecord, RunFolder
from custom.server_step import moved, server_variates
from custom.site_file import ServerConfig, server_config
from custom.stages import stage_of, stages
from custom.strict import ConfigError, require
from custom.warm_up import warmed_up

Receive = Callable[[FLModel], bool]


class Average(Protocol):
    """What a round gave.

    Attributes:
        accepted: sites whose update went in, with what each reported.
        refused: reason by site.
        metrics: mean over the sites where no single site's are known.
    """

    @property
    def accepted(self) -> dict[str, dict[str, float]]: ...  # noqa: D102
    @property
    def refused(self) -> dict[str, str]: ...  # noqa: D102
    @property
    def metrics(self) -> dict[str, float]: ...  # noqa: D102
    def mean(self) -> dict[str, NDArray[np.float32]]: ...  # noqa: D102


class Collector(Average, Protocol):
    """The same while replies come in."""

    def add(self, site: str, arrays: Any, meta: Mapping[str, Any]) -> bool: ...  # noqa: D102


class RoundVoid(Exception):
    """Fewer sites than ``federation.min_responses`` gave an acceptable update in time."""


class BudgetSpent(RoundVoid):
    """The same, and a site's privacy budget is a reason: to ask again would change nothing."""


class DiffusionFedAvg(FedAvg):
    """FedAvg (arXiv:1602.05629) that checks every reply, survives silent sites and leaves a receipt.

    Args:
        resume_run: name of an earlier run of the same experiment, which is its folder's; its newest checkpoint is
            carried on. Empty starts afresh.
    """

    def __init__(self, resume_run: str = "") -> None:
        # Rounds and sites come from experiment.json; an error reply of one site is no reason to panic.
        super().__init__(persistor_id="", ignore_result_error=True)
        self._resume_run = resume_run
        self._error_codes: dict[str, str] = {}
        self._skipped = SkipList()
        self._device = torch.device("cpu")  # until the server's settings are read
        self._reference: NDArray[np.float32] | None = None

    def run(self) -> None:
        """Train, evaluate, and write what the run leaves."""
        experiment = experiment_of(self.fl_ctx)
        server = server_config(workspace_root=workspace_root(self.fl_ctx))
        self._check(experiment, server)
        self._device = use(server.hardware)
        robust, asked = experiment.federation.robust, experiment.preprocess
        self._reference = server.reference_images(asked) if robust is not None and robust.reference else None
        if self._resume_run:
            folder = resumed(server.runs, self._resume_run, experiment)
        else:
            folder = RunFolder.create(server.runs, experiment)
        self.info(f"run folder: {folder.path}")
        folder.note_job(self.fl_ctx.get_job_id())
        try:
            plan = privacy_plan(experiment)
            if plan is not None:
                self.info(plan.describe())
            start = folder.last_round() or self._prepared(experiment, folder, server)
            model, ended_early = self._train(experiment, folder, start)
            metrics = self._finish(experiment, folder, model)
            if self.abort_signal.triggered:
                raise RoundVoid("the job was aborted")
            folder.complete(metrics, ended_early=ended_early)
        except Exception as error:
            folder.fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            folder.copy_products(results_folder(self.fl_ctx))
        self.info(f"completed: {folder.path / 'receipt.json'}")

    def _check(self, experiment: ExperimentConfig, server: ServerConfig) -> None:
        """Refuse an experiment that asks for what this controller does not do."""
        asked, remedy = experiment.secure_aggregation, "name SecureFedAvg in config_fed_server.json"
        require(asked is None, argument="secure_aggregation", value=asked, remedy=remedy)
        said, remedy = experiment.encryption, "name EncryptedFedAvg in config_fed_server.json"
        require(said is None, argument="encryption", value=said, remedy=remedy)

    def _prepared(self, experiment: ExperimentConfig, folder: RunFolder, server: ServerConfig) -> ModelFile:
        """The model before the first round: fresh or given weights, warmed up on the sites' noisy mean image."""
        model = initial_model(experiment)
        if experiment.start_from is not None:
            weights = start_weights(server.models, experiment)
            self.info(f"starting from the model {experiment.start_from}")
            model = replace(model, weights=weights, ema=weights)
        if experiment.autoencoder is not None and experiment.autoencoder.frozen is not None:
            weights = {**model.weights, **frozen_autoencoder(server.models, experiment, experiment.autoencoder.frozen)}
            model = replace(model, weights=weights, ema=weights)
        shapes = mean_image_shape(experiment)
        if shapes is None:
            return model
        sites = sorted(client.name for client in self.engine.get_clients())
        self.info(f"mean image before training: asking {', '.join(sites)}")
        average = self._ask(tasks.RELEASE, {}, _header(experiment, folder, 0), sites, shapes, experiment)
        image = torch.from_numpy(average.mean()[MEAN_IMAGE])
        _grid((image[None] - 1).clamp(-1, 1).numpy(), folder.path / "mean_image.png", experiment, "noisy mean image")
        weights = warmed_up(model.weights, image, experiment, self._device)
        model = replace(model, weights=weights, ema=weights)
        folder.save_round(model)  # a resumed run does not ask, and charge, the sites again
        return model

    def _train(self, experiment: ExperimentConfig, folder: RunFolder, model: ModelFile) -> tuple[ModelFile, str | None]:
        """All rounds, or as many as the sites' privacy budgets allow; then also why there are no more."""
        for round_number in range(model.rounds_done, experiment.federation.rounds):
            start = time.monotonic()
            stage = stage_of(experiment, round_number)
            if not stage.span(round_number).steps:
                break
            asked = self._invited(experiment, round_number)
            self.info(
                f"round {round_number + 1}/{experiment.federation.rounds} ({stage.name}): asking {', '.join(asked)}"
            )
            header = _header(experiment, folder, round_number)
            arrays, shapes = self._task_arrays(model), update_shapes(experiment, round_number)
            try:
                average = self._ask(tasks.TRAIN, arrays, header, asked, shapes, experiment)
            except BudgetSpent as error:
                if round_number == 0:
                    raise
                self.info(f"ending with the model of {round_number} rounds: {error}")
                return model, str(error)
            model = self._moved(model, average)
            record = RoundRecord(
                round_number=round_number,
                asked=asked,
                accepted=average.accepted,
                refused=average.refused,
                silent=sorted(set(asked) - set(average.accepted) - set(average.refused)),
                seconds=time.monotonic() - start,
                mean=average.metrics,
            )
            folder.record(record)  # before the checkpoint: a crash between them repeats the round and its record
            folder.save_round(model)
            self.info(record.told(experiment.federation.rounds))
            every = experiment.sampling.grid_every
            done, last = round_number + 1, experiment.federation.rounds
            if every and done % every == 0 and stage.first < done < last and stage.name == "denoiser":
                images = draw(model, count=experiment.sampling.grid_images, device=self._device)
                file = folder.path / "samples" / f"round_{round_number + 1:04d}.png"
                _grid(images, file, experiment, _after(round_number + 1))
        return model, None

    def _task_arrays(self, model: ModelFile) -> dict[str, NDArray[np.float32]]:
        """What the sites need for a round of the model."""
        names = round_parts(model.experiment, model.rounds_done).shared
        needed = stage_of(model.experiment, model.rounds_done).needed(model.weights)
        return to_numpy({**needed, **server_variates(model, names)})

    def _moved(self, model: ModelFile, average: Average) -> ModelFile:
        """The model after a round."""
        present = len(average.accepted) / max(len(self.engine.get_clients()), len(average.accepted))
        return moved(model, average.mean(), present=present)

    def _invited(self, experiment: ExperimentConfig, round_number: int) -> list[str]:
        """Who is asked in a round: drawn, connected, and not left out for having been silent."""
        drawn = drawn_sites([client.name for client in self.engine.get_clients()], experiment, round_number)
        return self._skipped.asked(drawn, turn=round_number, at_least=experiment.federation.min_responses)

    def _ask(
        self,
        task: str,
        arrays: Arrays,
        header: TaskHeader,
        asked: list[str],
        shapes: Shapes,
        experiment: ExperimentConfig,
    ) -> Average:
        """Send a task and average the replies, which have the given shapes, as they come in.

        Raises:
            RoundVoid: too few acceptable ones until all have answered or the time is up.
        """
        average: Collector = InTimeAverage(shapes, experiment)
        robust = experiment.federation.robust
        if robust is not None and task == tasks.TRAIN:
            average = RobustAverage(shapes, experiment, robust, self._judge(arrays, header, experiment))
        self._collect(average, task, arrays, header, asked, experiment)
        return average

    def _judge(self, arrays: Arrays, header: TaskHeader, experiment: ExperimentConfig) -> ReferenceCheck | None:
        """What drops updates that harm the model on the server's own images, if the job asks for it."""
        weights = to_torch(arrays)
        return ReferenceCheck.of_round(self._reference, weights, experiment, header.round_number, self._device)

    def _collect(
        self,
        average: Collector,
        task: str,
        arrays: Arrays,
        header: TaskHeader,
        asked: list[str],
        experiment: ExperimentConfig,
    ) -> None:
        """Send a task and add the replies as they come in; raises as :meth:`_ask`."""

        def receive(reply: FLModel) -> bool:
            site, meta = reply.meta["client_name"], sent_meta(reply)
            # Full weights would pass for a difference otherwise: names and shapes are the same.
            difference = reply.params if reply.params_type == ParamsType.DIFF else None
            added = average.add(site, difference, meta)
            if not added:
                self.info(f"refused the reply of {site}: {average.refused[site]}")
            return added

        self._send(task, task_model(arrays, header), asked, experiment.federation.round_timeout_s, receive)
        for site, code in self._error_codes.items():
            average.refused.setdefault(site, f"answered {code}")
        if len(average.accepted) < experiment.federation.min_responses:
            spent = BUDGET_SPENT in self._error_codes.values()
            raise (BudgetSpent if spent else RoundVoid)(
                f"{task} in round {header.round_number + 1}: {len(average.accepted)} acceptable updates, "
                f"federation.min_responses = {experiment.federation.min_responses}; "
                f"refused: {average.refused or 'none'}; see those sites' logs"
            )

    def _send(self, task: str, data: FLModel, targets: list[str], timeout: int, receive: Receive) -> set[str]:
        """Send a task, wait until all targets have answered or the time is up, and return who was silent."""
        self._error_codes = {}
        answered: set[str] = set()

        def received(reply: FLModel) -> bool:
            answered.add(reply.meta["client_name"])
            return receive(reply)

        connected = {client.name for client in self.engine.get_clients()}
        present = [site for site in targets if site in connected]
        if present:  # to NVFlare no targets are all of them
            self.send_model(task_name=task, data=data, targets=present, timeout=timeout, callback=received)
        while self.get_num_standing_tasks():
            if self.abort_signal.triggered:
                raise RoundVoid("the job was aborted")
            time.sleep(0.1)
        answered |= set(self._error_codes)
        silent = set(targets) - answered
        self._skipped.note(answered=answered, silent=silent, turn=data.current_round)
        return silent

    def _accept_train_result(
        self, client_name: str, result: Shareable, fl_ctx: FLContext, is_unknown_task: bool = False
    ) -> bool:
        code = result.get_return_code()
        if code != ReturnCode.OK and not is_unknown_task:
            self._error_codes[client_name] = code
        return bool(super()._accept_train_result(client_name, result, fl_ctx, is_unknown_task))

    def _finish(self, experiment: ExperimentConfig, folder: RunFolder, model: ModelFile) -> dict[str, Any]:
        """Samples, the finished model, and the sites' figures about it."""
        save_model(folder.path / "model.safetensors", model)
        count = experiment.sampling.evaluation_images
        self.info(f"drawing {count} samples from the model, and as many from the untrained network")
        images = draw(model, count=count, device=self._device)
        first = images[: experiment.sampling.grid_images]
        _grid(first, folder.path / "samples.png", experiment, _after(model.rounds_done))
        untrained = draw(initial_model(experiment), count=count, device=self._device)
        arrays = to_numpy(model.ema) | {
            tasks.SAMPLES: grey_levels(images),
            tasks.UNTRAINED_SAMPLES: grey_levels(untrained),
        }
        # Those that were done, of a run that ended early, too; always of the last stage.
        header = _header(experiment, folder, max(model.rounds_done, stages(experiment)[-1].first))
        sites = _reachable(folder.records())
        self.info(f"evaluation: asking {', '.join(sites)}")
        mean, by_site = self._evaluated(arrays, header, sites, experiment)
        said = ", ".join(f"{name} {value:.4f}" for name, value in mean.items() if name != "seconds")
        self.info(f"mean over sites: {said or 'withheld: each site keeps its figures, see its pictures folder'}")
        return {"mean": {name: mean[name] for name in sorted(mean) if name != "seconds"}, "sites": by_site}

    def _evaluated(
        self, arrays: Arrays, header: TaskHeader, sites: list[str], experiment: ExperimentConfig
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """The sites' figures about the finished model: their mean, and each site's where they are known."""
        figures: dict[str, dict[str, float]] = {}

        def receive(reply: FLModel) -> bool:
            site = reply.meta["client_name"]
            try:
                check_metrics(reply.metrics or {}, allowed=evaluation_metrics(experiment))
            except EgressRefused as error:
                self.info(f"refused the figures of {site}: {error}")
                return False
            figures[site] = {name: float(value) for name, value in (reply.metrics or {}).items()}
            return True

        self._send(tasks.EVALUATE, task_model(arrays, header), sites, experiment.federation.round_timeout_s, receive)
        mean = {
            name: float(np.mean([site[name] for site in figures.values() if name in site]))
            for name in evaluation_metrics(experiment)
            if any(name in site for site in figures.values())
        }
        return mean, figures


def resumed(runs: Path, run_id: str, experiment: ExperimentConfig) -> RunFolder:
    """The folder of an earlier run, to be carried on. A job names a run, never a path on the server.

    Raises:
        ConfigError: no name of a run, no checkpoint, or another experiment.
    """
    require(RUN_ID.fullmatch(run_id) is not None, argument="resume_run", value=run_id, remedy="give a run's name")
    folder = RunFolder(runs / experiment.name / run_id)
    last = folder.last_round()
    if last is None:
        raise ConfigError(f"resume_run = {run_id!r}: no checkpoint of it; start afresh")
    if last.experiment != experiment:
        raise ConfigError(f"resume_run = {run_id!r}: another experiment; resume with the job folder that began the run")
    return folder


def _reachable(records: Sequence[RoundRecord]) -> list[str]:
    """Sites whose last update was taken, in whichever round that was: one that is silent would cost a timeout again."""
    taken = {site: site in record.accepted for record in records for site in record.asked}
    return sorted(site for site, last in taken.items() if last)


def _header(experiment: ExperimentConfig, folder: RunFolder, round_number: int) -> TaskHeader:
    return TaskHeader(
        run_id=folder.run_id,
        round_number=round_number,
        config_sha256=experiment.sha256,
        schedule_sha256=build_schedule(experiment.schedule).sha256,
    )


def sent_meta(reply: FLModel) -> dict[str, Any]:
    """The meta that the site sent, without what NVFlare's controller adds on arrival."""
    return reply_meta({key: value for key, value in reply.meta.items() if key not in ("client_name", "props")})


def _grid(images: NDArray[np.float32], file: Path, experiment: ExperimentConfig, what: str) -> None:
    title = f"{experiment.name}: {what}"
    pictures = viewable(images, experiment.preprocess)
    sample_grid(pictures, file, title=title, window_hu=experiment.preprocess.window_hu)


def _after(rounds: int) -> str:
    return f"samples after {rounds} round{'s' if rounds > 1 else ''}"
