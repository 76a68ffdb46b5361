"""``fedct data``: look at a site's scans, prepare them for training, write an embedded cohort."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from pathlib import Path

import numpy as np

from medical_data.cohort import DataLimits, FolderSource, prepare_cohort
from medical_data.deidentify import SECRET_BYTES, Pseudonymizer, site_secret
from medical_data.inspection import InspectionReport, iter_volumes
from medical_data.phantom import PhantomConfig, write_cohort
from medical_data.preprocess import PreprocessConfig

OK, NOTHING_ACCEPTED = 0, 1

_FORMATS = ("auto", "dicom", "nifti")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``data`` with ``inspect``, ``prepare`` and ``phantom``.

    Each sets ``func(args)``, which returns the exit code and leaves errors that a user can mend to its caller.
    """
    data = subparsers.add_parser(
        "data",
        help="inspect and prepare a site's scans",
        description="Look at a site's scans, prepare them for training, or write an embedded cohort. "
        "Everything stays on this machine.",
    )
    commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _register_inspect(commands)
    _register_prepare(commands)
    _register_phantom(commands)


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
        help="preprocess a folder's scans into the site's cache",
        description="Read, preprocess and split the patients below a folder as a job would, into the site's "
        "cache; does nothing where that is done already. Exit code: 0 if the cohort is ready, 2 otherwise.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with scans, any nesting and file names")
    parser.add_argument(
        "--home",
        metavar="DIR",
        type=Path,
        required=True,
        help="the site's own folder for secret and cache, outside DIR",
    )
    _add_format(parser)
    job = parser.add_argument_group("preprocessing", "as the job that will train asks for")
    job.add_argument(
        "--spatial-dims",
        type=int,
        choices=(2, 3),
        default=PreprocessConfig.spatial_dims,
        help="axial slices or patches (default: %(default)s)",
    )
    job.add_argument(
        "--size",
        metavar="N",
        type=int,
        default=PreprocessConfig.size,
        help="pixels along each edge (default: %(default)s)",
    )
    job.add_argument(
        "--window-hu",
        metavar=("LOW", "HIGH"),
        type=float,
        nargs=2,
        default=PreprocessConfig.window_hu,
        help="HU that become -1 and 1 (default: %(default)s)",
    )
    job.add_argument(
        "--images-per-patient",
        metavar="N",
        type=int,
        default=PreprocessConfig.images_per_patient,
        help="at most, evenly spaced over the body (default: %(default)s)",
    )
    job.add_argument(
        "--spacing-mm",
        metavar=("D", "H", "W"),
        type=float,
        nargs=3,
        help="voxel size of patches; needed for 3 dimensions",
    )
    site = parser.add_argument_group("limits", "the site's own")
    site.add_argument(
        "--min-patients",
        metavar="N",
        type=int,
        default=DataLimits.min_patients,
        help="refuse fewer usable patients (default: %(default)s)",
    )
    site.add_argument(
        "--max-images-per-patient",
        metavar="N",
        type=int,
        default=DataLimits.max_images_per_patient,
        help="ceiling over what a job asks (default: none)",
    )
    site.add_argument(
        "--held-out-fraction",
        metavar="F",
        type=float,
        default=DataLimits.held_out_fraction,
        help="share of patients that never train (default: %(default)s)",
    )
    site.add_argument(
        "--split-seed",
        metavar="N",
        type=int,
        default=DataLimits.split_seed,
        help="of the split by patient (default: %(default)s)",
    )
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


def _inspect(args: argparse.Namespace) -> int:
    secret = secrets.token_bytes(SECRET_BYTES) if args.home is None else site_secret(args.home / "secret")
    found = iter_volumes(args.folder, format=args.format, pseudonymizer=Pseudonymizer(secret), progress=_progress())
    report = InspectionReport(rows=tuple(row for row, _ in found))
    print(report.table())
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    return OK if report.counts()["series_accepted"] else NOTHING_ACCEPTED


def _prepare(args: argparse.Namespace) -> int:
    cohort = prepare_cohort(
        source=FolderSource(folder=args.folder, format=args.format),
        preprocess=PreprocessConfig(
            spatial_dims=args.spatial_dims,
            size=args.size,
            window_hu=tuple(args.window_hu),
            images_per_patient=args.images_per_patient,
            spacing_mm=None if args.spacing_mm is None else tuple(args.spacing_mm),
        ),
        limits=DataLimits(
            min_patients=args.min_patients,
            max_images_per_patient=args.max_images_per_patient,
            held_out_fraction=args.held_out_fraction,
            split_seed=args.split_seed,
        ),
        home=args.home,
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
