"""audit.html: one file, no network, no script; on a screen, in the dark, on a phone and on paper."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from privacy.audit.report.blocks import (
    Alert,
    Block,
    Bullets,
    Command,
    Facts,
    Heading,
    Paragraph,
    Pictures,
    Report,
    Section,
    Table,
)
from privacy.audit.report.charts import WIDTH, Area, Chart, Label, Mark
from privacy.audit.report.content import report_of
from privacy.audit.report.document import Audit, write_whole
from privacy.audit.report.gallery import Gallery, png
from privacy.audit.report.wording import printable

# Shapes differ, so that nobody needs the colour.
ICONS = {"INVALID": "⊘", "RED": "▲", "AMBER": "◆", "GREEN": "●"}

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --quiet: #57606a; --grid: #d8dee4; --panel: #f3f5f7;
  --first: #0b57a4; --second: #a0410d; --third: #5b3a9e; --limit: #1a6b36; --bad: #b3141b;
  --INVALID: #4b5563; --RED: #b3141b; --AMBER: #8a5300; --GREEN: #1a6b36; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #12161b; --ink: #e6e9ed; --quiet: #a3adb8; --grid: #38414b; --panel: #1c2229;
  --first: #7ab7ff; --second: #ffa877; --third: #c4a7ff; --limit: #7ddc9a; --bad: #ff8a85;
  --INVALID: #b6bfca; --RED: #ff8a85; --AMBER: #f3bd62; --GREEN: #7ddc9a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
dd, dt, pre { overflow-wrap: anywhere; min-width: 0; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .5rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.3rem 0 .3rem; }
p, ul, dl { margin: .5rem 0; } .quiet { color: var(--quiet); }
.verdict { border: 2px solid var(--tone); border-left-width: .6rem; border-radius: .4rem; padding: .8rem 1rem;
  margin: 1rem 0; background: var(--panel); }
.verdict p.word { font-size: 1.25rem; font-weight: 700; color: var(--tone); margin: 0; }
.alert { border: 2px solid var(--bad); border-radius: .4rem; padding: .6rem .9rem; margin: 1rem 0; }
.alert strong { color: var(--bad); }
dl { display: grid; grid-template-columns: minmax(9rem, 1fr) 2fr; gap: .35rem 1rem; }
dt { color: var(--quiet); } dd { margin: 0; }
nav ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .92rem; }
a { color: var(--first); }
table { border-collapse: collapse; width: 100%; table-layout: fixed; margin: .8rem 0; font-size: .92rem; }
caption { text-align: left; color: var(--quiet); padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .5rem; border-bottom: 1px solid var(--grid); }
thead th { border-bottom: 2px solid var(--quiet); } tbody th { font-weight: 600; }
pre { background: var(--panel); padding: .7rem; border-radius: .3rem; white-space: pre-wrap; font-size: .88rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; max-width: 40rem; height: auto; display: block; }
figcaption { color: var(--quiet); font-size: .92rem; }
svg text { font-family: inherit; paint-order: stroke; stroke: var(--paper); stroke-width: 3px;
  stroke-linejoin: round; }
details { border: 1px solid var(--grid); border-radius: .4rem; padding: .3rem .8rem; margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem; }
.pairs img { width: 48%; image-rendering: pixelated; background: #000; }
@media screen and (max-width: 44rem) {
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, caption, tbody, tr, td, tbody th { display: block; } colgroup { display: none; }
  tr { border-bottom: 2px solid var(--grid); padding: .3rem 0; }
  td, tbody th { border: 0; padding: .12rem 0; } td::before { content: attr(data-label) ": "; color: var(--quiet); }
}
@media print {
  :root { --paper: #fff; --ink: #000; --quiet: #444; --grid: #bbb; --panel: #f4f4f4; color-scheme: light;
    --first: #0b57a4; --second: #a0410d; --third: #5b3a9e; --limit: #1a6b36; --bad: #b3141b;
    --INVALID: #4b5563; --RED: #b3141b; --AMBER: #8a5300; --GREEN: #1a6b36; }
  :root { font-size: 10pt; } body { max-width: none; padding: 0; } nav { display: none; }
  table { font-size: 8pt; } th, td { padding: .2rem .3rem; } figure svg { max-width: 30rem; }
  tr, figure, .verdict, .alert, dl > * { break-inside: avoid; }
  h2, h3, summary, caption, thead { break-after: avoid; } tbody tr:first-child { break-before: avoid; }
  details::details-content { content-visibility: visible; display: block; }
}
"""


def write_html(file: Path, audit: Audit, *, gallery: Gallery | None = None) -> None:
    """Write the report whole or not at all.

    Args:
        file: to write.
        audit: what it says.
        gallery: pairs of samples and patients: for the site's own copy, which must not leave it.
    """
    write_whole(file, _page(report_of(audit, gallery)).encode())


