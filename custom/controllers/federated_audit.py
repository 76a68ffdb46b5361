"""The server's side of a federated audit: a finished model goes out, counts come back."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvflare.app_common.abstract.fl_model import FLModel

from custom import tasks
from custom.audit_counts import Agreement, audit_of, audit_shapes
from custom.codec import (
    Arrays,
    TaskHeader,
    ToSite,
    experiment_of,
    results_folder,
    task_model,
    to_numpy,
    workspace_root,
)
from custom.config import ExperimentConfig
from custom.controllers.diffusion_fedavg import RoundVoid
from custom.controllers.secure_fedavg import MaskedAverage, SecureFedAvg
from custom.device import use
from custom.diffusion.networks import Shapes
from custom.diffusion.schedule import build_schedule
from custom.drawing import draw
from custom.egress import EgressRefused, check_counts
from custom.model_file import ModelFile, load_model
from custom.pictures import grey_levels
from custom.pooled_evidence import Collected, PooledAudit
from custom.run_folder import AUDIT_FILE, MODEL_FILE, RunFolder, check_receipt, newest_run
from custom.site_file import ServerConfig, server_config
from custom.strict import require
from privacy.audit.decision import DecisionRule
from privacy.audit.report.document import audit_of as decided
from privacy.audit.report.document import write_json
from privacy.audit.report.html import write_html
from privacy.audit.report.pdf import write_pdf


class FederatedAudit(SecureFedAvg):
    """Audits the newest completed run of the experiment that ``audit.model`` names, over all connected sites.

    The report applies the default cut-offs; a site that releases the model applies its own to the same evidence.
    """

    def __init__(self) -> None:
        super().__init__()
        self._agreement = Agreement()

    def run(self) -> None:
        """Ask, agree, ask again, and write the report."""
        experiment = experiment_of(self.fl_ctx)
        server = server_config(workspace_root=workspace_root(self.fl_ctx))
        self._check(experiment, server)
        self._device = use(server.hardware)
        run = newest_run(server.runs, str(audit_of(experiment).model))
        sha256 = check_receipt(run)["product_sha256"]
        model = load_model(run / MODEL_FILE)
        _require_same(model.experiment, experiment)
        folder = RunFolder.create(server.runs, experiment)
        self.info(f"auditing {run / MODEL_FILE}; run folder: {folder.path}")
        folder.note_job(self.fl_ctx.get_job_id())
        try:
            self._audit(experiment, model, sha256, folder)
        except Exception as error:
            folder.fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            folder.copy_products(results_folder(self.fl_ctx))
        self.info(f"completed: {folder.path / 'audit.html'}")

    def _check(self, experiment: ExperimentConfig, server: ServerConfig) -> None:
        require(experiment.audit is not None, argument="audit", value=None, remedy="missing; give the block")
        if experiment.secure_aggregation is not None:
            super()._check(experiment, server)

    def _audit(self, experiment: ExperimentConfig, model: ModelFile, sha256: str, folder: RunFolder) -> None:
        started = time.monotonic()
        pooled = PooledAudit(experiment, model, sha256)
        self._agreement = Agreement()
        ranges = self._counted(tasks.AUDIT_RANGE, to_numpy(model.ema), experiment, folder)
        self._agreement = pooled.agree(ranges.sums)
        tuning = self._counted(tasks.AUDIT_TUNE, {}, experiment, folder)
        self._agreement = pooled.choose(self._agreement, tuning.sums)
        report = self._counted(tasks.AUDIT_REPORT, {}, experiment, folder)
        copies, samples = None, audit_of(experiment).samples
        if samples:
            self.info(f"drawing {samples} samples to be screened for copies")
            images = draw(model, count=samples, device=self._device)
            copies = self._counted(tasks.AUDIT_COPIES, {tasks.SAMPLES: grey_levels(images)}, experiment, folder)
        evidence = pooled.evidence(
            self._agreement,
            tuning.sums,
            report,
            copies,
            created=datetime.now(timezone.utc).date().isoformat(),
            command=f"nvflare simulator jobs/{experiment.name}",
            seconds=time.monotonic() - started,
        )
        audit = decided(evidence, DecisionRule())
        write_json(folder.path / AUDIT_FILE, audit)
        write_html(folder.path / "audit.html", audit)
        write_pdf(folder.path / "audit.pdf", audit)
        self.info(f"{audit.decision.verdict}: {audit.decision.sentence}")
        folder.complete({"verdict": audit.decision.verdict})

    def _counted(self, task: str, arrays: Arrays, experiment: ExperimentConfig, folder: RunFolder) -> Collected:
        """One task's counts over all sites.

        Raises:
            RoundVoid: fewer sites than ``federation.min_responses`` answered acceptably.
        """
        schedule = build_schedule(experiment.schedule).sha256
        header = TaskHeader(
            run_id=folder.run_id, round_number=0, config_sha256=experiment.sha256, schedule_sha256=schedule
        )
        sites = sorted(client.name for client in self.engine.get_clients())
        shapes = audit_shapes(experiment, task)
        self.info(f"{task}: asking {', '.join(sites)}")
        if experiment.secure_aggregation is not None:
            average = self._ask(task, arrays, header, sites, shapes, experiment)
            return Collected(sums=average.arrays, by_site={}, sites=tuple(sorted(average.accepted)))
        by_site = self._plain_counts(task, arrays, header, sites, shapes, experiment)
        sums = {name: np.asarray(np.sum([counts[name] for counts in by_site.values()], axis=0)) for name in shapes}
        return Collected(sums=sums, by_site=by_site, sites=tuple(sorted(by_site)))

    def _plain_counts(
        self,
        task: str,
        arrays: Arrays,
        header: TaskHeader,
        sites: list[str],
        shapes: Shapes,
        experiment: ExperimentConfig,
    ) -> dict[str, dict[str, NDArray[np.int64]]]:
        found: dict[str, dict[str, NDArray[np.int64]]] = {}
        lock = threading.Lock()

        def receive(reply: FLModel) -> bool:
            site = reply.meta["client_name"]
            try:
                check_counts(reply.params or {}, shapes=shapes)
            except EgressRefused as error:
                self.info(f"refused the counts of {site}: {error}")
                return False
            with lock:
                found[site] = {name: reply.params[name] for name in shapes}
            return True

        data = task_model(arrays, header, agreement=self._agreement)
        self._send(task, data, sites, experiment.federation.round_timeout_s, receive)
        if len(found) < experiment.federation.min_responses:
            least, codes = experiment.federation.min_responses, self._error_codes or "none"
            raise RoundVoid(
                f"{task}: {len(found)} sites sent counts, federation.min_responses = {least}; error codes: {codes}; "
                "see those sites' logs"
            )
        return found

    def _work_model(self, arrays: Arrays, header: TaskHeader, message: ToSite) -> FLModel:
        return task_model(arrays, header, message, self._agreement)

    def _split(
        self, means: Mapping[str, NDArray[np.float64]], weight: float
    ) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        """The sums of counts, exactly: what was decoded is their mean over ``weight`` sites."""
        return {name: np.asarray(np.rint(mean * weight), dtype=np.int64) for name, mean in means.items()}, {}

    def _check_average(self, average: MaskedAverage, task: str, shapes: Shapes, experiment: ExperimentConfig) -> None:
        check_counts(average.arrays, shapes=shapes)


def _require_same(trained: ExperimentConfig, asked: ExperimentConfig) -> None:
    """The sites score with the job's network on the job's images: they must be those of the model."""
    for name in ("preprocess", "network", "schedule", "autoencoder"):
        remedy = f"the model's is {getattr(trained, name)}; copy its experiment.json into the audit's job"
        same = getattr(trained, name) == getattr(asked, name)
        require(same, argument=f"experiment.{name}", value=getattr(asked, name), remedy=remedy)
