"""Heat maps: heads and layers over steps, and pairs of steps."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from devmon.analysis.derive.watch_series import elements, units_of
from devmon.analysis.plots.style import (
    MAX_COLUMNS,
    axes_on,
    brief,
    draw_note,
    figure_of,
    step_number,
    styled,
    thin,
    title_of,
)


@styled
def plot_heads(dataset: xr.Dataset, variable: str, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """A heat map of `variable(step, layer, head)`, one row a head and one column a checkpoint; grey has no value.

    Any other small dimensions give a row for each of their elements. A `uniform` scalar is told as the reference.
    """
    array = dataset[variable].transpose("step", ...)
    array = array.isel(step=thin(array.sizes["step"], MAX_COLUMNS))
    rows = [(short(label), element.values) for label, element in elements(array)]
    values = np.array([row for _, row in rows], dtype=float)
    fig, ax = axes_on(ax, height=1.2 + 0.2 * min(max(len(rows), 4), 60))
    # values of both signs have colours around 0; others begin at 0, where that is near
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < 0 < high:
        bound = max(-low, high)
        limits: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}
    else:
        limits = {"cmap": "viridis", "vmin": min(low, 0.0) if low <= 0.25 * high else low, "vmax": high}
    colours = matplotlib.colormaps[limits.pop("cmap")].with_extremes(bad="#d9d9d9")
    image = ax.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="nearest", cmap=colours, **limits)
    units = units_of(dataset[variable])
    bar = figure_of(ax).colorbar(image, ax=ax, pad=0.015, fraction=0.045)
    bar.set_label(units or variable.replace("_", " "))
    bar.outline.set_visible(False)
    ax.grid(False)
    # as many rows and columns are named as can be read
    named = thin(len(rows), 48)
    ax.set_yticks(named, [brief(rows[i][0]) for i in named], fontsize=8 if len(rows) <= 24 else 6.5)
    steps = array["step"].values
    columns = thin(len(steps), 9)
    ax.set_xticks(columns, [step_number(float(steps[c])) for c in columns])
    ax.set(title=title_of(dataset, variable), xlabel="step (one column a checkpoint)")
    if not finite.size:
        draw_note(ax, "no finite value")
    elif "uniform" in dataset and dataset["uniform"].dims == ("step",):
        draw_note(ax, f"uniform attention: {float(dataset['uniform'].mean()):.3g}")
    return fig, ax


def short(label: str) -> str:
    parts = dict(part.split("=", 1) for part in label.split(", "))
    if set(parts) == {"pair"}:
        return parts["pair"]
    return f"L{parts['layer']}H{parts['head']}" if set(parts) == {"layer", "head"} else label


@styled
def plot_similarity(dataset: xr.Dataset, variable: str = "cka", *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """A square heat map of `variable(step, other_step)` from 0 to 1: how alike the run is at each two checkpoints.

    `dataset` is what `similarity` (one layer of it) or `circuit_overlap` gives. A block along the diagonal is a time
    without change, an edge between two blocks a change.
    """
    fig, ax = axes_on(ax, height=5.2, width=6.4)
    array = dataset[variable].transpose("step", "other_step")
    pick = thin(array.sizes["step"], MAX_COLUMNS)
    steps, values = array["step"].values[pick], np.asarray(array.values, dtype=float)[np.ix_(pick, pick)]
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#d9d9d9")
    image = ax.imshow(
        np.ma.masked_invalid(values), origin="lower", interpolation="nearest", cmap=colours, vmin=0, vmax=1
    )
    bar = figure_of(ax).colorbar(image, ax=ax, pad=0.015, fraction=0.045)
    bar.set_label(title_of(dataset, variable))
    bar.outline.set_visible(False)
    ax.grid(False)
    named = thin(len(steps), 9)
    labels = [step_number(float(steps[i])) for i in named]
    ax.set_xticks(named, labels)
    ax.set_yticks(named, labels)
    ax.set(xlabel="step (one column a checkpoint)", ylabel="step", title=title_of(dataset, variable))
    if "chance" in dataset and np.isfinite(dataset["chance"].item()):
        draw_note(ax, f"by chance: {dataset['chance'].item():.3g}")
    return fig, ax


@styled
def plot_pairs(dataset: xr.Dataset, *, most: int = 20, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Composition scores above their null over steps, one row a pair of heads: the `most` that rise highest.

    `dataset` is what `devmon.instruments.Composition` stores: `composition(step, kind, layer, head, layer_from,
    head_from)` and `null(step, kind)`. A row "K L1H2 from L0H1" is the keys of head 1.2 reading from head 0.1.
    """
    dims = ("kind", "layer", "head", "layer_from", "head_from")
    excess = dataset["composition"] - dataset["null"] if "null" in dataset else dataset["composition"]
    flat = excess.transpose("step", *dims).stack(pair=dims, create_index=False)
    height = flat.max("step", skipna=True).fillna(-np.inf).values
    chosen = [int(i) for i in np.argsort(-height, kind="stable")[:most] if np.isfinite(height[i])]
    where = np.unravel_index(chosen, [dataset.sizes[d] for d in dims])
    names = [dataset[d].values[i] if d in dataset.coords else i for d, i in zip(dims, where, strict=True)]
    labels = ["{} L{}H{} from L{}H{}".format(*name) for name in zip(*names, strict=True)]
    data = xr.Dataset({"excess": flat.isel(pair=chosen).assign_coords(pair=labels)})
    data["excess"].attrs |= {"long_name": "composition score above its null", "units": "1"}
    fig, ax = plot_heads(data, "excess", ax=ax)
    ax.set_title(f"Composition above its null, the {len(chosen)} pairs of heads that rise highest")
    return fig, ax
