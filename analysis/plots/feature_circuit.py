"""The drawing of a feature circuit: nodes by site, and what each adds by way of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from devmon.analysis.plots.style import COLOURS, axes_on, brief, draw_note, styled
from devmon.errors import DataError

LEAST_EDGE = 0.03  # of the largest edge: fewer are drawn the higher it is, at .01 most circuits are a tangle
ROW = 10  # nodes on one line of a site; more are dealt over two lines or three
GAP, LINE = 1.6, 0.62  # between sites, and between the lines of one, in units of the drawing
NAMED = 26  # characters of a name


@styled
def plot_feature_circuit(
    dataset: xr.Dataset,
    step: int | None = None,
    names: Mapping[tuple[str, int], str] | None = None,
    *,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """The first nodes of a feature circuit, the earliest site below, the answer on top.

    `dataset` is what `devmon.instruments.FeatureCircuit` stores; with steps the given one is drawn, else the last.
    A disc is a latent, by its number or its name in `names` {("mlp_out 0", 17): "…"}; a square is what a dictionary
    leaves over at a place. Blue raises the answer, red lowers it; areas are as the scores, widths of lines as the
    edges, of which those below 3% of the largest are left out.

    Raises DataError for a step that was not measured, and for another dataset.
    """
    if not {"node_site", "node_latent", "node_pos", "score", "edge"} <= set(dataset.data_vars):
        raise DataError(
            "plot_feature_circuit draws what a FeatureCircuit stores: score, edge, node_site; give its watch"
        )
    if "step" in dataset.dims:
        if step is not None and step not in dataset["step"].values:
            raise DataError(f"step {step} was not measured; the steps are {dataset['step'].values.tolist()}")
        dataset = dataset.isel(step=-1) if step is None else dataset.sel(step=step)
    sites = [str(site) for site in dataset["site"].values]
    count = int((dataset["node_site"] >= 0).sum())
    at = dataset["node_site"].values[:count].astype(int)
    score, edge = dataset["score"].values[:count], dataset["edge"].values[:count][:, [*range(count), -1]]

    # places: from the answer down, each site's nodes in the order of what they lead to
    widest = max([min(ROW, int((at == site).sum())) for site in range(len(sites))], default=1)
    places = np.zeros((count + 1, 2))
    heights, height = {}, 0.0
    for site in reversed(range(len(sites))):
        own = np.flatnonzero(at == site)
        lines = max(1, -(-len(own) // ROW))
        height -= GAP
        weights = np.abs(edge[own]) * np.append(at > site, True)
        aims = (weights @ places[:, 0]) / np.maximum(weights.sum(1), 1e-300)
        order = own[np.argsort(aims, kind="stable")]
        for rank, node in enumerate(order):
            line, along = rank % lines, (rank + 0.5) / len(order) - 0.5
            places[node] = along * widest, height - line * LINE
        heights[site] = height - (lines - 1) * LINE / 2
        height -= (lines - 1) * LINE

    fig, ax = axes_on(ax, height=1.2 - 0.85 * height, width=max(8.6, 0.9 * widest + 1.8))
    blue, red = COLOURS[0], COLOURS[1]
    largest = np.abs(edge).max(initial=0.0)
    drawn = np.argwhere((np.abs(edge) >= LEAST_EDGE * largest) & (largest > 0))
    for start, end in drawn:
        strength = abs(edge[start, end]) / largest
        look: dict[str, Any] = {
            "color": blue if edge[start, end] > 0 else red,
            "alpha": 0.25 + 0.5 * strength,
            "zorder": 1,
        }
        bend = 0.06 * np.sign(places[end, 0] - places[start, 0] or 1)
        arc = FancyArrowPatch(
            tuple(places[start]), tuple(places[end]), arrowstyle="-", lw=0.5 + 4 * strength,
            connectionstyle=f"arc3,rad={bend}", shrinkA=6, shrinkB=6, **look,
        )  # fmt: skip
        ax.add_patch(arc)

    # discs and squares, with their names beside them
    top = np.abs(score).max(initial=1e-300)
    for node in range(count):
        latent, pos = int(dataset["node_latent"][node]), int(dataset["node_pos"][node])
        look = {"color": blue if score[node] > 0 else red, "zorder": 3, "edgecolor": "white", "linewidth": 0.8}
        x, y = places[node]
        ax.scatter(x, y, s=30 + 220 * abs(score[node]) / top, marker="o" if latent >= 0 else "s", **look)
        name = (names or {}).get((sites[at[node]], latent)) if latent >= 0 else f"error @{pos}"
        text = brief(name or str(latent), NAMED)
        ax.annotate(text, (x, y), xytext=(0, -13), textcoords="offset points", ha="center", fontsize=7.5,
                    zorder=4, parse_math=False)  # fmt: skip
    ax.scatter(places[-1, 0], places[-1, 1], s=260, marker="D", color="#000000", zorder=3)
    ax.annotate(
        "answer – foil",
        (places[-1, 0], places[-1, 1]),
        xytext=(0, 12),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
    )
    for site, height in heights.items():
        ax.text(-widest / 2 - 0.25, height, sites[site], ha="right", va="center", fontsize=9, fontweight="bold")
    ax.set_xlim(-widest / 2 - 1.6, widest / 2 + 0.3)
    ax.set_ylim(min(heights.values(), default=0) - 1.0, 0.7)
    ax.set_axis_off()
    total = f", step {int(dataset['step'])}" if "step" in dataset.coords else ""
    ax.set_title(f"Feature circuit: the first {count} nodes{total}")
    draw_note(ax, f"blue raises the answer, red lowers it; {len(drawn)} edges from {LEAST_EDGE:.0%} of the largest")
    return fig, ax
