"""From extrema of f and of its slope to the turns, plateaus and rises that a reader names.

Along the curve the extrema of f cut it into stretches that go one way; within a stretch the extrema of the slope are
in turn the steepest place of a rise and the flattest place of a plateau. What is too small is taken out, least first,
each with the neighbour it leaves without meaning.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from devmon.analysis.detection.constants import FLANK, RATIO, SHARE, WIDEST
from devmon.analysis.detection.spline import Spline, summit
from devmon.analysis.detection.windows import Extremum, Order
from devmon.analysis.series import Array

Role = Literal["turn", "rise", "plateau"]


class Link:
    """One extremum in the chain: where it lies, and the curve between its neighbours."""

    def __init__(self, extremum: Extremum) -> None:
        self.of, self.sign = extremum, extremum.sign
        self.index = (extremum.left + extremum.right) / 2  # place, as a fractional index
        self.window: tuple[int, int] = (-1, -1)
        self.role: Role = "turn"
        self.way = extremum.sign  # of a rise or plateau: the sign of the trend
        self.size = 0.0  # signed, in units of the values
        self.span = (0.0, 0.0)  # on the axis
        self.curve: Spline
        self.at, self.x, self.place = 0, 0.0, 0.0  # on the grid of the curve, on the axis there, and between these
        self.value, self.speed = 0.0, 0.0

    def locate(self, x: Array) -> None:
        """The place, value and slope of the extremum on the curve, within its sure interval."""
        low, high = x[self.of.left], x[self.of.right]
        inside = np.flatnonzero((self.curve.x >= low - 1e-9) & (self.curve.x <= high + 1e-9))
        if len(inside) < 3:
            middle = int(np.clip(np.abs(self.curve.x - (low + high) / 2).argmin(), 1, len(self.curve.x) - 2))
            inside = np.arange(middle - 1, middle + 2)
        self.inside = inside
        source = self.curve.mean if self.of.order == Order.SLOPE else self.curve.slope
        self.at = int(inside[np.argmax(self.sign * source[inside])])
        self.x, self.value, self.speed = self.curve.x[self.at], self.curve.mean[self.at], self.curve.slope[self.at]
        self.place = float(summit(self.curve.x, source[:, None], np.array([self.at]))[0])  # between the curve's places
        self.index = float(np.interp(self.x, x, np.arange(len(x))))

    def reach(self, inside: NDArray[np.bool_]) -> tuple[int, int]:
        """First and last place of the run around the extremum in which `inside` is true."""
        outside = np.flatnonzero(~inside)
        before, after = outside[outside < self.at], outside[outside > self.at]
        return int(before[-1]) + 1 if len(before) else 0, int(after[0]) - 1 if len(after) else len(inside) - 1


class Chain:
    """The links that are left of `extrema`."""

    def __init__(self, x: Array, values: Array, spline: Callable[[int, int, int, int], Spline], extrema: list[Extremum],
                 smallest: float) -> None:  # fmt: skip
        self.x, self.values, self.spline, self.smallest = x, values, spline, smallest
        self.links = sorted(map(Link, extrema), key=lambda link: link.index)
        rules = (self._same, self._shallow, self._alike, self._slight, self._endless)
        while self._place() and any(rule() for rule in rules):
            pass

    def _place(self) -> bool:
        """Fit the curve between neighbours where these are new, and name the role of each link."""
        links, last = self.links, len(self.x) - 1
        for k, link in enumerate(links):
            before = min(links[k - 1].index if k else 0, link.of.left)
            after = max(links[k + 1].index if k + 1 < len(links) else last, link.of.right)
            window = int(np.floor(before)), int(np.ceil(after))
            if window != link.window:
                link.window, link.curve = window, self.spline(*window, link.of.left, link.of.right)
                link.locate(self.x)
        links.sort(key=lambda link: link.x)
        for k, link in enumerate(links):
            if link.of.order != Order.SLOPE:
                link.way = self._trend(k)
                link.role = "rise" if link.sign == link.way else "plateau"
        return bool(links)

    def _trend(self, k: int) -> int:
        """The way the curve goes at link k: away from the turn before, else towards the one after, else its net
        change."""
        before = [link for link in self.links[:k] if link.of.order == Order.SLOPE]
        after = [link for link in self.links[k + 1 :] if link.of.order == Order.SLOPE]
        if before or after:
            return -before[-1].sign if before else after[0].sign
        return 1 if self.level(len(self.links)) >= self.level(-1) else -1

    def level(self, k: int) -> float:
        """The curve at link k; at -1 and beyond the last link, where the data begin and end."""
        if 0 <= k < len(self.links):
            return self.links[k].value
        link = self.links[0 if k < 0 else -1]
        reaches = link.window[0] <= 0 if k < 0 else link.window[1] >= len(self.x) - 1
        if not reaches:
            return float(self.values[0 if k < 0 else -1])
        return float(link.curve.mean[slice(*ending(link.curve.x, k < 0))].mean())

    def around(self, k: int, *roles: Role) -> tuple[int, int]:
        """The nearest links of these roles before and after link k: -1 and their number are the ends of the data."""
        which = [j for j, link in enumerate(self.links) if link.role in roles]
        return max((j for j in which if j < k), default=-1), min((j for j in which if j > k), default=len(self.links))

    def _beside(self, k: int, side: int) -> Link | None:
        return self.links[k + side] if 0 <= k + side < len(self.links) else None

    def _drop(self, *which: int) -> bool:
        self.links = [link for k, link in enumerate(self.links) if k not in which]
        return True

    def _same(self) -> bool:
        """Of two neighbours of one kind the lesser goes."""
        for order in Order:
            mine = [k for k, link in enumerate(self.links) if link.of.order == order]
            for k, j in itertools.pairwise(mine):
                a, b = self.links[k], self.links[j]
                adjacent = order == Order.SLOPE or j == k + 1
                if adjacent and a.sign == b.sign:
                    height = (a.value, b.value) if order == Order.SLOPE else (a.speed, b.speed)
                    return self._drop(k if a.sign * height[0] < a.sign * height[1] else j)
        return False

    def _shallow(self) -> bool:
        """The two turns (or turn and end) between which the curve moves least, if that is too little."""
        turns = [k for k, link in enumerate(self.links) if link.role == "turn"]
        if not turns:
            return False
        levels = [self.level(-1), *(self.level(k) for k in turns), self.level(len(self.links))]
        ways = [self.links[turns[0]].sign, *(-self.links[k].sign for k in turns)]
        moves = [way * (b - a) for way, (a, b) in zip(ways, itertools.pairwise(levels), strict=True)]
        i = int(np.argmin(moves))
        for k, (a, b) in zip(turns, itertools.pairwise(moves), strict=True):
            self.links[k].size = self.links[k].sign * min(a, b)
        return moves[i] < self.smallest and self._drop(*turns[max(i - 1, 0) : i + 1])

    def _alike(self) -> bool:
        """The pair of a steepest and a flattest place whose slopes differ least, if by less than RATIO."""
        least: float = RATIO
        which: tuple[int, ...] = ()
        for k, link in enumerate(self.links):
            for side in (-1, 1) if link.role == "plateau" else ():
                ratio = self._pace(k, side) / max(link.way * link.speed, 1e-12)
                if ratio < least:
                    other = self._beside(k, side)
                    least, which = ratio, (k, k + side) if other is not None and other.role == "rise" else (k,)
        return bool(which) and self._drop(*which)

    def _pace(self, k: int, side: int) -> float:
        """The largest slope along the trend on one side of link k: that of the rise there, else within its window."""
        link, other = self.links[k], self._beside(k, side)
        if other is not None and other.role == "rise":
            return other.way * other.speed
        part = link.curve.slope[: link.at] if side < 0 else link.curve.slope[link.at + 1 :]
        return float((link.way * part).max(initial=0.0))

    def _slight(self) -> bool:
        """The size and span of every rise and plateau; the smallest goes if it is too small."""
        least = self.smallest
        which: tuple[int, ...] = ()
        for k, link in enumerate(self.links):
            curve, way = link.curve, link.way
            if link.role == "rise":
                low, high = link.reach(way * curve.slope >= 0.5 * way * link.speed)
                link.size = self.level(k + 1) - self.level(k - 1)
            elif link.role == "plateau":
                # what is missed there, beside a curve that goes on at its mean speed between the neighbours
                pace = way * (curve.mean[-1] - curve.mean[0]) / (curve.x[-1] - curve.x[0])
                low, high = link.reach(way * curve.slope < pace)
                link.size = pace * (curve.x[high] - curve.x[low]) * way - (curve.mean[high] - curve.mean[low])
                # it must rest between two moves: from the place before that is no rise, and to the one after
                before, after = self.around(k, "turn", "plateau")
                moves = way * (link.value - self.level(before)), way * (self.level(after) - link.value)
                link.size = link.size if min(moves) >= self.smallest else 0.0
            else:
                continue
            link.span = float(curve.x[low]), float(curve.x[high])
            if way * link.size < least:
                least = way * link.size
                # with a rise goes a plateau beside it, with a plateau the lesser of the two rises that it parted
                other = "plateau" if link.role == "rise" else "rise"
                near = (j for j in (k - 1, k + 1) if 0 <= j < len(self.links) and self.links[j].role == other)
                beside = sorted(near, key=lambda j: abs(self.links[j].size))
                which = (k, *beside[:1]) if link.role == "rise" or len(beside) == 2 else (k,)
        return bool(which) and self._drop(*which)

    def _endless(self) -> bool:
        """A rise that is still as fast at an end of the data as at its steepest place has no steepest place."""
        for k, link in enumerate(self.links):
            for side in (-1, 1) if link.role == "rise" else ():
                part = link.curve.slope[: link.at + 1] if side < 0 else link.curve.slope[link.at :]
                if self._beside(k, side) is None and (link.way * part).min() > link.way * link.speed / RATIO:
                    return self._drop(k)
        return False

    def events(self) -> list[tuple[int, Link]]:
        """The links that are events, with their places in the chain: not the rises that are slow, nor the flanks of
        turns."""
        return [(k, link) for k, link in enumerate(self.links) if link.role != "rise" or self._stands(k, link)]

    def _stands(self, k: int, link: Link) -> bool:
        width = link.span[1] - link.span[0]
        flank = False
        for side, end in zip((-1, 1), link.span, strict=True):
            other = self._beside(k, side)
            if other is not None and other.role == "turn":
                # of a symmetric rise both say the same
                near = side * (other.x - link.x) < FLANK * width and side * (other.x - end) < (FLANK - 0.5) * width
                flank |= near or abs(self.level(k - side) - self._from(link, other, side)) < SHARE
        return width <= WIDEST and not flank

    def _from(self, link: Link, turn: Link, side: int) -> float:
        """The level from which a rise goes on the side of a turn: that of the turn, or where the curve leaves the turn
        faster than it then rises, that of the flattest place in between."""
        between = (side * (link.curve.x - link.x) > 0) & (side * (turn.x - link.curve.x) > 0)
        pace = link.way * link.curve.slope[between]
        if not len(pace) or pace.max() < RATIO * link.way * link.speed:
            return turn.value
        fast = int(pace.argmax())
        rest = pace[fast:] if side < 0 else pace[: fast + 1]
        return float(link.curve.mean[between][(fast if side < 0 else 0) + int(rest.argmin())])


def ending(x: Array, first: bool) -> tuple[int, int]:
    """Of a curve at places x, the tenth of its length that is its level at an end: its first place, and that after its
    last."""
    inside = int(np.sum((x - x[0] if first else x[-1] - x) < 0.09 * (x[-1] - x[0])))
    return (0, inside) if first else (len(x) - inside, len(x))
