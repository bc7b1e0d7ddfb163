"""The smoothed curve of one series, as posterior draws, and simulated series of another mean that are smoothed alike.

Turns and plateaus are shapes of this curve: their sign and place are read off the draws, and their p-values compare
the curve with nulls that lack the feature but have the same noise, autocorrelation and checkpoints.
"""

from __future__ import annotations

import itertools
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from devmon.analysis.detection.null_model import FREE, Grid, Whitened, leading, normalised, shares
from devmon.analysis.detection.shapes import Jump, columns_of, shapes_of
from devmon.analysis.series import Array

MANY = 40  # checkpoints from which a change of the noise is told from chance
UNEVEN = 4.0  # ratio of noise sizes along the series from which their change is modelled
DRAWS = 400
LIKELY = 6  # covariances over which the curve is averaged
FINEST = 0.03  # decades between the places at which the curve is drawn, or closer where checkpoints are


class Curve:
    """The smoothed curve of one series: drift, jumps and f together, at places `at` (g,) on the time axis."""

    def __init__(self, null: Whitened, jumps: list[Jump], y: Array, seed: int) -> None:
        self.null, self.jumps, self.y, self.seed = null, jumps, y, seed
        self.at = places(null.grid)
        self.columns_at = columns_of(null.grid, shapes_of(jumps), self.at)[0]
        self.loglik = null.as_curve(null.rss(y))
        self.weights = leading(normalised(self.loglik), LIKELY)
        self.best = int(np.argmax(self.weights))
        self._smoothers: dict[int, tuple[Array, Array]] = {}

    def smoother(self, k: int) -> tuple[Array, Array]:
        """`Whitened.smoother` under covariance k at all places, kept."""
        if k not in self._smoothers:
            self._smoothers[k] = self.null.smoother(k, self.at, self.columns_at)
        return self._smoothers[k]

    @cached_property
    def draws(self) -> Array:
        """(DRAWS, g) joint draws, covariances in proportion to their posterior."""
        generator = np.random.default_rng([self.seed, 0xC0])
        parts = []
        counts = shares(self.weights, DRAWS)
        for k in np.flatnonzero(counts):
            smoother, covariance = self.smoother(int(k))
            root = square_root(covariance)
            normal = generator.standard_normal((counts[k], len(self.at)))
            chi = np.sqrt(generator.chisquare(self.null.df, counts[k]) / self.null.df)[:, None]
            parts.append(smoother @ self.y + normal @ root.T * self.null.noise_sd(self.y, int(k)) / chi)
        return np.concatenate(parts)

    @cached_property
    def twiced(self) -> Array:
        """(DRAWS, g) the draws, moved by what the smoother makes of its own residuals (twicing, Tukey 1977): smoothing fills
        a dip of the slope and moves it to the gentler side, and this takes back a part of it."""
        residual = self.y - np.interp(self.null.grid.x, self.at, self.smoothed)
        return np.asarray(self.draws + self.smoother(self.best)[0] @ residual)

    @cached_property
    def mean(self) -> Array:
        """(g,) posterior mean."""
        return np.asarray(
            sum(self.weights[k] * (self.smoother(int(k))[0] @ self.y) for k in np.flatnonzero(self.weights))
        )

    @cached_property
    def smoothed(self) -> Array:
        """(g,) the curve under the likeliest covariance, the one that nulls are compared with."""
        return np.asarray(self.smoother(self.best)[0] @ self.y)

    @cached_property
    def noise_sd(self) -> float:
        """Standard deviation of the noise under the likeliest covariance; never 0."""
        return max(self.null.noise_sd(self.y, self.best), 1e-12 * float(np.ptp(self.y)))

    @cached_property
    def unit(self) -> float:
        """The innovations of the noise under the likeliest covariance: the unit of prominences. Their size is about the same
        whether a series is taken for a random walk or for a wild curve with little noise; that of the noise is not."""
        return self.noise_sd * float(self.null.grid.innovation[self.best])

    def band(self, at: Array, level: float) -> tuple[Array, Array, Array]:
        """Mean and equal-tailed band of the curve at places `at` within the data."""
        tail = (1 - level) / 2
        low, high = np.quantile(self.draws, [tail, 1 - tail], axis=0)
        return np.interp(at, self.at, self.mean), np.interp(at, self.at, low), np.interp(at, self.at, high)

    def noise_profile(self) -> Array | None:
        """(n,) relative sd of the noise at each checkpoint where it plainly varies, else None.

        From squared differences of neighbouring residuals beside what the smoother leaves of the likeliest noise of constant
        size or, if that is the likeliest of all, shaped like the standard errors; both smoothed over the index. It varies
        plainly where the largest of at least MANY points is UNEVEN times the smallest in units of the likelier of the two.
        A curve that all but goes through the points tells nothing.
        """
        null, grid = self.null, self.null.grid
        kept = np.delete(np.arange(len(grid.x)), list(null.spikes))
        k = self._likeliest(("se",) if grid.thetas[self.best].shape == "se" else ("flat",))
        residual = grid.noise[k] @ null.project[k].T @ null.project[k]  # (m, m) of the series
        step = np.diff(residual[kept], axis=0)
        squares, left = np.square(step @ self.y), np.square(step @ np.linalg.cholesky(grid.noise[k])).sum(1)
        apart = np.subtract.outer(np.arange(len(grid.x)), (kept[1:] + kept[:-1]) / 2)
        kernel = np.exp(-0.5 * (apart / max(len(kept) / 12, 4)) ** 2)
        sd = np.sqrt(kernel @ squares / (kernel @ left)) * grid.sds[grid.thetas[k].shape]
        known = sd / grid.sds["se"] if grid.thetas[self._likeliest(("flat", "se"))].shape == "se" else sd
        if len(kept) < MANY or grid.freedom[k] > FREE or not known.min() * UNEVEN < known.max():
            return None
        sd = np.maximum(sd, sd.max() / 30)
        return np.repeat(sd, np.diff(np.append(grid.starts, len(grid.steps))))

    def _likeliest(self, shapes: tuple[str, ...]) -> int:
        """The likeliest covariance whose noise has one of these shapes, or of all where none has."""
        named = [k for k, theta in enumerate(self.null.grid.thetas) if theta.shape in shapes]
        return max(named or range(len(self.loglik)), key=lambda k: self.loglik[k])

    def simulated(self, mean: Array, count: int, stream: int) -> Array:
        """`count` series of the given mean (m,) at the points of the model plus noise as estimated, smoothed like the data.

        Returns the smoothed curves (count, g), each under its own likeliest covariance and in its own `unit`.
        """
        null, grid = self.null, self.null.grid
        generator = np.random.default_rng([self.seed, stream])
        series = []
        counts = shares(self.weights, count)
        for k in np.flatnonzero(counts):
            root = np.linalg.cholesky(grid.noise[k])
            noise = generator.standard_normal((counts[k], len(grid.x))) @ root.T
            series.append(mean + null.noise_sd(self.y, int(k)) * noise)
        ys = np.concatenate(series)
        rss = np.square(null.project @ ys.T).sum(1)
        chosen = np.argmax(null.as_curve(rss), axis=0)
        smoothed = np.empty((count, len(self.at)))
        for k in np.unique(chosen):
            mine = chosen == k
            smoothed[mine] = ys[mine] @ self.smoother(int(k))[0].T
        unit = np.sqrt(rss[chosen, np.arange(count)] / null.df) * grid.innovation[chosen]
        return np.asarray(smoothed / unit[:, None])


