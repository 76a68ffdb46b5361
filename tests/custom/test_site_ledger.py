from __future__ import annotations

from pathlib import Path

import pytest
import torch

from custom.site_ledger import open_ledger, release_sha256
from custom.site_state import SiteState
from privacy.accounting import GaussianRelease
from privacy.journal import JournalMissing, JournalTampered
from privacy.ledger import LEDGER_FILE, Run
from privacy.policy import Budget, Budgets

BUDGETS = Budgets(per_job=Budget(epsilon=4.0, delta=1e-3), total=Budget(epsilon=4.0, delta=1e-3))
RUN = Run(job="a", run_id="r")
PLAN = {"round-0000": GaussianRelease(noise_multiplier=4.0)}


def test_a_new_home_gets_a_ledger(tmp_path: Path) -> None:
    open_ledger(tmp_path).reserve(RUN, PLAN, budgets=BUDGETS)
    assert (tmp_path / LEDGER_FILE).is_file()


def test_a_ledger_that_is_gone_is_missed(tmp_path: Path) -> None:
    """Database, anchor and lock are all removed: the state of private training still tells."""
    open_ledger(tmp_path).reserve(RUN, PLAN, budgets=BUDGETS)
    SiteState.of_run(tmp_path, "a", "r", private=True).save(0, {"w": torch.zeros(1)})
    for file in tmp_path.glob(f"{LEDGER_FILE}*"):
        file.unlink()
    with pytest.raises(JournalMissing, match="restore ledger"):
        open_ledger(tmp_path)


def test_state_of_other_jobs_tells_nothing(tmp_path: Path) -> None:
    SiteState.of_run(tmp_path, "a", "r", private=False).save(0, {"w": torch.zeros(1)})
    open_ledger(tmp_path).reserve(RUN, PLAN, budgets=BUDGETS)


def test_another_secret_is_tampering(tmp_path: Path) -> None:
    open_ledger(tmp_path).reserve(RUN, PLAN, budgets=BUDGETS)
    (tmp_path / "secret").unlink()
    with pytest.raises(JournalTampered, match="secret"):
        open_ledger(tmp_path).statement()


def test_the_hash_of_a_release_is_that_of_names_shapes_and_values() -> None:
    release = {"b": torch.ones(2, 3), "a": torch.zeros(4)}
    hashes = {
        release_sha256(release),
        release_sha256({"b": torch.ones(3, 2), "a": torch.zeros(4)}),
        release_sha256({"b": torch.ones(2, 3), "c": torch.zeros(4)}),
        release_sha256({"b": torch.ones(2, 3), "a": -torch.zeros(4)}),
    }
    assert len(hashes) == 4
    assert release_sha256({"a": torch.zeros(4), "b": torch.ones(3, 2).T.contiguous()}) in hashes
