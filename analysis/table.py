"""A table of text, and its HTML: what results show in a notebook and reports show on a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

MAX_ROWS = 120  # rows of a table behind a figure


@dataclass(frozen=True)
class Row:
    """Cells as text; a `weak` row does not count (a rejected estimate, an event that does not stand)."""

    cells: list[str]
    weak: bool = False


@dataclass(frozen=True)
class Table:
    """Columns by name and rows of text.

    `look` is "" (numbers), "long" (words in the first and last column), "glance" (words in the last) or "text" (names
    and values).
    """

    block: ClassVar[str] = "table"
    columns: list[str]
    rows: list[Row]
    note: str = ""
    look: str = ""


def thinned(columns: list[str], rows: list[Row]) -> Table:
    """A table of at most MAX_ROWS of the rows, first and last among them, that says what it leaves out."""
    if len(rows) <= MAX_ROWS:
        return Table(columns, rows)
    kept = np.unique(np.linspace(0, len(rows) - 1, MAX_ROWS).round().astype(int))
    return Table(columns, [rows[i] for i in kept], f"{len(kept)} of {len(rows)} rows; all are in the trajectory.")


def table_html(table: Table) -> str:
    """A plain table with everything in it escaped; weak rows are grey."""
    from markupsafe import escape

    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = ""
    for row in table.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row.cells)
        rows += f"<tr{' style=opacity:.55' if row.weak else ''}>{cells}</tr>"
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return (f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>" if table.rows else "") + note
