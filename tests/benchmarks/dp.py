"""What does patient-level DP cost in time and memory?

    python tests/benchmarks/dp.py [--threads N] [--repeats N]

All in one run, interleaved, medians of pairwise ratios; the last line is one JSON object:

    k1                DP step over a step without DP, 32 images of 32², one draw of each of 32 patients
    k4                the same for 64 images, four draws of each of 16 patients (printed beside it: 32 images)
    three_d           the same for 8 volumes of 16³, one draw of each of 8 patients
    vs_opacus_hooks   our DP step over one with Opacus' hooks, 32 images of 32², where each image is a patient

A DP step is all of ``PatientSGD.step``: sample, draws, gradient per patient, clip, sum, secure noise, AdamW. A step
without DP is draws, forward, backward, ``clip_grad_norm_``, AdamW. The network is the preset ``tiny``. The sampling
rate is 1, so that each step has exactly as many images as the one that it is compared with; Poisson sampling would
change their number from step to step.

glibc gives freed memory back to the system after some steps and not after others, and takes it again page by page,
with DP or without, as the order of allocations had it. Here it keeps what it has, for all candidates, as at a site.

Memory is the peak of a fresh process that makes a few steps, less that of one that makes none.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from custom.device import keep_freed_memory
from custom.diffusion.loss import denoising_loss
from custom.diffusion.networks import build_network
from custom.diffusion.schedule import build_schedule
from custom.model_config import PRESETS, ScheduleConfig
from privacy.dpsgd import PatientSGD
from privacy.plan import DPConfig, calibrate

CLIP_NORM, SIGMA, RATE = 1.0, 30.0, 1e-4  # none of them changes the time
CHUNK_SIZES = (4, 8, 16, 32)
WITHOUT_DP, NO_STEP = 0, -1

Step = Callable[[], None]


class Work(NamedTuple):
    """Images of one step."""

    spatial_dims: int
    size: int
    patients: int
    draws: int


K1, K4, THREE_D = Work(2, 32, 32, 1), Work(2, 32, 16, 4), Work(3, 16, 8, 1)
K4_OF_32_IMAGES = Work(2, 32, 8, 4)


class Bench:
    """A network of its own, and a draw of images, noise and timesteps, [patients, draws, …]."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.network = build_network(PRESETS["tiny"], spatial_dims=work.spatial_dims, seed=0)
        self.parameters = dict(self.network.named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=RATE, fused=True)
        config = ScheduleConfig()
        self.schedule = build_schedule(config)
        shape = (work.patients, work.draws, 1, *(work.size,) * work.spatial_dims)
        images, noise = torch.rand(shape) * 2 - 1, torch.randn(shape)
        self.data = (images, noise, torch.randint(config.timesteps, shape[:2]))

    def draw(self, patients: object) -> Sequence[Tensor]:
        return [tensor[patients] for tensor in self.data]

    def images(self) -> list[Tensor]:
        return [tensor.flatten(0, 1) for tensor in self.draw(range(self.work.patients))]

    def without_dp(self) -> Step:
        def step() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            denoising_loss(self.network, self.schedule, *self.images()).mean().backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
            self.optimizer.step()

        return step

    def with_dp(self, chunk_size: int) -> Step:
        def loss(parameters: Mapping[str, Tensor], x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            def call(x: Tensor, timesteps: Tensor) -> Tensor:
                output: Tensor = functional_call(self.network, dict(parameters), (x, timesteps))
                return output

            return denoising_loss(call, self.schedule, x0, noise, timesteps)  # type: ignore[arg-type]

        config = DPConfig(
            delta=1e-3,
            clip_norm=CLIP_NORM,
            sampling_rate=1.0,
            steps_per_round=10_000,
            rounds=1,
            draws_per_patient=self.work.draws,
            noise_multiplier=SIGMA,
        )
        sgd = PatientSGD(
            parameters=self.parameters,
            optimizer=self.optimizer,
            loss=loss,
            plan=calibrate(config, patients=self.work.patients),
            patients=self.work.patients,
            chunk_size=chunk_size,
        )
        return lambda: sgd.step(self.draw)

    def with_opacus_hooks(self) -> Step:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        assert self.work.draws == 1, "its hooks know images, not patients"
        hooked = GradSampleModule(self.network, loss_reduction="mean")
        optimizer = DPOptimizer(
            self.optimizer, noise_multiplier=SIGMA, max_grad_norm=CLIP_NORM, expected_batch_size=self.work.patients
        )

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            denoising_loss(hooked, self.schedule, *self.images()).mean().backward()
            optimizer.step()

        return step


def seconds(candidates: Mapping[str, Step], repeats: int) -> dict[str, list[float]]:
    """Of each, in turn, ``repeats`` times."""
    for step in candidates.values():  # warm-up
        step()
        step()
    result: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats):
        for name in candidates if repeat % 2 == 0 else reversed(candidates):
            start = time.perf_counter()
            candidates[name]()
            result[name].append(time.perf_counter() - start)
    for name, values in result.items():
        print(f"  {name}: {1000 * statistics.median(values):.0f} ms a step", flush=True)
    return result


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def compare(work: Work, repeats: int) -> float:
    print(f"{work.patients} patients x {work.draws} of {work.size}^{work.spatial_dims}", flush=True)
    steps = {"without DP": Bench(work).without_dp(), "DP": Bench(work).with_dp(work.patients)}
    result = ratio(seconds(steps, repeats), "DP", "without DP")
    print(f"  {result:.2f} x", flush=True)
    return result


