"""What a report is made of: plain text in blocks, which HTML and PDF each render in their own way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from privacy.audit.decision import Verdict
from privacy.audit.report.charts import Chart
from privacy.audit.report.gallery import Gallery


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Terms and what is said of each."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Command:
    """What is typed into a shell."""

    text: str


@dataclass(frozen=True)
class Alert:
    """What must not be overlooked."""

    title: str
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text; the first cell of each names it.

    Attributes:
        caption: above it.
        columns: headings.
        rows: as many cells in each as there are columns.
        widths: of the columns on paper, in proportion.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Pictures:
    """Pairs of images."""

    gallery: Gallery


@dataclass(frozen=True)
class Details:
    """Blocks that a screen folds away and paper shows."""

    summary: str
    blocks: tuple[Block, ...]


Block: TypeAlias = Paragraph | Heading | Bullets | Facts | Command | Alert | Table | Chart | Pictures | Details


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report.

    Attributes:
        name: to link to.
        title: heading.
        blocks: in order.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of it.

    Attributes:
        title: of the document.
        subtitle: what, when, whose.
        created: ISO 8601.
        verdict: decides the colour and the icon.
        headline: the verdict in a few words.
        sentence: the verdict in one sentence.
        meaning: what follows for the reader.
        summary: the figures to know first.
        warning: stands above everything else and on every page; empty if there is nothing to warn of.
        sections: in order.
    """

    title: str
    subtitle: str
    created: str
    verdict: Verdict
    headline: str
    sentence: str
    meaning: str
    summary: Facts
    warning: str
    sections: tuple[Section, ...]
