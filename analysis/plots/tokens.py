"""When the tokens of a probe were learned, as a distribution over steps."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from devmon.analysis.plots.style import COLOURS, Z90, axes_on, draw_legend, step_axis, styled

BARS = 24  # of the histogram at most, from checkpoint to checkpoint: more hold too few tokens each to say anything


@styled
def plot_token_learning(learning: xr.Dataset, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The share of tokens learned by each step (`devmon.analysis.token_learning`), and between steps as bars.

    The dotted line is the share of tokens that got as much worse, what noise makes; the upright line is the step by
    which half of those that are learned were, with its 90% interval.
    """
    fig, ax = axes_on(ax, height=3.4)
    steps, share = learning["step"].values, learning["share"].values
    edges = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), BARS + 1)).round().astype(int))
    widths = np.diff(steps[edges])
    ax.bar(
        steps[edges[:-1]], np.diff(share[edges]), widths, align="edge", color=COLOURS[0], alpha=0.3, label="in between"
    )
    band = Z90 * learning["share_se"].values
    ax.fill_between(steps, share - band, share + band, color=COLOURS[0], alpha=0.18, linewidth=0)
    ax.plot(steps, share, color=COLOURS[0], linewidth=1.6, label="learned by this step")
    ax.plot(steps, learning["lost"].values, color="#777777", linestyle=":", label="unlearned: what noise makes")
    half = learning.sel(quantile=0.5)
    if np.isfinite(half["when"]):
        if np.isfinite(half["when_low"]):
            ax.axvspan(float(half["when_low"]), float(half["when_high"]), color=COLOURS[1], alpha=0.2, linewidth=0)
        ax.axvline(float(half["when"]), color=COLOURS[1], linewidth=1.2, label="half of them")
    step_axis(ax, steps)
    ax.set(title="When tokens were learned", ylabel="share of tokens", ylim=(0, None))
    draw_legend(ax, ax.get_legend_handles_labels()[0])
    return fig, ax
