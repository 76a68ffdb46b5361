"""What differential privacy costs in quality, and which remedy helps: one federation a row, all else equal.

    python tests/benchmarks/dp_quality.py OUT [--table epsilon|ablation|shared|scans] [--scans FOLDER]

Runs `jobs/ct_ddpm_dp` with the functions that sites and server use (no NVFlare, no ledger) once for each row:

    epsilon    ε ∈ {1, 3, 8, ∞} from fresh weights, and from weights pretrained on another, public phantom hospital
    ablation   ε = 8 from fresh weights, one thing changed at a time
    shared     each site's own noise beside one noise for all sites under secure aggregation (the sums are added in the
               clear here: masks change nothing of them), two of the three sites' shares being counted
    scans      the 22 real patients of ../shared/ct that have volumes, split among three sites, from pretrained weights

All but the last train on the embedded hospitals of the simulated sites large-1 to large-3. OUT keeps a JSON and the
samples of each row, so that a run that was stopped goes on. At its end it prints the table in Markdown and writes a
picture of all rows' samples. Two rows are computed at a time with one thread each: seconds are those of such a half
machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from custom import tasks
from custom.atomic import write_atomically
from custom.cli import main as fedct
from custom.config import ExperimentConfig
from custom.device import use
from custom.diffusion.networks import build_network
from custom.diffusion.objective import denoising
from custom.diffusion.sampler import sample
from custom.diffusion.schedule import build_schedule
from custom.egress import MEAN_IMAGE
from custom.evaluation import evaluate
from custom.job_plan import privacy_plan
from custom.masked_vector import shared_noise_encoding
from custom.model_file import ModelFile, load_model
from custom.pictures import grids
from custom.private_training import release_mean_image, shared_gradient, shared_mean_image, train_private_round
from custom.server_step import moved, stepped
from custom.site_file import HardwareConfig, load_site
from custom.training import held_out_loss, train_round
from custom.warm_up import warmed_up
from medical_data.cohort import Cohort, DataLimits, EmbeddedSource, FolderSource, prepare_cohort
from privacy.accounting import epsilon

REPOSITORY = Path(__file__).resolve().parents[2]
JOB = REPOSITORY / "jobs/ct_ddpm_dp/app/config/experiment.json"
MAIN_JOB = REPOSITORY / "jobs/ct_ddpm/app/config/experiment.json"
SITE_FILE = REPOSITORY / "simulator_workspace/local/fedct.toml"
SITES = ("large-1", "large-2", "large-3")
PUBLIC = EmbeddedSource(hospital=100, patients=200)
PUBLIC_STEPS = 1000
SAMPLES, REAL = 256, 640
CPU = use(HardwareConfig(device="cpu", threads=1))  # here and, because they import this file, in the workers

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One federation.

    Attributes:
        name: in the table and of its files.
        epsilon: target; None without differential privacy.
        pretrained: whether it starts from public weights; then there is no mean image, which would undo them.
        train: whether there are rounds at all.
        rate: factor on the job's sampling rate.
        speed: factor on the job's learning rate.
        shared: whether the sites share one noise; then each step is a round.
        changes: to the job's privacy block, as JSON.
    """

    name: str
    epsilon: float | None = 8.0
    pretrained: bool = False
    train: bool = True
    rate: float = 1.0
    speed: float = 1.0
    shared: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)


# A smaller budget gets a noisier mean image: at ε = 1 the job's own σ would take nearly all of it.
MEAN_IMAGE_SIGMA = {1.0: 8.0, 3.0: 4.0}
# Five or six patients train at a site: δ must lie below 1/6, and every patient takes part in every step.
FEW = {"patients": 6, "delta": 0.01, "sampling_rate": 1.0, "draws_per_patient": 16, "clip_norm": 0.2}
FEW_LAYERS = {**FEW, "trained": ["*norm*", "out.*"]}

