"""The site's side of a run: train a round, compare samples with held-out patients, open an encrypted sum.

Under differential privacy a release is trained for only after the site's policy has passed the job and its ledger has
set the cost aside, and leaves only after it was charged; asked for again, the same bytes leave again and cost nothing.
Under secure aggregation whatever would leave goes under masks first; they are made before the work begins.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from torch import Tensor

from custom import tasks
from custom.codec import (
    Arrays,
    FromSite,
    TaskHeader,
    ToSite,
    content_of,
    counts_reply,
    experiment_of,
    he_context,
    masked_reply,
    mean_reply,
    metrics_reply,
    read_agreement,
    read_task,
    stage_reply,
    to_torch,
    update_reply,
    workspace_root,
)
from custom.config import ExperimentConfig
from custom.device import use
from custom.diffusion.schedule import build_schedule
from custom.egress import (
    BUDGET_SPENT,
    MEAN_IMAGE,
    POLICY_CODES,
    SECAGG_REFUSED,
    evaluation_metrics,
    released_shapes,
    statistics_that_leave,
    update_metrics,
)
from custom.evaluation import MIN_IMAGES, Evaluation, evaluate
from custom.filters.egress_gate import checked, passed
from custom.filters.encryption import require_encryption
from custom.he_contexts import CLIENT_CONTEXT
from custom.he_packing import opened, packed_name
from custom.job_plan import privacy_plan
from custom.kept_release import KeptRelease, Request, charged_release, drop, keep
from custom.latents import latent_cohort
from custom.masked_vector import shared_noise_encoding
from custom.model_file import ModelFile, save_model
from custom.personal import site_models, without_guarantee
from custom.pictures import real_and_generated, viewable
from custom.privacy_config import MeanImageConfig
from custom.private_training import (
    release_mean_image,
    shared_gradient,
    shared_mean_image,
    train_private_round,
    training_patients,
)
from custom.site_file import SiteConfig, site_config
from custom.site_ledger import open_ledger, release_sha256
from custom.site_sessions import Masking, SiteSessions
from custom.site_state import SiteState
from custom.stages import model_autoencoder, stage_objective, stage_of, stages
from custom.strict import require
from custom.training import as_section, held_out_loss, section, train_round
from custom.update_form import BOUNDS, formed
from custom.volume_evaluation import VolumeEvaluation, evaluate_volumes, fewest_volumes
from medical_data.cohort import Cohort, prepare_cohort
from privacy.accounting import MechanismEvent
from privacy.ledger import Attempt, BudgetExceeded, Ledger, Run
from privacy.plan import RELEASE_BEFORE_TRAINING, DPPlan, round_release
from privacy.policy import PolicyRefused
from privacy.rng import SecureRandomness
from privacy.secagg.errors import ProtocolViolation, SecAggError
from privacy.secagg.rules import Rules

if TYPE_CHECKING:  # only an audit needs it, and every task of a training imports this file
    from custom.audit_counts import Agreement

logger = logging.getLogger(__name__)


class Aborted(Exception):
    """The server ended the job while this site was at work."""


@dataclass(frozen=True, kw_only=True)
class _Site:
    name: str
    config: SiteConfig
    experiment: ExperimentConfig
    device: torch.device
    abort: Signal

    @property
    def plan(self) -> DPPlan | None:
        return privacy_plan(self.experiment)

    @property
    def masks_asked(self) -> Rules | None:
        asked = self.experiment.secure_aggregation
        return None if asked is None else asked.rules

    def sessions(self, header: TaskHeader) -> SiteSessions:
        """The site's part in secure aggregation, if its policy lets the job have one."""
        self.config.policy.check_masks(self.masks_asked)
        return SiteSessions.of_run(self.config, self.name, self.experiment, header.run_id)

    def admitted(self) -> Cohort:
        """The site's cohort, if its policy lets the job use it."""
        cohort = self._cohort()
        patients, leaves = len(training_patients(cohort)), statistics_that_leave(self.experiment)
        if self.experiment.audit is not None:
            self.config.policy.check_audit(patients=patients, leaves=leaves, secure_aggregation=self.masks_asked)
            return cohort
        self.config.policy.check(
            self.plan,
            patients=patients,
            rounds=self.experiment.federation.rounds,
            leaves=leaves,
            secure_aggregation=self.masks_asked,
        )
        return cohort

    def denoised(self, cohort: Cohort, weights: Mapping[str, Tensor], header: TaskHeader) -> Cohort:
        """What a round trains on: the cohort's images, or their latents by the model's finished autoencoder."""
        if self.experiment.autoencoder is None or stage_of(self.experiment, header.round_number).name == "autoencoder":
            return cohort
        autoencoder = model_autoencoder(self.experiment, weights)
        return latent_cohort(cohort, autoencoder, state=self.state(header).folder, device=self.device)

    def state(self, header: TaskHeader) -> SiteState:
        """What the site remembers of the run."""
        return SiteState.of_run(
            self.config.home, self.experiment.name, header.run_id, private=self.experiment.privacy is not None
        )

    def reserved(self, plan: DPPlan, header: TaskHeader) -> tuple[Ledger, Run]:
        """The ledger, with the run's cost set aside in it, now or before."""
        ledger, run = open_ledger(self.config.home), Run(job=self.experiment.name, run_id=header.run_id)
        ledger.reserve(run, plan.releases(), budgets=self.config.policy.budgets)
        return ledger, run

    def _cohort(self) -> Cohort:
        start = time.monotonic()
        cohort = prepare_cohort(
            source=self.config.source,
            preprocess=self.experiment.preprocess,
            limits=self.config.limits,
            home=self.config.home,
        )
        if time.monotonic() - start > 2:
            self.say(f"cohort of {len(cohort.pseudonyms)} patients read in {time.monotonic() - start:.0f} s")
        return cohort

    def say(self, text: str) -> None:
        """A line on the site's own console and in its log."""
        logger.info(f"[{self.name}] {text}")


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A release with this site's own noise, as the server asks for it."""

    site: _Site
    ledger: Ledger
    request: Request
    state: SiteState

    @classmethod
    def of(cls, site: _Site, plan: DPPlan, header: TaskHeader, release: str, arrays: Mapping[str, Tensor]) -> _Asked:
        """From a task; the run's cost is set aside, now or before."""
        ledger, run = site.reserved(plan, header)
        request = Request(
            run=run,
            release=release,
            round_number=header.round_number,
            arrays_sha256=release_sha256(arrays),
            config_sha256=site.experiment.sha256,
        )
        return cls(site=site, ledger=ledger, request=request, state=site.state(header))

    def again(self) -> Shareable | None:
        """The reply that was charged for this very request, to be sent again; None if there must be a fresh one."""
        kept = charged_release(self.state.folder, self.ledger, self.request.run)
        if kept is None:
            return None
        if kept.state and kept.request.round_number <= self.request.round_number:
            # The site may have died between the charge and this.
            self.state.save(kept.request.round_number, kept.state)
        if kept.request != self.request:
            return None
        self.site.say(f"{self.request.release} is asked for again: what was charged leaves again, nothing is charged")
        return self._reply(kept.arrays)

    def begin(self) -> Attempt:
        """Begin a fresh one: noise that was never handed out."""
        budgets = self.site.config.policy.budgets
        return self.ledger.begin(self.request.run, self.request.release, budgets=budgets)

    def charged(
        self, attempt: Attempt, event: MechanismEvent, arrays: dict[str, Tensor], state: dict[str, Tensor]
    ) -> Shareable:
        """The reply with what was released, once it was checked and kept, and the ledger has charged it."""
        reply = self._reply(arrays)
        # Before the charge: whatever was charged can be sent again.
        keep(self.state.folder, KeptRelease(request=self.request, arrays=arrays, state=state))
        self.ledger.charge(attempt, event, sha256=release_sha256(arrays), budgets=self.site.config.policy.budgets)
        if state:  # After the charge: what a later round builds on has been paid for.
            self.state.save(self.request.round_number, state)
        return reply

    def _reply(self, arrays: Mapping[str, Tensor]) -> Shareable:
        in_order = {name: arrays[name] for name in sorted(arrays)}  # the same each time it is sent
        return checked(update_reply(in_order, weight=1.0, metrics={}), self.site.experiment)


