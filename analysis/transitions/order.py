"""What came first: every sure event of a run against the one that the others are compared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from devmon.analysis.detection.events import Event
from devmon.analysis.detection.results import Detection
from devmon.analysis.series import Array, run_level


@dataclass(frozen=True)
class Lag:
    """How far an event came behind the reference: `steps` (negative: before it), 90% interval, P(it came first).

    The order is `settled` where the interval leaves out 0 and both events are resolved between their checkpoints.
    """

    event: Event
    steps: float
    interval: tuple[float, float]
    first: float
    settled: bool


@dataclass(frozen=True)
class LeadLag:
    """How many steps a comes before b: `lag` = step of b - step of a (median), its 90% interval, P(a first)."""

    lag: float
    interval: tuple[float, float]
    first: float


def reference_event(events: Iterable[Event]) -> Event | None:
    """The event that others are compared with: among the sure run-level jumps the largest of prefix matching if there
    is one, else the one with the smallest p-value and, of equals, the largest change against its own interval."""
    sure = [event for event in events if event.kind == "jump" and event.sure and run_level(event.series)]
    induction = [event for event in sure if "prefix_matching" in event.series]
    if induction:
        return max(induction, key=lambda event: (abs(event.size), -event.step))
    return min(sure, key=lambda event: (event.p_value, -_clarity(event), event.step), default=None)


def lags(detection: Detection, reference: Event | None) -> list[Lag]:
    """Every other sure event against `reference` (see `reference_event`), run-level series first, each by its lag."""
    if reference is None:
        return []
    rows, place = [], detection.posterior(reference)
    for event in detection.events:
        if event is not reference and event.sure:
            lag = lead_lag(place, detection.posterior(event))
            settled = event.resolved and reference.resolved and not lag.interval[0] <= 0 <= lag.interval[1]
            rows.append(Lag(event, lag.lag, lag.interval, 1 - lag.first, settled))
    return sorted(rows, key=lambda row: (not run_level(row.event.series), row.steps))


def lead_lag(a: Event | tuple[Array, Array], b: Event | tuple[Array, Array], level: float = 0.90) -> LeadLag:
    """Compare two event locations, given as events or as posteriors (steps, weights), with independent errors.

    Two events within one checkpoint gap come out near P = ½, as they should. Ties count half for each.
    """
    (s, u), (t, v) = _location(a), _location(b)
    lags, tail = np.subtract.outer(t, s).ravel(), (1 - level) / 2
    levels = [tail, 0.5, 1 - tail]
    if (u == u[0]).all() and (v == v[0]).all():
        # pairs of equal weight need not be sorted: three places of the order, and how many are on either side of 0
        each = float(v[0] * u[0])
        places = _places(each, len(lags), tuple(levels))
        low, middle, high = (float(lag) for lag in np.partition(lags, places)[places])
        after = np.count_nonzero(lags > 0)
        ties = len(lags) - after - np.count_nonzero(lags < 0)
        first = float(min(each * (after + 0.5 * ties), 1.0))
        return LeadLag(middle, (low, high), first)

    weights = np.multiply.outer(v, u).ravel()
    order = np.argsort(lags)
    if (lags[order][1:] == lags[order][:-1]).any():  # equal lags in the order of the pairs, on any machine
        order = np.argsort(lags, kind="stable")
    lags, cumulative = lags[order], np.cumsum(weights[order])
    places = np.minimum(np.searchsorted(cumulative, levels), len(lags) - 1)
    low, middle, high = (float(lag) for lag in lags[places])
    first = float(np.clip(np.sum(weights[order] * ((lags > 0) + 0.5 * (lags == 0))), 0, 1))
    return LeadLag(middle, (low, high), first)


@lru_cache(maxsize=64)  # one for each pair of numbers of draws, of which almost all are DRAWS
def _places(each: float, count: int, levels: tuple[float, ...]) -> NDArray[np.int64]:
    """Where in the order of `count` pairs of this weight their sum reaches each of the levels."""
    return np.minimum(np.searchsorted(np.cumsum(np.full(count, each)), levels), count - 1)


def _location(item: Event | tuple[Array, Array]) -> tuple[Array, Array]:
    if isinstance(item, Event):
        steps = np.asarray(item.quantiles)
        return steps, np.full(len(steps), 1 / len(steps))
    steps, weights = np.asarray(item[0], dtype=np.float64), np.asarray(item[1], dtype=np.float64)
    if len(steps) > 400:  # equal-weight quantiles keep the comparison of all pairs small
        levels = (np.arange(400) + 0.5) / 400
        return np.interp(levels, np.cumsum(weights) / weights.sum(), steps), np.full(400, 1 / 400)
    return steps, weights / weights.sum()


def _clarity(event: Event) -> float:
    return abs(event.size) / max(event.size_interval[1] - event.size_interval[0], 1e-9 * abs(event.size) + 1e-300)
