"""``fedct poc``: a federation of real processes on this machine, from provisioning to the end."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # NVFlare takes a second to import, and every fedct command imports this file
    from nvflare.fuel.flare_api.flare_api import Session

    from poc.federation import Federation
    from poc.jobs import Followed

DONE, NOT_DONE = 0, 1


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``poc`` with ``up``, ``submit``, ``resume``, ``status``, ``pacs`` and ``down``."""
    poc = subparsers.add_parser(
        "poc",
        help="a provisioned federation on this machine",
        description="Provision a federation with NVFlare's own certificates, start server and hospitals as processes "
        "that speak mutual TLS, and run jobs in it. Everything of it lies in one folder.",
    )
    commands = poc.add_subparsers(title="commands", metavar="COMMAND", required=True)
    up = _command(commands, "up", _up, "provision and start; wait until all sites are ready")
    up.add_argument("--project", metavar="FILE", type=Path, help="NVFlare project file (default: the one it has)")
    up.add_argument(
        "--site-file",
        metavar="FILE",
        type=Path,
        help="the hospitals' site file (default: the one it has)",
    )
    up.add_argument("--sites", metavar="NAME", nargs="+", default=[], help="hospitals instead of the project file's")
    up.add_argument("--timeout", metavar="S", type=int, default=180, help="seconds to wait (default: %(default)s)")
    for name, run, what in (
        ("submit", _submit, "hand in a job, show its progress and download its result"),
        ("resume", _resume, "carry on the newest run of a job that did not complete"),
    ):
        job = _command(commands, name, run, what)
        job.add_argument("job", metavar="JOB", type=Path, help="the job's folder, such as jobs/ct_ddpm")
        job.add_argument("--user", metavar="NAME", help="who hands it in (default: the lead)")
        job.add_argument("--no-wait", action="store_true", help="do not wait for its end")
    status = _command(commands, "status", _status, "nodes, memory, jobs")
    status.add_argument("--html", metavar="FILE", type=Path, help="also write a page to look at")
    pacs = _command(commands, "pacs", _pacs, "start an Orthanc for a hospital, for trying fedct data pull")
    pacs.add_argument("site", metavar="SITE", help="the hospital")
    pacs.add_argument("--load", metavar="DIR", type=Path, help="folder of DICOM files to store in it")
    _command(commands, "down", _down, "stop everything that was started here; results stay")


def _command(commands: argparse._SubParsersAction[Any], name: str, run: Any, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}. Exit code: 0 if done; 1 if a job did not complete; 2 if it could "
        "not be done.",
    )
    parser.add_argument(
        "--folder",
        metavar="DIR",
        type=Path,
        default=Path("federation"),
        help="folder of the federation (default: %(default)s)",
    )
    parser.set_defaults(func=run)
    return parser


def _say(text: str) -> None:
    print(text, flush=True)


def _up(options: argparse.Namespace) -> int:
    from poc import lifecycle

    federation = lifecycle.up(
        options.folder,
        project_file=options.project,
        site_file=options.site_file,
        sites=options.sites,
        timeout_s=options.timeout,
        say=_say,
    )
    _say(f"ready: {', '.join(federation.nodes)} in {federation.folder}")
    return DONE


def _submit(options: argparse.Namespace) -> int:
    from poc import jobs

    federation = _federation(options)
    with jobs.session(federation, options.user) as session:
        return _followed(federation, session, jobs.submit(session, options.job), wait=not options.no_wait)


def _resume(options: argparse.Namespace) -> int:
    from custom.config import ExperimentConfig
    from poc import jobs

    federation = _federation(options)
    experiment = ExperimentConfig.of_job(options.job)
    run = jobs.unfinished_run(federation, experiment)
    _say(f"carrying on {experiment.name}/{run.run_id}")
    with jobs.session(federation, options.user) as session, jobs.resuming(options.job, run.run_id) as copy:
        for job_id in jobs.end_running(session, run):
            _say(f"ended job {job_id}, which had not finished")
        return _followed(federation, session, jobs.submit(session, copy), wait=not options.no_wait)


def _followed(federation: Federation, session: Session, job_id: str, *, wait: bool) -> int:
    from custom.commands.receipt import report
    from custom.run_folder import RunFailed
    from poc import jobs

    _say(f"job {job_id}")
    if not wait:
        return DONE
    try:
        followed: Followed = jobs.follow(federation, session, job_id, _say)
    except KeyboardInterrupt:
        _say("the job goes on: fedct poc status")
        return NOT_DONE
    _say(f"{job_id}: {followed.status}")
    if followed.folder is None:
        why = "; ".join(f"{site}: {said}" for site, said in followed.refused.items())
        print(f"fedct: the job did not begin: {why or 'see logs/ of the federation'}", file=sys.stderr)
        return NOT_DONE
    try:
        report(jobs.download(session, job_id, federation.results))
    except RunFailed as error:
        print(f"fedct: {error}", file=sys.stderr)
        return NOT_DONE
    return DONE


def _status(options: argparse.Namespace) -> int:
    from poc import lifecycle

    what = lifecycle.seen(_federation(options))
    for line in lifecycle.described(what):
        _say(line)
    if options.html is not None:
        from custom.atomic import write_atomically
        from poc.page import page

        write_atomically(options.html, page(what).encode())
        _say(f"page: {options.html}")
    return DONE


def _pacs(options: argparse.Namespace) -> int:
    from custom.strict import require
    from poc.pacs import start_pacs
    from poc.processes import PACS, environment, stop

    federation = _federation(options)
    sites, site = federation.members.sites, options.site
    require(site in sites, argument="site", value=site, remedy=f"give one of {list(sites)}")
    folder = federation.folder / "pacs" / site
    stop(federation.folder, [f"{PACS} {site}"])  # an earlier one: what it stores stays
    pacs = start_pacs(folder, marker=environment(federation.folder, f"{PACS} {site}"))
    if options.load is not None:
        _say(f"{pacs.load(options.load)} images stored")
    _say(f"PACS of {site}: {pacs.url}")
    _say(f"fedct data pull {pacs.url} FOLDER --credentials-file '{pacs.credentials_file}'")
    return DONE


def _down(options: argparse.Namespace) -> int:
    from poc.processes import stop

    count = stop(options.folder.resolve())
    _say(f"stopped {count} processes")
    return DONE


def _federation(options: argparse.Namespace) -> Federation:
    from poc.federation import Federation

    return Federation.load(options.folder)
