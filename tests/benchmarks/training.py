"""How fast is local training, and what does NVFlare add?

    python tests/benchmarks/training.py [--threads N] [--repeats N]

All in one run, so that the ratios hold on a noisy machine; the last line is one JSON object:

    throughput_ratio   images/s of ``train_round`` over a bare PyTorch loop on the same MONAI network and batch
    vs_diffusers       the same over a bare loop on diffusers' UNet2DModel of the same size (extra ``bench``)
    overhead_s_t1      seconds of a site's round in the simulator beside its training, ``-t 1`` (fresh processes)
    overhead_s_t3      the same for ``-t 3`` (lasting processes)

``train_round`` pays for everything it does: building the network, the held-out loss, the optimiser's state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.federation_config import FederationConfig
from custom.model_config import PRESETS, NetworkConfig, SamplingConfig, TrainingConfig
from custom.training import train_round
from medical_data.cohort import Cohort
from medical_data.preprocess import PreprocessConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
from simulator import Run, simulate

REPOSITORY = Path(__file__).resolve().parents[2]
SITES = ["site-1", "site-2", "site-3"]


def random_cohort(size: int) -> Cohort:
    """Noise: what the pixels show does not change the time."""
    rng = np.random.default_rng(0)
    return Cohort(
        images=rng.uniform(-1, 1, (640, 1, size, size)).astype(np.float32),
        patient=np.repeat(np.arange(40, dtype=np.int32), 16),
        pseudonyms=tuple(f"p{i}" for i in range(40)),
        held_out=np.arange(40) < 10,
        manifest_sha256="0" * 64,
    )


def bare_loop(
    network: nn.Module, call: Callable[[Tensor, Tensor], Tensor], images: Tensor, config: ExperimentConfig, steps: int
) -> None:
    """The least that trains: draw, noise, loss, backward, clip, step."""
    training = config.training
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.learning_rate, fused=True)
    alphas = torch.cos(torch.linspace(0, 1.57, config.schedule.timesteps)) ** 2
    network.train()
    for _ in range(steps):
        x0 = images[torch.randint(len(images), (training.batch_size,))]
        t = torch.randint(config.schedule.timesteps, (len(x0),))
        noise = torch.randn_like(x0)
        a = alphas[t].view(-1, 1, 1, 1)
        prediction = call(a.sqrt() * x0 + (1 - a).sqrt() * noise, t)
        loss = (prediction - (a.sqrt() * noise - (1 - a).sqrt() * x0)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), training.gradient_clip)
        optimizer.step()


def diffusers_network(config: NetworkConfig, size: int) -> nn.Module:
    """diffusers' UNet2DModel with the same levels, groups and heads."""
    from diffusers import UNet2DModel

    network: nn.Module = UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        layers_per_block=config.res_blocks,
        block_out_channels=config.channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in config.attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)),
        norm_num_groups=config.norm_groups,
        attention_head_dim=config.head_channels,
    )
    return network


def throughput(config: ExperimentConfig, repeats: int) -> dict[str, float]:
    """Median of the pairwise ratios over interleaved repeats."""
    cohort = random_cohort(config.preprocess.size)
    images = torch.from_numpy(cohort.images)
    steps = config.training.steps_per_round
    ours = build_network(config.network, spatial_dims=2, seed=0)
    theirs = diffusers_network(config.network, config.preprocess.size)
    for name, network in (("MONAI", ours), ("diffusers", theirs)):
        print(f"{name}: {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters")

    def round_of_ours() -> None:
        train_round(
            cohort=cohort,
            weights=ours.state_dict(),
            state={},
            config=config,
            site="bench",
            round_number=0,
            device=torch.device("cpu"),
        )

    candidates: dict[str, Callable[[], None]] = {
        "train_round": round_of_ours,
        "bare": lambda: bare_loop(ours, lambda x, t: ours(x=x, timesteps=t), images, config, steps),
        "diffusers": lambda: bare_loop(theirs, lambda x, t: theirs(x, t).sample, images, config, steps),
    }
    bare_loop(ours, lambda x, t: ours(x=x, timesteps=t), images, config, 3)  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats):
        order = list(candidates) if repeat % 2 == 0 else list(reversed(candidates))
        for name in order:
            start = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - start)
            print(f"  {name}: {steps * config.training.batch_size / seconds[name][-1]:.1f} images/s", flush=True)

    def ratio(other: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds["train_round"], seconds[other], strict=True))

    return {"throughput_ratio": ratio("bare"), "vs_diffusers": ratio("diffusers")}


def overhead(threads: int) -> float:
    """Median over the rounds after the first, in which the sites prepare their cohorts."""
    config = ExperimentConfig(
        name="overhead",
        seed=0,
        preprocess=PreprocessConfig(size=16, images_per_patient=4),
        network=PRESETS["tiny"],
        training=TrainingConfig(steps_per_round=2, batch_size=2),
        federation=FederationConfig(rounds=4),
        sampling=SamplingConfig(steps=2, grid_every=0, grid_images=1, evaluation_images=1),
    )
    with tempfile.TemporaryDirectory() as base:
        run: Run = simulate(Path(base), config, SITES, threads=threads)
        records = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()][1:]
    figures = []
    for record in records:
        training = [metrics["seconds"] for metrics in record["accepted"].values()]
        if threads == 1:  # one site after another
            figures.append((record["seconds"] - sum(training)) / len(training))
        else:
            figures.append(record["seconds"] - max(training))
    print(f"-t {threads}: overhead per site and round {', '.join(f'{figure:.1f}' for figure in figures)} s", flush=True)
    return statistics.median(figures)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    job = ExperimentConfig.load(REPOSITORY / "jobs/ct_ddpm/app/config/experiment.json")
    figures = throughput(replace(job, seed=0), options.repeats)
    figures |= {"overhead_s_t1": overhead(1), "overhead_s_t3": overhead(3)}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
