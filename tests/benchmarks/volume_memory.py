"""What memory and time does one training step on a volume take, and does ``fedct preflight`` know?

    python tests/benchmarks/volume_memory.py OUT [--quick] [--threads N] [--most-gib X] [--most-seconds X]

The presets tiny and base on volumes of 32³, 64³ and 96³, batch 1, in float32, with checkpointing, in bfloat16 and with
both. Each case runs in a fresh process: memory is the most that it was resident less what it was before there was a
network (on CUDA what PyTorch had allocated at most), time is that of the fastest step after the first. On one CPU
thread it is the processor's time, which does not depend on what else the machine does. What the preflight expects to
take more than ``--most-gib`` or ``--most-seconds`` is not run, and its row has the estimate only.

OUT keeps a JSON for each case, so that a run that was cut short goes on; at its end, volume_memory.json has them all
and volume_memory.md the tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from custom.config import ExperimentConfig
from custom.device import use
from custom.diffusion.checkpointing import checkpointed
from custom.federation_config import FederationConfig
from custom.model_config import PRESETS, TrainingConfig
from custom.preflight import estimate, step_bytes
from custom.site_file import HardwareConfig
from custom.stages import fresh_weights, stage_objective, stages
from custom.training import training_step
from medical_data.preprocess import PreprocessConfig

SETTINGS = {
    "float32": {"precision": "float32"},
    "checkpointing": {"precision": "float32", "checkpointing": True},
    "bfloat16": {"precision": "bfloat16"},
    "both": {"precision": "bfloat16", "checkpointing": True},
}
FEWEST_STEPS, MOST_STEPS, ENOUGH_S = 2, 5, 10.0
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row."""

    preset: str
    size: int
    setting: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.preset}_{self.size}_{self.setting}"

    @property
    def clock(self) -> Callable[[], float]:
        on_one_thread = self.threads == 1 and not torch.cuda.is_available()
        return time.process_time if on_one_thread else time.perf_counter

    @property
    def hardware(self) -> HardwareConfig:
        return HardwareConfig(threads=self.threads, **SETTINGS[self.setting])

    @property
    def experiment(self) -> ExperimentConfig:
        return ExperimentConfig(
            name="volume",
            seed=0,
            preprocess=PreprocessConfig(spatial_dims=3, size=self.size, spacing_mm=(2.0, 2.0, 2.0)),
            network=PRESETS[self.preset],
            training=TrainingConfig(steps_per_round=1, batch_size=1, gradient_clip=1.0),
            federation=FederationConfig(rounds=1),
        )


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM``, its peak, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measured(case: Case) -> dict[str, float]:
    """Steps of one case, in this process."""
    experiment, hardware = case.experiment, case.hardware
    device = use(hardware)
    (stage,) = stages(experiment)
    base = resident("VmRSS")
    objective = stage_objective(experiment, stage, fresh_weights(experiment, seed=0), device)
    gc.collect()
    if hardware.checkpointing:
        checkpointed(objective.network)
    optimizer = torch.optim.AdamW(objective.network.parameters(), fused=True)
    x0, generator = torch.rand(1, *experiment.image_shape, device=device), torch.Generator().manual_seed(0)
    seconds: list[float] = []
    while len(seconds) < FEWEST_STEPS or (len(seconds) < MOST_STEPS and sum(seconds) < ENOUGH_S):
        start = case.clock()
        training_step(objective, optimizer, x0, generator, gradient_clip=1.0, precision=hardware.precision)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(case.clock() - start)
    grown = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - base
    return {"memory": grown, "seconds": min(seconds[1:])}


def run(case: Case, most_bytes: float, most_seconds: float) -> dict[str, Any]:
    """Estimate, and measure in a process of its own what the estimate allows."""
    (stage,) = estimate(case.experiment, case.hardware, patients=1, clock=case.clock).stages
    needed = step_bytes(case.experiment, stages(case.experiment)[0], case.hardware, patients=1)
    result: dict[str, Any] = {**asdict(case), "estimated": {"memory": needed, "seconds": stage.step_seconds}}
    if needed > most_bytes or FEWEST_STEPS * stage.step_seconds > most_seconds:
        return {**result, "why": f"more than {most_bytes / GIB:.0f} GiB" if needed > most_bytes else "takes too long"}
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {**result, "measured": json.loads(child.stdout.splitlines()[-1])}


def tables(results: list[dict[str, Any]]) -> str:
    """What was measured beside its estimate, and each setting beside float32."""
    lines = [
        "| preset | volume | setting | memory, GiB | estimated | ratio | seconds a step | estimated | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [result["preset"], f"{result['size']}³", result["setting"]]
        for quantity, unit in (("memory", GIB), ("seconds", 1)):
            expected = result["estimated"][quantity]
            found = result["measured"][quantity] if "measured" in result else None
            cells.append(f"not run: {result['why']}" if found is None else f"{found / unit:.2f}")
            cells += [f"{expected / unit:.2f}", "" if found is None else f"{expected / found:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| preset | volume | setting | memory of float32's | time of float32's |", "|---|---|---|---|---|"]
    plain = {(r["preset"], r["size"]): r for r in results if r["setting"] == "float32"}
    for result in results:
        other = plain.get((result["preset"], result["size"]))
        if other is None or other is result:
            continue
        both = "measured" in result and "measured" in other
        source = "measured" if both else "estimated"
        ratios = [f"{result[source][name] / other[source][name]:.2f}" for name in ("memory", "seconds")]
        mark = "" if both else " (estimated)"
        lines.append(
            f"| {result['preset']} | {result['size']}³ | {result['setting']}{mark} | {ratios[0]} | {ratios[1]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?")
    parser.add_argument("--quick", action="store_true", help="the preset tiny at 32³ only")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads (default: %(default)s)")
    parser.add_argument("--most-gib", type=float, default=12.0, help="not beyond (default: %(default)s)")
    parser.add_argument("--most-seconds", type=float, default=900.0, help="not beyond, a case (default: %(default)s)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measured(Case(**json.loads(options.case)))))
        return
    if options.out is None:
        parser.error("name a folder OUT")
    options.out.mkdir(parents=True, exist_ok=True)
    cases = [
        Case(preset=preset, size=size, setting=setting, threads=options.threads)
        for preset in (["tiny"] if options.quick else ["tiny", "base"])
        for size in ([32] if options.quick else [32, 64, 96])
        for setting in SETTINGS
    ]
    results = []
    for case in cases:
        file = options.out / f"{case.name}.json"
        if not file.is_file():
            result = run(case, options.most_gib * GIB, options.most_seconds)
            file.write_text(json.dumps(result, indent=2) + "\n")
        results.append(json.loads(file.read_text()))
        print(json.dumps(results[-1]), flush=True)
    (options.out / "volume_memory.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "volume_memory.md").write_text(tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
