"""audit.pdf: the content of audit.html on paper."""

from __future__ import annotations

import io
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib
from fpdf import FPDF
from fpdf.enums import XPos, YPos
from fpdf.fonts import FontFace

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
from privacy.audit.report.charts import WIDTH, Area, Chart, Label, Tone
from privacy.audit.report.content import report_of
from privacy.audit.report.document import Audit, write_whole
from privacy.audit.report.gallery import Gallery, png
from privacy.audit.report.html import ICONS
from privacy.audit.report.wording import printable

FONT = "DejaVu"
LINE = 4.6  # mm
BODY = 9.0  # points
CHART_MM = 120.0
PICTURE_MM = 20.0
HEADED = 42.0  # mm: what must be left for a heading and the first of what it stands above

COLOURS: dict[str, tuple[int, int, int]] = {
    "ink": (27, 31, 36),
    "quiet": (87, 96, 106),
    "grid": (216, 222, 228),
    "first": (11, 87, 164),
    "second": (160, 65, 13),
    "third": (91, 58, 158),
    "limit": (26, 107, 54),
    "bad": (179, 20, 27),
    "INVALID": (75, 85, 99),
    "RED": (179, 20, 27),
    "AMBER": (138, 83, 0),
    "GREEN": (26, 107, 54),
}


def write_pdf(file: Path, audit: Audit, *, gallery: Gallery | None = None) -> None:
    """Write the report whole or not at all; the same audit gives the same bytes.

    Args:
        file: to write.
        audit: what it says.
        gallery: pairs of samples and patients: for the site's own copy, which must not leave it.
    """
    report = report_of(audit, gallery)
    paper = _Paper(report)
    paper.write()
    write_whole(file, bytes(paper.output()))


