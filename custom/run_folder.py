"""What a run leaves on the server: ``runs/<experiment>/<run>/``, which no later run touches.

    experiment.json     the configuration
    rounds.jsonl        one line a round: who was asked, accepted, refused or silent, and the metrics
    tensorboard/        the metrics again, for TensorBoard
    checkpoints/        after each round, the newest three
    samples/            a grid of samples every few rounds
    mean_image.png      what the sites released before training, if they did (noisy)
    model.safetensors   the finished model    \\
    samples.png         its samples            | only if the run was completed
    metrics.json        its figures            |
    receipt.json        what happened         /  (or ``"status": "failed"`` and why)
    jobs.txt            NVFlare's ids of the jobs that worked on it, a line each

An audit leaves its report instead of a model: ``audit.json``, ``audit.html`` and ``audit.pdf``.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from custom.atomic import write_atomically
from custom.config import EXPERIMENT_FILE, ExperimentConfig
from custom.strict import ConfigError

if TYPE_CHECKING:
    from custom.model_file import ModelFile

KEPT_CHECKPOINTS = 3
MODEL_FILE, AUDIT_FILE = "model.safetensors", "audit.json"  # what a receipt vouches for
JOBS_FILE = "jobs.txt"
# What whoever handed in the job may take home.
PRODUCTS = (
    EXPERIMENT_FILE,
    "rounds.jsonl",
    MODEL_FILE,
    "samples.png",
    "mean_image.png",
    "metrics.json",
    AUDIT_FILE,
    "audit.html",
    "audit.pdf",
    "receipt.json",
)
RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round as it was.

    Attributes:
        round_number: from 0.
        asked: sites that got the task.
        accepted: metrics of the sites whose update went into the model.
        refused: reason by site: a reply that did not pass, or an error code.
        silent: sites that gave no reply in time.
        seconds: from sending the task to the new model.
        mean: metrics of which only the mean over the sites is known, as under secure aggregation.
    """

    round_number: int
    asked: list[str]
    accepted: dict[str, dict[str, float]]
    refused: dict[str, str]
    silent: list[str]
    seconds: float
    mean: dict[str, float] = field(default_factory=dict)

    def told(self, rounds: int) -> str:
        """A line for people, of a run of so many rounds."""

        def mean(name: str, said: str) -> list[str]:
            values = [metrics[name] for metrics in (*self.accepted.values(), self.mean) if name in metrics]
            return [f"{said} {fmean(values):.4f}"] if values else []

        return ", ".join(
            [
                f"round {self.round_number + 1}/{rounds} done in {self.seconds:.0f} s",
                *mean("train_loss", "train loss"),
                *mean("held_out_loss", "held-out loss before it"),
                f"{len(self.accepted)} of {len(self.asked)} sites",
                *([f"refused {', '.join(self.refused)}"] if self.refused else []),
                *([f"silent {', '.join(self.silent)}"] if self.silent else []),
            ]
        )


