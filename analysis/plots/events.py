"""Figures of events: where each is, and which came first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from devmon.analysis.plots.style import (
    COLOURS,
    EVENT_COLOURS,
    EVENT_MARKS,
    axes_on,
    brief,
    draw_note,
    step_axis,
    styled,
    words_of,
)

if TYPE_CHECKING:
    from devmon.analysis.detection.events import Event
    from devmon.analysis.runs.compare import Matched
    from devmon.analysis.transitions.clusters import Transition


MARK_NAMES = {"jump": "circle", "turn": "diamond", "plateau": "square", "bump": "triangle"}


@styled
def plot_events(
    events: Sequence[Event],
    transitions: Sequence[Transition] = (),
    *,
    steps: np.ndarray | None = None,
    titles: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """A forest plot, one row an event: its 90% interval as a bar, its estimate as a mark, hollow where q > 0.05.

    A thin line is the span of an event, from 10% to 90% of a jump. Numbered grey strips are the spans of `transitions`.
    The axis is that of `steps` (the run's), or reaches as far as the events; `titles` are what series are called.
    """
    fig, ax = axes_on(ax, height=1.15 + 0.24 * max(len(events), 2))
    rows = in_order(events)
    # behind the rows: the spans of transitions as strips, with their numbers above
    for i, change in enumerate(transitions, 1):
        ax.axvspan(*change.span, color="#000000", alpha=0.09, lw=0, zorder=0)
        ax.annotate(
            str(i),
            (change.step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold",
            ha="center",
            annotation_clip=False,
            gid=f"at-step-{i}",
        )
    # a row an event: span thin, interval thick, estimate a mark, and its q (or p) at the right
    for y, event in enumerate(rows):
        sure = event.q_value is None or event.q_value <= 0.05
        colour = EVENT_COLOURS.get(event.kind, "#555555")
        if event.span is not None:
            ax.plot(event.span, [y, y], color=colour, lw=1)
        ax.plot(event.interval, [y, y], color=colour, lw=3.5, alpha=0.55, solid_capstyle="butt")
        ax.plot(
            event.step, y, EVENT_MARKS.get(event.kind, "o"), ms=6, mec=colour, mfc=colour if sure else "white", mew=1.4
        )
        chance = f"q = {event.q_value:.3g}" if event.q_value is not None else f"p = {event.p_value:.3g}"
        ax.annotate(
            chance, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, annotation_clip=False
        )
    called = [(titles or {}).get(event.series, event.series) for event in rows]
    labels = [f"{brief(name)} ({event.word})" for name, event in zip(called, rows, strict=True)]
    ax.set_yticks(range(len(rows)), labels, fontsize=8.5)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    # marks are explained in words, only those that are there
    there = [kind for kind in EVENT_MARKS if any(event.kind == kind for event in rows)]
    marks = ", ".join(f"{MARK_NAMES[kind]}: {words_of(rows, kind)}" for kind in there)
    ax.set_title("Events with 90% intervals", pad=32)
    ax.annotate(  # between the title and the numbers
        f"{marks}; hollow: q > 0.05",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 17),
        textcoords="offset points",
        fontsize=7.5,
        color="#555555",
        annotation_clip=False,
    )
    if steps is None:
        spans = [event.span or event.interval for event in rows] + [change.span for change in transitions]
        steps = np.array([x for event in rows for x in (event.step, *event.interval)] + [x for s in spans for x in s])
    step_axis(ax, steps)
    return fig, ax


def in_order(events: Sequence[Event]) -> list[Event]:
    """The rows of `plot_events`, from the top."""
    return sorted(events, key=lambda event: (event.step, event.series))


@styled
def plot_matched(matched: Sequence[Matched], *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Events matched across runs, a row each: every run's 90% interval and estimate, and the median as a diamond.

    A colour and a height within the row is a run, the same in all rows; the number of runs stands on the right.
    """
    runs = list(dict.fromkeys(run for match in matched for run in match.events))
    alone = ax is None
    fig, ax = axes_on(ax, height=1.3 + 0.34 * max(len(matched), 2))
    for y, match in enumerate(matched):
        for run, event in match.events.items():
            i = runs.index(run)
            at, colour = y + 0.6 * ((i + 0.5) / len(runs) - 0.5), COLOURS[i % 7]
            ax.plot(event.interval, [at, at], color=colour, lw=1.6, alpha=0.6, solid_capstyle="butt")
            ax.plot(event.step, at, "o", ms=3.5, color=colour)
        ax.plot(match.step, y, "D", ms=5.5, mfc="none", mec="#222222", mew=1.2)
        share = f"{len(match.events)} of {match.of} runs"
        ax.annotate(
            share, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, annotation_clip=False
        )
    labels = [f"{brief(match.series)} ({match.word})" for match in matched]
    ax.set_yticks(range(len(matched)), labels, fontsize=8.5)
    ax.set_ylim(len(matched) - 0.4, -0.6)
    ax.set_title("Events matched across runs")
    draw_note(ax, "diamond: median")
    step_axis(ax, np.array([x for match in matched for e in match.events.values() for x in (e.step, *e.interval)]))
    handles = [Line2D([], [], color=COLOURS[i % 7], marker="o", ms=3.5, label=run) for i, run in enumerate(runs[:7])]
    if alone:
        fig.legend(handles=handles, loc="outside lower center", ncols=4)
    return fig, ax
