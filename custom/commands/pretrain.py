"""``fedct pretrain``: weights to start from, trained on the embedded cohort, which is public."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

BATCH_SIZE = 16


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "pretrain",
        help="train a job's network on the embedded cohort, to start from",
        description="Train a job's network on patients of the embedded cohort: nobody's scans, so that a private job "
        "may start from the result at no cost in privacy. The job names it in start_from, and the server finds it in "
        "its folder of models.",
    )
    parser.add_argument("job", type=Path, help="the job's folder, such as jobs/ct_ddpm_dp")
    parser.add_argument("out", type=Path, help="the model to write, such as models/phantom.safetensors")
    parser.add_argument(
        "--hospital",
        type=int,
        default=100,
        help="embedded hospital; another than those that stand for real ones (default: %(default)s)",
    )
    parser.add_argument("--patients", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help=f"of {BATCH_SIZE} images (default: %(default)s)")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Make the cohort, train, write."""
    from dataclasses import replace

    from tqdm import tqdm

    from custom.config import ExperimentConfig, FederationConfig, TrainingConfig
    from custom.device import use
    from custom.model_file import ModelFile, initial_model, save_model
    from custom.site_file import HardwareConfig
    from custom.strict import require
    from custom.training import train_round
    from medical_data.cohort import DataLimits, EmbeddedSource, prepare_cohort

    require(not options.out.exists(), argument="out", value=str(options.out), remedy="exists; give a new file")
    job = ExperimentConfig.of_job(options.job)
    config = replace(
        job,
        name="pretrained",
        training=TrainingConfig(steps_per_round=options.steps, batch_size=BATCH_SIZE, gradient_clip=1.0),
        federation=FederationConfig(rounds=1),
        privacy=None,
        start_from=None,
    )
    cohort = prepare_cohort(
        source=EmbeddedSource(hospital=options.hospital, patients=options.patients),
        preprocess=job.preprocess,
        limits=DataLimits(held_out_fraction=0.1),
        home=options.out.parent / "embedded",
        progress=True,
    )
    weights = initial_model(job).weights
    with tqdm(total=options.steps, desc="training", unit="step") as bar:

        def progress(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(step - bar.n)

        update = train_round(
            cohort=cohort,
            weights=weights,
            optimizer_state={},
            config=config,
            site="public",
            round_number=0,
            device=use(HardwareConfig()),
            progress=progress,
        )
    trained = {name: weights[name] + difference for name, difference in update.difference.items()}
    save_model(options.out, ModelFile(experiment=config, rounds_done=1, weights=trained, ema=trained))
    print(f"{options.out}: mean training loss {update.metrics['train_loss']:.4f}; name it in the job's start_from")
    return 0
