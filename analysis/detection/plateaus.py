"""Plateaus: a curve that goes one way, all but stops, and goes on the same way.

Tilt the curve, y - c x, until the slow part leans back: it then has a maximum, a fall and a minimum. The prominence of
the plateau is the smaller of the rise before, the fall, and the rise after, at the tilt c where that is largest; its
place is where the slope is least. So a plateau is the pair of turns of a tilted curve, and is measured in the units of
the series as a turn is.

The p-value compares the prominence, in units of the innovations of the noise, with the most prominent plateau of simulated
series whose slope has one peak only between turns: the unimodal projection of the slope of the smoothed curve, plus noise
with the estimated autocorrelation, smoothed the same way.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from devmon.analysis.detection.curve import Curve, vertex
from devmon.analysis.detection.scan import tail_p
from devmon.analysis.detection.shapes import PULSE, Jump
from devmon.analysis.detection.turns import Turn
from devmon.analysis.series import Array

TILTS = 14
SLOW = 0.5  # on a plateau the slope is at most this share of the slower flank's
HALVINGS = 9  # of the search for the prominence: to a share 2**-9 of the range
FINER = 13  # of the search for the size of a plateau that was found
COARSE = 0.03  # decades between the places at which prominences are measured

Stretch = tuple[int, int, int]  # first and last place of a stretch that goes one way, and that way


@dataclass(frozen=True)
class Plateau:
    """Posterior draws of the place (on the time axis) and of the prominence, signed like the slope beside it; `span` is
    where the slope is below the tilt, `sure` the share of the draws that slow down to less than SLOW there."""

    place: Array
    size: Array
    span: tuple[float, float]
    p_value: float
    sure: float


def find_plateaus(curve: Curve, turns: list[Turn], *, alpha: float, n_null: int) -> list[Plateau]:
    """The plateaus of each stretch between `turns`, the most prominent first, each half searched in turn."""
    at = curve.at
    whole = _stretches(curve, turns)
    nulls: Array | None = None
    found: list[Plateau] = []
    stretches = list(whole)
    while stretches:
        low, high, way = stretches.pop()
        parts = prominence(way * curve.smoothed[None, low : high + 1], at[low : high + 1])
        height, tilt = float(parts[0][0]), float(parts[1][0])
        i, j = low + int(parts[2][0]), low + int(parts[3][0])
        span = float(at[i]), float(at[j])
        if not height > 0.5 * curve.unit or _between_jumps(curve.jumps, *span):
            continue
        if nulls is None:
            nulls = _nulls(curve, whole, min(n_null, 49))
            if tail_p(height / curve.unit, nulls) <= 0.5:
                nulls = _nulls(curve, whole, n_null)
        p = tail_p(height / curve.unit, nulls)
        if p > alpha:
            found.append(Plateau(np.empty(0), np.empty(0), span, p, 0.0))
            continue
        plateau = _located(curve, low, high, i, j, way, tilt, p)
        found.append(plateau)
        middle = int(np.searchsorted(at, np.median(plateau.place)))
        stretches += [(a, b, way) for a, b in ((low, middle), (middle, high)) if b - a > 8]
    return found


def prominence(
    curves: Array, at: Array, tilts: Array | None = None, halvings: int = HALVINGS
) -> tuple[Array, Array, NDArray[np.int64], NDArray[np.int64]]:
    """For rising curves (B, n): the prominence of the best plateau (B,), its tilt, and the places i < j between which the
    slope is below the tilt.

    The largest t for which some i < j have a rise of t up to i, a fall of t from i to j and a rise of t from j on in
    y - c x, by bisection over t for each c of `tilts` (B, tilt) or else TILTS values of it.
    """
    stride = max(int(np.ceil(len(at) * COARSE / max(float(np.ptp(at)), 1e-9) / 2)), 1) if len(at) > 60 else 1
    keep = np.unique(np.append(np.arange(0, len(at), stride), len(at) - 1))
    x, y = at[keep], curves[:, keep]
    if tilts is None:
        top = np.quantile(np.diff(y, axis=1) / np.diff(x), 0.95, axis=1)
        tilts = np.maximum(top, 0)[:, None] * np.append(0.0, np.geomspace(0.03, 0.9, TILTS - 1))
    tilted = y[:, None] - tilts[:, :, None] * (x - x[0])
    up = tilted - np.minimum.accumulate(tilted, axis=2)
    on = np.maximum.accumulate(tilted[:, :, ::-1], axis=2)[:, :, ::-1] - tilted
    low, high = np.zeros(tilts.shape), np.ptp(tilted, axis=2)
    for _ in range(halvings):
        t = (low + high) / 2
        reached = _reached(tilted, up, on, t)
        low, high = np.where(reached, t, low), np.where(reached, high, t)
    best = low.argmax(1)
    rows = np.arange(len(curves))
    height = low[rows, best]
    i, j = _ends(tilted[rows, best], up[rows, best], on[rows, best], height)
    return height, tilts[rows, best], keep[i], keep[j]


def unimodal(values: Array, weights: Array) -> Array:
    """The closest sequence, in weighted squares, that rises to one peak and falls from there."""
    best, least = values, np.inf
    for peak in range(0, len(values) + 1, max(len(values) // 40, 1)):
        parts = [isotonic_regression(values[a:b], weights=weights[a:b], increasing=up).x
                 for a, b, up in ((0, peak, True), (peak, len(values), False)) if b > a]  # fmt: skip
        fit = np.concatenate(parts)
        if (cost := float(np.sum(weights * np.square(fit - values)))) < least:
            best, least = fit, cost
    return best


def _stretches(curve: Curve, turns: list[Turn]) -> list[Stretch]:
    """Between the turns, and the lowest place between two maxima; a curve without turns goes the way of its ends."""
    last = len(curve.at) - 1
    tops = [(int(np.searchsorted(curve.at, np.median(one.place))), int(np.sign(np.median(one.size)))) for one in turns]
    path = tops[:1]
    for (a, up), (b, then) in itertools.pairwise(tops):
        if up == then:
            path.append((a + int(np.argmin(up * curve.mean[a : b + 1])), -up))
        path.append((b, then))
    if not path:
        return [(0, last, 1 if curve.mean[-1] > curve.mean[0] else -1)]
    cuts, ways = [0, *(i for i, _ in path), last], [*(up for _, up in path), -path[-1][1]]
    return [(a, b, way) for (a, b), way in zip(itertools.pairwise(cuts), ways, strict=True) if b - a > 4]


def _nulls(curve: Curve, stretches: list[Stretch], count: int) -> Array:
    """(count,) prominence, in units of the innovations, of the most prominent plateau where no stretch has one."""
    x = curve.null.grid.x
    mean = np.interp(x, curve.at, curve.mean)
    steps = np.diff(mean)
    for low, high, way in stretches:
        a, b = np.searchsorted(x, curve.at[[low, high]])
        if b - a > 2:
            gaps = np.diff(x)[a:b]
            slope = np.maximum(way * steps[a:b] / gaps, 0)
            steps[a:b] = way * unimodal(slope, gaps) * gaps
    null = mean[0] + np.append(0, np.cumsum(steps))
    smoothed = curve.simulated(null + np.mean(mean - null), count, 0x12)
    parts = [prominence(way * smoothed[:, low : high + 1], curve.at[low : high + 1])[0] for low, high, way in stretches]
    return np.asarray(np.max(parts, axis=0))


def _located(curve: Curve, low: int, high: int, i: int, j: int, way: int, tilt: float, p: float) -> Plateau:
    """Where each draw's slope is least between the flanks, and how prominent its plateau is at this tilt."""
    at, draws = curve.at, way * curve.draws
    slope = way * np.gradient(curve.smoothed, at)
    left = low + int(np.argmax(slope[low : i + 1])) if i > low else low
    right = j + int(np.argmax(slope[j : high + 1])) if high > j else high
    slopes, twiced = (
        np.gradient(curves[:, left : right + 1], at[left : right + 1], axis=1) for curves in (draws, way * curve.twiced)
    )
    a, b = i - left, j - left
    inner, moved = slopes[:, a : b + 1], twiced[:, a : b + 1]
    place = vertex(at[i : i + inner.shape[1]], -moved, moved.argmin(1))
    flank = np.minimum(slopes[:, : a + 1].max(1), slopes[:, b:].max(1))
    sure = float(np.mean(inner.min(1) < SLOW * flank))
    size = prominence(draws[:, low : high + 1], at[low : high + 1], np.full((len(draws), 1), tilt), FINER)[0]
    return Plateau(place, way * size, (float(at[i]), float(at[j])), p, sure)


