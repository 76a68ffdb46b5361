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
        description="Make the keys that simulated sites need: contexts of homomorphic encryption for jobs/ct_ddpm_he. "
        "They are written to the simulator's startup folder, which NVFlare keeps between runs and copies to the server "
        "and all sites: everybody there has all keys, so this protects nobody. A provisioned federation gets its own "
        "from NVFlare's provisioning. What is there is kept.",
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
    from custom.he_contexts import make_contexts

    startup = options.workspace / "startup"
    written = make_contexts(startup, force=options.force)
    print("\n".join(f"written: {file}" for file in written) or f"kept: the contexts in {startup}")
    return 0