class DiffusionTrainer(Executor):
    """Answers the tasks of :mod:`custom.tasks`; what it keeps between them is on the site's disk."""

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Do one task. Whatever goes wrong stays in the site's own log; only a return code leaves."""
        try:
            experiment = experiment_of(fl_ctx)
            config = site_config(fl_ctx.get_identity_name(), workspace_root=workspace_root(fl_ctx))
            config.check_part(experiment.name)
            site = _Site(
                name=fl_ctx.get_identity_name(),
                config=config,
                experiment=experiment,
                device=use(config.hardware),
                abort=abort_signal,
            )
            arrays, header, message = read_task(shareable)
            _check_agreement(header, experiment)
            if experiment.encryption is not None and task_name in (tasks.RELEASE, tasks.TRAIN):
                require_encryption(task_name, fl_ctx)
                he_context(fl_ctx, CLIENT_CONTEXT, secret_key=True)
            if experiment.audit is not None and task_name != tasks.SECAGG:
                reply = _audit(site, task_name, arrays, header, message, read_agreement(shareable))
            elif experiment.secure_aggregation is None:
                reply = _work(site, task_name, arrays, header)
            elif task_name == tasks.SECAGG:
                reply = stage_reply(_stage(site, message, header))
            else:
                reply = _masked_work(site, task_name, arrays, header, message)
            return passed(reply, experiment)
        except Aborted:
            return make_reply(ReturnCode.TASK_ABORTED)
        except (BudgetExceeded, PolicyRefused) as error:
            # A warning, because kits may stream errors to the server, and this one may name the exact patient count.
            self.log_warning(fl_ctx, f"{task_name} refused by this site; nothing leaves it: {error}")
            return make_reply(POLICY_CODES[error.rule] if isinstance(error, PolicyRefused) else BUDGET_SPENT)
        except SecAggError as error:
            self.log_warning(fl_ctx, f"{task_name}: this site's part in secure aggregation is over: {error}")
            return make_reply(SECAGG_REFUSED)
        except Exception:
            self.log_exception(fl_ctx, f"{task_name} failed; nothing of it leaves this site")
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)