TABLES: Mapping[str, tuple[Row, ...]] = {
    "epsilon": tuple(
        Row(name=f"ε = {'∞' if epsilon is None else f'{epsilon:g}'}, {start}", epsilon=epsilon, pretrained=pretrained)
        for pretrained, start in ((False, "fresh"), (True, "pretrained"))
        for epsilon in (1.0, 3.0, 8.0, None)
    ),
    "ablation": (
        Row(name="4 draws at a quarter of the rate", rate=0.25, changes={"draws_per_patient": 4}),
        Row(name="mean image alone, no steps", train=False),
        Row(name="pretrained weights alone, no steps", pretrained=True, train=False),
        Row(name="without the mean image", changes={"mean_image": None}),
        Row(name="norms, attention, output only", changes={"trained": ["*attn*", "*norm*", "out.*"]}),
        Row(name="pretrained, an eighth of the learning rate", pretrained=True, speed=0.125),
    ),
    "shared": tuple(
        Row(name=f"ε = {epsilon:g}, {whose}", epsilon=epsilon, shared=shared)
        for epsilon in (1.0, 8.0)
        for shared, whose in ((False, "own noise"), (True, "one noise for all sites"))
    ),
    "scans": (
        Row(name="pretrained, no steps", pretrained=True, train=False, changes=FEW),
        Row(name="ε = 8, all layers", pretrained=True, changes=FEW),
        Row(name="ε = 8, norms and output", pretrained=True, changes=FEW_LAYERS),
        Row(name="ε = 50, norms and output", epsilon=50.0, pretrained=True, changes=FEW_LAYERS),
        Row(name="ε = 8, all layers, one noise for all sites", pretrained=True, shared=True, changes=FEW),
        Row(name="ε = ∞, all layers", epsilon=None, pretrained=True, changes=FEW),
    ),
}


def experiment_of(row: Row) -> ExperimentConfig:
    """The job's experiment with the row's changes."""
    job = json.loads(JOB.read_text())
    privacy, training = job["privacy"] | row.changes, job["training"]
    privacy["sampling_rate"] *= row.rate
    training["learning_rate"] *= row.speed
    if row.pretrained:
        privacy["mean_image"] = None
    if privacy["mean_image"] is not None and row.epsilon in MEAN_IMAGE_SIGMA:
        privacy["mean_image"] |= {"noise_multiplier": MEAN_IMAGE_SIGMA[row.epsilon]}
    if row.epsilon is None:  # as many images, in the batches and with the rates of the main job
        images = privacy["sampling_rate"] * privacy["patients"] * privacy["draws_per_patient"]
        plain = json.loads(MAIN_JOB.read_text())["training"]
        plain["steps_per_round"] = round(training["steps_per_round"] * images / plain["batch_size"])
        return ExperimentConfig.from_json({**job, "training": plain, "privacy": None})
    privacy["target_epsilon"] = row.epsilon
    if row.shared:
        privacy["dp"] = "central_secagg"
        job["secure_aggregation"] = {"min_survivors": 3, "colluding_sites": 1}
        job["federation"]["rounds"] *= training["steps_per_round"]
        training["steps_per_round"] = 1
    return ExperimentConfig.from_json({**job, "privacy": privacy})


def federate_sums(config: ExperimentConfig, cohorts: list[Cohort], start: Weights) -> Weights:
    """A whole run in which the sites' sums share one noise, and the server makes the steps."""
    plan, sites = privacy_plan(config), len(cohorts)
    assert plan is not None
    assert config.privacy is not None

    def mean(task: str, integers: list[NDArray[np.int64]]) -> Mapping[str, NDArray[np.float64]]:
        schema = shared_noise_encoding(config, task, 0)
        assert schema is not None
        return schema.decode(np.sum([schema.encode(one) for one in integers], axis=0, dtype=np.uint32))[0]

    if config.privacy.mean_image is not None:
        asked = config.privacy.mean_image
        shares = [shared_mean_image(cohort, asked, plan, sites=sites) for cohort in cohorts]
        image = torch.from_numpy(mean(tasks.RELEASE, shares)[MEAN_IMAGE]).float()
        start = warmed_up(start, image, config, CPU)
    model = ModelFile(experiment=config, rounds_done=0, weights=dict(start), ema=dict(start))
    for number in range(config.federation.rounds):
        shares = [
            shared_gradient(
                cohort=cohort,
                weights=model.weights,
                config=config,
                plan=plan,
                round_number=number,
                device=CPU,
                patients_in_memory=32,
                sites=sites,
            )
            for cohort in cohorts
        ]
        model = stepped(model, {name: g.astype(np.float32) for name, g in mean(tasks.TRAIN, shares).items()})
    return model.ema


