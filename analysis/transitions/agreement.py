"""Do events of several tracks (series of one run, or runs of one series) fall together more often than by chance?

The null keeps the events of each track as they are, relative to one another, and turns each track by an independent
uniform shift around the circle of log step. What it tests is the place alone, not whether the events are real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from devmon.analysis.detection.results import Detection
from devmon.analysis.series import Array, run_level
from devmon.errors import DataError

SHIFTS = 999  # simulated turns of the tracks: the smallest p-value is 1 / (1 + SHIFTS)
Interval = tuple[float, float]


@dataclass(frozen=True)
class Agreement:
    """The place where most series of a run have an event: how many, of how many, at which step; and the shift null.

    `expected` is the mean of the largest number over the shifts, `p_value` the share of shifts with as large a number.
    """

    series: tuple[str, ...]
    of: int
    step: float
    expected: float
    p_value: float


def agreement(
    detection: Detection, first: float, last: float, *, kind: str = "jump", shifts: int = SHIFTS, seed: int = 0
) -> Agreement | None:
    """How many run-level series of a run, over steps `first` to `last`, have a sure event of this kind at one place.

    The place of an event is its interval together with its span. None where fewer than two series have one. Series made
    from the same measurements (a maximum and its element) agree by construction: leave one of them out.
    """
    events = [e for e in detection.events if e.kind == kind and e.sure and run_level(e.series)]
    names = sorted({e.series for e in events})
    if len(names) < 2:
        return None
    tracks = [[log_extent(e.extent) for e in events if e.series == name] for name in names]
    place, members = most_covered(tracks)
    null = shifted(tracks, *log_extent((first, last)), shifts=shifts, seed=seed)
    p = (1 + int(np.sum(null >= len(members)))) / (1 + shifts)
    return Agreement(tuple(names[i] for i in sorted(members)), len(names), 10**place - 1, float(null.mean()), p)


def log_extent(interval: Interval, more: float = 0.0) -> Interval:
    """An interval of steps in log10(step + 1), widened by `more` decades on both sides."""
    low, high = np.log10(np.maximum(interval, 0.0) + 1)
    return float(low) - more, float(high) + more


def most_covered(tracks: Sequence[Sequence[Interval]]) -> tuple[float, dict[int, int]]:
    """The place at which most tracks have an interval, and for each of them the index of that interval.

    Of equally covered places the one in the middle of the narrowest common part; of a track's intervals there the one
    whose middle is nearest.
    """
    best: tuple[int, float, float] | None = None  # how many, minus the length of the common part, minus where it begins
    for low, _ in (interval for track in tracks for interval in track):
        here = [[interval for interval in track if interval[0] <= low <= interval[1]] for track in tracks]
        ends = [max(end for _, end in covering) for covering in here if covering]
        key = len(ends), low - min(ends), -low
        best = key if best is None else max(best, key)
    if best is None:
        return float("nan"), {}
    place = -best[2] - best[1] / 2
    members = {}
    for i, track in enumerate(tracks):
        inside = [j for j, (start, end) in enumerate(track) if start <= place <= end]
        if inside:
            members[i] = min(inside, key=lambda j: abs(sum(track[j]) / 2 - place))
    return place, members


def shifted(
    tracks: Sequence[Sequence[Interval]], first: float, last: float, *, shifts: int, seed: int
) -> NDArray[np.int64]:
    """(shifts,) the largest number of tracks with an interval at one place, each track turned around [first, last]."""
    if not last > first:
        raise DataError(f"a circle of log step needs a length above 0, got {first:g} to {last:g}")
    length = last - first
    owner = np.array([i for i, track in enumerate(tracks) for _ in track])
    low, high = np.array([interval for track in tracks for interval in track], dtype=np.float64).reshape(-1, 2).T
    turn = np.random.default_rng([seed, 0xA9]).uniform(0, length, (shifts, len(tracks)))[:, owner]
    start: Array = (low - first + turn) % length
    # the cover of a place only grows where an interval begins: (shifts, place, interval)
    inside = (start[:, :, None] - start[:, None, :]) % length <= (high - low)
    tracks_at = [inside[:, :, owner == i].any(2) for i in np.unique(owner)]
    return np.asarray(np.sum(tracks_at, axis=0).max(1), dtype=np.int64)