def _work(site: _Site, task: str, arrays: Arrays, header: TaskHeader) -> Shareable:
    """The plain reply of a task with work in it."""
    private = site.experiment.privacy
    if task == tasks.TRAIN and site.plan is not None:
        return _train_privately(site, site.plan, arrays, header)
    if task == tasks.TRAIN:
        return _train(site, arrays, header)
    if task == tasks.RELEASE and private is not None and private.mean_image is not None and site.plan is not None:
        return _release(site, site.plan, private.mean_image, arrays, header)
    if task == tasks.DECRYPT and site.experiment.encryption is not None:
        return _decrypt(site, arrays, header)
    if task == tasks.EVALUATE:
        return _evaluate(site, arrays, header)
    return make_reply(ReturnCode.TASK_UNKNOWN)


def _audit(
    site: _Site, task: str, arrays: Arrays, header: TaskHeader, message: ToSite, agreement: Agreement
) -> Shareable:
    """The counts of a task of an audit, as they are or under masks."""
    from custom.audit_counts import AUDIT_TASKS
    from custom.site_audit import SiteAudit

    experiment, masked = site.experiment, site.experiment.secure_aggregation is not None
    if task not in AUDIT_TASKS:
        return make_reply(ReturnCode.TASK_UNKNOWN)
    masking = _masking(site, task, header, message) if masked else None
    policy, home = site.config.audit, site.config.home
    audit = SiteAudit(home, site.name, experiment, header.run_id, policy, masked=masked)
    counts = audit.answer(task, site.admitted(), arrays, agreement, site.device)
    site.say(f"{task}: scored and counted")
    reply = counts_reply(counts)
    if masking is None:
        return reply
    checked(reply, experiment)
    return masked_reply(masking.integers(np.concatenate([counts[name].ravel() for name in sorted(counts)])))


def _masking(site: _Site, task: str, header: TaskHeader, message: ToSite) -> Masking:
    """The masks of a task with work in it; they are summed before the work begins."""
    session = message.session
    ours = session is not None and (session.task, session.round_number) == (task, header.round_number)
    if session is None or message.boxes is None or not ours:
        remedy = "a task with work needs its own session and the peers' boxes"
        raise ProtocolViolation(argument="session", value=str(session), remedy=remedy)
    return site.sessions(header).masking(session, message.boxes)


