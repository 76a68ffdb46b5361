"""``fedct preflight``: whether a job fits a site's machine and its rounds' time, before it runs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from custom.atomic import write_atomically

if TYPE_CHECKING:
    from custom.config import ExperimentConfig
    from custom.preflight import Preflight
    from custom.site_file import HardwareConfig

GIB = 1 << 30


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "preflight",
        help="a job's memory, time and bytes at a site, before it runs",
        description="Estimate what each stage of a job needs at one site: peak memory, time and bytes. A training "
        "step runs on tensors without memory, and this machine's speed is measured for a few seconds. Exit code: 0 if "
        "the job fits; 1 if its memory or a round's time does not suffice, with settings that would, or if the site's "
        "policy refuses it.",
    )
    parser.add_argument("job", type=Path, help="the job's folder, such as jobs/ct_ddpm_3d")
    parser.add_argument("--site-file", metavar="FILE", type=Path, help="a site file (TOML), for its hardware")
    parser.add_argument("--site", metavar="NAME", help="which of its sites")
    parser.add_argument(
        "--patients",
        metavar="N",
        type=int,
        help="that train, for differential privacy (default: what the site's policy demands or the job announces)",
    )
    parser.add_argument(
        "--memory-gib", metavar="X", type=float, help="plan for this much memory instead of what is free"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the estimate to this file")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Estimate, print, and say what would fit."""
    from custom.config import ExperimentConfig
    from custom.job_policy import ask_policy
    from custom.preflight import estimate, levers
    from custom.site_file import HardwareConfig, load_site
    from custom.strict import require
    from privacy.policy import PolicyRefused

    asked, memory = (options.site_file is None) == (options.site is None), options.memory_gib
    require(asked, argument="--site", value=options.site, remedy="give --site-file and --site together")
    positive = memory is None or memory > 0
    require(positive, argument="--memory-gib", value=memory, remedy="give a positive number")
    experiment = ExperimentConfig.of_job(options.job)
    hardware, patients = HardwareConfig(), 1 if experiment.privacy is None else experiment.privacy.patients
    if options.site is not None:
        site = load_site(options.site_file, options.site)
        try:
            hardware, patients = site.hardware, ask_policy(site.policy, experiment)
        except PolicyRefused as refusal:
            print(f"{options.site} refuses it: {refusal}")
            return 1
    patients = patients if options.patients is None else options.patients
    available = None if memory is None else int(memory * GIB)
    preflight = estimate(experiment, hardware, patients=patients, available_bytes=available)
    print(_described(experiment, preflight, hardware))
    late = _late(experiment, preflight)
    helpful = []
    if not preflight.fits:
        available = preflight.available_bytes
        print(f"does not fit: {_gib(preflight.memory_bytes)} needed, {_gib(available)} there. One of these alone:")
        for lever in levers(experiment, hardware, patients=patients, available_bytes=available):
            helpful.append(lever)
            fits = "fits" if lever.memory_bytes <= available else "not enough"
            print(f"  {lever.setting}: {_gib(lever.memory_bytes)}, {fits}")
    print(*late, sep="\n", end="\n" if late else "")
    if options.json is not None:
        content = {"experiment": experiment.name, **asdict(preflight), "levers": [asdict(lever) for lever in helpful]}
        write_atomically(options.json, (json.dumps(content, indent=2) + "\n").encode())
    if late or not preflight.fits:
        return 1
    print("it fits")
    return 0


def _described(experiment: ExperimentConfig, preflight: Preflight, hardware: HardwareConfig) -> str:
    """A table with a row for each stage."""
    rows = [("stage", "parameters", "memory", "step", "round", "rounds", "all rounds", "up/round", "down/round")]
    rows += [
        (
            stage.name,
            f"{stage.parameters / 1e6:.2f} M",
            _gib(stage.memory_bytes),
            f"{stage.step_seconds:.2f} s",
            _duration(stage.round_seconds),
            str(stage.rounds),
            _duration(stage.rounds * stage.round_seconds),
            f"{stage.upload_bytes / 1e6:.1f} MB",
            f"{stage.download_bytes / 1e6:.1f} MB",
        )
        for stage in preflight.stages
    ]
    private = "" if experiment.privacy is None else f", {preflight.patients} patients that train"
    threads = f", {hardware.threads} threads" if hardware.threads else ""
    head = f"{experiment.name} on {preflight.device}{threads}{private}: {_gib(preflight.available_bytes)} available"
    total = f"training at this site takes {_duration(preflight.run_seconds)} in all"
    return "\n".join([head, *_aligned(rows), total])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _late(experiment: ExperimentConfig, preflight: Preflight) -> list[str]:
    """A line for each stage whose rounds would end after the server has gone on, with what would help."""
    timeout, lines = experiment.federation.round_timeout_s, []
    for stage in preflight.stages:
        if stage.round_seconds > timeout:
            beside = stage.round_seconds - stage.steps_per_round * stage.step_seconds
            steps = math.floor((timeout - beside) / stage.step_seconds)
            fewer = f"training.steps_per_round = {steps} or " if steps >= 1 else ""
            lines.append(
                f"too slow: a round of the {stage.name} takes {_duration(stage.round_seconds)}, and "
                f"federation.round_timeout_s = {timeout}: give {fewer}a timeout of {math.ceil(stage.round_seconds)}"
            )
    return lines


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
