"""audit.pdf beyond what it says: the same bytes anywhere, pages that can be counted, dashes, headings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from evidence_example import attack, claimed, clean

from privacy.audit.decision import DecisionRule
from privacy.audit.evidence import Evidence, Roc
from privacy.audit.report.blocks import Block, Details, Heading
from privacy.audit.report.content import report_of
from privacy.audit.report.document import audit_of, load_audit, write_json
from privacy.audit.report.pdf import write_pdf

ROC = Roc(fpr=(0.005, 0.01, 0.1, 1.0), tpr=(0.1, 0.2, 0.5, 1.0), low=(0.0, 0.1, 0.4, 1.0), high=(0.3, 0.4, 0.7, 1.0))
ELSEWHERE = """
import sys
from pathlib import Path
from privacy.audit.report.document import load_audit
from privacy.audit.report.pdf import write_pdf
write_pdf(Path(sys.argv[2]), load_audit(Path(sys.argv[1])))
"""


def of(attacks: int, **changes: object) -> Evidence:
    shown = tuple(replace(attack(), title=f"attack number {index}", roc=ROC) for index in range(attacks))
    return clean(attacks=shown, privacy=claimed(2.5), **changes)


def pages(file: Path) -> list[list[str]]:
    """Lines of every page, as a reader sees them."""
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext on this machine (Debian's package is called poppler-utils)")
    text = subprocess.run(["pdftotext", file, "-"], capture_output=True, text=True, check=True).stdout
    return [[line for line in page.splitlines() if line.strip()] for page in text.split("\f") if page.strip()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("paper") / "audit.pdf"
    write_pdf(file, audit_of(of(3), DecisionRule()))
    return file


@pytest.mark.parametrize(
    ("created", "stamp"),
    [
        ("2026-11-25", b"D:20261125000000Z"),
        ("2026-11-25T09:12:44", b"D:20261125091244Z"),
        ("2026-11-25T09:12:44+00:00", b"D:20261125091244Z"),
        ("2026-11-25T09:12:44+02:00", b"D:20261125091244+02'00'"),
    ],
)
def test_the_date_is_the_audits(created: str, stamp: bytes, tmp_path: Path) -> None:
    write_pdf(tmp_path / "audit.pdf", audit_of(of(1, created=created), DecisionRule()))
    assert b"/CreationDate (" + stamp + b")" in (tmp_path / "audit.pdf").read_bytes()


def test_another_process_elsewhere_writes_the_same_bytes(tmp_path: Path) -> None:
    audit, here, there = tmp_path / "audit.json", tmp_path / "here.pdf", tmp_path / "there.pdf"
    write_json(audit, audit_of(of(2), DecisionRule()))
    write_pdf(here, load_audit(audit))
    environment = {**os.environ, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, audit, there], env=environment, check=True)
    assert there.read_bytes() == here.read_bytes()


def test_every_page_says_how_many_there_are(written: Path) -> None:
    shown = pages(written)
    count = len(re.findall(rb"/Type /Page\b", written.read_bytes()))
    assert len(shown) == count > 3
    for number, lines in enumerate(shown, 1):
        assert lines[-1].endswith(f"page {number} of {count}")


def test_sections_can_be_jumped_to(written: Path) -> None:
    content = written.read_bytes()
    sections = report_of(audit_of(of(3), DecisionRule()), None).sections
    (root,) = re.findall(rb"/Outlines (\d+) 0 R", content)
    entries = re.findall(rb"/Parent " + root + rb" 0 R", content)
    assert len(entries) == len(sections)


def test_gaps_between_dashes_stay_open(written: Path) -> None:
    """Dashes have flat ends: others would reach into the gaps and leave colour as the only difference."""
    content = written.read_bytes()
    flat = {
        name
        for name, number in re.findall(rb"/(GS\d+) (\d+) 0 R", content)
        if b"/LC 0" in re.search(rb"\n" + number + rb" 0 obj(.*?)endobj", content, re.DOTALL).group(1)  # type: ignore[union-attr]
    }
    dashed = 0
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL):
        try:
            operators = zlib.decompress(stream)
        except zlib.error:  # not compressed: no page
            continue
        state, saved = {"cap": False, "dash": False}, []
        for line in operators.splitlines():
            if line.startswith(b"q"):
                saved.append(dict(state))
            if name := re.search(rb"/(GS\d+) gs", line):
                state["cap"] = name.group(1) in flat
            if pattern := re.fullmatch(rb"\[(.*)\] [\d.]+ d", line):
                state["dash"] = bool(pattern.group(1).strip())
            if line.strip() == b"S" and state["dash"]:
                dashed += 1
                assert state["cap"]
            if line == b"Q":
                state = saved.pop()
    assert dashed > 8  # curves, chance, ceiling, claim, and all of them in legends


def headings(blocks: tuple[Block, ...]) -> set[str]:
    found = {block.text for block in blocks if isinstance(block, Heading)}
    for block in blocks:
        if isinstance(block, Details):
            found |= {block.summary, *headings(block.blocks)}
    return found


@pytest.mark.parametrize("attacks", range(1, 8))
def test_no_heading_stands_alone_at_the_foot_of_a_page(attacks: int, tmp_path: Path) -> None:
    audit = audit_of(of(attacks), DecisionRule())
    sections = report_of(audit, None).sections
    titles = {section.title for section in sections}.union(*(headings(section.blocks) for section in sections))
    write_pdf(tmp_path / "audit.pdf", audit)
    for lines in pages(tmp_path / "audit.pdf"):
        assert lines[-2] not in titles
