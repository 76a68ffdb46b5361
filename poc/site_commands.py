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
    from custom.site_file import SITE_FILE
    from custom.strict import require
    from poc.kits import prepare_server, prepare_site
    from poc.signed_kits import verify_kit
    from poc.site_check import certified_name

    verify_kit(options.kit)
    own = options.kit / "local" / SITE_FILE
    given = options.site_file or own
    require(given.is_file(), argument="--site-file", value=str(given), remedy="no such file: give the node's site file")
    if options.server:
        server = (options.kit / "startup" / "server.crt").is_file()
        require(server, argument="kit", value=str(options.kit), remedy="a site's, not the server's; give --name")
        prepare_server(options.kit, _server_table(given))
    else:
        named = certified_name(options.kit)
        require(named == options.name, argument="--name", value=options.name, remedy=f"the kit is of {named!r}")
        table = _site_table(options.kit, given, options.name)
        prepare_site(options.kit, options.name, table if given.resolve() != own.resolve() else None)
    print(f"written: {', '.join(sorted(file.name for file in (options.kit / 'local').glob('*.*') if _ours(file)))}")
    return READY


def _site_table(kit: Path, file: Path, name: str) -> dict[str, Any]:
    """A site's table, with paths that hold wherever its file lies; what is wrong with it is said now."""
    from custom.site_file import load_site, read_tables
    from custom.strict import require
    from medical_data.cohort import FolderSource

    site, table = load_site(file, name), dict(read_tables(file)["sites"][name])
    other = "kit" in table and site.kit.resolve() != (kit / "startup").resolve()
    remedy = "take it out of the site file: a provisioned site has its own"
    require(not other, argument=f"sites.{name}.kit", value=table.get("kit"), remedy=remedy)
    table["home"] = str(site.home)
    if isinstance(site.source, FolderSource):
        table["data"] = dict(table["data"]) | {"folder": str(site.source.folder)}
    return table


def _server_table(file: Path) -> dict[str, Any]:
    from custom.site_file import ServerConfig, read_tables
    from custom.strict import build, require

    tables = read_tables(file)
    require("server" in tables, argument="server", value=None, remedy=f"add a table [server] to {file}")
    table, folder = dict(tables["server"]), file.resolve().parent
    base = folder.parent.parent if folder.name == "local" else folder  # as the server itself reads it
    server = build(ServerConfig, {"kit": ".", **table}, "server")
    return table | {"runs": str(base / server.runs), "models": str(base / server.models)}


def _ours(file: Path) -> bool:
    return file.suffix in (".json", ".toml")


def _check(options: argparse.Namespace) -> int:
    from poc.site_check import check_site, table

    checks = check_site(options.kit, options.name, root_sha256=options.root_sha256, offline=options.offline)
    print(table(checks))
    failed = [check for check in checks if check.holds is False]
    print(f"{options.name}: {'fit to be started' if not failed else f'{len(failed)} to mend before it is started'}")
    return NOT_READY if failed else READY
