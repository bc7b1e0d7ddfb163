"""Does an event coincide with a kink of the learning-rate schedule? Where it does, the schedule may be its cause.

A kink is a checkpoint at which the slope of the learning rate changes abruptly, or a reset at which it jumps. The
chance of a coincidence is that of an event of the same extent, put down anywhere within the run with equal probability
in log step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from devmon.analysis.detection.events import Event, meet
from devmon.analysis.run import RunData
from devmon.analysis.series import Array, Series, checked
from devmon.errors import DataError

ABRUPT = 0.3  # share by which slopes on two sides differ at a kink: |b - a| / (|a| + |b|)
RESET = 0.4  # change of log learning rate from one checkpoint to the next that may be a reset (a factor 1.5)
RATES = ("learning_rate", "lr")  # variables that hold the schedule; loggers add the optimizer's name after a hyphen
STEEP = 5.0  # a reset is this many times as large as the changes beside it


@dataclass(frozen=True)
class Kink:
    """A place where the schedule bends ("kink") or jumps ("reset"), between steps `low` and `high`."""

    step: float
    low: float
    high: float
    kind: str


@dataclass(frozen=True)
class Coincidence:
    """An event and the kinks within its extent. `chance` is the probability that an event so wide meets any kink."""

    event: Event
    kinks: tuple[Kink, ...]
    chance: float

    @property
    def note(self) -> str:
        if not self.kinks:
            return ""
        where = ", ".join(f"{kink.kind} at step {kink.step:.0f}" for kink in self.kinks)
        return f"may come from the learning-rate schedule: {where} (by chance with probability {self.chance:.2f})"


@dataclass(frozen=True)
class ScheduleCheck:
    """All events against all kinks. `p_value`: the chance of as many coincidences, were events placed independently."""

    rows: tuple[Coincidence, ...]
    kinks: tuple[Kink, ...]
    p_value: float


def schedule_check(
    events: Iterable[Event], schedule: Series | Sequence[float], first: float, last: float
) -> ScheduleCheck:
    """Events of a run over steps `first` to `last` against a series of learning rates, or against the steps of known
    kinks.

    The extent of an event is its interval together with its t10-t90 span, so that a change which sets in at a kink
    counts.
    """
    if not 0 <= first < last:
        raise DataError(f"a run goes from a step of at least 0 to a later one, got {first:g} to {last:g}")
    kinks = kinks_of(schedule) if isinstance(schedule, Series) else _given(schedule)
    kinks = tuple(kink for kink in kinks if meet((kink.low, kink.high), (first, last)))
    rows = []
    for event in events:
        own = event.extent
        near = tuple(kink for kink in kinks if meet(own, (kink.low, kink.high)))
        rows.append(Coincidence(event, near, chance_of(own, kinks, first, last)))
    return ScheduleCheck(tuple(rows), kinks, _as_many(rows))


def schedule_of(run: RunData, series: Sequence[Series]) -> Series | list[float] | None:
    """The learning rates that a run holds (a series called …/learning_rate, …/lr or lr-SGD), else the steps that its
    settings tell: `warm_up`, the end of the warm-up, and `kinks`, others at which the rate bends or jumps; else the
    rates that a monitor saw (`attrs["rates"]`)."""
    for each in series:
        if is_rate(each.name) and np.isfinite(each.values).sum() >= 6:
            return each
    settings, seen = run.attrs.get("settings"), run.attrs.get("rates")
    if isinstance(settings, Mapping):
        kinks = settings.get("kinks")
        steps = [settings.get("warm_up"), *(kinks if isinstance(kinks, list | tuple) else [])]
        told = [float(step) for step in steps if isinstance(step, int | float) and step > 0]
        if told:
            return told
    if not isinstance(seen, Mapping) or len(seen) < 6:
        return None
    rates = sorted((int(step), float(rate)) for step, rate in seen.items())
    return Series("learning rate", *np.array(rates, dtype=float).T)


def is_rate(series: str) -> bool:
    """Whether a series is the schedule by its name, and so a setting and nothing that the model does."""
    return any(part.partition("-")[0] in RATES for part in series.lower().split("/"))


def told_beside(events: Iterable[Event], series: Sequence[Series], most: int = 4) -> list[str]:
    """In words the sure events that meet a kink of the learning rate among `series`, the `most` telling ones."""
    rates = next((each for each in series if is_rate(each.name)), None)
    steps = [float(s) for each in series for s in each.steps]
    if rates is None or max(steps) <= min(steps):
        return []
    try:
        rows = schedule_check([e for e in events if e.sure], rates, min(steps), max(steps)).rows
    except DataError:  # learning rates that cannot be read say nothing
        return []
    met = sorted((row for row in rows if row.kinks), key=lambda row: row.chance)[:most]
    return [f"the {row.event.word} of {row.event.series} at step {row.event.step:.0f} {row.note}" for row in met]


def kinks_of(schedule: Series) -> tuple[Kink, ...]:
    """Kinks and resets of a series of learning rates, measured without noise.

    The slope before a checkpoint and after it (one-sided parabolas through three points) agree on any smooth schedule.
    A kink is abrupt whatever the axes, so they must differ by ABRUPT in learning rate over step, log over step and log
    over log step. Needs at least three checkpoints on either side of a kink, and cannot tell two that are closer than
    that.
    """
    steps, rates, _ = checked(schedule.steps, schedule.values, name=schedule.name)
    if np.any(rates < 0):
        raise DataError(
            f"series {schedule.name!r}: learning rates are at least 0, got {rates.min():g}: is it another series?"
        )
    if len(steps) < 6:
        raise DataError(
            f"series {schedule.name!r}: kinks need at least 6 points, got {len(steps)}: give their steps instead"
        )
    jumps = _resets(rates)
    bend = np.min([_bend(x, y) for x, y in _axes(steps, rates)], axis=0)
    for i in jumps:  # a jump bends the slopes of its neighbours, too
        bend[max(i - 2, 0) : i + 4] = 0
    kinks = [Kink(float(steps[i + 1]), float(steps[i]), float(steps[i + 1]), "reset") for i in jumps]
    above = np.flatnonzero(bend > ABRUPT)
    for group in np.split(above, np.flatnonzero(np.diff(above) > 2) + 1):
        if len(group):
            i = group[np.argmax(bend[group])]
            kinks.append(Kink(float(steps[i]), float(steps[i - 1]), float(steps[i + 1]), "kink"))
    return tuple(sorted(kinks, key=lambda kink: kink.step))


def chance_of(own: tuple[float, float], kinks: Sequence[Kink], first: float, last: float) -> float:
    """Share of the places within the run at which an interval as long in log step as `own` meets a kink.

    With the interval [u, u + w] and u uniform, a kink [a, b] is met for u from a - w to b: the union of these over all
    kinks.
    """
    x = _log(np.array([first, last, max(own[0], first), min(own[1], last)]))
    width = max(float(x[3] - x[2]), 0.0)
    end = float(x[1]) - width
    if end <= x[0]:
        return 1.0 if kinks else 0.0
    covered, reached = 0.0, float(x[0])
    for a, b in sorted((float(_log(kink.low)) - width, float(_log(kink.high))) for kink in kinks):
        low, high = max(a, reached), min(b, end)
        covered += max(high - low, 0.0)
        reached = max(reached, high)
    return covered / (end - float(x[0]))


def _as_many(rows: Sequence[Coincidence]) -> float:
    """P(at least as many coincidences) for independent events, each with its own chance (Poisson-binomial)."""
    law = np.ones(1)
    for row in rows:
        law = np.convolve(law, [1 - row.chance, row.chance])
    return float(law[sum(bool(row.kinks) for row in rows) :].sum())


def _given(steps: Sequence[float]) -> tuple[Kink, ...]:
    values = np.asarray(steps, dtype=np.float64)
    if values.ndim != 1 or not np.all(np.isfinite(values) & (values >= 0)):
        raise DataError(f"kinks are given as a list of steps of at least 0, got {steps!r}")
    return tuple(Kink(float(s), float(s), float(s), "kink") for s in np.sort(values))


def _axes(steps: Array, rates: Array) -> list[tuple[Array, Array]]:
    positive = rates[rates > 0]
    logs = np.log(np.maximum(rates, 1e-3 * positive.min() if len(positive) else 1.0))
    return [(steps, rates), (steps, logs), (_log(steps), logs)]


def _bend(x: Array, y: Array) -> Array:
    """(n,) how much the slopes before and after each point differ, 0 (alike) to 1; 0 at the two points of either
    end."""
    before, after = _slope(x, y, -1), _slope(x, y, 1)
    flat = 1e-6 * float(np.ptp(y)) / float(np.ptp(x)) + 1e-300  # slopes below it are none
    bend = np.abs(after - before) / np.maximum(np.abs(after) + np.abs(before), flat)
    return np.where(np.abs(after) + np.abs(before) > flat, bend, 0.0)


def _slope(x: Array, y: Array, way: int) -> Array:
    """(n,) slope at each point of the parabola through it and the next two on one side; 0 where there are not two."""
    n, slope = len(x), np.zeros(len(x))
    inner = np.arange(2, n - 2)
    near, far = inner + way, inner + 2 * way
    a = (y[near] - y[inner]) / (x[near] - x[inner])
    b = (y[far] - y[near]) / (x[far] - x[near])
    slope[inner] = a - (b - a) * (x[near] - x[inner]) / (x[far] - x[inner])
    return slope


def _resets(rates: Array) -> list[int]:
    """Indices i where the learning rate jumps from i to i + 1, out of proportion to the changes beside it.

    The first and the last change are none: there a warm-up begins, or a decay ends, at zero.
    """
    positive = rates[rates > 0]
    size = np.abs(np.diff(np.log(np.maximum(rates, positive.min() if len(positive) else 1.0))))
    beside = np.maximum(size[2:], size[:-2])
    return [int(i) + 1 for i in np.flatnonzero((size[1:-1] > RESET) & (size[1:-1] > STEEP * beside))]


def _log(steps: Array | float) -> Array:
    return np.log10(np.asarray(steps, dtype=np.float64) + 1)
