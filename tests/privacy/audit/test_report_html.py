"""audit.html beyond what it says: on office paper, for those who hear it, and with long names in its charts."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from evidence_example import attack, claimed, clean, interval
from pages import OUTSIDE

from privacy.audit.decision import DecisionRule
from privacy.audit.evidence import CohortIdentity, Evidence, Roc
from privacy.audit.report.document import audit_of
from privacy.audit.report.html import write_html

# A4 is 210 mm; printers and browsers take from 10 to 25 mm a side. 96 px are 25.4 mm.
A4_WIDTHS = (605, 643, 703, 718)
ROC = Roc(fpr=(0.005, 0.01, 0.1, 1.0), tpr=(0.1, 0.2, 0.5, 1.0), low=(0.0, 0.1, 0.4, 1.0), high=(0.3, 0.4, 0.7, 1.0))
# As long as the longest titles of the attacks that there are.
TITLES = tuple(f"gradient cosine of the sum of all updates, {index}" for index in range(14))


def long() -> Evidence:
    """Fourteen attacks with long titles, and every chart."""
    return clean(
        attacks=tuple(
            replace(attack(interval(0.55 + 0.02 * i, 0.5 + 0.02 * i, 0.62 + 0.02 * i)), title=title, roc=ROC)
            for i, title in enumerate(TITLES)
        ),
        cohorts=(CohortIdentity(site="hospital", manifest_sha256="a" * 64, members=1000, held_out=1000, images=9),),
        privacy=claimed(2.5),
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "audit.html"
    write_html(file, audit_of(long(), DecisionRule()))
    return file


@pytest.fixture(scope="module")
def page(report: Path, browser: Any) -> Any:
    opened = browser.new_page()
    opened.goto(report.as_uri())
    return opened


# Words of tables that stand on more than one line.
BROKEN_WORDS = """() => {
  const broken = [];
  for (const cell of document.querySelectorAll('th, td')) {
    const text = cell.firstChild;
    for (const word of cell.textContent.matchAll(/[^\\s-]+/g)) {
      const range = document.createRange();
      range.setStart(text, word.index);
      range.setEnd(text, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
      if (lines.size > 1) broken.push(word[0]);
    }
  }
  return broken;
}"""


@pytest.mark.parametrize("width", A4_WIDTHS)
def test_tables_stay_tables_on_paper(width: int, page: Any) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    page.emulate_media(media="print")
    displays = page.eval_on_selector_all("table", "(all) => all.map((table) => getComputedStyle(table).display)")
    assert set(displays) == {"table"}
    assert page.evaluate(BROKEN_WORDS) == []
    for table in page.query_selector_all("table"):  # those of details too, which nobody opened
        assert table.query_selector("thead th").is_visible()
        heads, cells = (
            table.eval_on_selector_all(f"{rows} > *", "(all) => all.map((cell) => cell.getBoundingClientRect().x)")
            for rows in ("thead tr", "tbody tr:first-child")
        )
        assert cells == heads or cells == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_tables_are_stacked_on_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 1000})
    page.emulate_media(media="screen")
    assert page.evaluate("getComputedStyle(document.querySelector('table')).display") == "block"
    label = "getComputedStyle(document.querySelector('#reasons td'), '::before').content"
    assert "Demands" in page.evaluate("document.querySelector('#reasons td').dataset.label")
    assert page.evaluate(label) != "none"


def test_the_text_of_charts_is_within_them(page: Any) -> None:
    page.set_viewport_size({"width": 1280, "height": 1000})
    page.emulate_media(media="screen")
    assert page.evaluate("document.querySelectorAll('svg').length") == 3
    assert page.evaluate(OUTSIDE) == []


def test_lines_behind_text_do_not_strike_it_through(page: Any) -> None:
    """Text has a rim in the colour of the paper, in the dark as in the light."""
    for scheme in ("light", "dark"):
        page.emulate_media(media="screen", color_scheme=scheme)
        rim = "getComputedStyle(document.querySelector('#chart-auc text')).stroke"
        assert page.evaluate(rim) == page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert page.evaluate("getComputedStyle(document.querySelector('#chart-auc text')).paintOrder").startswith("stroke")


class Outline(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in tags]


def test_a_page_can_be_heard(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    outline = Outline(text)
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert outline.named("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(attributes.get("scope") in ("col", "row") for attributes in outline.named("th"))
    assert len(outline.named("caption")) == len(outline.named("table"))
    drawings = outline.named("svg")
    assert all(drawing["role"] == "img" for drawing in drawings)
    for drawing in drawings:
        assert set(str(drawing["aria-labelledby"]).split()) <= set(ids)
    assert {str(link["href"]).removeprefix("#") for link in outline.named("a")} <= set(ids)


def test_curves_differ_in_their_dashes(report: Path) -> None:
    drawn = re.findall(r"<polyline[^>]*stroke=\"var\(--(first|second|third|quiet|limit)\)\"[^>]*>", roc(report))
    assert set(drawn) == {"first", "second", "third", "quiet", "limit"}
    dashes: dict[str, set[str]] = {}
    for line in re.findall(r"<polyline[^>]*>", roc(report)):
        tone = re.search(r"var\(--(\w+)\)", line)
        dash = re.search(r'stroke-dasharray="([^"]*)"', line)
        assert tone is not None
        dashes.setdefault(tone.group(1), set()).add(dash.group(1) if dash else "none")
    compared = [dashes[tone] for tone in ("first", "second", "third", "quiet", "limit")]
    assert all(len(kinds) == 1 for kinds in compared)
    assert len(set.union(*compared)) == len(compared)


def roc(report: Path) -> str:
    return report.read_text(encoding="utf-8").split('id="chart-roc"')[1].split("</figure>")[0]
