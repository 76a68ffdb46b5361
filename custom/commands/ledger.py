"""``fedct ledger``: what a site has spent on its patients' privacy, and what is left."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from custom.atomic import write_atomically

if TYPE_CHECKING:
    from privacy.ledger import Account, Statement

OK, EXHAUSTED = 0, 1


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "ledger",
        help="what a site has spent on privacy, and what is left",
        description="Verify a site's privacy ledger and show, per job and in total, the epsilon of patient-level "
        "differential privacy that was spent and what is left of the budget that was in force at the ledger's last "
        "entry. All releases are composed together, so the total is less than the sum of the jobs. Exit code: 0 if "
        "there is room; 1 if one more release like the last one would pass the site's total; 2 if the ledger is "
        "missing, was tampered with or cannot be read.",
    )
    parser.add_argument("--site-file", metavar="FILE", type=Path, required=True, help="the site file (TOML)")
    parser.add_argument("--site", metavar="NAME", required=True, help="which of its sites")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write accounts and every charge to this file")
    parser.add_argument(
        "--close",
        metavar="JOB/RUN",
        help="first give back what this run set aside and did not use: it was abandoned and will not resume",
    )
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Verify, close what is to be closed, print."""
    from custom.site_file import load_site
    from custom.strict import require
    from medical_data.deidentify import site_secret
    from privacy.accounting import epsilon
    from privacy.ledger import LEDGER_FILE, Ledger, Run

    home = load_site(options.site_file, options.site).home
    secret = home / "secret"
    remedy = "the site's secret is gone: restore it; if no job has run here, there is no ledger either"
    require(secret.is_file(), argument="secret", value="not there", remedy=remedy)  # it would be made anew
    ledger = Ledger(home / LEDGER_FILE, key=site_secret(secret), cost=epsilon)
    if options.close is not None:
        job, _, run_id = options.close.partition("/")
        ledger.close(Run(job=job, run_id=run_id))
    statement = ledger.statement()
    print(table(statement))
    if options.json is not None:
        text = json.dumps(to_json(statement), indent=2, allow_nan=False)
        write_atomically(options.json, (text + "\n").encode())
    return EXHAUSTED if statement.exhausted else OK


def table(statement: Statement) -> str:
    """The accounts, a line each."""
    width = max(len(name) for name in ("all jobs", *statement.jobs))
    lines = [f"{'':{width}}    spent  set aside  budget    left     delta  accountant"]
    for name, account in (*statement.jobs.items(), ("all jobs", statement.total)):
        lines.append(
            f"{name:{width}} {account.spent:8.3f} {account.committed:10.3f} {account.budget.epsilon:7.3f} "
            f"{account.left:7.3f} {account.budget.delta:9.1e}  {account.accountant}"
        )
    lines.append(
        f"{len(statement.charges)} releases charged; 'set aside' is epsilon with what open runs still may spend"
    )
    lines += [f"open run: {run}" for run in statement.open_runs]
    if statement.exhausted:
        lines.append("exhausted: one more release like the last one would pass the total budget")
    return "\n".join(lines)


def to_json(statement: Statement) -> dict[str, Any]:
    """The statement as plain JSON types."""
    return {
        "version": 1,
        "exhausted": statement.exhausted,
        "total": _account(statement.total),
        "jobs": {job: _account(account) for job, account in statement.jobs.items()},
        "open_runs": [str(run) for run in statement.open_runs],
        "charges": [
            {
                "at": charge.at,
                "run": str(charge.attempt.run),
                "release": charge.attempt.release,
                "attempt": charge.attempt.number,
                "event": charge.event.to_json(),
                "sha256": charge.sha256,
            }
            for charge in statement.charges
        ],
    }


def _account(account: Account) -> dict[str, Any]:
    return {
        "epsilon_spent": account.spent,
        "epsilon_committed": account.committed,
        "epsilon_budget": account.budget.epsilon,
        "epsilon_left": account.left,
        "delta": account.budget.delta,
        "accountant": account.accountant,
    }
