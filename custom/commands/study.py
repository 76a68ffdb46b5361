"""``fedct study``: many small federations, one factor at a time, as one table and its figures."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from custom.study.config import Run, StudyConfig

INTERRUPTED = 130  # exit code, as of a shell


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "study",
        help="compare many small federations, one factor at a time",
        description="Train every case of a study with each of its seeds, several at a time, each in a process with one "
        "thread. Results lie in OUT/runs, one file a run; what is there is not run again, so that a study that was "
        "interrupted or extended goes on with the same command. Then write OUT/results.csv (one row for each number), "
        "OUT/summary.csv (means and 95 % intervals over the seeds), OUT/tables.md, OUT/goals.md (what the study is to "
        "show, and whether it does) and OUT/figures. A run that fails does not stop the others: it is named at the "
        "end, with the file of its error, and the exit code is 1.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="the study (JSON)")
    parser.add_argument("--out", type=Path, help="the study's folder (default: runs/study/<name of the study>)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time (default: %(default)s)")
    parser.add_argument(
        "--only", metavar="SUITE[/CASE]", action="append", default=[], help="run these only; repeat for several"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the runs and how long the remaining ones will take")
    what.add_argument("--figures-only", action="store_true", help="run nothing; tables and figures of what is there")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Run what is missing, then tables and figures."""
    from custom.strict import require
    from custom.study.config import StudyConfig

    processes = options.processes
    require(processes >= 1, argument="--processes", value=processes, remedy="give at least 1")
    config = StudyConfig.load(options.config)
    out = options.out or Path("runs") / "study" / config.name
    runs = config.select(options.only)
    if options.list:
        _list(runs, out, processes)
        return 0
    if options.figures_only:
        return _report(config, out)
    from custom.study.federation import run_case
    from custom.study.runner import collect, run_study

    try:
        failures = run_study(config, out, processes=processes, run_one=run_case, runs=runs)
    except KeyboardInterrupt:
        print("fedct: interrupted; finished runs are kept, the same command goes on", file=sys.stderr)
        return INTERRUPTED
    for failure in failures:
        print(f"fedct: {failure.run} failed: {failure.error} ({failure.file})", file=sys.stderr)
    if failures and not collect(config, out):
        return 1
    return max(_report(config, out), int(bool(failures)))


def _list(runs: Sequence[Run], out: Path, processes: int) -> None:
    """The runs, which of them are done, and how long the others will take."""
    from custom.study.runner import read_result, remaining_seconds

    done = [read_result(run, out) is not None for run in runs]
    for run, finished in zip(runs, done, strict=True):
        print(f"{run.key}  {'done' if finished else 'to do'}  {run}")
    seconds = remaining_seconds(runs, out, processes=processes)
    left = len({run.key for run, finished in zip(runs, done, strict=True) if not finished})
    if seconds is None:
        estimate = "; how long they take is known once one has finished"
    else:
        estimate = f"; about {seconds / 60:.1f} minutes with {processes} processes" if left else ""
    print(f"{sum(done)} of {len(runs)} done, {left} to do{estimate}")


def _report(config: StudyConfig, out: Path) -> int:
    """Tables and figures of all results that are there."""
    from custom.atomic import write_atomically
    from custom.strict import require
    from custom.study.figures import draw_figures, write_tables
    from custom.study.goals import table, verdict
    from custom.study.runner import collect, summarize, write_csv, write_summary

    rows = collect(config, out)
    require(len(rows) > 0, argument="out", value=str(out), remedy="holds no result of this study; run it first")
    write_csv(rows, out / "results.csv")
    write_summary(summarize(rows), out / "summary.csv")
    write_tables(config, rows, out / "tables.md")
    files = draw_figures(config, rows, out)
    if config.goals:
        judged = table([verdict(goal, rows) for goal in config.goals])
        write_atomically(out / "goals.md", judged.encode())
        print(judged)
    print(f"{out}: results.csv, summary.csv, tables.md and {len(files)} figures")
    return 0
