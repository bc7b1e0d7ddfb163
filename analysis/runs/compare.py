"""Many runs of one configuration: their events matched, never their curves averaged; and which series comes first.

A curve averaged over runs whose transitions differ in step is smooth where every run leaps. So each run is searched
alone, and events of one series, kind and sign are matched where their extents meet in log step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binom, binomtest

from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event
from devmon.analysis.detection.results import Detection
from devmon.analysis.detection.search import benjamini_hochberg, detect
from devmon.analysis.series import Array
from devmon.analysis.transitions.agreement import SHIFTS, log_extent, most_covered, shifted
from devmon.errors import DataError

WIDENING = 0.1  # decades by which an extent is widened on either side (a factor of 1.26)
NOT_ENOUGH = "not enough runs"


@dataclass(frozen=True)
class Matched:
    """One event as it shows in several runs: `events` by run, out of `of` runs in which the series could be searched.

    `step` is the median over runs, `interval` the order statistics that hold the median of all such runs with
    probability `coverage` (for few runs less than 0.9), `spread` the standard deviation of log10 step over runs (None
    for one run). An event of a single run keeps its own interval, with coverage 0. `p_value`: the share of independent
    circular shifts of the runs' events that bring events of as many runs together.
    """

    series: str
    kind: str
    sign: int
    events: Mapping[str, Event]
    of: int
    step: float
    interval: tuple[float, float]
    coverage: float
    spread: float | None
    p_value: float
    q_value: float | None
    note: str

    @property
    def word(self) -> str:
        """What a reader calls it; a jump up or down where it is abrupt in at least half of its runs."""
        events = list(self.events.values())
        if self.kind == "jump" and 2 * sum(event.abrupt for event in events) >= len(events):
            return "jump up" if self.sign > 0 else "jump down"
        return replace(events[0], abrupt=False).word


@dataclass(frozen=True)
class SignTest:
    """In how many runs series a came first, b came first, or neither (`ties`); two-sided exact binomial `p_value`.

    `outcome` is "a first", "b first", "no order", or "not enough runs" where even unanimous runs could not show alpha.
    `lag` is the median over runs of step of b - step of a, `interval` and `coverage` as in `Matched`.
    """

    outcome: str
    a_first: int
    b_first: int
    ties: int
    p_value: float
    lag: float
    interval: tuple[float, float]
    coverage: float
    lags: Mapping[str, float]


@dataclass(frozen=True)
class RunsComparison:
    """Every run searched alone (`detections`), and the events `matched` across them, those of most runs first."""

    detections: Mapping[str, Detection]
    matched: tuple[Matched, ...]
    outcome: str
    within: float

    def to_frame(self) -> pd.DataFrame:
        """One row a matched event."""
        columns = ["series", "kind", "sign", "found", "of", "step", "low", "high", "coverage", "spread", "p_value",
                   "q_value", "runs", "note"]  # fmt: skip
        rows = [
            (m.series, m.kind, m.sign, len(m.events), m.of, m.step, *m.interval, m.coverage, m.spread, m.p_value,
             m.q_value, ", ".join(m.events), m.note)
            for m in self.matched
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def lead_lag(self, a: str | Matched, b: str | Matched, *, alpha: float = 0.05) -> SignTest:
        """Whether events of a come before those of b, over the runs that have both.

        Of a series given by name, the jump found in most runs counts (the earlier one of equals).
        """
        first, second = self._of(a), self._of(b)
        lags = {run: second.events[run].step - first.events[run].step for run in first.events if run in second.events}
        return sign_test(lags, alpha=alpha)

    def _of(self, series: str | Matched) -> Matched:
        if isinstance(series, Matched):
            return series
        mine = [m for m in self.matched if m.series == series and m.kind == "jump"]
        if not mine:
            known = ", ".join(sorted({m.series for m in self.matched if m.kind == "jump"})) or "none"
            raise DataError(f"no run has a jump of series {series!r}; jumps were found in {known}")
        return max(mine, key=lambda m: (len(m.events), -m.step))


def compare_runs(
    runs: Mapping[str, Any],
    detector: Detector | None = None,
    *,
    within: float = WIDENING,
    shifts: int = SHIFTS,
    seed: int = 0,
) -> RunsComparison:
    """Search each run and match its sure events with those of the others.

    `runs` maps a name to whatever `detect` takes, or to its `Detection`. Events of one series, kind and sign match
    where their extents (interval and t10-t90 span), widened by `within` decades, share a place; each run gives one
    event to a match. With fewer than two runs the outcome is "not enough runs" and nothing is matched.
    """
    if not within >= 0:
        raise DataError(f"within is a number of decades of at least 0, got {within}")
    detections = {run: data if isinstance(data, Detection) else detect(data, detector) for run, data in runs.items()}
    if len(detections) < 2:
        return RunsComparison(detections, (), NOT_ENOUGH, within)
    matched = []
    for series in dict.fromkeys(name for detection in detections.values() for name in detection.fits):
        searched = {run: d for run, d in detections.items() if _searched(d, series)}
        if searched:
            matched += _match(series, searched, within, shifts, seed)
    family = [m.p_value for m in matched if len(m.events) > 1]
    matched = [replace(m, q_value=benjamini_hochberg(m.p_value, family)) if len(m.events) > 1 else m for m in matched]
    matched.sort(key=lambda m: (-len(m.events), m.step, m.series))
    return RunsComparison(detections, tuple(matched), "EVENTS" if matched else "NO EVENT", within)


def sign_test(lags: Mapping[str, float], *, alpha: float = 0.05) -> SignTest:
    """The exact sign test of lags (b minus a), one a run; lags of 0 are ties and count for neither side."""
    values = np.array(list(lags.values()), dtype=np.float64)
    if not np.all(np.isfinite(values)):
        raise DataError("lags must be finite: leave out the runs that lack one of the two events")
    a_first, b_first = int(np.sum(values > 0)), int(np.sum(values < 0))
    n = a_first + b_first
    p = float(binomtest(a_first, n, 0.5).pvalue) if n else 1.0
    if 2 * 0.5**n > alpha:
        outcome = NOT_ENOUGH
    elif p <= alpha:
        outcome = "a first" if a_first > b_first else "b first"
    else:
        outcome = "no order"
    lag, interval, coverage = median_interval(values)
    return SignTest(outcome, a_first, b_first, len(values) - n, p, lag, interval, coverage, dict(lags))


def median_interval(values: Array, level: float = 0.90) -> tuple[float, tuple[float, float], float]:
    """The median, the narrowest symmetric pair of order statistics with coverage `level` or all there is, and its
    coverage.

    The interval from the k-th smallest to the k-th largest of n values misses the median with probability
    2 P(Binomial(n, ½) < k).

    >>> median_interval(np.array([3.0, 1.0, 2.0, 5.0, 4.0]))
    (3.0, (1.0, 5.0), 0.9375)
    """
    ordered, n = np.sort(values), len(values)
    if n == 0:
        return float("nan"), (float("nan"), float("nan")), 0.0
    k = max([k for k in range(1, n // 2 + 1) if 1 - 2 * binom.cdf(k - 1, n, 0.5) >= level], default=1)
    coverage = max(1 - 2 * float(binom.cdf(k - 1, n, 0.5)), 0.0)
    return float(np.median(ordered)), (float(ordered[k - 1]), float(ordered[n - k])), coverage


def _searched(detection: Detection, series: str) -> bool:
    return series in detection.fits and detection.fits[series].outcome in ("EVENTS", "NO EVENT")


def _match(series: str, searched: Mapping[str, Detection], within: float, shifts: int, seed: int) -> list[Matched]:
    """The events of one series, matched: the place where most runs have one first, then the next among those left."""
    names, matched = list(searched), []
    sure = {run: [e for e in d.events if e.series == series and e.sure] for run, d in searched.items()}
    trends = [trend.steps for d in searched.values() if (trend := d.fits[series].trend) is not None]
    ends = log_extent((min(float(t[0]) for t in trends), max(float(t[-1]) for t in trends)))
    for kind, sign in sorted({(e.kind, 1 if e.size > 0 else -1) for events in sure.values() for e in events}):
        left = [[e for e in sure[run] if e.kind == kind and (e.size > 0) == (sign > 0)] for run in names]
        null = shifted([_extents(events, within) for events in left], *ends, shifts=shifts, seed=seed)
        while any(left):
            _, members = most_covered([_extents(events, within) for events in left])
            events = {names[i]: left[i][j] for i, j in sorted(members.items())}
            left = [[e for j, e in enumerate(own) if members.get(i) != j] for i, own in enumerate(left)]
            matched.append(_matched(series, kind, sign, events, len(names), null))
    return matched


def _matched(series: str, kind: str, sign: int, events: dict[str, Event], of: int, null: np.ndarray) -> Matched:
    steps = np.array([event.step for event in events.values()])
    step, interval, coverage = median_interval(steps)
    spread = float(np.std(np.log10(steps + 1), ddof=1)) if len(steps) > 1 else None
    note = "found in one run only" if len(events) == 1 else ""
    if len(events) == 1:
        interval, coverage = next(iter(events.values())).interval, 0.0
    p = (1 + int(np.sum(null >= len(events)))) / (1 + len(null))
    return Matched(series, kind, sign, events, of, step, interval, coverage, spread, p, None, note)


def _extents(events: list[Event], within: float) -> list[tuple[float, float]]:
    return [log_extent(event.extent, within) for event in events]