def federate(config: ExperimentConfig, cohorts: list[Cohort], start: Weights, *, train: bool) -> Weights:
    """A whole run, one site after the other."""
    plan = privacy_plan(config)
    if plan is not None and config.privacy is not None and config.privacy.mean_image is not None:
        asked = config.privacy.mean_image
        image = torch.stack([release_mean_image(cohort, asked, plan) for cohort in cohorts]).mean(dim=0)
        start = warmed_up(start, image, config, CPU)
    model = ModelFile(experiment=config, rounds_done=0, weights=dict(start), ema=dict(start))
    states: list[Weights] = [{} for _ in cohorts]
    for number in range(config.federation.rounds if train else 0):
        differences = []
        for site, cohort in enumerate(cohorts):
            if plan is None:
                plain = train_round(
                    cohort=cohort,
                    weights=model.weights,
                    state=states[site],
                    config=config,
                    site=SITES[site],
                    round_number=number,
                    device=CPU,
                )
                states[site], difference = plain.state, plain.difference
            else:
                private = train_private_round(
                    cohort=cohort,
                    weights=model.weights,
                    state=states[site],
                    config=config,
                    plan=plan,
                    round_number=number,
                    device=CPU,
                    patients_in_memory=32,
                )
                states[site], difference = private.state, private.difference
            differences.append(difference)
        mean = {name: np.mean([d[name].numpy() for d in differences], axis=0) for name in start}
        model = moved(model, mean)
    return model.ema


def measured(
    config: ExperimentConfig, cohorts: list[Cohort], weights: Weights
) -> tuple[dict[str, float], NDArray[np.float32]]:
    """Figures against held-out patients, and the samples."""
    network, schedule = build_network(config.network, spatial_dims=2), build_schedule(config.schedule)
    network.load_state_dict(dict(weights))
    loss = float(np.mean([held_out_loss(denoising(network, schedule), cohort, CPU) for cohort in cohorts]))
    samples = sample(
        network, schedule, config.sampling, count=SAMPLES, image_shape=config.image_shape, seed=0, device=CPU
    ).numpy()
    rng = np.random.default_rng(0)
    pools = {
        part: np.concatenate([cohort.images[cohort.rows(part)] for cohort in cohorts]) for part in ("held_out", "train")
    }
    some = {part: pool[np.sort(rng.permutation(len(pool))[:REAL])] for part, pool in pools.items()}
    per_patient = max(int(np.bincount(cohort.patient).max()) for cohort in cohorts)
    result = evaluate(samples, some["held_out"], train=some["train"], images_per_patient=per_patient, seed=0)
    figures = {
        "held_out_loss": loss,
        "effnet_kid": result.generated.effnet.kid_mean,
        "effnet_kid_std": result.generated.effnet.kid_std,
        "effnet_kid_real": result.baseline.effnet.kid_mean,
    }
    return figures, samples


def compute(row: Row, cohorts: list[Cohort], public: Weights, folder: Path) -> None:
    """One row, unless it is there."""
    file = folder / f"{row.name}.json"
    if file.is_file():
        return
    config = experiment_of(row)
    plan = privacy_plan(config)
    fresh = build_network(config.network, spatial_dims=2, seed=config.seed).state_dict()
    start = time.monotonic()
    first = public if row.pretrained else fresh
    weights = federate_sums(config, cohorts, first) if row.shared else federate(config, cohorts, first, train=row.train)
    seconds = time.monotonic() - start
    figures, samples = measured(config, cohorts, weights)
    np.save(folder / f"{row.name}.npy", samples[:32])
    rounds = config.federation.rounds if row.train else 0
    spent = None if plan is None else epsilon(plan.events(rounds), plan.config.delta).epsilon
    values = {"epsilon": spent, "sigma": plan and plan.noise_multiplier, "seconds": seconds, **figures}
    write_atomically(file, (json.dumps(values, indent=1) + "\n").encode())
    print(f"{row.name}: {values}", flush=True)


