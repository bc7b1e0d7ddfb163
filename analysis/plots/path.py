"""The figure of essential dynamics: the path of the outputs in the plane of their first two components."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from devmon.analysis.plots.style import axes_on, draw_legend, draw_note, step_number, styled, thin


@styled
def plot_essential(dynamics: xr.Dataset, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The smoothed path of `essential_dynamics` in its first two components, by checkpoint, from ring to square.

    Dots are the components before smoothing. Stars are cusps, turns that no random walk makes; their absence is told.
    """
    fig, ax = axes_on(ax, height=4.6, width=7.4)
    steps = np.asarray(dynamics["step"].values)
    path, raw = (dynamics[name].transpose("step", "component").values for name in ("pc", "raw_pc"))
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.92, len(steps)))
    # the path is coloured by checkpoint; the scores before smoothing are dots of the same colours
    for i in range(len(steps) - 1):
        ax.plot(path[i : i + 2, 0], path[i : i + 2, 1], color=shades[i], lw=2)
    ax.scatter(raw[:, 0], raw[:, 1], s=9, color=shades, alpha=0.55, lw=0, zorder=2)
    ends: dict[str, Any] = {"ls": "", "ms": 7, "mec": "#333333", "zorder": 4}
    handles: list[Any] = ax.plot(*path[0, :2], marker="o", mfc="white", label=f"step {step_number(steps[0])}", **ends)
    handles += ax.plot(*path[-1, :2], marker="s", mfc=shades[-1], label=f"step {step_number(steps[-1])}", **ends)
    # where the path turns as no random walk does, it has a star
    cusp = np.asarray(dynamics["cusp"].values, dtype=bool)
    if cusp.any():
        look: dict[str, Any] = {"ls": "", "marker": "*", "ms": 13, "color": "#D55E00", "mec": "white", "zorder": 5}
        where = ", ".join(step_number(float(s)) for s in steps[cusp])
        handles += ax.plot(path[cusp, 0], path[cusp, 1], label=f"cusp at step {where}", **look)
    # the ends are in the legend; a few checkpoints between them are named at their place
    for i in thin(len(steps), 7)[1:-1]:
        ax.annotate(
            step_number(float(steps[i])),
            (path[i, 0], path[i, 1]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    share = [f"{float(x):.0%}" for x in dynamics["explained"].values[:2]]
    ax.set(xlabel=f"component 1 ({share[0]} of the variance)", ylabel=f"component 2 ({share[1]} of the variance)")
    ax.set_title("Path of the outputs")
    draw_note(ax, "" if cusp.any() else "no turn sharper than a random walk's")
    draw_legend(ax, handles)
    return fig, ax
