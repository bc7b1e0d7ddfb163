"""Figures of curves over steps: one series, the LLC, several series stacked, layers, loss by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from devmon.analysis.derive.verdicts import FINITE_TIME, accepted
from devmon.analysis.derive.watch_series import units_of
from devmon.analysis.plots.style import (
    COLOURS,
    EVENT_COLOURS,
    LINES,
    MARKERS,
    MAX_POINTS,
    Z90,
    axes_on,
    brief,
    cleared,
    draw_curve,
    draw_legend,
    draw_strips,
    legend_below,
    log_ticks,
    panels_on,
    step_axis,
    step_number,
    styled,
    thin,
    title_of,
)

if TYPE_CHECKING:
    from devmon.analysis.detection.events import Event
    from devmon.analysis.series import Series

PANEL_HEIGHT = 1.2  # of a series in an overview, inches


@styled
def plot_series(series: Series, events: Sequence[Event] = (), *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """One series over steps with its 90% band, rejected points hollow, and the events found in it."""
    fig, ax = axes_on(ax, height=2.7)
    handles = draw_curve(ax, series, verdicts=None) + draw_strips(ax, events)
    ax.set(title=brief(series.name, 90), ylabel=series.units or series.name.rpartition("/")[2])
    step_axis(ax, series.steps)
    draw_legend(ax, handles)
    return fig, ax


@styled
def plot_llc(derived: xr.Dataset, events: Sequence[Event] = (), *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The LLC over steps from `llc(dataset)` (`llc`, `se`, `verdict`): each rejected estimate hollow, by its verdict.

    The scale is that of the accepted estimates; a rejected one beyond it is drawn at the edge and its value told.
    """
    from devmon.analysis.series import Series

    fig, ax = axes_on(ax, height=3.2)
    verdicts = np.asarray(derived["verdict"].values).astype(str)
    units = units_of(derived["llc"])
    llc, se = (np.asarray(derived[name].values, dtype=float) for name in ("llc", "se"))
    series = Series("LLC", np.asarray(derived["step"].values), llc, se, units, ~accepted(verdicts))
    handles = draw_curve(ax, series, verdicts=verdicts) + draw_strips(ax, events)
    note = " (finite-time: of its settings, no level)" if FINITE_TIME in verdicts else ""
    note = note if accepted(verdicts).any() else " (every estimate is rejected)"
    ax.set(title=f"Local learning coefficient{note}", ylabel=f"LLC [{units}]" if units else "LLC")
    step_axis(ax, series.steps)
    draw_legend(ax, handles)
    return fig, ax


