"""Figures of a report on dictionaries: how often latents fire, and when each feature was born."""

from __future__ import annotations

import numpy as np
import xarray as xr

from devmon.analysis import plots
from devmon.analysis.reports.content import Block, Figure, Paragraph
from devmon.analysis.reports.drawing import Page
from devmon.analysis.table import Row, Table, thinned
from devmon.analysis.transitions.features import feature_births
from devmon.analysis.wording import number, step

SHOWN = 200  # rows of the table of births


def densities_figure(page: Page, name: str, data: xr.Dataset) -> Figure:
    """A histogram of densities at each step; shares of rare, dense and dead latents behind it."""
    drawing, _ = plots.plot_densities(data)
    caption = f"{name}: how many of {data.sizes['latent']} latents fire in which share of places, at each checkpoint."
    density = data["density"].transpose("step", "latent").values
    rows = [
        Row(
            [step(float(at)), *(number(float(share), 2) for share in ((d == 0).mean(), np.median(d), (d > 0.1).mean()))]
        )
        for at, d in zip(data["step"].values, density, strict=True)
    ]
    columns = ["step", "share that never fires", "median density", "share above 10%"]
    return page.add(f"{name}-densities", drawing, caption, thinned(columns, rows))


def births_blocks(page: Page, name: str, data: xr.Dataset) -> list[Block]:
    """When each latent was born and died, in a sentence, a raster and a table."""
    births = feature_births(data)
    kinds = births["kind"].values
    count = {
        kind: int((kinds == kind).sum()) for kind in ("there", "born", "died", "born and died", "unsure", "silent")
    }
    born = np.flatnonzero(np.isfinite(births["born"].values))
    words = (
        f"Of {len(kinds)} latents {count['there']} are there at all steps, {len(born)} are born and "
        f"{count['died'] + count['born and died']} die; {count['unsure']} come or go without a sure event, "
        f"{count['silent']} are silent."
    )
    if len(born):
        middle = np.median(births["born"].values[born])
        words += f" Half of the births are before step {step(float(middle))}."
    drawing, _ = plots.plot_births(births)
    caption = (
        f"{name}: density of each latent over its largest, one row a latent by its birth. Red: interval and span of a "
        "birth, blue of a death, sure after correction for the number of latents (q ≤ .05)."
    )
    ends = ("born", "born_low", "born_high", "died", "died_low", "died_high")
    moved = np.flatnonzero(np.isfinite(births["born"].values) | np.isfinite(births["died"].values))
    moved = moved[np.argsort(np.fmin(births["born"].values[moved], births["died"].values[moved]))]
    rows = [
        Row([str(int(births["latent"].values[j])), str(kinds[j]), *(_step(births[end].values[j]) for end in ends)])
        for j in moved[:SHOWN]
    ]
    columns = ["latent", "kind", "born", "from", "to", "died", "from", "to"]
    return [Paragraph(words), page.add(f"{name}-births", drawing, caption, Table(columns, rows))]


def _step(value: float) -> str:
    return step(float(value)) if np.isfinite(value) else "–"
