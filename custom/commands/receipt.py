"""``fedct receipt``: did a run complete, and where are its results?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "receipt",
        help="check a run's receipt and name its results",
        description="Check that a run was completed and that its model is the one of its receipt, and name what it "
        "left. NVFlare's own exit code does not tell: it is 0 even if a run died. Exit code 0: completed; 2: not.",
    )
    parser.add_argument("experiment", help="name of the experiment, such as ct_ddpm, or a run's folder")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the server's runs folder (default: runs)")
    parser.add_argument(
        "--newer-than", type=Path, metavar="FILE", help="refuse a run that began before FILE was written"
    )
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Check and print."""
    from custom.config import EXPERIMENT_FILE
    from custom.run_folder import RunFailed, newest_run

    named = Path(options.experiment)
    folder = named if named.is_dir() and (named / EXPERIMENT_FILE).is_file() else newest_run(options.runs, named.name)
    marker = options.newer_than
    if marker is not None and (folder / EXPERIMENT_FILE).stat().st_mtime < marker.stat().st_mtime:
        raise RunFailed(f"{folder}: the newest run began before {marker} was written: this one left no folder")
    report(folder)
    return 0


def report(folder: Path) -> None:
    """Print what a completed run left; raises ``RunFailed`` as :func:`custom.run_folder.check_receipt`."""
    from custom.run_folder import AUDIT_FILE, check_receipt

    receipt = check_receipt(folder)
    if receipt["product"] == AUDIT_FILE:
        _audit(folder)
        return
    mean = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["mean"]
    print(f"completed: {receipt['rounds_done']} of {receipt['rounds_asked']} rounds")
    if receipt["reason"] is not None:
        print(f"  ended early: {receipt['reason']}")
    for what in ("refused", "silent"):
        if receipt[what]:
            print(f"  {what}, by round: {receipt[what]}")
    print("\n".join(f"  {name}: {value:.4f}" for name, value in mean.items()))
    for what, name in (
        ("samples", "samples.png"),
        ("metrics", "metrics.json"),
        ("receipt", "receipt.json"),
        ("model", "model.safetensors"),
    ):
        print(f"{what + ':':9}{folder / name}")


def _audit(folder: Path) -> None:
    from privacy.audit.report.document import load_audit

    decision = load_audit(folder / "audit.json").decision
    print(f"{decision.verdict}: {decision.sentence}")
    for what, name in (("report", "audit.html"), ("to print", "audit.pdf"), ("evidence", "audit.json")):
        print(f"{what + ':':10}{folder / name}")
