"""``fedct simulator-keys``: what simulated sites need and provisioned ones get from NVFlare's provisioning."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "simulator-keys",
        help="make the keys that simulated sites need",
        description="Make the keys that simulated sites need: kits with keys and certificates for secure aggregation "
        "(jobs/ct_ddpm_secagg), in the folders that the simulator's site file names, and contexts of homomorphic "
        "encryption (jobs/ct_ddpm_he), in the simulator's startup folder. All of them lie on this machine and protect "
        "nobody. A provisioned federation gets its own from NVFlare's provisioning. What is there is kept.",
    )
    parser.add_argument(
        "workspace",
        type=Path,
        nargs="?",
        default=Path("simulator_workspace"),
        help="the simulator's workspace (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace keys that are there")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Make what is missing and say so."""
    from importlib.util import find_spec

    from custom.he_contexts import make_contexts
    from custom.simulator_kits import make_kits
    from custom.site_file import simulated_kits

    kits = make_kits(*simulated_kits(options.workspace), force=options.force)
    print("\n".join(f"written: {kit}" for kit in kits) or "kept: the sites' kits")
    if find_spec("tenseal") is None:
        print("no contexts: jobs/ct_ddpm_he needs pip install 'fedct[he]'")
        return 0
    startup = options.workspace / "startup"
    contexts = make_contexts(startup, force=options.force)
    print("\n".join(f"written: {file}" for file in contexts) or f"kept: the contexts in {startup}")
    return 0
