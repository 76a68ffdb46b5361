"""FedAvg under secure aggregation: the server adds masked vectors and sees their sum.

One session of :mod:`privacy.secagg` for each sum, in three tasks a site: the work, whose reply is the masked vector;
the survivors, to be signed, whose reply also advertises keys for the next session; and the signatures, upon which
shares are revealed, whose reply also deals the next session's shares. Only a run's first session, and one after a
failure, takes two more tasks before its work.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvflare.app_common.abstract.fl_model import FLModel
from torch import Tensor

from custom import tasks
from custom.client_sampling import grouped
from custom.codec import (
    MASKED,
    Arrays,
    FromSite,
    TaskHeader,
    ToSite,
    read_answer,
    task_model,
)
from custom.config import ExperimentConfig
from custom.controllers.diffusion_fedavg import Average, BudgetSpent, DiffusionFedAvg, RoundVoid
from custom.diffusion.networks import Shapes
from custom.egress import BUDGET_SPENT, EgressRefused, check_arrays
from custom.masked_vector import Schema, session_encoding, session_ring, shared_noise_encoding, split_means
from custom.model_file import ModelFile
from custom.robust import clipped, combined
from custom.round_parts import update_shapes
from custom.server_step import stepped
from custom.site_file import ServerConfig
from custom.site_sessions import kit_root
from custom.stages import stage_of
from custom.strict import ConfigError, require
from custom.update_form import BOUNDS, first_bounds, next_bounds
from privacy.secagg.encoding import QuantisedEncoding
from privacy.secagg.errors import SecAggError, TooFew
from privacy.secagg.messages import Roster, Session
from privacy.secagg.server import Server

ATTEMPTS = 2  # at one sum, each with fresh keys


@dataclass(frozen=True, kw_only=True)
class MaskedAverage:
    """What a session gave.

    Attributes:
        arrays: mean of the survivors' arrays by name, float32; in an audit the sums of their counts, int64.
        metrics: mean of their metrics.
        accepted: the survivors; what one of them reported is not known.
        refused: reason by site.
    """

    arrays: dict[str, NDArray[Any]]
    metrics: dict[str, float]
    accepted: dict[str, dict[str, float]]
    refused: dict[str, str]

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """The arrays."""
        return self.arrays


class _Sum:
    """One session at the server, with what belongs to it here.

    Attributes:
        server: the protocol's.
        invited: who may advertise.
        roster: and ``encoding``, once the adverts are in.
    """

    roster: Roster
    encoding: Schema

    def __init__(self, server: Server, invited: Collection[str], experiment: ExperimentConfig) -> None:
        self.server, self.invited, self._experiment = server, sorted(invited), experiment
        self.task, self.round_number = server.session.task, server.session.round_number

    def close_adverts(self) -> None:
        """Fix the roster; raises ``TooFew``."""
        parties = max(self.server.advertised, 2)
        self.encoding = session_encoding(self._experiment, self.task, self.round_number, parties=parties)
        self.roster = self.server.roster(size=self.encoding.size)

    def take(self, site: str, answer: FromSite) -> None:
        """The site's part in opening this session; raises ``SecAggError``."""
        if answer.advert is not None and site in self.invited:
            self.server.add_advert(site, answer.advert)
        if answer.boxes is not None:
            self.server.add_boxes(site, answer.boxes)


