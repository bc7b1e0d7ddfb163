"""The noise of a curve: AR(1) of locally varying size beside a smooth part, by restricted likelihood.

In windows of SPAN places the values are a straight line, plus integrated Brownian motion in log step (the smooth
part: the prior of a cubic smoothing spline), plus AR(1) noise, plus where it pays one sharp rise (over one to three
gaps) or one single outlying point. Their likelihood, restricted to what a straight line leaves, is the largest over
the smooth part's share, which tells the correlation; the size of the noise is averaged over the shares by their
likelihood. AR(1) alone would take a smooth curve for correlated noise; a smooth curve beside white noise would take
correlated noise for wiggles.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.special import stdtrit

from devmon.analysis.detection.constants import (
    AT_ONCE,
    CAUTION,
    DIVERGED,
    EXACT,
    PHIS,
    SHARES,
    SMALLEST,
    SPAN,
    SPIKE,
    TAIL,
    WIDTH,
)
from devmon.analysis.series import Array


def covariance(counts: Array, phi: float) -> Array:
    """(places, places) covariance of the means of consecutive blocks of `counts` points of unit AR(1) noise."""
    last = np.cumsum(counts) - 1
    gap = (last - counts + 1)[None, :] - last[:, None]  # from the last point of one block to the first of a later one
    shrunk = (1 - phi**counts) / ((1 - phi) * counts)
    cov = np.where(gap > 0, np.outer(shrunk, shrunk) * phi ** np.maximum(gap, 0), 0.0)
    cov += cov.T
    own = {k: (k + 2 * np.sum((k - (lag := np.arange(1, k))) * phi**lag)) / k**2 for k in np.unique(counts)}
    np.fill_diagonal(cov, [own[k] for k in counts])
    return cov


def integrated_walk(x: Array) -> Array:
    """(n, n) covariance of integrated Brownian motion on x, scaled to length 1."""
    u = (x - x[0]) / np.ptp(x)
    low, high = np.minimum(u[:, None], u), np.maximum(u[:, None], u)
    return low**2 * (3 * high - low) / 6


class NoiseModel:
    """What the noise of any series at these places needs: whitening matrices of every window, correlation and share."""

    def __init__(self, x: Array, counts: Array) -> None:
        n = len(x)
        self.length = m = min(n, SPAN)
        self.starts = sorted({*range(0, n - m + 1, max(1, m // 4)), n - m})
        self.overlap = max(1.0, len(self.starts) * m / n)
        parts = [self._window(x[a : a + m], counts[a : a + m], min(2.0, n / m)) for a in self.starts]
        self.whiten, self.logdet, self.odd, self.wider = (np.array(part) for part in zip(*parts, strict=True))
        # log prior odds of each rise and point, and what its size costs (Schwarz)
        self.cost = float(np.log(self.odd.shape[-1]) + 0.5 * np.log(m - 2))
        # the noise at a place is a mean over the windows that hold it, most of those in whose middle it lies; a mean of
        # roots, so that one window with a corner counts less
        self.mix = np.zeros((n, len(self.starts)))
        for i, a in enumerate(self.starts):
            self.mix[a : a + m, i] = np.minimum(np.arange(1, m + 1), np.arange(m, 0, -1))
        self.mix /= self.mix.sum(1, keepdims=True)

    @staticmethod
    def _window(x: Array, counts: Array, windows: float) -> tuple[Array, Array, Array, Array]:
        """Whitening matrices, log determinants, whitened rises and single points, and factors for few degrees of
        freedom.

        The noise at a place rests on about `windows` windows. Where the smooth part follows the points closely few
        degrees of freedom are left for the noise: it is widened as a t quantile is beside that of all m - 2.
        """
        m, d = len(x), len(x) - 2
        basis = np.linalg.qr(np.vander((x - x.mean()) / np.ptp(x), 2), mode="complete")[0][:, 2:]
        smooth = basis.T @ integrated_walk(x) @ basis
        steps = np.tri(m, m - 1, -1)  # and rises over two and three gaps
        rises = [np.mean([steps[:, k : m - 1 - width + k] for k in range(width + 1)], axis=0) for width in range(3)]
        single = np.hstack([np.eye(m), *rises])
        # for all correlations at once: (phi, d, d) of the noise, (phi, share, d, d) of both
        shares = np.array(SHARES)[:, None, None]
        rough = basis.T @ np.array([covariance(counts, phi) for phi in PHIS]) @ basis
        inverse = np.linalg.inv(np.linalg.cholesky(rough))
        against = np.maximum(np.linalg.eigvalsh(inverse @ smooth @ inverse.swapaxes(1, 2)), 0)
        root = np.linalg.cholesky(rough[:, None] + shares * smooth)
        whiten = np.linalg.solve(root, np.broadcast_to(basis.T, (*root.shape[:2], d, m)))
        logdet = 2 * np.log(np.diagonal(root, axis1=2, axis2=3)).sum(2)
        free = np.maximum(np.sum(1 / (1 + shares[:, 0] * against[:, None]), axis=2) * windows, 1.5)
        columns = whiten @ single
        size = np.sqrt(np.sum(columns**2, axis=2, keepdims=True))
        largest = size.max(axis=(1, 2, 3), keepdims=True)
        odd = columns / np.where(size > 1e-9 * largest, size, np.inf)
        return whiten, logdet, odd, stdtrit(free, TAIL) / stdtrit(d * windows, TAIL)

    def fit(self, values: Array, phi: float | None = None, *, alone: bool = False) -> tuple[Array, Array]:
        """Log likelihood (phi, series) and noise sd (phi, places, series) of `values` (places, series); of one `phi`
        alone if it is given. With `alone` each series has the numbers, to the last bit, that it has without others."""
        which = slice(None) if phi is None else slice(PHIS.index(phi), PHIS.index(phi) + 1)
        d, m, series = self.length - 2, self.length, values.shape[1]
        # the bits of a product depend on how many columns it has: all have the same, the last filled up
        width = WIDTH if alone else series
        values = values[:, np.minimum(np.arange(-(-series // width) * width), series - 1)]
        whiten, odd = self.whiten[:, which], np.swapaxes(self.odd[:, which], -1, -2)
        number, shares, columns = *whiten.shape[1:3], values.shape[1]
        loglik, sd = np.zeros((number, columns)), np.empty((number, len(self.starts), columns))
        tiny = d * (1e-300 + (EXACT * np.ptp(values, axis=0)) ** 2)
        # window by window, whose matrices then stay in the cache while all series meet them
        for i, a in enumerate(self.starts):
            z = values[a : a + m] - values[a : a + m].mean(0)
            for first in range(0, columns, step := width * max(1, AT_ONCE // width)):
                at = slice(first, first + step)
                count = min(series - first, step)
                left = _product(whiten[i].reshape(-1, m), z[:, at], width).reshape(number, shares, d, -1)
                rss = np.square(left).sum(2) + tiny[at]  # (phi, share, series)
                # the rise or point that takes most off the sum of squares, where it is worth its cost
                apart = _product(odd[i], left, width)[..., :count]
                gain = np.zeros_like(rss)
                gain[..., :count] = np.square(apart, out=apart).max(2)
                less = np.maximum(rss - gain, 1e-12 * rss) + tiny[at]
                usual = 0.5 * d * np.log(rss / d)
                freed = usual - 0.5 * (d - 1) * np.log(less / (d - 1)) - self.cost
                logs = np.maximum(freed, 0) - 0.5 * self.logdet[i, which, :, None] - usual
                size = np.sqrt(np.where(freed > 0, less / (d - 1), rss / d)) * self.wider[i, which, :, None]
                best = logs.max(1)
                weights = np.exp(logs - best[:, None])
                # where all values are one, as of a saturated accuracy, nothing tells the correlation
                loglik[:, at] += best * (np.ptp(values[a : a + m, at], axis=0) > 0)
                sd[:, i, at] = (weights * size).sum(1) / weights.sum(1)
        mixed = _product(self.mix, np.sqrt(sd), width)
        return loglik[:, :series] / self.overlap, mixed[..., :series] ** 2


def _product(matrices: Array, columns: Array, width: int) -> Array:
    """Matrices (..., n, m) times columns (..., m, series), `width` of them to a product."""
    found = np.empty((*columns.shape[:-2], matrices.shape[-2], columns.shape[-1]))
    for k in range(0, columns.shape[-1], width):
        at = slice(k, k + width)
        np.matmul(matrices, columns[..., at], out=found[..., at])
    return found


def correlation(loglik: Array) -> int:
    """Index of the CAUTION quantile of the posterior of the correlation, its prior uniform between 0 and 1."""
    edges = np.concatenate([[0.0], (np.array(PHIS[1:]) + np.array(PHIS[:-1])) / 2, [1.0]])
    posterior = np.exp(loglik - loglik.max()) * np.diff(edges)
    return int(np.searchsorted(np.cumsum(posterior / posterior.sum()), CAUTION))


def of_replicates(model: NoiseModel, replicates: Array) -> tuple[int, Array]:
    """Index of the correlation, and sd (places,), of the mean of `replicates` (R, places): the spread of the replicates
    about their mean, a level common to all steps of a replicate left out."""
    count = len(replicates)
    loglik, sd = model.fit((replicates - replicates.mean(0)).T)
    k = correlation(loglik.sum(1))
    return k, np.sqrt(np.mean(sd[k] ** 2, axis=1) / (count - 1))


def without_rises(x: Array, values: Array) -> tuple[Array, int]:
    """The values with sharp rises between rests taken out, for their noise alone; and how many gaps that takes.

    A rise is one to three changes the same way, each by more than SPIKE noise sd, with two changes within these on
    both sides, over gaps of at least half its own: checkpoints close together are no rest. There the noise is known
    from the rests, where a window, whose likelihood allows one rise, takes stairs for correlated noise.
    """
    change, gap = np.diff(values), np.diff(x)
    large = np.abs(change) > SPIKE * _wiggles(values)
    way = large * np.sign(change)
    ends = np.flatnonzero(np.diff(way, prepend=0.0, append=0.0))  # of runs of large changes the same way
    taken = np.zeros(len(change), dtype=bool)
    for a, b in itertools.pairwise(ends):
        beside = [a - 2, a - 1, b, b + 1]
        if way[a] != 0 and b - a <= 3 and a >= 2 and b + 2 <= len(change):
            taken[a:b] = not large[beside].any() and 2 * gap[beside].min() >= gap[a:b].mean()
    return values - np.append(0.0, np.cumsum(np.where(taken, change, 0.0))), int(taken.sum())


def _wiggles(values: Array) -> Array:
    """Noise sd at each gap, from the median change over the gaps around it, mirrored at the ends."""
    change = np.abs(np.diff(values))
    half = min(SPAN // 2, len(change) - 1)
    around = sliding_window_view(np.pad(change, half, mode="reflect"), 2 * half + 1)
    return 1.4826 * np.median(around, axis=1) / np.sqrt(2) + EXACT * np.ptp(values) / SPIKE


def spikes(values: Array) -> NDArray[np.bool_]:
    """Single points that leave all four neighbours, the same way, by more than SPIKE noise sd and twice as far as the
    points beside them lie apart. The noise is the median change from one point to the next nearby."""
    n, found = len(values), np.zeros(len(values), dtype=bool)
    around = np.stack([values[k : n - 4 + k] for k in (0, 1, 3, 4)]) if n >= 5 else np.empty((4, 0))
    away = np.maximum(values[2:-2] - around.max(0), around.min(0) - values[2:-2])
    for i in np.flatnonzero(away > 2 * np.abs(around[1] - around[2])) + 2:
        near = np.delete(values[max(0, i - SPAN // 2) : i + SPAN // 2 + 1], min(int(i), SPAN // 2))
        scale = 1.4826 * np.median(np.abs(np.diff(near))) / np.sqrt(2)
        found[i] = away[i - 2] > SPIKE * scale + EXACT * np.ptp(values)
    return found


def before_divergence(values: Array) -> int:
    """How many values there are before those at the end, fewer than a quarter of all, that grow beyond all measure."""
    if not len(values):
        return 0
    usual = float(np.quantile(np.abs(values), 0.75))
    if not abs(values[-1]) > DIVERGED * usual > 0:
        return len(values)
    return int(np.flatnonzero(np.abs(values) <= usual / SMALLEST)[-1]) + 1
