"""The figure of a ladder of nbeta: whether λ̂ is at its limit."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from devmon.analysis.derive.verdicts import accepted
from devmon.analysis.plots.style import COLOURS, REJECTED, Z90, axes_on, draw_legend, styled
from devmon.analysis.wording import number


@styled
def plot_ladder(rungs: xr.Dataset, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """λ̂ against nbeta (log scale) from `ladder(dataset)` without a step, with the WBIC slope as a band.

    The axis reaches to 0, so that λ̂ at its limit is a level line. Bars and band are ±1.64 standard errors; rejected
    rungs are hollow.
    """
    fig, ax = axes_on(ax, height=3.4, width=6.0)
    nbeta, llc, se = (np.asarray(rungs[name].values, dtype=float) for name in ("nbeta", "llc", "se"))
    verdicts = rungs["verdict"].values.astype(str)
    good = accepted(verdicts)
    handles: list[Any] = []
    if good.any():
        look: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "ms": 4, "capsize": 2, "elinewidth": 1}
        handles.append(ax.errorbar(nbeta[good], llc[good], Z90 * se[good], label="λ̂ at this nbeta", **look))
    slope, error = float(rungs["wbic_slope"]), float(rungs["wbic_slope_se"])
    if np.isfinite(slope):
        label = f"slope in 1 / nbeta: {number(slope, 3)} ± {number(error, 2)}"
        handles.append(ax.axhline(slope, color=COLOURS[1], lw=1, ls="--", label=label))
        if np.isfinite(error):
            ax.axhspan(slope - Z90 * error, slope + Z90 * error, color=COLOURS[1], alpha=0.15, lw=0)
    for i in np.flatnonzero(~good & np.isfinite(llc)):
        hollow: dict[str, Any] = {"marker": REJECTED.get(verdicts[i], "o"), "mec": "#555555", "mfc": "white", "ms": 6}
        handles += ax.plot(nbeta[i], llc[i], ls="", label=f"rejected, {verdicts[i]}", **hollow)
    ax.set_xscale("log")
    ax.set_ylim(min(0, ax.get_ylim()[0]), max(0, ax.get_ylim()[1]))
    ax.set(xlabel="nbeta (log scale)", ylabel="LLC", title=f"λ̂ by nbeta: {rungs['limit'].item()}")
    draw_legend(ax, handles)
    return fig, ax
