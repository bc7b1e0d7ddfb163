"""What is said of an event: its place and size with their intervals, its span, and where checkpoints are missing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from devmon.analysis.detection.abrupt import abruptness
from devmon.analysis.detection.chain import Chain, Link, ending
from devmon.analysis.detection.constants import DRAWS, LONGEST, NARROW, SHARE, SPIKE
from devmon.analysis.detection.events import Event
from devmon.analysis.detection.spline import summit
from devmon.analysis.detection.windows import p_value
from devmon.analysis.series import Array


class Ruler:
    """Turns the links of a chain into events in the steps and units of one series."""

    def __init__(self, chain: Chain, sd: Array, null: Array, *, level: float, alpha: float, first: float, scale: float,
                 steps: Array, name: str) -> None:  # fmt: skip
        self.chain, self.sd, self.null, self.level, self.alpha = chain, sd, null, level, alpha
        self.first, self.scale, self.steps, self.name = first, scale, steps, name
        self.rng = np.random.default_rng(0)

    def events(self) -> list[tuple[Event, Array]]:
        """Every event with sorted draws of its step, in the order of steps. A turn that is a bump stands for its foot
        too."""
        found = self.chain.events()
        bumps = {k: span for k, link in found if link.role == "turn" and (span := self._bump(k, link)) is not None}
        parts = {k for k, link in found for top, span in bumps.items() if k != top and self._part(link, top, span)}
        return [self._event(k, link, bumps.get(k)) for k, link in found if k not in parts]

    def _event(self, k: int, link: Link, bump: tuple[float, float] | None) -> tuple[Event, Array]:
        kind = "bump" if bump else {"turn": "turn", "rise": "jump", "plateau": "plateau"}[link.role]
        # place and size with their intervals, then the span
        steps = np.sort(self._back(self._places(link)))
        tail = (1 - self.level) / 2
        low, high, *quantiles = between(steps, (tail, 1 - tail, *np.arange(1, 100) / 100))
        step = float(np.clip(self._back(link.place), low, high))
        small, large = between(np.sort(self._sizes(k, link)), (tail, 1 - tail))
        size = float(link.size * self.scale)
        ends = bump or (link.span if link.role != "turn" else None)
        if link.role == "rise":
            ends = self._t10_t90(link)
        span = None if ends is None else (float(self._back(ends[0])), float(self._back(ends[1])))
        width = None if ends is None else float(ends[1] - ends[0])
        # fewer than three checkpoints within: what lies between them is not known
        start, end = (low, high) if span is None else span
        inside = int(np.sum((self.steps >= start) & (self.steps <= end)))
        vague = {"jump": "abruptness", "bump": "width", "turn": "location between checkpoints", "plateau": "length"}
        note = "" if inside >= 3 else f"{vague[kind]} unresolved{steps_to_add(self.steps, start, end)}"
        p_abrupt = self._abrupt(ends) if kind in ("jump", "bump") and ends else None
        event = Event(
            kind, step, (low, high), size, (min(small, size), max(large, size)), width, span,
            p_value(link.of.evidence, self.null), None, inside >= 3, note, self.name,
            tuple(quantiles), p_abrupt,
            p_abrupt is not None and p_abrupt <= self.alpha and self._lasts(k, link, inside),
        )  # fmt: skip
        return event, steps

    def _places(self, link: Link) -> Array:
        """Draws of the place: where the drawn curve, or its slope, has its extremum within the sure interval, spread
        over what lies between checkpoints: all of a gap where a rise is within it, and of a turn as much as it loses
        of its height from one checkpoint to the next."""
        x, uniform = self.chain.x, self.rng.uniform(-0.5, 0.5, DRAWS)
        if (gap := self._within(link)) is not None:
            return x[gap : gap + 2].mean() + (x[gap + 1] - x[gap]) * uniform
        # drawn where it may lie, and one place of the grid on both sides
        low, high = max(int(link.inside[0]) - 1, 0), min(int(link.inside[-1]) + 2, len(link.curve.x))
        source = (link.curve.draws if link.role == "turn" else link.curve.slopes)(low, high)
        inside = link.inside - low
        places = summit(link.curve.x[low:high], source, inside[np.argmax(link.sign * source[inside], axis=0)])
        if link.role != "turn":
            return places
        near = int(np.clip(round(link.index), 1, len(x) - 2))
        beside = np.interp(x[[near - 1, near + 1]], link.curve.x, link.curve.mean)
        lost = np.clip(link.sign * (link.value - beside.mean()) / max(abs(link.size), 1e-12), 0, 1)
        return places + lost * 0.5 * (x[near + 1] - x[near - 1]) * uniform

    def _levels(self, k: int) -> Array:
        """Draws of the curve at link k, or at an end of the data."""
        links = self.chain.links
        if 0 <= k < len(links):
            return links[k].curve.draws(links[k].at, links[k].at + 1)[0]
        end = 0 if k < 0 else -1
        link = links[end]
        whole = link.window[0] <= 0 if k < 0 else link.window[1] >= len(self.chain.x) - 1
        if whole:
            return link.curve.draws(*ending(link.curve.x, k < 0)).mean(0)
        return self.chain.values[end] + self.sd[end] * self.rng.standard_normal(DRAWS)

    def _sizes(self, k: int, link: Link) -> Array:
        """Draws of the size: of a turn the prominence, of a rise its change, of a plateau what is missed there."""
        if link.role == "rise":
            return self.scale * (self._levels(k + 1) - self._levels(k - 1))
        if link.role == "plateau":
            low, high = (int(np.abs(link.curve.x - end).argmin()) for end in link.span)
            drawn = link.curve.draws(low, high + 1)
            gone = drawn[-1] - drawn[0]
            return self.scale * (link.size + (link.curve.mean[high] - link.curve.mean[low]) - gone)
        here = self._levels(k)
        drops = [link.sign * (here - self._levels(j)) for j in self.chain.around(k, "turn")]
        return self.scale * link.sign * np.min(drops, axis=0)

    def _within(self, link: Link) -> int | None:
        """The gap between two checkpoints that holds all of a rise."""
        x, values = self.chain.x, self.chain.values
        i = int(np.clip(np.searchsorted(x, link.x) - 1, 0, len(x) - 2))
        all_of_it = abs(values[i + 1] - values[i]) >= 0.8 * abs(link.size) > SPIKE * self.sd[i]
        return i if link.role == "rise" and all_of_it else None

    def _t10_t90(self, link: Link) -> tuple[float, float]:
        """The ends of a rise: beyond those of half its top speed by as much as those of a logistic lie, whose t10-t90
        is log(81) / (2 log(3 + sqrt(8))) times its width at half its top speed."""
        x = self.chain.x
        if (i := self._within(link)) is not None:
            return float(x[i] + 0.1 * (x[i + 1] - x[i])), float(x[i + 1] - 0.1 * (x[i + 1] - x[i]))
        more = 0.5 * (np.log(81) / (2 * np.log(3 + np.sqrt(8))) - 1) * (link.span[1] - link.span[0])
        return max(link.span[0] - more, x[0]), min(link.span[1] + more, x[-1])

    def _abrupt(self, ends: tuple[float, float]) -> float:
        if ends[1] - ends[0] > LONGEST:
            return 1.0
        start, end = np.interp(ends, self.chain.x, np.arange(len(self.chain.x)))
        return abruptness(self.chain.values, start, end)

    def _lasts(self, k: int, link: Link, inside: int) -> bool:
        """Whether a change is more than one or two checkpoints that leave and come back."""
        if link.role == "turn":
            return inside >= 3
        turns = [self.chain.links[j] for j in self.chain.around(k, "turn") if 0 <= j < len(self.chain.links)]
        return all(abs(turn.index - link.index) >= 2.5 for turn in turns)

    def _bump(self, k: int, link: Link) -> tuple[float, float] | None:
        """The ends, at half its height, of a turn of some size that comes back about as far as it went within NARROW
        decades."""
        sides = [abs(link.value - self.chain.level(j)) for j in self.chain.around(k, "turn")]
        if min(sides) < max(SHARE, 0.5 * max(sides)):
            return None
        x, below = self.chain.x, np.flatnonzero(link.sign * (link.value - self.chain.values) >= 0.5 * min(sides))
        before, after = below[x[below] < link.x], below[x[below] > link.x]
        if not (len(before) and len(after)) or x[after[0]] - x[before[-1]] > NARROW:
            return None
        # half height lies between the last place below it and the first above
        low, high = int(before[-1]), int(after[0])
        return float(x[low : low + 2].mean()), float(x[high - 1 : high + 1].mean())

    def _part(self, link: Link, top: int, span: tuple[float, float]) -> bool:
        """Whether a link is a flank or a foot of the bump at link `top`."""
        peak, width = self.chain.links[top], span[1] - span[0]
        reach = 1.5 if link.role == "rise" else 2.0
        if link.role == "turn" and (link.sign == peak.sign or abs(link.size) > abs(peak.size)):
            return False  # a foot from which the curve goes further than the bump is high is a turn of its own
        return abs(link.x - peak.x) <= reach * width

    def _back(self, x: float | Array) -> Array:
        return np.maximum(10.0 ** np.asarray(x) - self.first, 0.0)


def between(ordered: Array, shares: Sequence[float]) -> list[float]:
    """Quantiles of sorted values, those of `np.quantile` in a tenth of its time."""
    return np.interp(np.asarray(shares) * (len(ordered) - 1), np.arange(len(ordered)), ordered).tolist()


def steps_to_add(steps: Array, start: float, end: float) -> str:
    """Up to three whole steps, evenly spaced in log step, between the checkpoints around start and end."""
    before = steps[steps <= start][-1] if np.any(steps <= start) else steps[0]
    after = steps[steps >= end][0] if np.any(steps >= end) else steps[-1]
    origin = float(steps[steps > 0][0])
    inner = np.geomspace(before + origin, after + origin, 5)[1:-1] - origin
    wanted = sorted({int(step) for step in np.round(inner)} - {int(step) for step in steps})
    wanted = [step for step in wanted if before < step < after]
    if not wanted:
        return " (no step lies between the checkpoints)"
    return ": measure step" + ("s " if len(wanted) > 1 else " ") + ", ".join(map(str, wanted))
