"""``fedct audit``: how much a model says about the patients it was trained on, as a report."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from custom.audit_config import AuditConfig
    from custom.canary_run import CanaryFindings
    from custom.model_file import ModelFile
    from custom.site_file import SiteConfig
    from medical_data.cohort import Cohort


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "audit",
        help="attack a model with its own patients and write the report",
        description="Attack a model with the patients of the sites that trained it, against their held-out patients, "
        "and write audit.json, audit.html and audit.pdf. The verdict is reached by the first site's cut-offs. "
        "site_copy.html shows the samples that come closest beside the patient: it stays at the site.",
    )
    parser.add_argument("model", type=Path, help="model.safetensors of a run")
    parser.add_argument("out", type=Path, help="folder to write to; must not exist yet")
    parser.add_argument("--site-file", type=Path, required=True, help="the site file (TOML)")
    parser.add_argument("--site", action="append", required=True, help="whose patients; repeat for every site")
    parser.add_argument("--config", type=Path, help="a JSON file with what to change of the defaults (AuditConfig)")
    parser.add_argument(
        "--canaries",
        type=int,
        default=0,
        metavar="N",
        help="for a model with differential privacy: train the first site once more with N canaries, whose inclusion "
        "is committed to beforehand, for a lower bound on epsilon (default: none)",
    )
    parser.add_argument(
        "--updates",
        action="store_true",
        help="also attack by the updates of a few more rounds, one site's and their sum, as a curious server could",
    )
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Audit and write; the exit code is 0 for a report, whatever it says."""
    from datetime import datetime, timezone

    from custom.audit import audit_model
    from custom.device import use
    from custom.model_file import load_model
    from custom.run_folder import AUDIT_FILE
    from custom.site_file import load_site
    from custom.strict import require
    from medical_data.cohort import prepare_cohort
    from privacy.audit.report.document import audit_of, write_json
    from privacy.audit.report.html import write_html
    from privacy.audit.report.pdf import write_pdf

    require(not options.out.exists(), argument="out", value=str(options.out), remedy="choose a folder that is new")
    model = load_model(options.model)
    config = _config(options.config)
    sites = {name: load_site(options.site_file, name) for name in options.site}
    cohorts = {
        name: prepare_cohort(
            source=site.source,
            preprocess=model.experiment.preprocess,
            limits=site.limits,
            home=site.home,
            progress=True,
        )
        for name, site in sites.items()
    }
    first = sites[options.site[0]]
    device = use(first.hardware)
    options.out.mkdir(parents=True, mode=0o700)
    canaries = _canaries(options, model, cohorts[options.site[0]], first)
    audited = audit_model(
        options.model,
        cohorts,
        config,
        device=device,
        created=datetime.now(timezone.utc).date().isoformat(),
        command=_command(options),
        canaries=canaries,
        updates=options.updates,
        progress=True,
    )
    audit = audit_of(audited.evidence, first.audit.rule)
    write_json(options.out / AUDIT_FILE, audit)
    write_html(options.out / "audit.html", audit)
    write_pdf(options.out / "audit.pdf", audit)
    if audited.gallery is not None:
        write_html(options.out / "site_copy.html", audit, gallery=audited.gallery)
        (options.out / "site_copy.html").chmod(0o600)
    print(f"{audit.decision.verdict}: {audit.decision.sentence}")
    for reason in audit.decision.reasons:
        print(f"  {reason.verdict}: {reason.test}: {reason.found} ({reason.cut_off})")
    print(f"report: {options.out / 'audit.html'}")
    return 0


def _config(file: Path | None) -> AuditConfig:
    import json

    from custom.audit_config import AuditConfig
    from custom.strict import ConfigError, build

    if file is None:
        return AuditConfig()
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"--config = {file}: {type(error).__name__}; give a readable JSON file") from error
    return build(AuditConfig, values, "audit")


def _canaries(options: argparse.Namespace, model: ModelFile, cohort: Cohort, site: SiteConfig) -> CanaryFindings | None:
    from custom.canary_run import run_with_canaries
    from custom.device import use

    if not options.canaries:
        return None
    return run_with_canaries(
        model.experiment,
        cohort,
        count=options.canaries,
        folder=options.out / "canaries",
        device=use(site.hardware),
        patients_in_memory=site.hardware.patients_in_memory,
        progress=True,
    )


def _command(options: argparse.Namespace) -> str:
    words = ["fedct", "audit", str(options.model), "OUT", "--site-file", str(options.site_file)]
    for name in options.site:
        words += ["--site", name]
    if options.config is not None:
        words += ["--config", str(options.config)]
    if options.canaries:
        words += ["--canaries", str(options.canaries)]
    return shlex.join(words + (["--updates"] if options.updates else []))
