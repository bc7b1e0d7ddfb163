"""Turns: a curve that surely rose and then surely fell (a maximum), or the reverse (a minimum).

The sign of the slope is certain where 90% of the posterior draws of the smoothed curve agree; a turn is the passage
between two certain runs of opposite sign. Its prominence is the smaller of the rise before and the fall after. The
p-value compares it, in units of the innovations of the noise, with the most prominent turn of simulated series that are
monotone: the isotonic projection of the smoothed curve plus noise with the estimated autocorrelation, smoothed the same way.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.signal import find_peaks

from devmon.analysis.detection.curve import Curve, runs_of_sign, vertex
from devmon.analysis.detection.scan import tail_p
from devmon.analysis.detection.shapes import PULSE, Jump
from devmon.analysis.series import Array

CERTAIN = 0.90  # share of the draws by which the slope has a sign


@dataclass(frozen=True)
class Turn:
    """Posterior draws of the place (on the time axis) and of the signed prominence: + for a maximum. `implied` is the
    p-value of the shapes that imply it, 1 where none do."""

    place: Array
    size: Array
    p_value: float
    implied: float


def find_turns(curve: Curve, *, n_null: int) -> list[Turn]:
    """Every turn of certain sign, with its p-value (max statistic: also right for several turns in one series)."""
    at, draws = curve.at, curve.draws
    sign = runs_of_sign(draws, CERTAIN)
    sure = np.flatnonzero(sign)
    passages = [(i, j) for i, j in itertools.pairwise(sure) if sign[i] != sign[j]]
    if not passages:
        return []
    nulls = monotone_nulls(curve, n_null)
    borders = [0] + [(i + j) // 2 + 1 for i, j in passages] + [len(at) - 1]
    turns = []
    for n, (i, j) in enumerate(passages):
        way = int(sign[i])
        reach = int(borders[n]), int(i), int(j) + 1, int(borders[n + 2])
        place, size = summit(way * draws, *reach)
        height = float(summit(way * curve.smoothed[None], *reach)[1][0])
        shaped = implied(curve.jumps, at[i], at[j + 1], way)
        turns.append(Turn(vertex(at, way * draws, place), way * size, tail_p(height / curve.unit, nulls), shaped))
    return turns


def implied(jumps: list[Jump], start: float, end: float, way: int) -> float:
    """P-value of a turn between `start` and `end` that pulses or jumps imply (1 where none do).

    That of a pulse with its top there; or the larger one of two opposite jumps around it, since a curve with a rise
    and a fall that are both there is not monotone (an intersection-union test).
    """
    near = sorted((jump for jump in jumps if start <= jump.middle[0] <= end), key=lambda jump: jump.middle[0])
    p = [jump.p_value for jump in near if jump.form == PULSE and jump.up == (way > 0)]
    steps = [jump for jump in near if jump.form != PULSE]
    p += [max(a.p_value, b.p_value) for a, b in itertools.pairwise(steps) if a.up != b.up and a.up == (way > 0)]
    return min(p, default=1.0)


def is_flank(jump: Jump, turn: Turn, turns: list[Turn]) -> bool:
    """Whether a jump goes up to a maximum (down to a minimum), or down (up) from it, with no other turn between."""
    top, maximum = float(np.median(turn.place)), float(np.median(turn.size)) > 0
    low, high = sorted((jump.middle[0], top))
    alone = not any(low < float(np.median(other.place)) < high for other in turns)
    return alone and jump.up == (maximum == (jump.middle[0] < top))


def summit(curves: Array, left: int, low: int, high: int, right: int) -> tuple[NDArray[np.int64], Array]:
    """Index and prominence of the highest place of each curve between `low` and `high`, bases out to left and right."""
    top = np.asarray(low + np.argmax(curves[:, low : high + 1], axis=1))
    height = curves[np.arange(len(curves)), top]
    before = height - curves[:, left : low + 1].min(1)
    after = height - curves[:, high : right + 1].min(1)
    return top, np.minimum(before, after)


def monotone_nulls(curve: Curve, count: int) -> Array:
    """(count,) prominence, in units of the innovations, of the most prominent turn in simulated monotone series."""
    mean = np.interp(curve.null.grid.x, curve.at, curve.mean)
    fits = [np.asarray(isotonic_regression(mean, increasing=up).x) for up in (True, False)]
    monotone = min(fits, key=lambda fit: float(np.square(fit - mean).sum()))
    return np.array([most_prominent(one) for one in curve.simulated(monotone, count, 0x11)])


def most_prominent(curve: Array) -> float:
    """The largest prominence of any maximum or minimum inside a curve."""
    found = [find_peaks(way * curve, prominence=0)[1]["prominences"] for way in (1, -1)]
    return float(max((part.max() for part in found if len(part)), default=0.0))
