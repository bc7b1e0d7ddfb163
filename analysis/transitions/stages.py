"""`stages(series, detection)`: the run cut at its transitions, and how much each series changed in each part.

The transitions are the jumps of the series. With `kinds=("turn", "plateau")` stages end at the critical points of
smooth curves instead, as in Hoogland et al. (2024, arXiv:2402.02364).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from devmon.analysis.detection.events import Event, meet
from devmon.analysis.detection.results import Detection
from devmon.analysis.series import Series, run_level


@dataclass(frozen=True)
class Change:
    """Last minus first accepted value of a series in a stage, its standard error (if known), and the two steps."""

    value: float
    se: float | None
    steps: tuple[int, int]


@dataclass(frozen=True)
class Transition:
    """Events of several series that belong together.

    `step` is the median of their estimates, `interval` spans their 90% intervals, `span` their t10 to t90; events with
    a wide interval count for these only where all have one.
    """

    step: float
    interval: tuple[float, float]
    span: tuple[float, float]
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Stage:
    """A part of the run, between checkpoints `start` and `end`: a "stage", or the "transition" between two of them."""

    kind: str
    start: int
    end: int
    changes: dict[str, Change]
    transition: Transition | None = None


def transitions(events: Iterable[Event], kinds: Collection[str] = ("jump",)) -> list[Transition]:
    """Clusters of sure run-level events of these `kinds`, in the order of their steps.

    Beginning with the best located event, another joins it when the 90% interval of each meets the extent of the other.
    The extent of a jump is its interval together with its t10-t90 span: two rises that go on at the same time are one
    transition even where their midpoints are told apart. An event with a wide interval places a transition only where
    all of its events are wide.
    """
    left = sorted(
        (event for event in events if event.kind in kinds and event.sure and run_level(event.series)),
        key=lambda event: (np.log((event.interval[1] + 1) / (event.interval[0] + 1)), event.step, event.series),
    )
    clusters = []
    while left:
        members = [event for event in left if _together(left[0], event)]
        left = [event for event in left if event not in members]
        placed = [event for event in members if not event.wide] or members
        clusters.append(
            Transition(
                step=float(np.median([event.step for event in placed])),
                interval=(min(e.interval[0] for e in placed), max(e.interval[1] for e in placed)),
                span=(min(e.extent[0] for e in placed), max(e.extent[1] for e in placed)),
                events=tuple(members),
            )
        )
    return sorted(clusters, key=lambda transition: transition.step)


def stages(series: Sequence[Series], detection: Detection, kinds: Collection[str] = ("jump",)) -> list[Stage]:
    """Stages and transitions in turn, from the first to the last checkpoint; one stage where nothing was found.

    Changes are those of the run-level series, from the first to the last accepted checkpoint within the part. A
    transition reaches from the checkpoint before its span to the one after it; two that overlap meet halfway.
    """
    return stages_between(series, transitions(detection.events, kinds))


def stages_between(series: Sequence[Series], changes: Sequence[Transition]) -> list[Stage]:
    """`stages`, where the transitions are known already."""
    shown = [each for each in series if run_level(each.name) and len(each.steps)]
    if not shown:
        return []
    grid = np.unique(np.concatenate([each.steps for each in shown]))
    # start and end of each transition, as indices of the grid; one that begins before the last has ended shares its
    # overlap with it, and neither loses its start
    ends: list[int] = []
    for i, change in enumerate(changes):
        low = max(int(np.searchsorted(grid, change.span[0], side="right")) - 1, 0)
        high = min(int(np.searchsorted(grid, change.span[1], side="left")), len(grid) - 1)
        if i and low < ends[-1]:
            low = ends[-1] = max((low + ends[-1]) // 2, ends[-2])
        ends += [low, max(high, low)]
    # the parts between these cuts are a stage and a transition in turn; a stage without room between two transitions
    # is left out
    parts = []
    for i, (a, b) in enumerate(pairwise([0, *ends, len(grid) - 1])):
        start, end = int(grid[a]), int(grid[b])
        if i % 2 == 0 and start == end and changes:
            continue
        moved = {each.name: moved_by for each in shown if (moved_by := change_over(each, start, end)) is not None}
        kind, transition = ("transition", changes[i // 2]) if i % 2 else ("stage", None)
        parts.append(Stage(kind, start, end, moved, transition))
    return parts


def change_over(series: Series, start: float, end: float) -> Change | None:
    """Last minus first accepted value from step `start` to `end`; None where there are not two."""
    values = np.asarray(series.values, dtype=float)
    where = np.flatnonzero(series.good & (series.steps >= start) & (series.steps <= end))
    if len(where) < 2:
        return None
    a, b = where[0], where[-1]
    se = None if series.se is None else float(np.hypot(series.se[a], series.se[b]))
    return Change(float(values[b] - values[a]), se, (int(series.steps[a]), int(series.steps[b])))


def _together(a: Event, b: Event) -> bool:
    return meet(a.interval, b.extent) and meet(b.interval, a.extent)
