"""Runs of a study in one process pool, each result in a file of its own, and the tables made from them.

``runs/<key>.json`` holds what a run gave; a study that is started again does what has none. What failed leaves
``runs/<key>.error.txt`` and is tried again then.
"""

from __future__ import annotations

import csv
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from statistics import fmean, stdev

import torch
from tqdm import tqdm

from custom.atomic import write_atomically
from custom.strict import require
from custom.study.config import RESULT_FORMAT, Run, StudyConfig
from medical_data.cache import locked

RunOne = Callable[[Run, Path], Mapping[str, float]]
CONFIDENCE = 0.95  # of the intervals over seeds


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gave: metrics by name, nan where one was not finite, and how long it took."""

    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that failed: the last line of its error, and the file with all of it."""

    run: Run
    error: str
    file: Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of one run."""

    suite: str
    case: str
    seed: int
    metric: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A metric of a case over its seeds.

    Attributes:
        n: seeds with the metric.
        mean: over them; nan if one of them is.
        low: lower end of the 95 % t-interval, and ``high`` the upper one; None with one seed, or without a finite mean.
    """

    suite: str
    case: str
    metric: str
    n: int
    mean: float
    low: float | None
    high: float | None


def result_file(run: Run, out: Path) -> Path:
    """Where the run's result is, or will be."""
    return out / "runs" / f"{run.key}.json"


