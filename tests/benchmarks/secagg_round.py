"""What does secure aggregation add to a federated round of the real model?

    python tests/benchmarks/secagg_round.py [--rounds N] [--steps N] [--pairs N]

The main job and its masked twin in NVFlare's simulator with lasting processes (``-t 3``), one after the other, each at
three sites with the job's own network (0.7 M parameters) and steps. A round is timed by the server, from sending the
task to the new model; the first round of a run, in which processes start and the first session is opened, is told
apart. The last line is one JSON object:

    round_ratio         median round with masks over median round without
    first_round_ratio   the same for first rounds
    added_s             seconds added to a median round
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / folder) for folder in ("", "tests", "tests/integration")]

from simulator import simulate  # noqa: E402

from custom.config import ExperimentConfig  # noqa: E402
from custom.run_folder import check_receipt  # noqa: E402

JOBS = ("ct_ddpm", "ct_ddpm_secagg")
SITES = ["site-1", "site-2", "site-3"]


def main() -> None:
    """Run, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=4, help="a run (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="a round (default: the job's)")
    parser.add_argument("--pairs", type=int, default=1, help="runs of each job, alternating (default: %(default)s)")
    options = parser.parse_args()
    first: dict[str, list[float]] = {name: [] for name in JOBS}
    others: dict[str, list[float]] = {name: [] for name in JOBS}
    for _ in range(options.pairs):
        for name in JOBS:
            seconds = rounds_of(name, options.rounds, options.steps)
            print(f"{name:16} rounds of {', '.join(f'{s:.1f}' for s in seconds)} s", flush=True)
            first[name].append(seconds[0])
            others[name] += seconds[1:]
    plain, masked = (statistics.median(others[name]) for name in JOBS)
    figures = {
        "round_ratio": round(masked / plain, 3),
        "first_round_ratio": round(statistics.median(first[JOBS[1]]) / statistics.median(first[JOBS[0]]), 3),
        "added_s": round(masked - plain, 2),
    }
    print(json.dumps(figures))


def rounds_of(name: str, rounds: int, steps: int | None) -> list[float]:
    """Seconds of each round of one run."""
    experiment = ExperimentConfig.of_job(REPOSITORY / "jobs" / name)
    experiment = replace(
        experiment,
        federation=replace(experiment.federation, rounds=rounds, min_responses=3),
        training=replace(experiment.training, steps_per_round=steps or experiment.training.steps_per_round),
        sampling=replace(experiment.sampling, grid_every=0, grid_images=4, evaluation_images=24),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = simulate(Path(folder), experiment, SITES, threads=3, timeout=3600)
        check_receipt(run.folder)
        lines = (run.folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["seconds"] for line in lines]


if __name__ == "__main__":
    main()
