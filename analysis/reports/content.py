"""What a report says, whatever it is written as: sections of paragraphs, tables, figures, lists and definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from devmon.analysis.series import Series
from devmon.analysis.table import Table


@dataclass(frozen=True)
class Panel:
    """One pair of axes of a figure, in the coordinates of its SVG, so that a script can say what lies under the mouse.

    `group` is the SVG id of its parts; `box` is left, top, right, bottom; `limits` are the steps at left and right.
    `scale` is that of the axis of steps: "linear", "log", "symlog" (linear up to `threshold`, with 0.35 decades for
    it), or "columns" where each of `steps` is a column, as wide as the others ("square": and a row). `lines` names
    series of the run; other panels have `rows` of labels instead, and a heat map `values` (row, step) in `unit`s, of
    which the largest value has three digits.
    """

    group: str
    box: list[float]
    scale: str
    limits: list[float]
    threshold: float = 0.0
    lines: list[str] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    values: list[list[int | None]] = field(default_factory=list)
    unit: float = 1.0


@dataclass(frozen=True)
class Figure:
    """A drawing: SVG text, its caption and the numbers behind it. `parts` can be hidden: label and SVG ids."""

    block: ClassVar[str] = "figure"
    name: str
    svg: str
    caption: str
    data: Table | None = None
    panels: list[Panel] = field(default_factory=list)
    parts: list[tuple[str, list[str]]] = field(default_factory=list)
    opened: bool = False


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `look` is "", "soft", "note", "lead" or "outcome"."""

    block: ClassVar[str] = "text"
    text: str
    look: str = ""


@dataclass(frozen=True)
class Prose:
    block: ClassVar[str] = "story"
    sentences: list[str]


@dataclass(frozen=True)
class Heading:
    block: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Items:
    block: ClassVar[str] = "items"
    items: list[str]


@dataclass(frozen=True)
class Terms:
    """Terms and their meanings; `look` is "" or "answers"."""

    block: ClassVar[str] = "terms"
    pairs: list[tuple[str, str]]
    look: str = ""


@dataclass(frozen=True)
class Code:
    """Text to copy or to save as a file of this name."""

    block: ClassVar[str] = "code"
    text: str
    file: str


@dataclass(frozen=True)
class Fold:
    """What a reader opens by hand."""

    block: ClassVar[str] = "fold"
    title: str
    inside: list[Any]
    opened: bool = False


@dataclass(frozen=True)
class Columns:
    """Two columns side by side where the screen is wide enough."""

    block: ClassVar[str] = "columns"
    left: list[Any]
    right: list[Any]


Block = Table | Figure | Paragraph | Prose | Heading | Items | Terms | Code | Fold | Columns


@dataclass(frozen=True)
class Section:
    """A part of the report under a heading; a `folded` one is opened by hand."""

    key: str
    title: str
    blocks: list[Block]
    folded: bool = False


@dataclass(frozen=True)
class Content:
    """A whole report. `outcome` is that of the run; `series` holds every curve and `events` every event, as numbers."""

    title: str
    subtitle: str
    outcome: str
    sections: list[Section]
    series: list[dict[str, Any]]
    events: list[dict[str, Any]]


def curve_numbers(series: Series) -> dict[str, Any]:
    """A series to five digits and its errors to three, null where a value is missing or infinite."""
    return {
        "name": series.name,
        "units": series.units,
        "steps": [int(s) for s in series.steps],
        "values": _rounded(series.values, 5),
        "se": None if series.se is None else _rounded(series.se, 3),
        "rejected": [] if series.rejected is None else np.flatnonzero(series.rejected).tolist(),
    }


def _rounded(values: Any, digits: int) -> list[float | None]:
    """To so many digits, by one format of all: a page may have 400,000 of them."""
    numbers = np.asarray(values, dtype=float).tolist()
    rounded = map(float, (f"%.{digits}g " * len(numbers) % tuple(numbers)).split())
    return [value if math.isfinite(value) else None for value in rounded]