def _between_jumps(jumps: list[Jump], start: float, end: float) -> bool:
    """Whether jumps on both sides explain the flanks: what lies between two jumps is no event of its own."""
    middle, pad = (start + end) / 2, 0.25 * (end - start) + 0.02
    spans = [(c, c - w / 2 - pad, c + w / 2 + pad) for c, w in (one.middle for one in jumps if one.form != PULSE)]
    return any(c < middle and high >= start for c, _, high in spans) and any(
        c > middle and low <= end for c, low, _ in spans
    )


def _reached(tilted: Array, up: Array, on: Array, t: Array) -> NDArray[np.bool_]:
    """(B, tilt) whether some i < j have rises of t before and after and a fall of t between."""
    limit = t[:, :, None]
    before = np.maximum.accumulate(np.where(up >= limit, tilted, -np.inf), axis=2)
    return np.asarray(((before - tilted >= limit) & (on >= limit)).any(2))


def _ends(tilted: Array, up: Array, on: Array, t: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The places i < j that reach t, for each curve (B, n): the lowest j, and the highest i before it."""
    limit = t[:, None] * (1 - 1e-9)
    rises = np.where(up >= limit, tilted, -np.inf)
    before = np.maximum.accumulate(rises, axis=1)
    fits = (before - tilted >= limit) & (on >= limit)
    fits[~fits.any(1)] = True
    # the lowest place among those that fit and follow the same top
    first = fits.argmax(1)
    i = np.array([int(np.argmax(rises[b, : first[b] + 1])) for b in range(len(tilted))])
    j = np.array(
        [i[b] + int(np.argmin(np.where(fits[b, i[b] :], tilted[b, i[b] :], np.inf))) for b in range(len(tilted))]
    )
    return i, np.maximum(j, i)
