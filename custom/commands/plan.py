"""``fedct plan``: what a job with differential privacy will do and what it costs, without running it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from custom.atomic import write_atomically


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "plan",
        help="a job's differential privacy, before it runs",
        description="Calibrate a job's plan of patient-level differential privacy and print it: noise multiplier, "
        "steps, epsilon by round, and what it means for a patient (the best that any membership attack can do). With "
        "a site, also ask the site's policy. Exit code: 0; 1 if the site's policy refuses the job.",
    )
    parser.add_argument("job", type=Path, help="the job's folder, such as jobs/ct_ddpm_dp")
    parser.add_argument("--site-file", metavar="FILE", type=Path, help="a site file (TOML), to ask a site's policy")
    parser.add_argument("--site", metavar="NAME", help="which of its sites")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the plan to this file")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Calibrate, print, ask the policy."""
    from custom.config import ExperimentConfig
    from custom.job_plan import privacy_plan
    from custom.job_policy import ask_policy
    from custom.site_file import load_site
    from custom.strict import ConfigError, require
    from privacy.policy import PolicyRefused

    asked = (options.site_file is None) == (options.site is None)
    require(asked, argument="--site", value=options.site, remedy="give --site-file and --site together")
    experiment = ExperimentConfig.of_job(options.job)
    plan = privacy_plan(experiment)
    print(f"{experiment.name}: no differential privacy" if plan is None else plan.describe())
    if options.json is not None:
        if plan is None:
            raise ConfigError(f"--json = {options.json}: leave it out; {experiment.name} has no plan to write")
        write_atomically(options.json, (json.dumps(plan.to_json(), indent=2) + "\n").encode())
    if options.site is None:
        return 0
    try:
        patients = ask_policy(load_site(options.site_file, options.site).policy, experiment)
    except PolicyRefused as refusal:
        print(f"{options.site} refuses it: {refusal}")
        return 1
    print(f"{options.site}'s policy lets it pass with {patients} patients; its ledger decides when the job runs")
    return 0
