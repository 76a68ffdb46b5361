"""audit.json, audit.html and audit.pdf: the same content, read back, looked at in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evidence_example import attack, claimed, clean, control, copies, interval

from privacy.audit.decision import DecisionRule
from privacy.audit.errors import BrokenReport
from privacy.audit.evidence import BlindOutcome, CohortIdentity, Cost, Evidence, InversionOutcome, Roc, SiteRow
from privacy.audit.report.document import audit_of, load_audit, schema, write_json
from privacy.audit.report.gallery import WARNING, Gallery, Pair
from privacy.audit.report.html import write_html
from privacy.audit.report.pdf import write_pdf

REPOSITORY = Path(__file__).resolve().parents[3]
WIDTHS = (360, 768, 1280)
ROC = Roc(fpr=(0.005, 0.01, 0.1, 1.0), tpr=(0.1, 0.2, 0.5, 1.0), low=(0.0, 0.1, 0.4, 1.0), high=(0.3, 0.4, 0.7, 1.0))


def big() -> Evidence:
    """Everything that a report can hold, and much of it."""
    attacks = tuple(
        replace(attack(p_value=0.01 * (index + 1)), name=f"attack-{index}", title=f"attack number {index}", roc=ROC)
        for index in range(14)
    )
    sites = tuple(f"hospital-{index}" for index in range(5))
    return clean(
        scope="federated",
        attacks=attacks,
        strongest=3,
        cohorts=tuple(
            CohortIdentity(site=site, manifest_sha256="a" * 64, members=100, held_out=100, images=1600)
            for site in sites
        ),
        sites=tuple(
            SiteRow(
                site=site,
                members=50,
                held_out=50,
                patient_auc=None if index == 1 else interval(0.5, 0.4, 0.6),
                note="this site's policy keeps its own figures" if index == 1 else "",
            )
            for index, site in enumerate(sites)
        ),
        privacy=claimed(2.5),
        copies=(copies(), replace(copies(0.4), method="pixels", withhold=tuple(range(40)), copies=40)),
        inversions=(
            InversionOutcome(seen="one site's update", rdlv=0.8, ssim=0.9, cosine=0.999),
            InversionOutcome(seen="the sum of 5 such updates", rdlv=-0.1, ssim=0.3, cosine=0.98),
        ),
        costs=(Cost(part="grey box", evaluations_per_image=77.0, seconds=120.4),),
        suppressed=3,
    )


EXAMPLES: dict[str, Evidence] = {
    "GREEN": clean(attacks=(replace(attack(), roc=ROC),)),
    "AMBER": clean(attacks=(attack(resolvable=False),), copies=()),
    "RED": clean(attacks=(replace(attack(interval(0.9, 0.8, 1.0), interval(0.5, 0.4, 0.6), 1e-9), roc=ROC),)),
    "INVALID": clean(
        blind=BlindOutcome(patient_auc=interval(0.9, 0.8, 1.0), p_value=0.001, confounded=True, note="…"),
        controls=(control("untrained", False),),
    ),
    "big": big(),
    "masked": clean(
        scope="federated",
        cohorts=(CohortIdentity(site="a + b", manifest_sha256="", members=9, held_out=9, images=99),),
        blind=None,
    ),
}
SECTIONS = (
    "reasons",
    "subject",
    "threats",
    "attacks",
    "worst",
    "checks",
    "copies",
    "privacy",
    "sites",
    "limits",
    "annex",
)
each = pytest.mark.parametrize("name", EXAMPLES)


def written(evidence: Evidence, folder: Path, gallery: Gallery | None = None) -> str:
    write_html(folder / "audit.html", audit_of(evidence, DecisionRule()), gallery=gallery)
    return (folder / "audit.html").read_text(encoding="utf-8")


def pairs() -> Gallery:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 16, 16)).astype(np.uint8)
    return Gallery(pairs=(Pair(sample=7, similarity=0.93, sample_image=images[0], patient_image=images[1]),))


# ---- audit.json


@each
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    audit = audit_of(EXAMPLES[name], DecisionRule())
    write_json(tmp_path / "audit.json", audit)
    assert load_audit(tmp_path / "audit.json") == audit


def test_the_published_schema_is_the_code_s() -> None:
    assert json.loads((REPOSITORY / "docs/audit.schema.json").read_text()) == schema()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: d["decision"].update(verdict="GREEN"), "does not follow"),
        (lambda d: d["rule"].update(green_auc=0.9), "does not follow"),
        (lambda d: d["evidence"]["attacks"][0].update(adjusted_p=0.9, p_value=0.9), "does not follow"),
        (lambda d: d["evidence"]["attacks"][0].update(adjusted_p=1.5), "adjusted_p"),
        (lambda d: d["evidence"].update(strongest=9), "strongest"),
        (lambda d: d["evidence"].update(more=1), "additionalProperties"),
        (lambda d: d["evidence"].pop("blind"), "required"),
        (lambda d: d.update(version=2), "version"),
    ],
)
def test_a_changed_file_is_refused(spoil: Any, words: str, tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    write_json(file, audit_of(EXAMPLES["RED"], DecisionRule()))
    document = json.loads(file.read_text())
    spoil(document)
    file.write_text(json.dumps(document))
    with pytest.raises(BrokenReport, match=words):
        load_audit(file)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1, "version": 1}', '{"version": NaN}'])
def test_what_is_no_document_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(BrokenReport):
        load_audit(tmp_path / "audit.json")


# ---- audit.html


@each
def test_a_page_needs_nothing_but_itself(name: str, tmp_path: Path) -> None:
    page = written(EXAMPLES[name], tmp_path, pairs())
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#|data:)", page)
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert "anonymous" not in page.lower()


@each
def test_tags_are_closed_in_order(name: str, tmp_path: Path) -> None:
    void = {"meta", "img", "col", "br", "polygon", "polyline"}
    stack: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attributes: object) -> None:
            if tag not in void:
                stack.append(tag)

        def handle_startendtag(self, tag: str, attributes: object) -> None:
            assert tag in void

        def handle_endtag(self, tag: str) -> None:
            assert stack.pop() == tag

    Checker().feed(written(EXAMPLES[name], tmp_path))
    assert not stack


def test_what_comes_from_data_is_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'&\u202e"
    evidence = replace(
        big(),
        command=hostile,
        cohorts=(CohortIdentity(site=hostile, manifest_sha256="a" * 64, members=9, held_out=9, images=9),),
    )
    page = written(evidence, tmp_path)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\u202e" not in page


def test_patients_are_shown_in_the_sites_own_copy_only(tmp_path: Path) -> None:
    assert "data:image" not in written(EXAMPLES["RED"], tmp_path)
    own = written(EXAMPLES["RED"], tmp_path, pairs())
    assert own.count("data:image/png") == 2
    assert WARNING in own


def opened(browser: Any, file: Path, width: int, **options: Any) -> tuple[Any, list[str]]:
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    return page, wrong


OVERFLOWING = """() => {
  const out = [];
  const width = document.documentElement.clientWidth;
  for (const element of document.querySelectorAll('body *')) {
    const box = element.getBoundingClientRect();
    if (box.width > 0 && getComputedStyle(element).position !== 'absolute' && !element.closest('thead')
        && (box.right > width + 1 || box.left < -1)) out.push(element.tagName + ' ' + element.textContent.slice(0, 40));
  }
  if (document.documentElement.scrollWidth > width) out.push('page');
  return out;
}"""
CONTRAST = """(selector) => {
  const luminance = (rgb) => {
    const [r, g, b] = rgb.match(/[\\d.]+/g).slice(0, 3).map((c) => {
      const s = c / 255; return s <= 0.03928 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const style = getComputedStyle(document.querySelector(selector));
  const body = getComputedStyle(document.body);
  const [a, b] = [luminance(style.color), luminance(body.backgroundColor)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


@each
def test_a_page_is_whole_at_every_width(name: str, browser: Any, tmp_path: Path) -> None:
    written(EXAMPLES[name], tmp_path, pairs())
    verdict = audit_of(EXAMPLES[name], DecisionRule()).decision.verdict
    for width in WIDTHS:
        page, wrong = opened(browser, tmp_path / "audit.html", width)
        for details in page.query_selector_all("details"):
            details.evaluate("(element) => { element.open = true; }")
        assert page.get_attribute("#verdict", "data-verdict") == verdict
        assert verdict in page.inner_text("#verdict")
        for section in SECTIONS:
            assert page.is_visible(f"#{section} h2"), section
        assert page.evaluate(OVERFLOWING) == []
        assert [url for url in wrong if not url.startswith("data:")] == []
        page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_the_light_and_in_the_dark(scheme: str, browser: Any, tmp_path: Path) -> None:
    written(EXAMPLES["RED"], tmp_path)
    page, _ = opened(browser, tmp_path / "audit.html", 900, color_scheme=scheme)
    for selector in ("main p", ".quiet", ".word", "caption", "nav a", "dt"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.context.close()


def test_paper_shows_what_a_screen_folds_away(browser: Any, tmp_path: Path) -> None:
    written(EXAMPLES["big"], tmp_path)
    page, _ = opened(browser, tmp_path / "audit.html", 700, color_scheme="dark")
    assert not page.is_visible("details table")
    page.emulate_media(media="print")
    assert page.evaluate("document.querySelector('details table').getBoundingClientRect().height") > 50
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(OVERFLOWING) == []
    page.context.close()


# ---- audit.pdf


@each
def test_paper_says_the_same(name: str, tmp_path: Path) -> None:
    audit = audit_of(EXAMPLES[name], DecisionRule())
    write_pdf(tmp_path / "audit.pdf", audit)
    content = (tmp_path / "audit.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    write_pdf(tmp_path / "again.pdf", audit)
    assert (tmp_path / "again.pdf").read_bytes() == content
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext on this machine (Debian's package is called poppler-utils)")
    done = subprocess.run(["pdftotext", tmp_path / "audit.pdf", "-"], capture_output=True, text=True, check=True)
    text = " ".join(done.stdout.split())
    assert audit.decision.verdict in text
    assert " ".join(audit.decision.sentence.split()) in text
    assert "What this audit cannot say" in text


def test_the_sites_own_paper_warns_on_every_page(tmp_path: Path) -> None:
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext on this machine (Debian's package is called poppler-utils)")
    write_pdf(tmp_path / "audit.pdf", audit_of(EXAMPLES["big"], DecisionRule()), gallery=pairs())
    done = subprocess.run(["pdftotext", tmp_path / "audit.pdf", "-"], capture_output=True, text=True, check=True)
    pages = [page for page in done.stdout.split("\f") if page.strip()]
    assert len(pages) > 3
    assert all(WARNING in " ".join(page.split()) for page in pages)
