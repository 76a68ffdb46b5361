"""The ``fedct`` command: everything around a run. Running jobs is NVFlare's own command line."""

from __future__ import annotations

import argparse
import sys
from importlib import metadata

from custom.commands import (
    audit,
    data,
    evaluate,
    ledger,
    plan,
    preflight,
    pretrain,
    receipt,
    release,
    sample,
    simulator_keys,
    study,
)
from custom.run_folder import RunFailed
from custom.strict import ConfigError
from medical_data.errors import MedicalDataError
from poc import commands as federation
from poc import site_commands as site
from privacy.errors import PrivacyError

# What a user can mend: one line with the remedy, no traceback.
EXPECTED = (ConfigError, RunFailed, MedicalDataError, PrivacyError, ValueError, OSError)


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: as typed after ``fedct``; the process's own by default.

    Returns:
        0 if it did what was asked, 1 if the answer is no, 2 if it could not be done.
    """
    parser = argparse.ArgumentParser(
        prog="fedct",
        description="CT diffusion models across hospitals. Jobs are run with nvflare, for example "
        "`nvflare simulator jobs/ct_ddpm`; this command does what comes before and after.",
    )
    parser.add_argument("--version", action="version", version=f"fedct {metadata.version('fedct')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (
        data,
        plan,
        preflight,
        pretrain,
        sample,
        evaluate,
        audit,
        release,
        receipt,
        ledger,
        simulator_keys,
        study,
        federation,
        site,
    ):
        command.register(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.func(options))
    except EXPECTED as error:
        print(f"fedct: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