def _masked_work(site: _Site, task: str, arrays: Arrays, header: TaskHeader, message: ToSite) -> Shareable:
    """The same under masks, which are summed before the work begins: afterwards they cost one addition."""
    masking = _masking(site, task, header, message)
    if site.plan is not None and shared_noise_encoding(site.experiment, task, header.round_number) is not None:
        return masked_reply(masking.integers(_share(site, site.plan, task, arrays, header, masking.sites)))
    reply = _work(site, task, arrays, header)
    if reply.get_return_code() != ReturnCode.OK:
        return reply
    return masked_reply(masking.values(*content_of(checked(reply, site.experiment)), bounds=arrays.get(BOUNDS)))


def _share(site: _Site, plan: DPPlan, task: str, arrays: Arrays, header: TaskHeader, sites: int) -> NDArray[np.int64]:
    """This site's integers in a sum whose noise the sites share, charged.

    They are not kept, and asked for again they are made and charged anew. They have a share of the noise only, and no
    site knows in which sums they will stand, nor what its peers send in them: of the same integers in a sum over three
    sites and in one over two of these, the difference is the third site's, under no noise but its own share; in two
    sums with other noise of the peers, that noise averages out. Fresh integers are two sums of the theorem, charged as
    two.
    """
    experiment, cohort = site.experiment, site.admitted()
    asked = None if experiment.privacy is None else experiment.privacy.mean_image
    (ledger, run), budgets = site.reserved(plan, header), site.config.policy.budgets
    if task == tasks.RELEASE and asked is not None and plan.release_event is not None:
        event: MechanismEvent = plan.release_event
        attempt = ledger.begin(run, RELEASE_BEFORE_TRAINING, budgets=budgets)
        integers = shared_mean_image(cohort, asked, plan, sites=sites)
    else:
        event = plan.round_event
        attempt = ledger.begin(run, round_release(header.round_number), budgets=budgets)
        weights = to_torch(arrays)
        integers = shared_gradient(
            cohort=site.denoised(cohort, weights, header),
            weights=weights,
            config=experiment,
            plan=plan,
            round_number=header.round_number,
            device=site.device,
            patients_in_memory=site.config.hardware.patients_in_memory,
            sites=sites,
        )
    digest = release_sha256({task: torch.from_numpy(integers)})
    ledger.charge(attempt, event, sha256=digest, budgets=budgets)
    return integers


def _stage(site: _Site, message: ToSite, header: TaskHeader) -> FromSite:
    """What the protocol asks between two tasks with work: about the running session, and about the next."""
    sessions, running, opening = site.sessions(header), message.session, message.opening
    signed = revealed = advert = boxes = None
    if running is not None and message.survivors is not None and site.name in message.survivors.survived:
        signed = sessions.confirm(running, message.survivors)
    if running is not None and site.name in (one.party for one in message.signatures or ()):
        revealed = sessions.reveal(running, message.signatures or ())
    if opening is not None and message.roster is None:
        advert = sessions.open(opening, running=running)
    elif opening is not None and message.roster is not None and site.name in message.roster.parties:
        boxes = sessions.share(opening, message.roster)
    return FromSite(signed=signed, revealed=revealed, advert=advert, boxes=boxes)


def _check_agreement(header: TaskHeader, experiment: ExperimentConfig) -> None:
    schedule = build_schedule(experiment.schedule).sha256
    for argument, theirs, ours in (
        ("config_sha256", header.config_sha256, experiment.sha256),
        ("schedule_sha256", header.schedule_sha256, schedule),
    ):
        remedy = f"this site has {ours[:12]}…; server and site must run the same job folder and fedct version"
        require(theirs == ours, argument=argument, value=f"{theirs[:12]}…", remedy=remedy)


class _Progress:
    """A line on the console every ten seconds, and the end of the work if the server ends the job."""

    def __init__(self, site: _Site, label: str, steps: int) -> None:
        self._site = site
        self._steps = steps
        self.label = label
        self._last = time.monotonic()

    @classmethod
    def of_round(cls, site: _Site, header: TaskHeader) -> _Progress:
        """Of a round's training."""
        steps = stage_of(site.experiment, header.round_number).span(header.round_number).steps
        return cls(site, f"round {header.round_number + 1}/{site.experiment.federation.rounds}", steps)

    def __call__(self, step: int, loss: float | None = None) -> None:
        if self._site.abort.triggered:
            raise Aborted
        if time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            said = "" if loss is None else f", loss {loss:.4f}"
            self._site.say(f"{self.label}: step {step}/{self._steps}{said}")


