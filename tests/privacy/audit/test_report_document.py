"""audit.json: what contradicts itself is neither written nor read, and a failed write leaves the old file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evidence_example import attack, claimed, clean, copies

from privacy.audit.decision import DecisionRule
from privacy.audit.errors import BrokenReport
from privacy.audit.evidence import BlindOutcome, CohortIdentity, Cost, Evidence, Roc
from privacy.audit.report import document
from privacy.audit.report.document import audit_of, load_audit, write_json, write_whole

Spoil = Callable[[dict[str, Any]], object]


def with_roc(**changes: tuple[float, ...]) -> Evidence:
    curve = Roc(fpr=(0.1, 1.0), tpr=(0.2, 1.0), low=(0.1, 1.0), high=(0.3, 1.0))
    return clean(attacks=(replace(attack(), roc=replace(curve, **changes)),))


CONTRADICTIONS: dict[str, tuple[Evidence, str]] = {
    "no date": (clean(created="yesterday"), "created"),
    "no such attack": (clean(strongest=1), "strongest"),
    "an attack before the first": (clean(strongest=-1), "strongest"),
    "no such seed": (clean(attacks=(replace(attack(), reported=3),)), "reported"),
    "a seed before the first": (clean(attacks=(replace(attack(), reported=-1),)), "reported"),
    "a curve that goes back": (with_roc(fpr=(1.0, 0.1)), "roc"),
    "a curve outside its band": (with_roc(tpr=(0.4, 1.0)), "roc"),
    "a rate above 1": (with_roc(high=(0.3, 1.1)), "roc"),
    "a band that is shorter": (with_roc(low=(0.1,)), "roc"),
    "a sample that was not drawn": (clean(copies=(replace(copies(), withhold=(96,)),)), "withhold"),
    "a sample before the first": (clean(copies=(replace(copies(), withhold=(-1,)),)), "withhold"),
}
contradiction = pytest.mark.parametrize(("evidence", "words"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)


@contradiction
def test_evidence_that_contradicts_itself_is_no_audit(evidence: Evidence, words: str) -> None:
    with pytest.raises(BrokenReport, match=words):
        audit_of(evidence, DecisionRule())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: d["evidence"].update(created="yesterday"), "created"),
        (lambda d: d["evidence"]["attacks"][0].update(reported=3), "reported"),
        (lambda d: d["evidence"]["attacks"][0]["roc"].update(tpr=[0.1, 0.2]), "roc"),
        (lambda d: d["evidence"]["copies"][0].update(withhold=[96]), "withhold"),
        (lambda d: d["evidence"]["attacks"][0]["seeds"][0]["patient_auc"].update(low=0.9), "estimate, low, high"),
        (lambda d: d["evidence"]["attacks"][0]["seeds"][0].update(sign=0), "sign"),
        (lambda d: d["evidence"]["attacks"][0].update(access="everything"), "access"),
        (lambda d: d["evidence"]["copies"][0].update(copies=True), "copies"),
        (lambda d: d["evidence"].update(report_members=-1), "report_members"),
        (lambda d: d["rule"].update(green_auc=0.5), "green_auc"),
        (lambda d: d.update(version=True), "version"),
        (lambda d: d["decision"]["reasons"].pop(), "does not follow"),
        (lambda d: d["decision"].update(sentence="All is well."), "does not follow"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(spoil: Spoil, words: str, tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    write_json(file, audit_of(clean(), DecisionRule()))
    read = json.loads(file.read_text())
    spoil(read)
    file.write_text(json.dumps(read))
    with pytest.raises(BrokenReport, match=words):
        load_audit(file)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_a_number_that_cannot_be_leaves_the_file_as_it_was(seconds: float, tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    file.write_text("the last one")
    audit = audit_of(clean(costs=(Cost(part="grey box", evaluations_per_image=1.0, seconds=seconds),)), DecisionRule())
    with pytest.raises(BrokenReport):
        write_json(file, audit)
    assert file.read_text() == "the last one"
    assert list(tmp_path.iterdir()) == [file]


def test_a_disk_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left")

    file = tmp_path / "audit.html"
    file.write_text("the last one")
    monkeypatch.setattr(document.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(file, b"half of it")
    assert file.read_text() == "the last one"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b'{"version": 1e999}', b'{"version": ' + b"9" * 5000 + b"}", b"[" * 100_000],
    ids=["no UTF-8", "infinity", "a number of 5000 digits", "deep"],
)
def test_bytes_that_are_no_document_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_bytes(content)
    with pytest.raises(BrokenReport):
        load_audit(tmp_path / "audit.json")


def test_a_file_that_is_not_there_is_refused_by_name_alone(tmp_path: Path) -> None:
    with pytest.raises(BrokenReport, match=r"^audit\.json = 'FileNotFoundError'"):
        load_audit(tmp_path / "audit.json")


def test_a_masked_audit_is_read_back(tmp_path: Path) -> None:
    masked = clean(
        scope="federated",
        cohorts=(CohortIdentity(site="a + b", manifest_sha256="", members=500, held_out=500, images=9),),
        sites=(),
        privacy=replace(claimed(2.5), commitment=None),
    )
    audit = audit_of(masked, DecisionRule())
    assert audit.decision.verdict == "GREEN"
    write_json(tmp_path / "audit.json", audit)
    assert load_audit(tmp_path / "audit.json") == audit


def test_whole_numbers_are_read_back_as_the_rates_that_they_are(tmp_path: Path) -> None:
    """JSON knows one kind of number: 1 for 1.0 must not change what the audit equals."""
    blind = clean().blind
    assert isinstance(blind, BlindOutcome)
    audit = audit_of(clean(blind=replace(blind, p_value=1.0)), DecisionRule())
    file = tmp_path / "audit.json"
    write_json(file, audit)
    file.write_text(file.read_text().replace('"p_value": 1.0', '"p_value": 1'))
    read = load_audit(file)
    assert read == audit
    assert read.evidence.blind is not None
    assert type(read.evidence.blind.p_value) is float
