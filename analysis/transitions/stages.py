"""`stages(series, detection)`: the run cut at its transitions, and how much each series changed in each part.

The transitions are clusters of abrupt jumps (`clusters.transitions`), the main one and the minor events alike. With
`kinds=("turn", "plateau")` stages end at the critical points of smooth curves instead, as in Hoogland et al. (2024,
arXiv:2402.02364).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from devmon.analysis.detection.results import Detection
from devmon.analysis.series import Series, run_level
from devmon.analysis.transitions.clusters import Transition, transitions


@dataclass(frozen=True)
class Change:
    """Later minus earlier of two accepted values of a series, its standard error (if known), and their steps.

    `dof` are the degrees of freedom of an error measured by few replicates, None where it is taken as known.
    """

    value: float
    se: float | None
    steps: tuple[int, int]
    dof: int | None = None


@dataclass(frozen=True)
class Stage:
    """A part of the run, between checkpoints `start` and `end`: a "stage", or the "transition" between two of them."""

    kind: str
    start: int
    end: int
    changes: dict[str, Change]
    transition: Transition | None = None


def stages(series: Sequence[Series], detection: Detection, kinds: Collection[str] = ("jump",)) -> list[Stage]:
    """Stages and transitions in turn, from the first to the last checkpoint; one stage where nothing was found.

    Changes are those of the run-level series, from the first to the last accepted checkpoint within the part. A
    transition reaches from the checkpoint before its span to the one after it; two that overlap meet halfway.
    """
    return stages_between(series, transitions(detection, kinds))


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
    where = np.flatnonzero(series.good & (series.steps >= start) & (series.steps <= end))
    return _change(series, where[0], where[-1]) if len(where) >= 2 else None


def change_across(series: Series, start: float, end: float) -> Change | None:
    """The first accepted value from step `end` on minus the last one up to `start`; None where a side has none."""
    before = np.flatnonzero(series.good & (series.steps <= start))
    after = np.flatnonzero(series.good & (series.steps >= end))
    if not len(before) or not len(after) or before[-1] >= after[0]:
        return None
    return _change(series, before[-1], after[0])


def _change(series: Series, a: int, b: int) -> Change:
    """The change from index a to b; its error is that of the replicates' changes, else of two independent errors."""
    values = np.asarray(series.values, dtype=np.float64)
    change = Change(float(values[b] - values[a]), None, (int(series.steps[a]), int(series.steps[b])))
    # What is common to both steps (chains that share their noise, the same items) drops out of the difference.
    if series.replicates is not None:
        paired = np.asarray(series.replicates, dtype=np.float64)
        paired = paired[:, b] - paired[:, a]
        if len(paired) > 1 and np.isfinite(paired).all():
            return replace(change, se=float(paired.std(ddof=1) / np.sqrt(len(paired))), dof=len(paired) - 1)
    return change if series.se is None else replace(change, se=float(np.hypot(series.se[a], series.se[b])))