def _train(site: _Site, arrays: Arrays, header: TaskHeader) -> Shareable:
    experiment, round_number, progress = site.experiment, header.round_number, _Progress.of_round(site, header)
    cohort, stage = site.admitted(), stage_of(experiment, round_number)
    weights = to_torch({name: array for name, array in arrays.items() if name != BOUNDS})
    state = site.state(header)
    kept = state.before(round_number, since=stage.first)
    update = train_round(
        cohort=site.denoised(cohort, weights, header),
        weights=weights,
        state=kept,
        config=experiment,
        site=site.name,
        round_number=round_number,
        device=site.device,
        hardware=site.config.hardware,
        progress=progress,
    )
    leaves = formed(update.difference, section(kept, "lost"), experiment, arrays.get(BOUNDS))
    state.save(round_number, {**update.state, **as_section(leaves.lost, "lost")})
    patients = len(np.unique(cohort.patient[cohort.rows("train")]))
    site.say(
        f"{progress.label}: done, loss {update.metrics['train_loss']:.4f}, held-out loss of the global model "
        f"{update.metrics['held_out_loss']:.4f}, {update.metrics['seconds']:.0f} s"
    )
    weight = float(patients) if experiment.federation.weighting == "patients" else 1.0
    said = {name: value for name, value in update.metrics.items() if name in update_metrics(experiment)}
    return update_reply(to_torch(leaves.arrays), weight=weight, metrics=said)


def _train_privately(site: _Site, plan: DPPlan, arrays: Arrays, header: TaskHeader) -> Shareable:
    experiment, round_number, progress = site.experiment, header.round_number, _Progress.of_round(site, header)
    cohort = site.admitted()
    weights = to_torch(arrays)
    asked = _Asked.of(site, plan, header, round_release(round_number), weights)
    again = asked.again()
    if again is not None:
        return again
    attempt = asked.begin()
    update = train_private_round(
        cohort=site.denoised(cohort, weights, header),
        weights=weights,
        state=asked.state.before(round_number, since=stage_of(experiment, round_number).first),
        config=experiment,
        plan=plan,
        round_number=round_number,
        device=site.device,
        patients_in_memory=site.config.hardware.patients_in_memory,
        progress=progress,
    )
    reply = asked.charged(attempt, update.event, update.difference, update.state)
    spent = plan.epsilon_by_round[round_number]
    site.say(f"{progress.label}: done and charged; epsilon {spent:.3f} of {plan.epsilon:.3f} by this run's plan")
    return reply


def _release(site: _Site, plan: DPPlan, mean_image: MeanImageConfig, arrays: Arrays, header: TaskHeader) -> Shareable:
    """The mean image before training."""
    cohort = site.admitted()
    asked = _Asked.of(site, plan, header, RELEASE_BEFORE_TRAINING, to_torch(arrays))
    again = asked.again()
    if again is not None:
        return again
    attempt, event = asked.begin(), plan.releases()[RELEASE_BEFORE_TRAINING]
    reply = asked.charged(attempt, event, {MEAN_IMAGE: release_mean_image(cohort, mean_image, plan)}, {})
    site.say(f"mean image released with noise multiplier {event.noise_multiplier:g} and charged")
    return reply


def _decrypt(site: _Site, arrays: Mapping[str, Any], header: TaskHeader) -> Shareable:
    """The mean of a sum that NVFlare's decryptor has opened, which is for the server and says nothing of one site."""
    experiment = site.experiment
    site.config.policy.check_masks(site.masks_asked)  # who may not train for this job opens none of its sums
    shapes = {packed_name(shapes): shapes for shapes in released_shapes(experiment)}
    require(len(arrays) == 1 and set(arrays) <= set(shapes), argument="sum", value=sorted(arrays), remedy="give one")
    ((name, total),) = arrays.items()
    remedy = "still encrypted: put NVFlare's HEModelDecryptor into the job's task_data_filters on decrypt"
    require(isinstance(total, list), argument="sum", value=type(total).__name__, remedy=remedy)
    site.say(f"opened the sum of {name}s of round {header.round_number + 1}")
    return mean_reply(opened(total, shapes[name], SecureRandomness()))