def read_result(run: Run, out: Path) -> Result | None:
    """A run's result; None if there is none, or none that can be read."""
    try:
        values = json.loads(result_file(run, out).read_text(encoding="utf-8"))
        if (values["format"], values["key"]) != (RESULT_FORMAT, run.key):
            return None
        metrics = {name: math.nan if value is None else float(value) for name, value in values["metrics"].items()}
        return Result(metrics=metrics, seconds=float(values["seconds"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def run_study(
    config: StudyConfig,
    out: Path,
    *,
    processes: int,
    run_one: RunOne,
    runs: Sequence[Run] | None = None,
) -> tuple[Failure, ...]:
    """Run what has no result yet, each run in a process with one thread.

    A second study in the same folder waits for the first. When this process ends, so do those of the pool; finished
    runs stay.

    Args:
        config: the study.
        out: its folder; ``out/home`` is given to every run.
        processes: runs at a time.
        run_one: makes a run's metrics; a function that another process can import. The folder that it is given is
            the same for all runs.
        runs: some of the study's; all by default.

    Returns:
        What failed; nothing if the study is complete.
    """
    require(processes >= 1, argument="processes", value=processes, remedy="give at least 1")
    wanted = {run.key: run for run in reversed(config.runs() if runs is None else runs)}  # a shared result: once
    ordered = list(reversed(wanted.values()))
    failures = []
    with locked(out / "study.lock"):
        todo = [run for run in ordered if read_result(run, out) is None]
        work = partial(_work, out=out, run_one=run_one)
        bar = tqdm(total=len(ordered), initial=len(ordered) - len(todo), desc=config.name, unit="run")
        with bar, closing(_ended(todo, work, processes)) as ended:
            for run, error in ended:
                file = result_file(run, out).with_suffix(".error.txt")
                if error is None:
                    file.unlink(missing_ok=True)
                else:
                    write_atomically(file, f"{run}\n\n{error}".encode())
                    failures.append(Failure(run=run, error=error.strip().splitlines()[-1], file=file))
                bar.set_postfix_str(f"{run}{'' if error is None else ' FAILED'}", refresh=False)
                bar.update()
    return tuple(failures)


def remaining_seconds(runs: Sequence[Run], out: Path, *, processes: int) -> float | None:
    """About how long the runs without a result will take: each as long as others of its case, suite or study did.

    Returns:
        Seconds; 0 if nothing is left, None if no run has finished yet.
    """
    results = {run.key: (run, read_result(run, out)) for run in runs}
    left = [run for run, result in results.values() if result is None]
    done = [(run, result.seconds) for run, result in results.values() if result is not None]
    if not left or not done:
        return None if left else 0.0
    total = 0.0
    for run in left:
        suite = [(other, seconds) for other, seconds in done if other.case.suite == run.case.suite]
        case = [(other, seconds) for other, seconds in suite if other.case.name == run.case.name]
        total += fmean(seconds for _, seconds in case or suite or done)
    return total / min(processes, len(left))


def collect(config: StudyConfig, out: Path) -> list[Row]:
    """Every metric of every run of the study that has a result, in the study's order."""
    return [
        Row(suite=run.case.suite, case=run.case.name, seed=run.seed, metric=metric, value=value)
        for suite in config.suites
        for case in suite.cases
        for run in (Run(case=case, seed=seed) for seed in case.seeds)
        if (result := read_result(run, out)) is not None
        for metric, value in result.metrics.items()
    ]


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Mean and t-interval over the seeds, for each metric of each case, in the rows' order."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row.suite, row.case, row.metric), []).append(row.value)
    summaries = []
    for (suite, case, metric), numbers in values.items():
        mean, low, high = interval(numbers)
        summaries.append(Summary(suite=suite, case=case, metric=metric, n=len(numbers), mean=mean, low=low, high=high))
    return summaries


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and the ends of Student's 95 % interval; no ends for a single value, or without a finite mean."""
    from scipy.stats import t

    if not all(math.isfinite(value) for value in values):
        return math.nan, None, None
    mean, n = fmean(values), len(values)
    if n == 1:
        return mean, None, None
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def write_csv(rows: Sequence[Row], file: Path) -> None:
    """Write ``suite, case, seed, metric, value``, a row for each number."""
    lines = [(row.suite, row.case, row.seed, row.metric, row.value) for row in rows]
    _write_table(("suite", "case", "seed", "metric", "value"), lines, file)


def write_summary(summaries: Sequence[Summary], file: Path) -> None:
    """Write ``suite, case, metric, n, mean, low, high``; without an interval its ends are empty."""
    lines = [(each.suite, each.case, each.metric, each.n, each.mean, each.low, each.high) for each in summaries]
    _write_table(("suite", "case", "metric", "n", "mean", "low", "high"), lines, file)


def _write_table(header: Sequence[str], lines: Sequence[Sequence[object]], file: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    write_atomically(file, text.getvalue().encode())


def _work(run: Run, *, out: Path, run_one: RunOne) -> str | None:
    """One run, in a process of the pool; None, or the error as text. The result is on the disk before it returns."""
    try:
        began = time.monotonic()
        metrics = {name: float(value) for name, value in run_one(run, out / "home").items()}
        record = {
            "format": RESULT_FORMAT,
            "key": run.key,
            "seed": run.seed,
            "seconds": time.monotonic() - began,
            "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
            "case": run.case.to_json(),
        }
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        write_atomically(result_file(run, out), text.encode())
    except Exception:  # whatever it is, the other runs go on and the person reads it
        return traceback.format_exc()
    return None


def _ended(
    runs: Sequence[Run], work: Callable[[Run], str | None], processes: int
) -> Generator[tuple[Run, str | None], None, None]:
    """Runs as they end, with an error or None.

    A process that dies (of memory, mostly) breaks its pool. Which run it was cannot be known, so those that were in the
    pool run again one at a time, after the others.
    """
    together, alone = deque(runs), deque[Run]()
    while together or alone:
        waiting, width = (together, processes) if together else (alone, 1)
        going: dict[Future[str | None], Run] = {}
        try:
            with _pool(min(width, len(waiting))) as pool:
                while waiting or going:
                    while waiting and len(going) < width:
                        future = pool.submit(work, waiting[0])
                        going[future] = waiting.popleft()
                    for future in wait(going, return_when=FIRST_COMPLETED).done:
                        error = future.result()
                        yield going.pop(future), error
        except BrokenProcessPool:
            if waiting is together:
                alone.extend(going.values())
            else:
                yield from ((run, "the run's process died; does it have enough memory?") for run in going.values())


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes are gone afterwards, even if it was interrupted in the middle of a run."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin)
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """What a process of the pool does first: one thread, no Ctrl-C of its own, an end when its parent ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        sys.stderr.flush()
        os._exit(1)
