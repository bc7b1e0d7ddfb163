"""Features of dictionaries over steps: how often they fire, when each is there, how long each is in each snapshot."""

from __future__ import annotations

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from devmon.analysis.plots.style import MAX_COLUMNS, axes_on, draw_note, figure_of, step_number, styled, thin

BINS = np.linspace(-5, 0, 31)  # of log10 density; what never fires has a row of its own below
MOST_ROWS = 400  # latents of a raster: more than a figure has pixels say no more


@styled
def plot_densities(dataset: xr.Dataset, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """How many latents fire how often: a histogram of log10 density at each step, one column a checkpoint.

    `dataset` is a watch with `density` (step, latent). The lowest row counts latents that never fire.
    """
    pick = thin(dataset.sizes["step"], MAX_COLUMNS)
    density = dataset["density"].transpose("step", "latent").values[pick]
    with np.errstate(divide="ignore"):
        logs = np.log10(density)
    edges = np.concatenate([[-5.7, -5.4], BINS])  # a row for those that never fire, and a gap
    counts = np.stack([np.histogram(np.clip(row[row > -np.inf], *BINS[[0, -1]]), BINS)[0] for row in logs], 1)
    never = (logs == -np.inf).sum(1)
    counts = np.concatenate([never[None], np.zeros((1, len(pick))), counts]) / density.shape[1]
    fig, ax = axes_on(ax, height=3.4)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#ffffff00")
    shown = np.ma.masked_equal(counts, 0)
    image = ax.pcolormesh(np.arange(len(pick) + 1) - 0.5, edges, shown, cmap=colours, vmin=0)
    bar = figure_of(ax).colorbar(image, ax=ax, pad=0.015, fraction=0.045)
    bar.set_label("share of latents")
    bar.outline.set_visible(False)
    ax.grid(False)
    ax.set_yticks([-5.55, *range(-5, 1)], ["never", "1e-5", "1e-4", ".001", ".01", ".1", "1"])
    _steps(ax, dataset["step"].values[pick])
    ax.set(title="How often latents fire", ylabel="share of places")
    return fig, ax


@styled
def plot_births(births: xr.Dataset, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """When each latent is there (`feature_births`): one row a latent by its birth, one column a checkpoint.

    Shades are density over its largest. A red bar is the interval of a birth, a blue one that of a death; latents that
    are there all along stand above, those that come or go without a sure event below. Silent ones are left out.
    """
    rank = {"there": 0, "born": 1, "born and died": 1, "died": 2, "unsure": 3}
    kinds = births["kind"].values
    heard = np.flatnonzero(kinds != "silent")
    first = np.nan_to_num(births["born"].values, nan=np.inf)
    last = np.nan_to_num(births["died"].values, nan=np.inf)
    order = heard[np.lexsort((last[heard], first[heard], [rank[kinds[j]] for j in heard]))]
    rows = order[thin(len(order), MOST_ROWS)]
    steps = births["step"].values
    pick = thin(len(steps), MAX_COLUMNS)
    present = births["present"].transpose("step", "latent").values[np.ix_(pick, rows)].T
    fig, ax = axes_on(ax, height=1.4 + 0.012 * max(len(rows), 120))
    if not len(rows):
        draw_note(ax, "no latent fires in one of a thousand places")
        return fig, ax
    ax.imshow(present, aspect="auto", interpolation="nearest", cmap="Greys", vmin=0, vmax=1.3)
    thick = max(0.8, min(3.0, 160 / len(rows)))
    for name, colour in (("born", "#c1272d"), ("died", "#1f5fa8")):
        for row, j in enumerate(rows):
            if np.isfinite(births[name].values[j]):
                both = [births[f"{name}_{end}"].values[j] for end in ("low", "high")]
                ends = np.interp(both, steps[pick], range(len(pick)))
                ax.plot(ends, [row, row], color=colour, linewidth=thick, solid_capstyle="butt")
    ax.grid(False)
    _steps(ax, steps[pick])
    counts = ", ".join(f"{int((kinds == kind).sum())} {kind}" for kind in (*rank, "silent") if (kinds == kind).any())
    ax.set(title=f"Features: {counts}", ylabel=f"latent ({len(rows)} of {len(kinds)})")
    return fig, ax


@styled
def plot_crosscoder(table: xr.Dataset, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The length of each latent in each snapshot over its largest (`devmon.features.crosscoder`), by when it is there.

    One row a latent, sorted by its first and last snapshot, one column a snapshot.
    """
    norm = table["relative"].transpose("step", "latent").values
    alive = np.flatnonzero(np.isfinite(norm).all(0))
    first, last = table["born"].values[alive], table["died"].values[alive]
    order = alive[np.lexsort((-norm[:, alive].sum(0), -last, first))]
    rows = order[thin(len(order), MOST_ROWS)]
    fig, ax = axes_on(ax, height=1.4 + 0.012 * max(len(rows), 120))
    if not len(rows):
        draw_note(ax, "no latent fires")
        return fig, ax
    image = ax.imshow(norm[:, rows].T, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    bar = figure_of(ax).colorbar(image, ax=ax, pad=0.015, fraction=0.045)
    bar.set_label("length over the largest")
    bar.outline.set_visible(False)
    ax.grid(False)
    _steps(ax, table["step"].values)
    ax.set(title="Lengths of a crosscoder's latents by snapshot", ylabel=f"latent ({len(rows)} of {norm.shape[1]})")
    return fig, ax


def _steps(ax: Axes, steps: np.ndarray) -> None:
    columns = thin(len(steps), 9)
    ax.set_xticks(columns, [step_number(float(steps[c])) for c in columns])
    ax.set_xlabel("step (one column a checkpoint)")