def pretrained(folder: Path) -> Weights:
    """Public weights, as `fedct pretrain` makes them."""
    file = folder / "pretrained.safetensors"
    if not file.is_file():
        arguments = [JOB.parents[2], file, "--hospital", PUBLIC.hospital, "--patients", PUBLIC.patients]
        assert fedct(["pretrain", *map(str, arguments), "--steps", str(PUBLIC_STEPS)]) == 0
    return load_model(file).ema


def cohorts_of(scans: Path | None, folder: Path) -> list[Cohort]:
    """Those of the simulated sites, or a folder's patients in three parts."""
    preprocess = ExperimentConfig.load(JOB).preprocess
    found = []
    for number, name in enumerate(SITES):
        site = load_site(SITE_FILE, name)
        source, limits, home = site.source, site.limits, folder / "sites" / name
        if scans is not None:
            source, limits, home = FolderSource(folder=folder / "scans" / name), DataLimits(), folder / "real" / name
            source.folder.mkdir(parents=True, exist_ok=True)
            patients = sorted(p for p in scans.iterdir() if p.name.startswith("STS"))
            for patient in patients[number :: len(SITES)]:
                if not (source.folder / patient.name).exists():
                    (source.folder / patient.name).symlink_to(patient.resolve())
        found.append(prepare_cohort(source=source, preprocess=preprocess, limits=limits, home=home, progress=True))
    return found


def table(rows: tuple[Row, ...], folder: Path) -> str:
    """In Markdown."""
    lines = ["| | ε spent | σ | held-out loss | EffNet-KID | seconds |", "|---|---|---|---|---|---|"]
    for row in rows:
        values = json.loads((folder / f"{row.name}.json").read_text())
        epsilon, sigma = ("none" if values[name] is None else f"{values[name]:.2f}" for name in ("epsilon", "sigma"))
        lines.append(
            f"| {row.name} | {epsilon} | {sigma} | {values['held_out_loss']:.4f} | "
            f"{values['effnet_kid']:.3f} ± {values['effnet_kid_std']:.3f} | {values['seconds']:.0f} |"
        )
    real = json.loads((folder / f"{rows[0].name}.json").read_text())["effnet_kid_real"]
    return "\n".join([*lines, "", f"Real training patients against held-out ones: EffNet-KID {real:.3f}."])


def main() -> None:
    """Compute what is missing, print the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that this leaves")
    parser.add_argument("--table", choices=tuple(TABLES), default="epsilon", help="default: %(default)s")
    parser.add_argument("--scans", type=Path, default=REPOSITORY.parent / "shared" / "ct", help="for the table scans")
    parser.add_argument("--processes", type=int, default=2, help="rows at a time (default: %(default)s)")
    options = parser.parse_args()
    rows, folder = TABLES[options.table], options.out.resolve() / options.table
    folder.mkdir(parents=True, exist_ok=True)
    cohorts = cohorts_of(options.scans if options.table == "scans" else None, options.out.resolve())
    public = pretrained(options.out.resolve()) if any(row.pretrained for row in rows) else {}
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(compute, row, cohorts, public, folder) for row in rows]:
            done.result()
    panels = [(row.name.replace("ε", "eps").replace("∞", "inf"), np.load(folder / f"{row.name}.npy")) for row in rows]
    for first in range(0, len(panels), 4):
        picture = folder / f"samples_{first // 4 + 1}.png"
        grids(panels[first : first + 4], picture, window_hu=ExperimentConfig.load(JOB).preprocess.window_hu, columns=4)
        print(picture)
    print(table(rows, folder))


if __name__ == "__main__":
    main()