class RunFolder:
    """The folder of one run.

    Args:
        path: ``runs/<experiment>/<run id>``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, runs: Path, experiment: ExperimentConfig) -> RunFolder:
        """A fresh folder named after the time, with the configuration in it."""
        stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
        folder = cls(runs / experiment.name / f"{stamp}-{secrets.token_hex(2)}")
        folder.path.mkdir(parents=True)
        folder._write_json(EXPERIMENT_FILE, experiment.to_json())
        return folder

    @property
    def run_id(self) -> str:
        """Names the run at the sites."""
        return self.path.name

    def experiment(self) -> ExperimentConfig:
        """The configuration that the run began with."""
        return ExperimentConfig.load(self.path / EXPERIMENT_FILE)

    def job_ids(self) -> list[str]:
        """NVFlare's ids of the jobs that worked on this run, in order; empty for one that noted none."""
        file = self.path / JOBS_FILE
        return file.read_text(encoding="utf-8").split() if file.is_file() else []

    def note_job(self, job_id: str) -> None:
        """Write down that a job works on this run."""
        with (self.path / JOBS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(f"{job_id}\n")

    def copy_products(self, folder: Path) -> None:
        """Copy what the run gave, the receipt last, to where NVFlare lets it be downloaded from."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in PRODUCTS:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)

    def save_round(self, model: ModelFile) -> None:
        """Write the checkpoint after a round and drop those too old to resume from."""
        from custom.model_file import save_checkpoint

        save_checkpoint(self._checkpoint(model.rounds_done), model)
        for old in sorted(self._checkpoints())[:-KEPT_CHECKPOINTS]:
            self._checkpoint(old).unlink(missing_ok=True)

    def last_round(self) -> ModelFile | None:
        """The newest checkpoint, or None before the first round was done."""
        from custom.model_file import load_model

        done = self._checkpoints()
        return load_model(self._checkpoint(max(done))) if done else None

    def record(self, record: RoundRecord) -> None:
        """Append a line to ``rounds.jsonl`` and the metrics to the TensorBoard files."""
        from torch.utils.tensorboard.writer import SummaryWriter

        with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(record), allow_nan=False) + "\n")
        with SummaryWriter(str(self.path / "tensorboard")) as writer:
            for site, metrics in (*record.accepted.items(), ("mean over sites", record.mean)):
                for name, value in metrics.items():
                    writer.add_scalar(f"{name}/{site}", value, record.round_number)

    def records(self) -> list[RoundRecord]:
        """The whole lines of ``rounds.jsonl``; of a round that was repeated after a resumption, the last one."""
        file = self.path / "rounds.jsonl"
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
        by_round = {record.round_number: record for record in (RoundRecord(**json.loads(line)) for line in lines)}
        return [by_round[number] for number in sorted(by_round)]

    def complete(self, metrics: dict[str, Any], *, ended_early: str | None = None) -> None:
        """Write ``metrics.json`` and then the receipt, which vouches for the model, or the audit, by its hash.

        Args:
            metrics: mean over sites, and by site.
            ended_early: why there were fewer rounds than asked for, such as a privacy budget that was spent.
        """
        self._write_json("metrics.json", metrics)
        self._receipt("completed", ended_early)

    def fail(self, reason: str) -> None:
        """Write a receipt that says so."""
        self._receipt("failed", reason)

    def _receipt(self, status: str, reason: str | None) -> None:
        experiment = self.experiment()
        product = self.path / (MODEL_FILE if experiment.audit is None else AUDIT_FILE)
        records = self.records()
        self._write_json(
            "receipt.json",
            {
                "version": 1,
                "status": status,
                "reason": reason,
                "run_id": self.run_id,
                "experiment": experiment.name,
                "config_sha256": experiment.sha256,
                "product": product.name,
                "product_sha256": file_sha256(product) if status == "completed" else None,
                "rounds_asked": experiment.federation.rounds,
                "rounds_done": len(records),
                "participants": {str(record.round_number): sorted(record.accepted) for record in records},
                "refused": {str(record.round_number): record.refused for record in records if record.refused},
                "silent": {str(record.round_number): record.silent for record in records if record.silent},
            },
        )

    def _checkpoint(self, rounds_done: int) -> Path:
        return self.path / "checkpoints" / f"round_{rounds_done:04d}.safetensors"

    def _checkpoints(self) -> list[int]:
        return [int(file.stem.removeprefix("round_")) for file in self.path.glob("checkpoints/round_*.safetensors")]

    def _write_json(self, name: str, values: Any) -> None:
        text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False)
        write_atomically(self.path / name, (text + "\n").encode())


class RunFailed(Exception):
    """There is no receipt of a completed run, or what it vouches for is not there."""


def check_receipt(path: Path) -> dict[str, Any]:
    """The receipt of a completed run, held against the model, or the audit, that lies beside it.

    Args:
        path: a run's folder.

    Raises:
        RunFailed: no receipt (the run was killed), a failed run, or a product that is not the one of the receipt.
    """
    try:
        receipt: dict[str, Any] = json.loads((path / "receipt.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFailed(f"{path}: no receipt: the run was stopped before its end; resume or repeat it") from None
    except json.JSONDecodeError as error:
        raise RunFailed(f"{path}: the receipt is no JSON; repeat the run") from error
    if receipt.get("status") != "completed":
        raise RunFailed(f"{path}: {receipt.get('status')}: {receipt.get('reason')}")
    name = receipt.get("product")
    product = path / (name if name in (MODEL_FILE, AUDIT_FILE) else MODEL_FILE)
    if not product.is_file() or file_sha256(product) != receipt.get("product_sha256"):
        raise RunFailed(f"{path}: {product.name} is not the one of the receipt; do not use it")
    return receipt


def run_folders(runs: Path, experiment: str) -> list[Path]:
    """The folders of an experiment's runs, in the order in which they were started."""
    return sorted(folder for folder in (runs / experiment).glob("*") if RUN_ID.fullmatch(folder.name))


def newest_run(runs: Path, experiment: str) -> Path:
    """The folder of the run that was started last; raises ``ConfigError`` if there is none."""
    folders = run_folders(runs, experiment)
    if not folders:
        raise ConfigError(f"runs = {runs / experiment}: none there; start one: nvflare simulator jobs/{experiment}")
    return folders[-1]


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
