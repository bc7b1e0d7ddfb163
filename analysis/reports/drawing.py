"""From a matplotlib drawing to a figure of the page: SVG, where it shows what, and a PNG copy."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from devmon.analysis import plots
from devmon.analysis.reports.content import Figure, Panel
from devmon.analysis.reports.svg import compact
from devmon.analysis.series import Series
from devmon.analysis.table import Table
from devmon.files import write_whole


class Where(NamedTuple):
    """What a pair of axes shows: lines over steps, or rows with a value for each of `steps` (`content.Panel`)."""

    ax: Axes
    scale: str
    lines: list[str] = []  # noqa: RUF012
    steps: list[float] = []  # noqa: RUF012
    rows: list[str] = []  # noqa: RUF012
    values: list[list[int | None]] = []  # noqa: RUF012
    unit: float = 1.0


@dataclass
class Page:
    """Turns drawings into figures of the report and, where a folder is given, into PNG files."""

    folder: Path | None
    names: set[str] = field(default_factory=set)
    panels: dict[tuple[Any, ...], tuple[Drawing, list[Axes]]] = field(default_factory=dict)  # see `figures.stack`

    def add(
        self,
        name: str,
        drawing: Drawing,
        caption: str,
        data: Table | None = None,
        where: Sequence[Where] = (),
        parts: Sequence[tuple[str, list[str]]] = (),
        opened: bool = False,
    ) -> Figure:
        base = name = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "figure"
        while name in self.names:
            name = f"{base}-{sum(known.startswith(base) for known in self.names) + 1}"
        self.names.add(name)
        prefix = f"f{len(self.names):x}"
        with plots.style():
            image = io.BytesIO()
            drawing.savefig(image, format="svg")
            panels = [_panel(drawing, axes, prefix) for axes in where]
            if self.folder is not None:
                png = io.BytesIO()
                drawing.savefig(png, format="png")
                write_whole(self.folder / f"{name}.png", png.getvalue())
        hidden = [(label, [f"{prefix}-{i}" for i in ids]) for label, ids in parts]
        return Figure(name, compact(image.getvalue().decode(), prefix), caption, data, panels, hidden, opened)


def curves(ax: Axes, series: Sequence[Series]) -> Where:
    """Axes with lines over steps."""
    return Where(ax, ax.get_xscale(), [each.name for each in series])


def rows_over_steps(ax: Axes, rows: Sequence[str]) -> Where:
    """Axes of steps with one mark or bar a row, of which the page says these words; the first row is the top one."""
    return Where(ax, ax.get_xscale(), rows=list(rows))


def heat(ax: Axes, steps: Sequence[float], rows: list[str], *, square: bool = False) -> Where:
    """Axes with a heat map, one column a step. A `square` map has steps upward, too: its first row is the lowest."""
    values: Any = np.ma.filled(np.ma.asarray(ax.images[0].get_array(), dtype=float), np.nan)
    peak = float(np.max(np.abs(values), where=np.isfinite(values), initial=0.0))
    unit = float(f"1e{int(np.floor(np.log10(peak))) - 2}") if peak else 1.0
    table = [[rounded_to(x, unit) for x in row] for row in (values[::-1] if square else values)]
    scale = "square" if square else "columns"
    return Where(ax, scale, steps=list(steps), rows=rows[::-1] if square else rows, values=table, unit=unit)


def rounded_to(value: float, unit: float) -> int | None:
    """How many units; a page holds many thousands of these."""
    return round(value / unit) if np.isfinite(value) else None


def _panel(drawing: Drawing, where: Where, prefix: str) -> Panel:
    """The axes in the coordinates of the SVG: points from the left, points from the top."""
    width, height = drawing.get_size_inches() * 72
    box = where.ax.get_position()
    corners = [box.x0 * width, (1 - box.y1) * height, box.x1 * width, (1 - box.y0) * height]
    scale: Any = where.ax.xaxis.get_transform()
    return Panel(
        group=f"{prefix}-axes_{drawing.axes.index(where.ax) + 1}",
        box=[round(float(v), 2) for v in corners],
        scale=where.scale,
        limits=[float(f"{v:.8g}") for v in where.ax.get_xlim()],
        threshold=float(scale.linthresh) if where.scale == "symlog" else 0.0,
        lines=where.lines,
        steps=[float(f"{s:.6g}") for s in where.steps],
        rows=where.rows,
        values=where.values,
        unit=where.unit,
    )
