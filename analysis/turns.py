"""Turns: a curve that surely rose and then surely fell (a maximum), or the reverse (a minimum).

The sign of the slope is certain where 95% of the posterior draws of the smoothed curve agree; a turn is the passage
between two certain runs of opposite sign. Its prominence is the smaller of the rise before and the fall after. The
p-value compares it, in noise units, with the most prominent turn of simulated series that are monotone: the
isotonic projection of the smoothed curve plus noise with the estimated autocorrelation, smoothed the same way.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.signal import find_peaks

from devmon.analysis.jumps import Jump, shapes_of
from devmon.analysis.shapes import PULSE, columns_of
from devmon.analysis.smooth import Array, Grid, Whitened, shares

CERTAIN = 0.95
UNEVEN = 4.0  # ratio of noise sizes along the series from which their change is modelled
DRAWS = 400
FINEST = 0.02  # decades between the places at which the curve is drawn, or closer where checkpoints are


@dataclass(frozen=True)
class Turn:
    """Posterior draws of the place (on the time axis) and of the signed prominence: + for a maximum."""

    place: Array
    size: Array
    p_value: float


class Curve:
    """The smoothed curve of one series: drift, jumps and f together, at places `at` (g,) on the time axis."""

    def __init__(self, null: Whitened, jumps: list[Jump], y: Array, seed: int) -> None:
        self.null, self.jumps, self.y, self.seed = null, jumps, y, seed
        self.at = places(null.grid)
        self.columns_at = columns_of(null.grid, shapes_of(jumps), self.at)[0]
        self.weights = null.weights(y)
        self.draws = self._draw(np.random.default_rng([seed, 0xC0]))

    def _draw(self, generator: np.random.Generator) -> Array:
        """(DRAWS, g) joint draws, covariances in proportion to their posterior."""
        parts = []
        counts = shares(self.weights, DRAWS)
        for k in np.flatnonzero(counts):
            smoother, covariance = self.null.smoother(int(k), self.at, self.columns_at)
            root = square_root(covariance)
            normal = generator.standard_normal((counts[k], len(self.at)))
            chi = np.sqrt(generator.chisquare(self.null.df, counts[k]) / self.null.df)[:, None]
            parts.append(smoother @ self.y + normal @ root.T * self.null.noise_sd(self.y, int(k)) / chi)
        return np.concatenate(parts)

    def band(self, at: Array, level: float) -> tuple[Array, Array, Array]:
        """Mean and equal-tailed band of the curve at places `at` within the data."""
        tail = (1 - level) / 2
        low, high = np.quantile(self.draws, [tail, 1 - tail], axis=0)
        mean = self.draws.mean(0)
        return np.interp(at, self.at, mean), np.interp(at, self.at, low), np.interp(at, self.at, high)

    def noise_profile(self) -> Array | None:
        """(n,) relative sd of the noise at each checkpoint where it plainly varies, else None.

        From squared differences of neighbouring residuals, in units of the likeliest noise of constant size and smoothed
        over the index; it varies plainly where the largest is UNEVEN times the smallest.
        """
        grid = self.null.grid
        kept = np.delete(np.arange(len(grid.x)), list(self.null.spikes))
        residual = (self.y - np.interp(grid.x, self.at, self.draws.mean(0)))[kept]
        flat = [k for k, theta in enumerate(grid.thetas) if theta.shape == "flat"]
        size = np.diagonal(grid.noise[max(flat, key=lambda k: self.weights[k])])[kept]
        squares = np.square(np.diff(residual)) / (size[1:] + size[:-1])
        apart = np.subtract.outer(np.arange(len(grid.x)), (kept[1:] + kept[:-1]) / 2)
        kernel = np.exp(-0.5 * (apart / max(len(kept) / 12, 4)) ** 2)
        sd = np.sqrt(kernel @ squares / kernel.sum(1))
        if not sd.min() * UNEVEN < sd.max():
            return None
        sd = np.maximum(sd, sd.max() / 30)
        return np.repeat(sd, np.diff(np.append(grid.starts, len(grid.steps))))


def find_turns(curve: Curve, *, n_null: int) -> list[Turn]:
    """Every turn of certain sign, with its p-value (max statistic: also right for several turns in one series)."""
    at, draws = curve.at, curve.draws
    rising = (np.diff(draws, axis=1) > 0).mean(0)
    sign = np.where(rising >= CERTAIN, 1, np.where(rising <= 1 - CERTAIN, -1, 0))
    sure = np.flatnonzero(sign)
    passages = [(i, j) for i, j in itertools.pairwise(sure) if sign[i] != sign[j]]
    if not passages:
        return []
    best = int(np.argmax(curve.weights))
    smoother, _ = curve.null.smoother(best, at, curve.columns_at)
    smoothed, sd = smoother @ curve.y, max(curve.null.noise_sd(curve.y, best), 1e-12 * float(np.ptp(curve.y)))
    nulls = monotone_nulls(curve, n_null)
    borders = [0] + [(i + j) // 2 + 1 for i, j in passages] + [len(at) - 1]
    turns = []
    for n, (i, j) in enumerate(passages):
        way = int(sign[i])
        reach = int(borders[n]), int(i), int(j) + 1, int(borders[n + 2])
        place, size = summit(way * draws, *reach)
        height = float(summit(way * smoothed[None], *reach)[1][0])
        p = (1 + int(np.sum(nulls >= height / sd))) / (1 + n_null)
        p = min(p, implied(curve.jumps, at[i], at[j + 1], way))
        turns.append(Turn(at[place], way * size, p))
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


def summit(curves: Array, left: int, low: int, high: int, right: int) -> tuple[Array, Array]:
    """Index and prominence of the highest place of each curve between `low` and `high`, bases out to left and right."""
    top = low + np.argmax(curves[:, low : high + 1], axis=1)
    height = curves[np.arange(len(curves)), top]
    before = height - curves[:, left : low + 1].min(1)
    after = height - curves[:, high : right + 1].min(1)
    return top, np.minimum(before, after)


def monotone_nulls(curve: Curve, count: int) -> Array:
    """(count,) prominence, in noise units, of the most prominent turn in simulated monotone series."""
    null, grid = curve.null, curve.null.grid
    mean = np.interp(grid.x, curve.at, curve.draws.mean(0))
    fits = [np.asarray(isotonic_regression(mean, increasing=up).x) for up in (True, False)]
    monotone = min(fits, key=lambda fit: float(np.square(fit - mean).sum()))
    generator = np.random.default_rng([curve.seed, 0x11])
    series = []
    counts = shares(curve.weights, count)
    for k in np.flatnonzero(counts):
        root = np.linalg.cholesky(grid.noise[k])
        noise = generator.standard_normal((counts[k], len(grid.x))) @ root.T
        series.append(monotone + null.noise_sd(curve.y, int(k)) * noise)
    ys = np.concatenate(series)
    rss = np.stack([np.square(project @ ys.T).sum(0) for project in null.project])
    chosen = np.argmax(null.loglik(rss), axis=0)
    result = np.zeros(count)
    for k in np.unique(chosen):
        smoother, _ = null.smoother(int(k), curve.at, curve.columns_at)
        mine = np.flatnonzero(chosen == k)
        for b, smoothed in zip(mine, ys[mine] @ smoother.T, strict=True):
            result[b] = most_prominent(smoothed) / np.sqrt(rss[k, b] / null.df)
    return result


def most_prominent(curve: Array) -> float:
    """The largest prominence of any maximum or minimum inside a curve."""
    found = [find_peaks(way * curve, prominence=0)[1]["prominences"] for way in (1, -1)]
    return float(max((part.max() for part in found if len(part)), default=0.0))


def square_root(covariance: Array) -> Array:
    """R with R Rᵀ = covariance, for one that is positive up to rounding."""
    size = np.abs(covariance).max()
    try:
        return np.linalg.cholesky(covariance + 1e-7 * size * np.eye(len(covariance)))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(np.maximum(values, 0))


def places(grid: Grid) -> Array:
    """The points of the model, and places between them where they are further apart than FINEST."""
    parts = [np.linspace(a, b, int(np.ceil((b - a) / FINEST)), endpoint=False) for a, b in itertools.pairwise(grid.x)]
    return np.append(np.concatenate(parts), grid.x[-1])