def _evaluate(site: _Site, arrays: Arrays, header: TaskHeader) -> Shareable:
    start = time.monotonic()
    experiment, cohort = site.experiment, site.admitted()
    pictures = (tasks.SAMPLES, tasks.UNTRAINED_SAMPLES)
    weights = to_torch({name: array for name, array in arrays.items() if name not in pictures})
    objective = stage_objective(experiment, stage_of(experiment, header.round_number), weights, site.device)
    denoised = site.denoised(cohort, weights, header)
    metrics = {"held_out_loss": held_out_loss(objective, denoised, site.device)}
    metrics |= _compare(site, cohort, arrays, header)
    site.say("evaluation: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if site.plan is not None:  # the run is over: give back what it set aside and did not use
        open_ledger(site.config.home).close(Run(job=experiment.name, run_id=header.run_id))
        drop(site.state(header).folder)
    if experiment.personal is not None:
        metrics |= _personal(site, denoised, weights, header)
    metrics["seconds"] = time.monotonic() - start
    return metrics_reply({name: value for name, value in metrics.items() if name in evaluation_metrics(experiment)})


def _personal(site: _Site, cohort: Cohort, weights: Mapping[str, Tensor], header: TaskHeader) -> dict[str, float]:
    """Held-out losses of the site's own models, which are kept beside its pictures and never sent."""
    experiment = site.experiment
    models = site_models(
        cohort=cohort,
        weights=weights,
        state=site.state(header).before(header.round_number),
        config=experiment,
        site=site.name,
        device=site.device,
        hardware=site.config.hardware,
        progress=partial(_Progress, site),
    )
    folder, stage = site.config.home / "personal" / experiment.name / header.run_id, stages(experiment)[-1]
    losses = {}
    for name, tensors in (("personal", models.personal), ("local", models.local)):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        said = without_guarantee(experiment)
        model = ModelFile(experiment=said, rounds_done=header.round_number, weights=tensors, ema=tensors)
        save_model(folder / f"{name}.safetensors", model)
        objective = stage_objective(experiment, stage, tensors, site.device)
        losses[f"{name}_held_out_loss"] = held_out_loss(objective, cohort, site.device)
    site.say("on held-out patients: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
    site.say(f"personal model, to be audited before anyone gets it or its samples: {folder / 'personal.safetensors'}")
    return losses


def _compare(site: _Site, cohort: Cohort, arrays: Arrays, header: TaskHeader) -> dict[str, float]:
    """EffNet-KID of the samples against held-out patients, and a picture of both, which stays at the site."""
    experiment, preprocess = site.experiment, site.experiment.preprocess
    generated, untrained = (
        arrays[name].astype(np.float32) / 127.5 - 1 for name in (tasks.SAMPLES, tasks.UNTRAINED_SAMPLES)
    )
    rng = np.random.default_rng(experiment.seed)
    held_out, train = (
        cohort.images[np.sort(rng.permutation(rows)[: len(generated)])]
        for rows in (cohort.rows("held_out"), cohort.rows("train"))
    )
    pictures = site.config.home / "pictures" / experiment.name / header.run_id
    spread = np.linspace(0, len(held_out) - 1, min(16, len(held_out))).round().astype(int)  # over the patients
    real_and_generated(
        viewable(held_out[spread], preprocess),
        viewable(generated[:16], preprocess),
        pictures / "real_and_generated.png",
        window_hu=preprocess.window_hu,
    )
    site.say(f"real beside generated, for this site's eyes only: {pictures / 'real_and_generated.png'}")
    per_patient = int(np.bincount(cohort.patient).max())
    volumes = preprocess.spatial_dims == 3
    fewest = fewest_volumes(per_patient) if volumes else max(MIN_IMAGES, per_patient + 3)
    if min(len(held_out), len(train), len(generated)) < fewest:
        site.say("too few images for EffNet-KID: it is left out")
        return {}
    result: Evaluation | VolumeEvaluation = (evaluate_volumes if volumes else evaluate)(
        generated, held_out, train=train, untrained=untrained, images_per_patient=per_patient, seed=experiment.seed
    )
    (pictures / "evaluation.txt").write_text(result.table() + "\n", encoding="utf-8")
    return {
        "effnet_kid": result.generated.effnet.kid_mean,
        "effnet_kid_baseline": result.baseline.effnet.kid_mean,
    } | ({"effnet_kid_untrained": result.untrained.effnet.kid_mean} if result.untrained else {})