def peak(chunk_size: int) -> float:
    """Of this process, after a few steps, in MiB."""
    bench = Bench(K1)
    if chunk_size != NO_STEP:
        step = bench.without_dp() if chunk_size == WITHOUT_DP else bench.with_dp(chunk_size)
        for _ in range(3):
            step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peaks(chunk_sizes: Sequence[int]) -> list[float]:
    """Each of a fresh process. To be called while this one is small: a child's peak starts at its parent's size."""
    file = str(Path(__file__).resolve())
    outputs = [
        subprocess.run([sys.executable, file, "--peak", str(size)], check=True, capture_output=True, text=True).stdout
        for size in (NO_STEP, *chunk_sizes)
    ]
    no_step, *others = map(float, outputs)
    return [other - no_step for other in others]


def chunks(memory: Sequence[float], repeats: int) -> float:
    """Print time and memory by chunk size; return our time over that of Opacus' hooks."""
    print(f"{K1.patients} patients x {K1.draws} of {K1.size}^{K1.spatial_dims}, by chunk size", flush=True)
    ours = {f"chunks of {size}": Bench(K1).with_dp(size) for size in CHUNK_SIZES}
    hooks = {"Opacus' hooks": Bench(K1).with_opacus_hooks()}
    times = seconds({"without DP": Bench(K1).without_dp(), **ours, **hooks}, repeats)
    for name, mib in zip(times, memory, strict=False):
        print(f"  {name:14} {ratio(times, name, 'without DP'):5.2f} x {mib:6.0f} MiB", flush=True)
    return ratio(times, f"chunks of {K1.patients}", "Opacus' hooks")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_threads = "PyTorch threads; with more than one, whoever shares the cores decides (default: %(default)s)"
    parser.add_argument("--threads", type=int, default=1, help=help_threads)
    parser.add_argument("--repeats", type=int, default=15, help="interleaved repeats (default: %(default)s)")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
    keep_freed_memory()
    if options.peak is not None:
        print(peak(options.peak))
        return
    memory = peaks((WITHOUT_DP, *CHUNK_SIZES))
    compare(K4_OF_32_IMAGES, options.repeats)
    figures = {name: compare(work, options.repeats) for name, work in (("k1", K1), ("k4", K4), ("three_d", THREE_D))}
    figures["vs_opacus_hooks"] = chunks(memory, options.repeats)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
