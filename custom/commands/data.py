"""``fedct data``: fetch a site's scans, look at them, prepare them for training, write an embedded cohort."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from custom.config import ExperimentConfig
from custom.site_file import load_site
from custom.strict import require
from medical_data.cohort import prepare_cohort
from medical_data.deidentify import SECRET_BYTES, Pseudonymizer, site_secret
from medical_data.inspection import InspectionReport, iter_volumes
from medical_data.phantom import PhantomConfig, write_cohort

if TYPE_CHECKING:
    from medical_data.dicomweb_server import Server

OK, NOTHING_ACCEPTED, NOTHING_FOUND, INCOMPLETE = 0, 1, 1, 2

TOKEN_VARIABLE, CREDENTIALS_VARIABLE = "FEDCT_PACS_TOKEN", "FEDCT_PACS_CREDENTIALS"

_FORMATS = ("auto", "dicom", "nifti")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``data`` with ``pull``, ``inspect``, ``prepare`` and ``phantom``.

    Each sets ``func(args)``, which returns the exit code and leaves errors that a user can mend to its caller.
    """
    data = subparsers.add_parser(
        "data",
        help="fetch, inspect and prepare a site's scans",
        description="Fetch a site's scans from its PACS, look at them, prepare them for training, or write an "
        "embedded cohort. Everything stays on this machine.",
    )
    commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _register_pull(commands)
    _register_inspect(commands)
    _register_prepare(commands)
    _register_phantom(commands)


def _register_pull(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "pull",
        help="fetch a CT cohort from a DICOMweb server into a folder of scans",
        description="Search a DICOMweb server (PACS) for CT series and fetch their images into a folder that the site "
        "file can name. What it writes is still identifiable, exactly as the server sends it: names and dates stay "
        "in the files until a job reads them, so give a folder that only the site may read. An image is there whole "
        "or not at all; the same command again fetches only what is missing, however the last one ended. It prints "
        "counts, no patient data. Exit code: 0 if all that was found is in the folder, 1 if nothing was found, 2 if "
        "the server could not give everything.",
        epilog=f"Who we are comes from a file that only its owner may read, or from the environment: {TOKEN_VARIABLE} "
        f"(a bearer token) or {CREDENTIALS_VARIABLE} (user:password). The environment's proxies are not used.",
    )
    parser.add_argument(
        "url", metavar="URL", help="of the DICOMweb service, such as https://pacs.example.org/dicom-web"
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of scans; made where it is not there")
    parser.add_argument(
        "--query",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="only series with this DICOM attribute, such as StudyDate=20200101-20201231, StudyDescription=*THORAX* "
        "or BodyPartExamined=CHEST; can be given several times, and all must hold. Modality is always CT. Other users "
        "of this machine can see a command: do not name patients",
    )
    parser.add_argument("--limit", metavar="N", type=int, help="at most so many patients, with all their series")
    parser.add_argument("--token-file", metavar="FILE", type=Path, help="file with a bearer token, mode 0600")
    parser.add_argument("--credentials-file", metavar="FILE", type=Path, help="file with user:password, mode 0600")
    parser.add_argument("--ca", metavar="FILE", type=Path, help="authorities to trust instead of the public ones (PEM)")
    parser.add_argument("--client-cert", metavar="FILE", type=Path, help="our certificate and its key in one PEM file")
    parser.add_argument(
        "--allow-http", action="store_true", help="allow patients to travel unencrypted to another machine"
    )
    parser.set_defaults(func=_pull)


def _register_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "inspect",
        help="which series are accepted, which refused and why",
        description="Read every DICOM and NIfTI series below a folder and print a table: patients (as pseudonyms), "
        "series, slices, spacing, HU range, accepted or refused and why. Exit code: 0 if a series is "
        "accepted, 1 if none is, 2 if the folder cannot be read.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with scans, any nesting and file names")
    _add_format(parser)
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        help="also write the report as JSON; it names files, so keep it at the site",
    )
    parser.add_argument(
        "--home",
        metavar="DIR",
        type=Path,
        help="the site's own folder: show the pseudonyms of its secret (default: of a secret made up for this table)",
    )
    parser.set_defaults(func=_inspect)


def _register_prepare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "prepare",
        help="preprocess a site's scans into its cache, before a job needs them",
        description="Read, preprocess and split a site's patients as a job asks for, into the site's cache; does "
        "nothing where that is done already. A job does the same at its first start. Exit code: 0 if the cohort is "
        "ready, 2 otherwise.",
    )
    parser.add_argument("job", metavar="JOB", type=Path, help="the job's folder, such as jobs/ct_ddpm")
    parser.add_argument("--site-file", metavar="FILE", type=Path, required=True, help="the site file (TOML)")
    parser.add_argument("--site", metavar="NAME", required=True, help="which of its sites")
    parser.set_defaults(func=_prepare)


