"""The figure of fine-tuning: what is learned, what is forgotten, how far each layer moves from the model before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from devmon.analysis.plots.style import COLOURS, LINES, figure_of, styled

if TYPE_CHECKING:
    import xarray as xr


@styled
def plot_fine_tuning(
    runs: Mapping[str, Mapping[str, xr.Dataset]],
    losses: Sequence[str] = ("task", "questions", "general"),
    drift: str = "general_drift",
    *,
    ax: Sequence[Axes] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Of runs by name: the losses of these watches over steps (± 1 se), and of each run `drift` (step, layer) by layer.

    One pair of axes for the losses, one for each run.
    """
    if ax is None:
        fig = Figure(figsize=(5 * (1 + len(runs)), 3.6), layout="constrained")
        axes = list(fig.subplots(1, 1 + len(runs)))
    else:
        axes, fig = list(ax), figure_of(ax[0])
    for (way, run), line in zip(runs.items(), LINES, strict=False):
        for name, colour in zip(losses, COLOURS, strict=False):
            data = run[name]
            label = f"{name}, {way}"
            axes[0].errorbar(data["step"], data["loss"], data["loss_se"], color=colour, linestyle=line, label=label)
    axes[0].set(xlabel="step", ylabel="nats per token", title="learned and forgotten (± 1 se)")
    axes[0].legend(fontsize=7)
    for axis, (way, run) in zip(axes[1:], runs.items(), strict=False):
        moved = run[drift]
        for step, layers in zip(moved["step"].values, moved["drift"].values, strict=True):
            axis.plot(moved["layer"], layers, label=f"step {step}")
        axis.set(xlabel="layer", ylabel="|h − before| / |before|", title=f"drift on general text, {way}")
        axis.legend(fontsize=7)
    return fig, axes
