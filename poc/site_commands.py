"""``fedct site``: a hospital's own kit, made ready and looked at before it is started."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

READY, NOT_READY = 0, 1


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``site`` with ``prepare`` and ``check``."""
    site = subparsers.add_parser(
        "site",
        help="prepare and check a node of a real federation",
        description="For a hospital's IT, and for whoever runs the server: write a node's own decisions into its kit, "
        "and look at everything before it is started (docs/deployment.md).",
    )
    commands = site.add_subparsers(title="commands", metavar="COMMAND", required=True)
    prepare = commands.add_parser(
        "prepare",
        help="write local/ of a kit",
        description="Hold the kit against the coordinator's signature and write local/: which classes a job may name, "
        "the site's rules, no code, no log streaming, filters on every reply, the site file. Exit code: 0; 2 if "
        "it could not be done.",
    )
    prepare.add_argument("kit", metavar="KIT", type=Path, help="the kit's folder, with startup/ in it")
    node = prepare.add_mutually_exclusive_group(required=True)
    node.add_argument("--name", metavar="SITE", help="the site's name in the federation")
    node.add_argument("--server", action="store_true", help="the kit is the server's")
    prepare.add_argument("--site-file", metavar="FILE", type=Path, help="site file (default: what is in local/)")
    prepare.set_defaults(func=_prepare)
    check = commands.add_parser(
        "check",
        help="is the node fit to be started?",
        description="Look at signature, root, key, certificate, clock, local/, data, disk and the way to the server. "
        "Exit code: 0 if all that was checked holds, 1 if not.",
    )
    check.add_argument("kit", metavar="KIT", type=Path, help="the kit's folder, with startup/ in it")
    check.add_argument("--name", metavar="SITE", required=True, help="the site's name in the federation")
    check.add_argument("--root-sha256", metavar="HEX", help="the root's fingerprint, as the coordinator told it")
    check.add_argument("--offline", action="store_true", help="do not connect to the server")
    check.set_defaults(func=_check)


def _prepare(options: argparse.Namespace) -> int:
    from custom.site_file import SITE_FILE, load_site, read_tables
    from custom.strict import require
    from poc.kits import prepare_server, prepare_site
    from poc.signed_kits import verify_kit

    verify_kit(options.kit)
    own = options.kit / "local" / SITE_FILE
    given = options.site_file or own
    require(given.is_file(), argument="--site-file", value=str(given), remedy="no such file: give the node's site file")
    if options.server:
        tables = read_tables(given)
        require("server" in tables, argument="server", value=None, remedy=f"add a table [server] to {given}")
        prepare_server(options.kit, tables["server"])
    else:
        load_site(given, options.name)  # what is wrong with it is said now, not when a job comes
        tables = read_tables(given)
        prepare_site(options.kit, options.name, tables["sites"][options.name] if given != own else None)
    print(f"written: {', '.join(sorted(file.name for file in (options.kit / 'local').glob('*.*') if _ours(file)))}")
    return READY


def _ours(file: Path) -> bool:
    return file.suffix in (".json", ".toml")


def _check(options: argparse.Namespace) -> int:
    from poc.site_check import check_site, table

    checks = check_site(options.kit, options.name, root_sha256=options.root_sha256, offline=options.offline)
    print(table(checks))
    failed = [check for check in checks if check.holds is False]
    print(f"{options.name}: {'fit to be started' if not failed else f'{len(failed)} to mend before it is started'}")
    return NOT_READY if failed else READY