class _Paper(FPDF):  # type: ignore[misc]
    """Pages of one report."""

    def __init__(self, report: Report) -> None:
        super().__init__(format="A4")
        self._report = report
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self.add_font(FONT, "", fonts / "DejaVuSans.ttf")
        self.add_font(FONT, "B", fonts / "DejaVuSans-Bold.ttf")
        self.add_font(f"{FONT}Mono", "", fonts / "DejaVuSansMono.ttf")
        self.set_title(report.title)
        self.set_lang("en")
        created = datetime.fromisoformat(report.created)
        self.set_creation_date(created if created.tzinfo else created.replace(tzinfo=timezone.utc))
        self.set_margins(16, 16, 16)
        self.set_auto_page_break(True, margin=18)

    def header(self) -> None:
        """The warning of a copy that must not leave its site, on every page."""
        if self._report.warning:
            self._said(self._report.warning, style="B", tone="bad")

    def footer(self) -> None:
        """Title and page number."""
        self.set_y(-12)
        self.set_font(FONT, "", 7.5)
        self.set_text_color(*COLOURS["quiet"])
        self.cell(0, 4, f"{printable(self._report.title)}   ·   page {self.page_no()} of {{nb}}", align="C")

    def write(self) -> None:
        """All of it."""
        report = self._report
        self.add_page()
        self._said(report.title, size=16, style="B")
        self._said(report.subtitle, tone="quiet")
        self.ln(2)
        self._said(f"{ICONS[report.verdict]} {report.headline}", size=13, style="B", tone=report.verdict)
        self._said(report.sentence)
        self._said(report.meaning)
        self._block(report.summary)
        for section in report.sections:
            self._section(section)

    def _section(self, section: Section) -> None:
        self.ln(3)
        self._keep(HEADED)
        self.start_section(printable(section.title))
        self._said(section.title, size=12, style="B")
        for block in section.blocks:
            self._block(block)

    def _block(self, block: Block) -> None:
        if isinstance(block, Paragraph):
            self._said(block.text)
        elif isinstance(block, Heading):
            self._keep(HEADED)
            self._said(block.text, style="B")
        elif isinstance(block, Bullets):
            for item in block.items:
                self._said(f"•  {item}")
        elif isinstance(block, Facts):
            self._table(Table(caption="", columns=("", ""), rows=block.rows, widths=(35, 65)))
        elif isinstance(block, Command):
            self.set_font(f"{FONT}Mono", "", 8)
            self.set_text_color(*COLOURS["ink"])
            self.multi_cell(0, LINE, printable(block.text), new_x=XPos.LMARGIN, new_y=YPos.NEXT, align="L")
            self.ln(1)
        elif isinstance(block, Alert):
            self._said(f"{block.title}. {block.text}", style="B", tone="bad")
        elif isinstance(block, Table):
            self._table(block)
        elif isinstance(block, Chart):
            self._chart(block)
        elif isinstance(block, Pictures):
            self._pictures(block.gallery)
        else:
            self._keep(HEADED)
            self._said(block.summary, style="B")
            for inner in block.blocks:
                self._block(inner)

    def _said(self, text: str, *, size: float = BODY, style: str = "", tone: str = "ink") -> None:
        self.set_font(FONT, style, size)
        self.set_text_color(*COLOURS[tone])
        height = LINE * max(1.0, size / BODY)
        self.multi_cell(0, height, printable(text), new_x=XPos.LMARGIN, new_y=YPos.NEXT, align="L")
        self.ln(1)

    def _keep(self, height: float) -> None:
        """A new page unless so many mm are left."""
        if self.will_page_break(height):
            self.add_page()

    def _table(self, table: Table) -> None:
        self._keep(24)
        if table.caption:
            self._said(table.caption, tone="quiet")
        self.set_font(FONT, "", 8)
        self.set_text_color(*COLOURS["ink"])
        self.set_draw_color(*COLOURS["grid"])
        head = FontFace(emphasis="BOLD")
        named = any(table.columns)
        style: dict[str, Any] = (
            {"first_row_as_headings": named, "headings_style": head} if named else {"first_row_as_headings": False}
        )
        with self.table(
            col_widths=table.widths, text_align="LEFT", line_height=4.2, borders_layout="HORIZONTAL_LINES", **style
        ) as rows:
            for cells in (table.columns, *table.rows) if named else table.rows:
                row = rows.row()
                for cell in cells:
                    row.cell(printable(cell))
        self.ln(2)

    def _chart(self, chart: Chart) -> None:
        scale = CHART_MM / WIDTH
        self._keep(chart.height * scale + 8)
        self._said(chart.title, tone="quiet")
        left, top = self.l_margin, self.get_y()
        for mark in chart.marks:
            colour = COLOURS[mark.tone]
            if isinstance(mark, Label):
                self._label(mark, left, top, scale)
                continue
            places = [(left + x * scale, top + y * scale) for x, y in mark.places]
            if isinstance(mark, Area):
                with self.local_context(fill_opacity=0.16 if mark.faint else 1.0):
                    self.set_fill_color(*colour)
                    self.polygon(places, style="F")
                continue
            # The default, a projecting cap, would close the gaps between dashes.
            dash = (mark.dash[0] * scale, mark.dash[1] * scale, 0.0) if mark.dash else (0.0, 0.0, 0.0)
            with self.local_context(
                draw_color=colour, line_width=mark.width * scale, dash_pattern=dash, stroke_cap_style="butt"
            ):
                self.polyline(places)
        self.set_y(top + chart.height * scale + 3)

    def _label(self, label: Label, left: float, top: float, scale: float) -> None:
        tone: Tone = label.tone
        self.set_font(FONT, "", label.size * scale * 72 / 25.4)
        self.set_text_color(*COLOURS[tone])
        text = printable(label.text)
        shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[label.anchor] * self.get_string_width(text)
        self.text(left + label.place[0] * scale - shift, top + label.place[1] * scale, text)

    def _pictures(self, gallery: Gallery) -> None:
        for pair in gallery.pairs:
            self._keep(PICTURE_MM + 8)
            y = self.get_y()
            for place, image in enumerate((pair.sample_image, pair.patient_image)):
                x = self.l_margin + place * (PICTURE_MM + 2)
                self.image(io.BytesIO(png(image)), x=x, y=y, w=PICTURE_MM, h=PICTURE_MM)
            self.set_y(y + PICTURE_MM + 1)
            self._said(f"sample {pair.sample} and the nearest patient, {pair.similarity:.3f}", tone="quiet")