def _register_phantom(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "phantom",
        help="write a hospital of the embedded cohort as DICOM",
        description="Write procedural chest CT of made-up patients as DICOM series, a folder a patient. The same "
        "arguments give the same bytes. Exit code: 0 if written, 2 otherwise.",
    )
    parser.add_argument("folder", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--hospital", metavar="N", type=int, required=True, help="which hospital: another scanner, other patients"
    )
    parser.add_argument(
        "--patients", metavar="N", type=int, default=PhantomConfig.patients, help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--slices",
        metavar="N",
        type=int,
        default=PhantomConfig.slices,
        help="axial slices a series (default: %(default)s)",
    )
    parser.add_argument(
        "--matrix", metavar="N", type=int, default=PhantomConfig.matrix, help="pixels a side (default: %(default)s)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of everything (default: %(default)s)")
    parser.set_defaults(func=_phantom)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=_FORMATS, default="auto", help="what to read (default: both)")


def _progress() -> bool:
    return sys.stderr.isatty()


def _pull(args: argparse.Namespace) -> int:
    from medical_data.dicomweb import Query, pull

    report = pull(
        _server(args),
        Query(filters=_filters(args.query), max_patients=args.limit),
        args.folder,
        progress=_progress(),
    )
    print(report.text())
    if report.failed:
        return INCOMPLETE
    return OK if report.series else NOTHING_FOUND


def _server(args: argparse.Namespace) -> Server:
    from medical_data.dicomweb_server import Server, read_credentials

    ways = {
        "--token-file": args.token_file,
        "--credentials-file": args.credentials_file,
        TOKEN_VARIABLE: os.environ.get(TOKEN_VARIABLE),
        CREDENTIALS_VARIABLE: os.environ.get(CREDENTIALS_VARIABLE),
    }
    given = [name for name, value in ways.items() if value is not None]
    require(len(given) <= 1, argument="credentials", value=given, remedy="give one way to log in")
    secret = {name: read_credentials(ways[name]) if name.startswith("--") else ways[name] for name in given}
    return Server(
        url=args.url,
        token=secret.get("--token-file", secret.get(TOKEN_VARIABLE)),
        credentials=secret.get("--credentials-file", secret.get(CREDENTIALS_VARIABLE)),
        ca=args.ca,
        client_cert=args.client_cert,
        allow_http=args.allow_http,
    )


def _filters(words: list[str]) -> dict[str, str]:
    filters: dict[str, str] = {}
    for word in words:
        keyword, equals, value = word.partition("=")
        # Never the value: it may name a patient.
        require(bool(equals), argument="--query", value="without =", remedy="give KEY=VALUE")
        require(keyword not in filters, argument="--query", value=keyword, remedy="given twice; give it once")
        filters[keyword] = value
    return filters


def _inspect(args: argparse.Namespace) -> int:
    secret = secrets.token_bytes(SECRET_BYTES) if args.home is None else site_secret(args.home / "secret")
    found = iter_volumes(args.folder, format=args.format, pseudonymizer=Pseudonymizer(secret), progress=_progress())
    report = InspectionReport(rows=tuple(row for row, _ in found))
    print(report.table())
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    return OK if report.counts()["series_accepted"] else NOTHING_ACCEPTED


def _prepare(args: argparse.Namespace) -> int:
    site = load_site(args.site_file, args.site)
    experiment = ExperimentConfig.of_job(args.job)
    cohort = prepare_cohort(
        source=site.source,
        preprocess=experiment.preprocess,
        limits=site.limits,
        home=site.home,
        progress=_progress(),
    )
    patients, held_out = len(cohort.pseudonyms), int(np.count_nonzero(cohort.held_out))
    edges = "x".join(str(edge) for edge in cohort.images.shape[2:])
    print(f"patients: {patients} ({patients - held_out} train, {held_out} held out)")
    print(
        f"images: {len(cohort.images)} of {edges} ({cohort.rows('train').size} train, "
        f"{cohort.rows('held_out').size} held out)"
    )
    print(f"manifest: {cohort.manifest_sha256}")
    return OK


def _phantom(args: argparse.Namespace) -> int:
    config = PhantomConfig(
        hospital=args.hospital,
        patients=args.patients,
        slices=args.slices,
        matrix=args.matrix,
        seed=args.seed,
    )
    write_cohort(config, args.folder, progress=_progress())
    print(f"patients: {config.patients} of hospital {config.hospital} in {args.folder}")
    return OK