@styled
def plot_overview(
    series: Sequence[Series],
    events: Sequence[Event] = (),
    *,
    titles: Mapping[str, str] | None = None,
    again: tuple[Figure, list[Axes]] | None = None,
    ax: Sequence[Axes] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Series stacked on one axis of steps. An event is shaded in its own panel; its line goes through all of them.

    `titles` are those of the panels, by the names of the series. `again` is what an earlier call without `ax` returned,
    for as many series at the same steps: it is drawn anew.
    """
    if again is not None:
        cleared(*again, PANEL_HEIGHT)
    fig, axes = panels_on(ax, len(series), PANEL_HEIGHT) if again is None else again
    shown = {each.name for each in series}
    handles: dict[str, Any] = {}
    for i, (panel, each) in enumerate(zip(axes, series, strict=True)):
        curve = draw_curve(panel, each, verdicts=None, colour=COLOURS[0])
        own = [event for event in events if event.series == each.name]
        for event in events:
            if event.series in shown and event.series != each.name:
                panel.axvline(event.step, color=EVENT_COLOURS.get(event.kind, "#555555"), lw=0.7, alpha=0.45, zorder=0)
        for handle in curve + draw_strips(panel, own):
            handles.setdefault(str(handle.get_label()).partition(":")[0], handle)
        panel.set_title(brief((titles or {}).get(each.name, each.name), 90), fontsize=9.5, pad=3)
        panel.set_ylabel(brief(each.units, 18), fontsize=8.5)
        if again is None:
            step_axis(panel, np.concatenate([s.steps for s in series]), label=i == len(axes) - 1)
    for label, handle in handles.items():
        handle.set_label(label)
    if ax is None:
        legend_below(fig, list(handles.values()))
    else:
        draw_legend(axes[0], list(handles.values()))
    return fig, axes


@styled
def plot_layers(dataset: xr.Dataset, variable: str, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """One line a layer of `variable(step, layer)`; its `control_<variable>` dashed and a `majority` baseline grey."""
    fig, ax = axes_on(ax, height=3.2)
    array = dataset[variable].transpose("step", "layer")
    pick = thin(array.sizes["step"], MAX_POINTS)
    steps = array["step"].values[pick]
    handles: list[Any] = []
    # a line a layer with its band and its control, each under an id by which the page hides it
    for i, layer in enumerate(array["layer"].values if "layer" in array.coords else range(array.sizes["layer"])):
        look: dict[str, Any] = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markevery": max(1, len(pick) // 25)}
        values = array.values[pick, i].astype(float)
        handles += ax.plot(steps, values, label=brief(f"layer {layer}", 40), gid=f"layer-{i}", **look)
        if (error := dataset.get(f"{variable}_se")) is not None and error.dims == dataset[variable].dims:
            half = Z90 * error.transpose("step", "layer").values[pick, i]
            ax.fill_between(
                steps, values - half, values + half, color=look["color"], alpha=0.15, lw=0, gid=f"layer-{i}-band"
            )
        if (control := dataset.get(f"control_{variable}")) is not None and "layer" in control.dims:
            ax.plot(
                steps,
                control.transpose("step", "layer").values[pick, i],
                color=look["color"],
                ls="--",
                lw=1.1,
                gid=f"layer-{i}-control",
            )
    # what the layers are compared with has one entry for all
    if f"control_{variable}" in dataset:
        handles.append(Line2D([], [], color="#555555", ls="--", lw=1.1, label="control task (dashed)"))
    if variable == "accuracy" and "majority" in dataset and "step" in dataset["majority"].dims:
        majority = dataset["majority"].transpose("step", ...).values.reshape(len(dataset["step"]), -1)[pick, 0]
        handles += ax.plot(steps, majority, color="#777777", ls=":", label="majority class")
    units = units_of(dataset[variable])
    ax.set(title=title_of(dataset, variable), ylabel=units or variable.replace("_", " "))
    step_axis(ax, steps)
    draw_legend(ax, handles)
    return fig, ax


@styled
def plot_position_loss(
    dataset: xr.Dataset, variable: str = "loss_by_position", *, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """The loss by position in the sequence (log axis, the first predicted token is 1) at up to six checkpoints."""
    fig, ax = axes_on(ax, height=3.2)
    array = dataset[variable].transpose("step", ...)
    steps = np.asarray(array["step"].values)
    rank = np.log10(steps + (steps[steps > 0].min() if (steps > 0).any() else 1))
    chosen = sorted({int(np.abs(rank - at).argmin()) for at in np.linspace(rank[0], rank[-1], 6)})
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(chosen)))
    positions = np.arange(1, array.shape[1] + 1)
    handles: list[Any] = []
    for shade, index, line in zip(shades, chosen, LINES * 2, strict=False):
        label = f"step {step_number(float(steps[index]))}"
        handles += ax.plot(positions, array.values[index], color=shade, ls=line, label=label)
    ax.set_xscale("log")
    log_ticks(ax, 1, len(positions), zero=False)
    ax.set(title=title_of(dataset, variable), xlabel="position in the sequence (log scale)")
    ax.set_ylabel(units_of(array) or "loss")
    draw_legend(ax, handles)
    return fig, ax


@styled
def plot_runs(runs: Mapping[str, Sequence[Series]], *, ax: Sequence[Axes] | None = None) -> tuple[Figure, list[Axes]]:
    """The same series of several runs, a panel a series and a colour a run; never averaged, without rejected points."""
    names = list(dict.fromkeys(each.name for series in runs.values() for each in series))
    fig, axes = panels_on(ax, len(names), 1.4)
    steps = np.concatenate([each.steps for series in runs.values() for each in series])
    handles = [Line2D([], [], color=COLOURS[i % 7], ls=LINES[i // 7 % 4], label=run) for i, run in enumerate(runs)]
    for panel, name in zip(axes, names, strict=True):
        for i, series in enumerate(runs.values()):
            for each in series:
                if each.name == name:
                    values = np.asarray(each.values, dtype=float)
                    good = np.isfinite(values) & (True if each.rejected is None else ~np.asarray(each.rejected, bool))
                    panel.plot(
                        each.steps[good],
                        values[good],
                        color=COLOURS[i % 7],
                        ls=LINES[i // 7 % 4],
                        gid=f"run-{i}-{axes.index(panel)}",
                    )
                    panel.set_ylabel(each.units, fontsize=8.5)
        panel.set_title(name, fontsize=9.5, pad=3)
        step_axis(panel, steps, label=panel is axes[-1])
    if ax is None:
        legend_below(fig, handles)
    else:
        draw_legend(axes[0], handles)
    return fig, axes
