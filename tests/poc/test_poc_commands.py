"""What the exit code of ``fedct poc submit`` says. The server and its answers are stand-ins here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from custom.run_folder import RunFailed
from poc import commands, jobs
from poc.commands import DONE, NOT_DONE
from poc.federation import Federation, Members

MEMBERS = Members(project="p", server="server", sites=("site-1",), users={}, kits="kits", ports=(1, 2))


def ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **job: Any) -> int:
    whole = {"job_id": "a", "status": "FINISHED:COMPLETED", "refused": {}, "folder": tmp_path} | job
    monkeypatch.setattr(jobs, "follow", lambda *_: jobs.Followed(**whole))
    federation = Federation(folder=tmp_path, members=MEMBERS)
    nobody: Any = None
    return commands._followed(federation, nobody, "a", wait=True)


def test_a_job_that_nvflare_calls_completed_and_that_has_no_receipt_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(*_: object) -> Path:
        raise RunFailed("no receipt; fedct poc resume carries it on")

    monkeypatch.setattr(jobs, "download", download)
    assert ended(monkeypatch, tmp_path) == NOT_DONE
    assert "fedct poc resume" in capsys.readouterr().err


def test_a_job_that_did_not_begin_is_not_done_and_says_who_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {"site-1": "why"}
    assert ended(monkeypatch, tmp_path, folder=None, refused=refused, status="FINISHED:FAILED_TO_RUN") == NOT_DONE
    assert "the job did not begin: site-1: why" in capsys.readouterr().err


def test_whoever_does_not_wait_is_done_at_once(tmp_path: Path) -> None:
    nobody: Any = None
    assert commands._followed(Federation(folder=tmp_path, members=MEMBERS), nobody, "a", wait=False) == DONE