class SecureFedAvg(DiffusionFedAvg):
    """FedAvg over sums under masks.

    Args:
        resume_run: as of :class:`DiffusionFedAvg`.
    """

    def __init__(self, resume_run: str = "") -> None:
        super().__init__(resume_run)
        self._next: _Sum | None = None
        self._refused: dict[str, str] = {}  # in the running sum, with why
        self._lost: set[str] = set()  # in the running sum, silent or with an error
        self._lock = threading.Lock()

    def _check(self, experiment: ExperimentConfig, server: ServerConfig) -> None:
        there, remedy = experiment.secure_aggregation is not None, "missing; give the block, or name DiffusionFedAvg"
        require(there, argument="secure_aggregation", value=None, remedy=remedy)
        self._root = kit_root(server.kit)

    def _ask(
        self,
        task: str,
        arrays: Arrays,
        header: TaskHeader,
        asked: list[str],
        shapes: Shapes,
        experiment: ExperimentConfig,
    ) -> MaskedAverage:
        def summed(sites: list[str]) -> MaskedAverage:
            return self._summed_once(task, arrays, header, sites, shapes, experiment)

        robust = experiment.federation.robust
        if robust is None or robust.groups is None or task != tasks.TRAIN:
            return summed(asked)
        groups = grouped(asked, robust.groups, seed=experiment.seed, round_number=header.round_number)
        sums = [self._group_sum(group, summed) for group in groups]
        judge = self._judge(arrays, header, experiment)
        averages, failed = [], {}
        for group, average in zip(groups, sums, strict=True):
            if average is None:
                failed.update(dict.fromkeys(group, "its group gave no sum"))
                continue
            if robust.clip_norm is not None:  # to which honest sites have clipped theirs
                average = replace(average, arrays=clipped(average.arrays, norm=robust.clip_norm))
            reason = None if judge is None else judge(average.arrays)
            if reason is None:
                averages.append(average)
            else:
                failed.update(dict.fromkeys(group, reason))
        if len(averages) < robust.fewest:
            remedy = f"federation.robust.rule needs {robust.fewest}; see those sites' logs"
            raise RoundVoid(f"{task} in round {header.round_number + 1}: {len(averages)} groups gave a sum; {remedy}")
        sizes = [float(len(average.accepted)) for average in averages]
        metrics = {name for average in averages for name in average.metrics}
        return MaskedAverage(
            arrays=combined([average.arrays for average in averages], sizes, robust),
            metrics={
                name: float(np.mean([a.metrics[name] for a in averages if name in a.metrics])) for name in metrics
            },
            accepted={site: said for average in averages for site, said in average.accepted.items()},
            refused=failed | {site: why for average in averages for site, why in average.refused.items()},
        )

    def _group_sum(self, group: list[str], summed: Callable[[list[str]], MaskedAverage]) -> MaskedAverage | None:
        """The sum of one group; None if it has too few survivors, or a mean that no acceptable updates have."""
        try:
            return summed(group)
        except BudgetSpent:
            raise
        except (RoundVoid, EgressRefused) as error:  # one malicious site can make its group's sum too long
            self.info(f"no sum of the group {', '.join(group)}: {error}")
            return None

    def _summed_once(
        self,
        task: str,
        arrays: Arrays,
        header: TaskHeader,
        asked: list[str],
        shapes: Shapes,
        experiment: ExperimentConfig,
    ) -> MaskedAverage:
        """One sum over the sites that are asked; raises as :meth:`_ask`."""
        self._refused, self._lost = {}, set()
        for attempt in range(1, ATTEMPTS + 1):
            running, self._next = self._next, None
            try:
                if running is None or (running.task, running.round_number) != (task, header.round_number):
                    running = self._opened(task, header, asked, experiment)
                average = self._summed(running, arrays, header, experiment)
            except SecAggError as error:
                said = f"{task} in round {header.round_number + 1}: {error}; refused: {self._refused or 'none'}"
                spent = any(BUDGET_SPENT in reason for reason in self._refused.values())
                if spent or attempt == ATTEMPTS or len(set(asked) - self._lost) < 2:
                    raise (BudgetSpent if spent else RoundVoid)(f"{said}; see those sites' logs") from error
                asked = [site for site in asked if site not in self._lost]
                self.info(f"{said}; once more, with fresh keys")
                continue
            if shared_noise_encoding(experiment, task, header.round_number) is None:
                self._check_average(average, task, shapes, experiment)
            return average
        raise AssertionError  # the last attempt returned or raised

    def _check_average(self, average: MaskedAverage, task: str, shapes: Shapes, experiment: ExperimentConfig) -> None:
        """Refuse a mean that no acceptable updates have; raises ``EgressRefused``."""
        check_arrays(average.arrays, shapes=shapes, max_norm=experiment.federation.max_update_norm)

    def _task_arrays(self, model: ModelFile) -> dict[str, NDArray[np.float32]]:
        arrays = super()._task_arrays(model)
        if not _few_bits(model.experiment):
            return arrays
        stage = stage_of(model.experiment, model.rounds_done)
        shapes = update_shapes(model.experiment, model.rounds_done)
        bounds = first_bounds(shapes, stage, stage.span(model.rounds_done)) | _bounds(model)
        return {**arrays, BOUNDS: np.array([float(bounds[name]) for name in sorted(shapes)], np.float32)}

    def _moved(self, model: ModelFile, average: Average) -> ModelFile:
        if shared_noise_encoding(model.experiment, tasks.TRAIN, model.rounds_done) is not None:
            return stepped(model, average.mean())
        after = super()._moved(model, average)
        if not _few_bits(model.experiment):
            return after
        bounds = {f"{BOUNDS}/{name}": bound for name, bound in (_bounds(model) | next_bounds(average.mean())).items()}
        return replace(after, optimizer={**after.optimizer, **bounds})

    def _evaluated(
        self, arrays: Arrays, header: TaskHeader, sites: list[str], experiment: ExperimentConfig
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        if self._next is not None and self._next.invited != sites:  # not all of them were in the last round
            self._next = None
        try:
            return self._ask(tasks.EVALUATE, arrays, header, sites, {}, experiment).metrics, {}
        except RoundVoid as error:
            self.info(f"no figures: {error}")
            return {}, {}

    def _opened(self, task: str, header: TaskHeader, asked: list[str], experiment: ExperimentConfig) -> _Sum:
        """A session made ready in two tasks of its own; raises ``SecAggError``."""
        opening = self._session(task, header, header.round_number, asked, experiment)
        self.info(f"secure aggregation: opening a session with {', '.join(asked)}")
        session = opening.server.session
        self._stage(ToSite(opening=session), header, opening.invited, experiment, opening.take)
        opening.close_adverts()
        parties = opening.roster.parties
        self._stage(ToSite(opening=session, roster=opening.roster), header, parties, experiment, opening.take)
        return opening

    def _summed(self, running: _Sum, arrays: Arrays, header: TaskHeader, experiment: ExperimentConfig) -> MaskedAverage:
        """The work, the signatures and the shares of one session; raises ``SecAggError`` if nothing is decoded."""
        server, session = running.server, running.server.session
        boxes = server.boxes()
        shared = sorted({box.sender for box in boxes})
        data = self._work_model(arrays, header, ToSite(session=session, boxes=boxes))

        def masked(reply: FLModel) -> bool:
            return self._taken(reply, lambda site: server.add_masked(site, (reply.params or {}).get(MASKED)))

        self._sent(session.task, data, shared, experiment.federation.round_timeout_s, masked)
        with self._lock:
            survivors = server.close()
        least, count = _fewest(session.task, experiment), len(survivors.survived)
        if count < least:
            remedy = f"federation.min_responses = {least}; nothing is decoded"
            raise TooFew(argument="masked vectors", value=count, remedy=remedy)

        following = self._following(session.task, header, survivors.survived, experiment)

        def confirmed(site: str, answer: FromSite) -> None:
            if answer.signed is not None:
                server.add_signature(site, answer.signed)
            if following is not None:
                following.take(site, answer)

        opening = None if following is None else following.server.session
        message = ToSite(session=session, survivors=survivors, opening=opening)
        invited = set() if following is None else set(following.invited)
        self._stage(message, header, {*survivors.survived, *invited}, experiment, confirmed)
        signatures = server.signatures()
        following = self._with_roster(following)

        def revealed(site: str, answer: FromSite) -> None:
            if answer.revealed is not None:
                server.add_revealed(site, answer.revealed)
            if following is not None:
                following.take(site, answer)

        message = ToSite(
            session=session,
            signatures=signatures,
            opening=None if following is None else following.server.session,
            roster=None if following is None else following.roster,
        )
        parties = set() if following is None else set(following.roster.parties)
        self._stage(message, header, {*(one.party for one in signatures), *parties}, experiment, revealed)
        encoding = running.encoding
        if isinstance(encoding, QuantisedEncoding):  # whose bounds were not known when the session was opened
            encoding = session_encoding(
                experiment,
                session.task,
                session.round_number,
                parties=encoding.parties,
                bounds=arrays.get(BOUNDS),
            )
        means, weight = encoding.decode(server.unmask())
        self._next = following
        found, metrics = self._split(means, weight)
        accepted: dict[str, dict[str, float]] = {site: {} for site in survivors.survived}
        return MaskedAverage(arrays=found, metrics=metrics, accepted=accepted, refused=dict(self._refused))

    def _work_model(self, arrays: Arrays, header: TaskHeader, message: ToSite) -> FLModel:
        """A task with work in it."""
        return task_model(arrays, header, message)

    def _split(
        self, means: Mapping[str, NDArray[np.float64]], weight: float
    ) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        """Arrays and metrics of a decoded mean over a total weight."""
        return split_means(means)

    def _following(
        self, task: str, header: TaskHeader, survived: Collection[str], experiment: ExperimentConfig
    ) -> _Sum | None:
        """The session after this one, to be opened with this one's own tasks; None after the last."""
        robust = experiment.federation.robust
        if task == tasks.EVALUATE or experiment.audit is not None or (robust is not None and robust.groups is not None):
            return None
        number = 0 if task == tasks.RELEASE else header.round_number + 1
        if number < experiment.federation.rounds:
            return self._session(tasks.TRAIN, header, number, self._invited(experiment, number), experiment)
        return self._session(tasks.EVALUATE, header, number, survived, experiment)

    def _session(
        self, task: str, header: TaskHeader, round_number: int, invited: Collection[str], experiment: ExperimentConfig
    ) -> _Sum:
        """A session with a fresh nonce."""
        asked = experiment.secure_aggregation
        assert asked is not None  # noqa: S101 - checked when the run began
        session = Session(
            job=experiment.sha256,
            run=header.run_id,
            task=task,
            round_number=round_number,
            nonce=secrets.token_hex(8),
        )
        ring_bits = session_ring(experiment, task)
        server = Server(session=session, rules=asked.rules, root=self._root, ring_bits=ring_bits)
        return _Sum(server, invited, experiment)

    def _with_roster(self, following: _Sum | None) -> _Sum | None:
        """The next session with its roster, or None if it has too few sites: then it is opened anew in its turn."""
        if following is None:
            return None
        try:
            following.close_adverts()
        except TooFew as error:
            self.info(f"secure aggregation: the next session is not opened yet: {error}")
            return None
        return following

    def _stage(
        self,
        message: ToSite,
        header: TaskHeader,
        targets: Collection[str],
        experiment: ExperimentConfig,
        take: Callable[[str, FromSite], None],
    ) -> None:
        """Ask the sites for a stage of the protocol."""
        asked = experiment.secure_aggregation
        assert asked is not None  # noqa: S101 - checked when the run began

        def receive(reply: FLModel) -> bool:
            return self._taken(reply, lambda site: take(site, read_answer(reply.params)))

        self._sent(tasks.SECAGG, task_model({}, header, message), sorted(targets), asked.stage_timeout_s, receive)

    def _sent(
        self, task: str, data: FLModel, targets: list[str], timeout: int, receive: Callable[[FLModel], bool]
    ) -> None:
        self._lost |= self._send(task, data, targets, timeout, receive) | set(self._error_codes)
        for site, code in self._error_codes.items():
            self._refused[site] = f"answered {code}"

    def _taken(self, reply: FLModel, take: Callable[[str], None]) -> bool:
        """Take a site's reply, or refuse it by the site's name."""
        site = reply.meta["client_name"]
        try:
            with self._lock:  # NVFlare calls from several threads
                take(site)
        except (SecAggError, ConfigError) as error:
            self._refused[site] = str(error)
            self.info(f"refused the reply of {site}: {error}")
            return False
        return True


def _fewest(task: str, experiment: ExperimentConfig) -> int:
    """Survivors without which a sum is not decoded."""
    federation, asked = experiment.federation, experiment.secure_aggregation
    if task != tasks.TRAIN or federation.robust is None or federation.robust.groups is None or asked is None:
        return federation.min_responses
    return max(2, asked.min_survivors)


def _few_bits(experiment: ExperimentConfig) -> bool:
    return experiment.updates is not None and experiment.updates.bits is not None


def _bounds(model: ModelFile) -> dict[str, Tensor]:
    """Bounds of a tensor's next update, from the last mean difference of it, by name."""
    place = f"{BOUNDS}/"
    return {key.removeprefix(place): bound for key, bound in model.optimizer.items() if key.startswith(place)}
