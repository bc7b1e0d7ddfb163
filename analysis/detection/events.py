"""What a search of one series returns: events, the smoothed curve, the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from devmon.analysis.detection.constants import MAX_Q, WIDE
from devmon.analysis.series import Array
from devmon.analysis.wording import number, step
from devmon.errors import DataError


@dataclass(frozen=True)
class Event:
    """One transition. Steps are optimizer steps; sizes are in the units of the series.

    `interval` and `size_interval` are credible at the detector's level. `size` is the signed change of a jump, the
    height of a bump, the prominence of a turn (+ maximum, - minimum) or of a plateau (signed like the trend). `span` is
    from t10 to t90 of a jump, the full width at half maximum of a bump, and where a plateau is slow; `width` is its
    length in decades of step.

    Two questions, two answers. Is it there: `p_value`, against the best curve without it and noise, for all places,
    sizes and kinds of the series at once; `q_value` also for the number of series. Is it abrupt: `p_abrupt`, the
    change of a jump or bump against drift and random walks (None for turns and plateaus, which need only be there),
    and `abrupt`. `resolved` is false where fewer than three checkpoints lie within the span (of a turn: the
    interval). `quantiles` are the 1st to 99th percentile of the location.
    """

    kind: str
    step: float
    interval: tuple[float, float]
    size: float
    size_interval: tuple[float, float]
    width: float | None
    span: tuple[float, float] | None
    p_value: float
    q_value: float | None
    resolved: bool
    note: str
    series: str = ""
    quantiles: tuple[float, ...] = field(default=(), repr=False)
    p_abrupt: float | None = None
    abrupt: bool = False

    @property
    def word(self) -> str:
        """What a reader calls it; "jump" only where it is abrupt."""
        up = self.size > 0
        if self.kind == "jump":
            return "jump" if self.abrupt else "rise" if up else "fall"
        return {"turn": "maximum" if up else "minimum", "bump": "bump" if up else "dip"}.get(self.kind, self.kind)

    @property
    def sure(self) -> bool:
        """Whether it stands after the correction for the number of series (q <= 0.05; p where q is not known)."""
        return (self.p_value if self.q_value is None else self.q_value) <= MAX_Q

    @property
    def wide(self) -> bool:
        """Whether the ends of the interval differ by more than a factor of WIDE."""
        return (self.interval[1] + 1) / (self.interval[0] + 1) > WIDE

    @property
    def extent(self) -> tuple[float, float]:
        """The interval together with the span; of a plateau, which is where a stage ends, the interval alone."""
        low, high = self.interval if self.kind == "plateau" or self.span is None else self.span
        return min(low, self.interval[0]), max(high, self.interval[1])

    def in_words(self) -> str:
        """The event in a sentence without its full stop: what happened, where, and how sure that is."""
        low, high = (step(x) for x in self.interval)
        chance = f"p = {number(self.p_value, 2)}" + ("" if self.q_value is None else f", q = {number(self.q_value, 2)}")
        size, over = number(abs(self.size)), ""
        if self.kind == "jump":
            what = f"{'rises' if self.size > 0 else 'falls'}{' abruptly' if self.abrupt else ''} by {size}"
        else:
            what = f"has a {self.word}" + (f" of {size}" if self.kind == "bump" else "")
            over = "" if self.span is None else f" over steps {step(self.span[0])}–{step(self.span[1])}"
        at = ", flattest at" if self.kind == "plateau" else " at"
        return f"{self.series} {what}{over}{at} step {step(self.step)} [{low}, {high}] ({chance})"

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def _repr_html_(self) -> str:
        from markupsafe import escape

        note = "" if self.resolved else f" Not resolved in time{f': {self.note}' if self.note else ''}."
        return f"<p><b>{escape(self.word)}</b>: {escape(self.in_words())}.{escape(note)}</p>"


@dataclass(frozen=True)
class Trend:
    """The smoothed curve at each step used, with the band in which a new value would lie at the detector's level."""

    steps: Array
    mean: Array
    low: Array
    high: Array


class TrendLater(Trend):
    """A trend that is worked out when it is first looked at: reports look at none, and it is most of a search."""

    def __init__(self, make: Callable[[], Trend]) -> None:
        object.__setattr__(self, "_make", make)

    def __getattr__(self, name: str) -> Any:
        if name not in ("steps", "mean", "low", "high"):
            raise AttributeError(name)
        self.__dict__.update(vars(self._make()))
        return self.__dict__[name]


@dataclass(frozen=True)
class Noise:
    """What the trend leaves: its sd (median over steps) and its correlation from one checkpoint to the next.

    `source` says where they come from: "replicates", "se" (estimated, and bounded by the errors given) or "estimated".
    """

    sd: float
    autocorrelation: float
    source: str = "estimated"


@dataclass(frozen=True)
class Fit:
    """What one series says. `outcome` is EVENTS, NO EVENT, UNRESOLVED or SAMPLER REJECTED.

    `p_values` holds, for extrema of the curve ("turn") and of its slope ("slope"), the p-value of each one found, or
    of the most likely one where none is: simultaneous over the series. Nothing smaller than `smallest` is reported.
    """

    outcome: str
    found: tuple[Event, ...] = ()
    trend: Trend | None = None
    noise: Noise | None = None
    p_values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    series: str = ""
    locations: tuple[tuple[Event, Array], ...] = field(default=(), repr=False)
    smallest: float = 0.0

    def events(self) -> list[Event]:
        """The events at or under the detector's alpha, in the order of their steps."""
        return list(self.found)

    def posterior(self, event: Event) -> tuple[Array, Array]:
        """Location posterior of an event of this fit: steps (sorted) and weights (sum 1)."""
        for known, draws in self.locations:
            if known.kind == event.kind and known.step == event.step:
                steps, counts = np.unique(draws, return_counts=True)
                return steps, counts / counts.sum()
        raise DataError(f"this fit has no {event.kind} at step {event.step:g}: ask the fit the event came from")


def meet(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two intervals have a point in common."""
    return a[0] <= b[1] and b[0] <= a[1]
