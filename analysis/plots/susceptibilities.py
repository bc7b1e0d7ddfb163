"""The figure of susceptibilities: tokens in their common components, and how wide they lie over steps."""

from __future__ import annotations

from typing import cast

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from devmon.analysis.plots.style import COLOURS, brief, draw_note, step_axis, styled

NAMED = 6  # tokens furthest out that are named


@styled
def plot_susceptibilities(
    components: xr.Dataset, *, ax: tuple[Axes, Axes] | None = None
) -> tuple[Figure, tuple[Axes, Axes]]:
    """Left the tokens of the last step in the first two components, right the spread of each component over steps.

    `components` is what `susceptibility_components` gives. Colours are probes, a line leads from where the first step
    had a token; the tokens furthest out are named. Steps in grey are those whose variance is mostly noise.
    """
    fig = Figure(figsize=(10.4, 4.6), layout="constrained") if ax is None else cast(Figure, ax[0].figure)
    left, right = fig.subplots(1, 2, width_ratios=(1.15, 1)) if ax is None else ax
    score = components["score"].transpose("step", "token", "pc").values[:, :, :2]
    first, last = score[0], score[-1]
    probes = components["probe_of"].values if "probe_of" in components.coords else np.full(len(last), "tokens")
    # the tokens, from where they were to where they are
    for colour, probe in zip(COLOURS, dict.fromkeys(probes.tolist()), strict=False):
        mine = probes == probe
        left.plot(*np.stack([first[mine], last[mine]]).T.transpose(0, 2, 1), color=colour, alpha=0.15, lw=0.6)
        left.plot(*last[mine].T, ".", color=colour, ms=4, alpha=0.8, label=str(probe))
    far = np.argsort(-np.linalg.norm(last, axis=1), kind="stable")[:NAMED]
    for item in far if "label" in components.coords else ():
        text = str(components["label"].values[item]).replace("\n", "⏎")
        left.annotate(
            brief(text, 28), last[item], xytext=(4, 3), textcoords="offset points", fontsize=7, parse_math=False
        )
    share = [f"{float(value):.0%}" for value in components["explained"].isel(step=-1).values[:2]]
    left.set(xlabel=f"component 1 ({share[0]} of the variance)", ylabel=f"component 2 ({share[1]} of the variance)")
    left.set_title(f"Tokens at step {int(components['step'][-1])}")
    left.legend(loc="best", markerscale=2)

    # the components over steps; what is mostly noise is shaded
    steps = components["step"].values
    for colour, pc in zip(COLOURS, components["pc"].values, strict=False):
        right.plot(steps, components["spread"].sel(pc=pc), color=colour, marker="o", ms=3, label=f"component {int(pc)}")
    noisy = components["noise"].values > 0.5
    for step in steps[noisy]:
        right.axvline(step, color="#d9d9d9", lw=4, zorder=0)
    step_axis(right, steps)
    right.set(ylabel="standard deviation in the component", title="Spread over tokens")
    if noisy.any():
        draw_note(right, f"{int(noisy.sum())} of {len(steps)} steps are mostly noise (grey)")
    right.legend(loc="best")
    return fig, (left, right)
