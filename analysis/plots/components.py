"""λ̂ of the components of a model over steps."""

from __future__ import annotations

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from devmon.analysis.derive.verdicts import accepted
from devmon.analysis.plots.style import MAX_COLUMNS, axes_on, draw_note, figure_of, step_number, styled, thin


@styled
def plot_components(derived: xr.Dataset, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """A heat map of λ̂ from `component_llc`: one row a component by layer, one column a checkpoint, logarithmic colours.

    Each layer's random masks stand after its components, those of several layers last. A rejected or negative
    estimate is grey. A number in brackets is the component's group.
    """
    layer = derived["layer"].values
    random = np.isin(np.arange(len(layer)), derived["null"].values[derived["null"].values >= 0])
    order = np.lexsort((np.arange(len(layer)), random, np.where(layer < 0, np.inf, layer)))
    pick = thin(derived.sizes["step"], MAX_COLUMNS)
    rows = derived.isel(component=order, step=pick).transpose("replicate", "component", "step", missing_dims="ignore")
    usable = accepted(rows["verdict"].values) & (rows["llc"].values > 0)
    values = np.where(usable, rows["llc"].values, np.nan)
    fig, ax = axes_on(ax, height=1.2 + 0.2 * min(max(len(order), 4), 60))
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#d9d9d9")
    if usable.any():
        # At least a factor of two from end to end, so that noise alone has no colours.
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        norm = LogNorm(low, max(high, 2 * low))
        image = ax.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="nearest", cmap=colours, norm=norm)
        bar = figure_of(ax).colorbar(image, ax=ax, pad=0.015, fraction=0.045)
        bar.set_label("LLC")
        bar.outline.set_visible(False)
    else:
        ax.imshow(np.ma.masked_invalid(values), aspect="auto", cmap=colours)
        draw_note(ax, "no accepted estimate")
    ax.grid(False)
    groups = rows["group"].values if "group" in rows else np.full(len(order), -1)
    names = [
        f"{_short(str(n))} [{g}]" if g >= 0 else _short(str(n))
        for n, g in zip(rows["component"].values, groups, strict=True)
    ]
    named = thin(len(names), 48)
    ax.set_yticks(named, [names[i] for i in named], fontsize=8 if len(names) <= 24 else 6.5)
    steps = rows["step"].values
    columns = thin(len(steps), 9)
    ax.set_xticks(columns, [step_number(float(steps[c])) for c in columns])
    ax.set(title="Local learning coefficient by component", xlabel="step (one column a checkpoint)")
    return fig, ax


def _short(name: str) -> str:
    """ "layer 0 head 1" as "L0H1": rows are narrow."""
    words = name.split()
    if words[:1] == ["layer"] and len(words) == 4 and words[2] == "head":
        return f"L{words[1]}H{words[3]}"
    if words[:1] == ["layer"] and len(words) in (2, 3):
        return " ".join([f"L{words[1]}", *words[2:]])
    count, _, place = name.partition(" random of ")
    return f"random {count}, {place.replace('layer ', 'L')}" if place else name
