"""The figures of a report's first screen: the series that tell the run over its stages, and the order of changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from devmon.analysis.plots.style import (
    COLOURS,
    EVENT_COLOURS,
    EVENT_MARKS,
    axes_on,
    brief,
    draw_curve,
    figure_of,
    step_axis,
    styled,
)

if TYPE_CHECKING:
    from devmon.analysis.detection.events import Event
    from devmon.analysis.series import Series

SIZE = (7.2, 4.7)  # inches: what stands beside the answers on a screen of 1280 × 800


@styled
def plot_stages(
    rows: Sequence[tuple[str, Series]],
    parts: Sequence[tuple[str, float, float, bool]] = (),
    at: tuple[float, tuple[float, float]] | None = None,
    *,
    ax: Sequence[Axes] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Series (title, series) one above the other on one axis of steps, over the named parts of a run.

    `parts` are (name, first step, last step, whether it is shaded); `at` is a step with its interval, marked in all
    panels.
    """
    if ax is None:
        fig = Figure(figsize=SIZE)
        fig.subplots_adjust(left=0.095, right=0.985, top=0.87, bottom=0.1, hspace=0.38)
        axes = list(fig.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0])
    else:
        axes, fig = list(ax), figure_of(ax[0])
    steps = np.concatenate([series.steps for _, series in rows])
    for i, (panel, (title, series)) in enumerate(zip(axes, rows, strict=True)):
        draw_curve(panel, series, verdicts=None, colour=COLOURS[i])
        for _, first, last, shaded in parts:
            if shaded:
                panel.axvspan(first, last, color="#000000", alpha=0.07, lw=0, zorder=0)
        if at is not None:
            panel.axvspan(*at[1], color=EVENT_COLOURS["jump"], alpha=0.2, lw=0, zorder=0)
            panel.axvline(at[0], color=EVENT_COLOURS["jump"], lw=1.2, zorder=1)
        panel.set_title(brief(title, 80), fontsize=9.5, pad=3)
        step_axis(panel, steps, label=i == len(axes) - 1)
    # names above the first panel: of stages where there is room for them, of transitions in a row of their own
    top = axes[0]
    for name, first, last, shaded in parts:
        low, high = (top.transData.transform((x, 0))[0] for x in (max(first, top.get_xlim()[0]), last))
        if shaded or high - low > 5.5 * len(name):
            middle = top.transData.inverted().transform(((low + high) / 2, 0))[0]
            top.annotate(
                name,
                (middle, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 29 if shaded else 18),
                textcoords="offset points",
                ha="center",
                fontsize=9 if shaded else 8.5,
                fontweight="bold" if shaded else "normal",
                color="#b34700" if shaded else "#555555",
                annotation_clip=False,
            )
    return fig, axes


@styled
def plot_order(
    rows: Sequence[tuple[str, Event]], at: tuple[float, float] | None = None, *, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """What changed first within one transition, a row (label, event) each, by half-way.

    The thin line reaches from onset to end (10% and 90% of the change; half height of a bump), the thick one is the
    90% interval of half-way, the mark. The axis is that of the transition, `at` (first, last), linear in steps.
    """
    fig, ax = axes_on(ax, height=1.0 + 0.26 * max(len(rows), 2))
    ordered = sorted(rows, key=lambda row: (row[1].step, row[0]))
    for y, (_, event) in enumerate(ordered):
        colour = EVENT_COLOURS.get(event.kind, "#555555")
        for x in event.span or ():
            ax.plot(x, y, "|", color=colour, ms=8, mew=1.4)
        if event.span is not None:
            ax.plot(event.span, [y, y], color=colour, lw=1.1)
        ax.plot(event.interval, [y, y], color=colour, lw=4, alpha=0.5, solid_capstyle="butt")
        filled = colour if event.resolved else "white"
        ax.plot(event.step, y, EVENT_MARKS.get(event.kind, "o"), ms=6, mec=colour, mfc=filled, mew=1.4)
    ax.set_yticks(range(len(ordered)), [brief(label, 48) for label, _ in ordered], fontsize=8.5)
    ax.set_ylim(len(ordered) - 0.4, -0.6)
    ends = [x for _, event in ordered for x in (event.step, *event.interval, *(event.span or ()))]
    low, high = at or (min(ends), max(ends))
    margin = 0.04 * (high - low) or 1.0
    ax.set_xlim(low - margin, high + margin)
    ax.set_xlabel("optimizer step: from onset | to end |, half-way with its 90% interval (hollow: not resolved)")
    return fig, ax
