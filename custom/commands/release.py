"""``fedct release``: a model or synthetic images, with the audit that allows it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "release",
        help="release weights or synthetic DICOM, if the sites' policies accept the model's audit",
        description="Write a folder that may leave: weights or synthetic DICOM, a model card and the audit. Refused "
        "without an audit of this very model, over every site whose patients it knows, with a verdict that each of "
        "them accepts by its own cut-offs.",
    )
    parser.add_argument("model", type=Path, help="model.safetensors of a run")
    parser.add_argument("out", type=Path, help="folder to write to; must not exist yet")
    parser.add_argument("--audit", type=Path, action="append", required=True, help="audit.json of this model")
    parser.add_argument("--site-file", type=Path, required=True, help="the site file (TOML)")
    parser.add_argument("--site", action="append", required=True, help="a site that must agree; repeat for every site")
    parser.add_argument("--as", dest="form", choices=("weights", "dicom"), required=True, help="what to release")
    parser.add_argument("--count", type=int, default=64, help="samples of a DICOM set (default: %(default)s)")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Check and write."""
    from custom.device import use
    from custom.model_file import load_model
    from custom.release import ReleaseRefused, release
    from custom.site_file import HardwareConfig, load_site
    from custom.strict import require
    from medical_data.cohort import prepare_cohort
    from privacy.audit.report.document import load_audit

    remedy = "give one audit, over all sites: none may be left out of sight"
    require(len(options.audit) == 1, argument="--audit", value=[str(file) for file in options.audit], remedy=remedy)
    audit = load_audit(options.audit[0])
    model = load_model(options.model)
    sites = {}
    for name in options.site:
        site = load_site(options.site_file, name)
        cohort = prepare_cohort(
            source=site.source,
            preprocess=model.experiment.preprocess,
            limits=site.limits,
            home=site.home,
            progress=True,
        )
        sites[name] = (cohort.manifest_sha256, site.audit)
    try:
        withheld = release(
            model,
            options.model,
            audit,
            options.out,
            sites=sites,
            form=options.form,
            count=options.count,
            device=use(HardwareConfig()),
            progress=True,
        )
    except ReleaseRefused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 1
    print(f"released: {options.out}")
    if withheld:
        print(f"withheld: {len(withheld)} samples too close to a patient")
    return 0
