"""``fedct pretrain``: weights to start from, trained on the embedded cohort, which is public."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from custom.config import ExperimentConfig
    from custom.model_config import TrainingConfig

BATCH_SIZE = 16  # where the job has none


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "pretrain",
        help="train a job's network on the embedded cohort, to start from",
        description="Train a job's networks on patients of the embedded cohort: nobody's scans, so that a private job "
        "may start from the result at no cost in privacy. The job names it in start_from, or in autoencoder.frozen for "
        "its autoencoder alone, and the server finds it in its folder of models.",
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
    parser.add_argument("--slices", type=int, default=16, help="of each patient's scan (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="gradient steps of each network (default: %(default)s)")
    parser.add_argument(
        "--autoencoder",
        metavar="FILE",
        type=Path,
        help="take the weights of a published MONAI AutoencoderKL (.safetensors, or a torch file of tensors) instead "
        "of training one; its architecture is the job's autoencoder block",
    )
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Make the cohort, train, write."""
    from tqdm import tqdm

    from custom.config import ExperimentConfig
    from custom.device import use
    from custom.latents import latent_cohort
    from custom.model_file import initial_model, save_model
    from custom.public_autoencoder import with_public_autoencoder
    from custom.server_step import moved
    from custom.site_file import HardwareConfig
    from custom.stages import model_autoencoder, stage_of
    from custom.strict import require
    from custom.training import train_round
    from medical_data.cohort import DataLimits, EmbeddedSource, prepare_cohort

    require(not options.out.exists(), argument="out", value=str(options.out), remedy="exists; give a new file")
    job, given = ExperimentConfig.of_job(options.job), options.autoencoder is not None
    fits, remedy = job.autoencoder is not None or not given, f"leave it out: {job.name} has no autoencoder"
    require(fits, argument="--autoencoder", value=str(options.autoencoder), remedy=remedy)
    config = _public(job, options.steps, given=given)
    home, device = options.out.parent / "embedded", use(HardwareConfig())
    cohort = prepare_cohort(
        source=EmbeddedSource(hospital=options.hospital, patients=options.patients, slices=options.slices),
        preprocess=config.preprocess,
        limits=DataLimits(held_out_fraction=0.1),
        home=home,
        progress=True,
    )
    model = initial_model(config)
    if given:
        weights = with_public_autoencoder(model.weights, options.autoencoder, config, cohort.images)
        model = replace(model, weights=weights, ema=weights)
    for number in range(config.federation.rounds):
        stage, seen = stage_of(config, number), cohort
        if config.autoencoder is not None and stage.name == "denoiser":
            seen = latent_cohort(cohort, model_autoencoder(config, model.weights), state=home, device=device)
        with tqdm(total=options.steps, desc=f"training the {stage.name}", unit="step") as bar:

            def progress(step: int, loss: float, bar: tqdm[Any] = bar) -> None:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update(step - bar.n)

            update = train_round(
                cohort=seen,
                weights=model.weights,
                state={},
                config=config,
                site="public",
                round_number=number,
                device=device,
                progress=progress,
            )
        model = moved(model, {name: tensor.numpy() for name, tensor in update.difference.items()})
    save_model(options.out, model)
    named = "start_from" if config.autoencoder is None else "start_from, or its autoencoder in autoencoder.frozen"
    loss = update.metrics["train_loss"]
    print(f"{options.out}: mean training loss {loss:.4f}; name it in the job's {named}")
    return 0


def _public(job: ExperimentConfig, steps: int, *, given: bool) -> ExperimentConfig:
    """The job without its sites: a round a network, without differential privacy."""
    from custom.federation_config import FederationConfig

    autoencoder = job.autoencoder
    if autoencoder is not None and given:
        autoencoder = replace(autoencoder, rounds=0, frozen="given", training=None)
    elif autoencoder is not None:
        training = _public_training(autoencoder.training or job.training, steps)
        autoencoder = replace(autoencoder, rounds=1, frozen=None, training=training)
    return replace(
        job,
        name="pretrained",
        training=_public_training(job.training, steps),
        federation=FederationConfig(rounds=1 if autoencoder is None or given else 2),
        autoencoder=autoencoder,
        privacy=None,
        secure_aggregation=None,
        start_from=None,
        encryption=None,
    )


def _public_training(training: TrainingConfig, steps: int) -> TrainingConfig:
    from custom.model_config import TrainingConfig

    size = training.batch_size or BATCH_SIZE
    return TrainingConfig(steps_per_round=steps, batch_size=size, gradient_clip=1.0)
