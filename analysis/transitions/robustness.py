"""`robustness(series, event)`: where an event lies when half the checkpoints, the smoother or the sampler differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event
from devmon.analysis.detection.search import detect
from devmon.analysis.series import Array, Series
from devmon.errors import DataError

REACH = 0.3  # decades around the extent of an event in which it is sought again
BANDWIDTHS = (0.05, 0.08, 0.12, 0.2, 0.3, 0.5)  # decades: half-widths of the local regression, of which one is chosen
PLACES = 400  # at which the local regression is taken within the window


@dataclass(frozen=True)
class Robustness:
    """An event in each variant of its analysis: the step of each by its name, None where it was not found.

    `band` is the least and the largest step over the event itself and all variants that found it; `found` of
    `len(steps)` did. The variants are "even" and "odd" (every other checkpoint, by the detector), "local regression"
    (by shape alone, no test) and each other series by its name.
    """

    event: Event
    steps: Mapping[str, float | None]
    band: tuple[float, float]

    @property
    def found(self) -> int:
        return sum(step is not None for step in self.steps.values())


def robustness(
    series: Series, event: Event, others: Iterable[Series] = (), detector: Detector | None = None
) -> Robustness:
    """Find an event of `series` again in halves of it, by another smoother, and in `others`: the same quantity measured
    under other sampler settings (nbeta, gamma), each with a name of its own.

    An event is found again where the detector has one of its kind and sign whose step lies within REACH decades of its
    extent; of several, the nearest. Raises DataError for two series of one name.
    """
    variants = {"even": series.where(_alternate(series, 0)), "odd": series.where(_alternate(series, 1))}
    for other in others:
        if other.name in variants or other.name in (series.name, "local regression"):
            raise DataError(f"two variants are named {other.name!r}: give each other series its own name")
        variants[other.name] = other
    steps: dict[str, float | None] = {}
    for name, variant in variants.items():
        steps[name] = _again(event, detect(variant, detector).events)
    steps["local regression"] = _by_shape(series, event)
    known = [event.step, *(step for step in steps.values() if step is not None)]
    return Robustness(event, steps, (min(known), max(known)))


def _alternate(series: Series, start: int) -> np.ndarray:
    """Every other accepted point."""
    chosen = np.zeros(len(series.steps), dtype=bool)
    chosen[np.flatnonzero(series.good)[start::2]] = True
    return chosen


def _window(event: Event) -> tuple[float, float]:
    low, high = event.extent
    return low * 10**-REACH, max(high, 1.0) * 10**REACH


def _again(event: Event, events: Iterable[Event]) -> float | None:
    low, high = _window(event)
    same = [e.step for e in events if e.kind == event.kind and e.size * event.size >= 0 and low <= e.step <= high]
    return min(same, key=lambda step: abs(np.log((step + 1) / (event.step + 1))), default=None)


def _by_shape(series: Series, event: Event) -> float | None:
    """The place in the window where the local-regression curve has the event's shape; None where it lies at an end."""
    good = series.where(series.good)
    steps, y = np.asarray(good.steps, dtype=np.float64), np.asarray(good.values, dtype=np.float64)
    if not np.any(steps > 0):
        return None
    origin = float(steps[steps > 0][0])
    x = np.log10(steps + origin)
    low, high = _window(event)
    at = np.linspace(max(np.log10(low + origin), x[0]), min(np.log10(high + origin), x[-1]), PLACES)
    value, slope = local_regression(x, y, at, bandwidth(x, y))
    sign = 1.0 if event.size >= 0 else -1.0
    if event.kind == "jump":
        case = sign * slope
    elif event.kind == "plateau":
        case = -np.abs(slope)
    else:
        base = np.interp(at, at[[0, -1]], value[[0, -1]]) if event.kind == "bump" else 0.0
        case = sign * (value - base)
    best = int(np.argmax(case))
    if best in (0, PLACES - 1) or (event.kind == "jump" and case[best] <= 0):
        return None
    return float(10 ** at[best] - origin)


def local_regression(x: Array, y: Array, at: Array, width: float) -> tuple[Array, Array]:
    """Value and slope at each place of `at` of the parabola fitted to (x, y) with tricube weights (Cleveland, 1979).

    The half-width is `width`, or as much more as takes in six points.
    """
    value, slope = np.empty(len(at)), np.empty(len(at))
    for i, place in enumerate(at):
        distance = np.abs(x - place)
        half = max(width, 1.001 * float(np.sort(distance)[min(6, len(x) - 1)]))
        root = np.sqrt(np.clip(1 - (distance / half) ** 3, 0, 1) ** 3)
        design = np.vander(x - place, 3, increasing=True)
        value[i], slope[i] = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0][:2]
    return value, slope


def bandwidth(x: Array, y: Array) -> float:
    """The half-width that best predicts each point from the others."""

    def error(width: float) -> float:
        left_out = range(1, len(x) - 1)
        fits = [local_regression(np.delete(x, i), np.delete(y, i), x[i : i + 1], width)[0][0] for i in left_out]
        return float(np.mean(np.square(y[1:-1] - fits)))

    return min(BANDWIDTHS, key=error)