def _page(report: Report) -> str:
    links = "".join(f'<li><a href="#{s.name}">{text_html(s.title)}</a></li>' for s in report.sections)
    warning = (
        f'<div class="alert" role="alert"><strong>{text_html(report.warning)}</strong></div>' if report.warning else ""
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text_html(report.title)}</title>
<style>{STYLE}</style>
</head>
<body>
{warning}
<header>
<h1>{text_html(report.title)}</h1>
<p class="quiet">{text_html(report.subtitle)}</p>
<div class="verdict" id="verdict" data-verdict="{report.verdict}" style="--tone: var(--{report.verdict})">
<p class="word"><span aria-hidden="true">{ICONS[report.verdict]}</span> {text_html(report.headline)}</p>
<p>{text_html(report.sentence)}</p>
<p>{text_html(report.meaning)}</p>
</div>
{_facts(report.summary)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{"".join(_section(section) for section in report.sections)}
</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    blocks = "".join(block_html(block) for block in section.blocks)
    return f'<section id="{section.name}">\n<h2>{text_html(section.title)}</h2>\n{blocks}</section>\n'


def block_html(block: Block) -> str:
    """One block as HTML; whatever is text in it is escaped."""
    if isinstance(block, Paragraph):
        return f"<p>{text_html(block.text)}</p>\n"
    if isinstance(block, Heading):
        return f"<h3>{text_html(block.text)}</h3>\n"
    if isinstance(block, Bullets):
        return f"<ul>{''.join(f'<li>{text_html(item)}</li>' for item in block.items)}</ul>\n"
    if isinstance(block, Facts):
        return _facts(block)
    if isinstance(block, Command):
        return f"<pre><code>{text_html(block.text)}</code></pre>\n"
    if isinstance(block, Alert):
        return (
            f'<div class="alert" role="note"><strong>{text_html(block.title)}.</strong> {text_html(block.text)}</div>\n'
        )
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Chart):
        return _chart(block)
    if isinstance(block, Pictures):
        return _pictures(block.gallery)
    inner = "".join(block_html(each) for each in block.blocks)
    return f"<details><summary>{text_html(block.summary)}</summary>\n{inner}</details>\n"


def _facts(facts: Facts) -> str:
    return f"<dl>{''.join(f'<dt>{text_html(term)}</dt><dd>{text_html(said)}</dd>' for term, said in facts.rows)}</dl>\n"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{text_html(column)}</th>' for column in table.columns)
    rows = []
    for first, *cells in table.rows:
        named = zip(table.columns[1:], cells, strict=True)
        said = "".join(f'<td data-label="{text_html(column)}">{text_html(cell)}</td>' for column, cell in named)
        rows.append(f'<tr><th scope="row">{text_html(first)}</th>{said}</tr>')
    body = "".join(rows)
    columns = "".join(f'<col style="width: {width}%">' for width in table.widths)
    return (
        f"<table><caption>{text_html(table.caption)}</caption><colgroup>{columns}</colgroup>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>\n"
    )


def _chart(chart: Chart) -> str:
    marks = "".join(_mark(mark) for mark in chart.marks)
    title, description = f"{chart.name}-title", f"{chart.name}-description"
    return (
        f'<figure id="{chart.name}"><svg viewBox="0 0 {WIDTH:g} {chart.height:g}" role="img" '
        f'aria-labelledby="{title} {description}"><title id="{title}">{text_html(chart.title)}</title>'
        f'<desc id="{description}">{text_html(chart.description)}</desc>{marks}</svg>'
        f"<figcaption>{text_html(chart.title)}</figcaption></figure>\n"
    )


def _mark(mark: Mark) -> str:
    if isinstance(mark, Label):
        x, y = mark.place
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" fill="var(--{mark.tone})" text-anchor="{mark.anchor}" '
            f'font-size="{mark.size:g}">{text_html(mark.text)}</text>'
        )
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.places)
    if isinstance(mark, Area):
        return f'<polygon points="{points}" fill="var(--{mark.tone})" fill-opacity="{0.16 if mark.faint else 1}"/>'
    dash = f' stroke-dasharray="{mark.dash[0]:g} {mark.dash[1]:g}"' if mark.dash else ""
    return f'<polyline points="{points}" fill="none" stroke="var(--{mark.tone})" stroke-width="{mark.width:g}"{dash}/>'


def _pictures(gallery: Gallery) -> str:
    pairs = []
    for pair in gallery.pairs:
        images = "".join(
            f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png(image)).decode()}"> '
            for alt, image in ((f"sample {pair.sample}", pair.sample_image), ("nearest patient", pair.patient_image))
        )
        pairs.append(f"<figure>{images}<figcaption>sample {pair.sample}, {pair.similarity:.3f}</figcaption></figure>")
    return f'<div class="pairs">{"".join(pairs)}</div>\n'


def text_html(text: str) -> str:
    """Text as it may stand in HTML, without what no printer shows."""
    return escape(printable(text))