def square_root(covariance: Array) -> Array:
    """R with R Rᵀ = covariance, for one that is positive up to rounding."""
    size = np.abs(covariance).max()
    try:
        return np.linalg.cholesky(covariance + 1e-7 * size * np.eye(len(covariance)))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def places(grid: Grid) -> Array:
    """The points of the model, and places between them where they are further apart than FINEST."""
    parts = [np.linspace(a, b, int(np.ceil((b - a) / FINEST)), endpoint=False) for a, b in itertools.pairwise(grid.x)]
    return np.append(np.concatenate(parts), grid.x[-1])


def runs_of_sign(draws: Array, certain: float) -> NDArray[np.int64]:
    """(g - 1,) the sign of the slope between places where at least a share `certain` of the draws agree, else 0."""
    rising = (np.diff(draws, axis=1) > 0).mean(0)
    return np.where(rising >= certain, 1, np.where(rising <= 1 - certain, -1, 0))


def vertex(at: Array, curves: Array, top: NDArray[np.int64]) -> Array:
    """(B,) where the parabola through the highest place of each curve (B, n) and its two neighbours has its top."""
    if len(at) < 3:
        return np.asarray(at[top])
    rows, i = np.arange(len(curves)), np.clip(top, 1, len(at) - 2)
    left, here, right = (curves[rows, i + k] for k in (-1, 0, 1))
    a, b = at[i] - at[i - 1], at[i + 1] - at[i]
    before, after = (here - left) / a, (right - here) / b  # slopes in the middles of the two gaps
    bend = before - after
    shift = np.where(bend > 0, (before * b + after * a) / np.where(bend > 0, 2 * bend, 1), 0)
    inside = (top > 0) & (top < len(at) - 1)
    return np.where(inside, at[i] + np.clip(shift, -a / 2, b / 2), at[top])
