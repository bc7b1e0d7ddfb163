"""Windows of all sizes: where the slope surely has a sign, and where it surely grows or falls.

For each window the slope of the least-squares line, and for each pair of adjacent windows that share a point the
change of slope from the first to the second, divided by its standard error. All are compared at once with the
simulated largest value under the noise alone, less a penalty sqrt(2 log(e n / m)) that makes small windows as rare to
exceed as large ones (Dümbgen & Spokoiny 2001). Two windows of opposite sign, one after the other, hold an extremum
between them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import sparse

from devmon.analysis.detection.constants import GROW, LEAST
from devmon.analysis.detection.noise import NoiseModel, covariance
from devmon.analysis.series import Array


class Order(IntEnum):
    """What a window looks at."""

    SLOPE = 1
    CHANGE = 2  # of slope


@dataclass(frozen=True)
class Extremum:
    """A maximum (`sign` 1) or minimum of f (`order` SLOPE) or of its slope (CHANGE), surely between two places.

    `evidence` is the smaller of the two signs' largest penalised statistics.
    """

    order: int
    sign: int
    left: int
    right: int
    evidence: float


class Windows:
    """The windows of a set of places: rows of contrasts, their penalties, and their null for each correlation."""

    def __init__(self, x: Array, counts: Array) -> None:
        self.x, self.counts, self.noise = x, counts, NoiseModel(x, counts)
        # slopes over every size from every place; then the windows that are used: hops of a sixth of their length
        n, sizes = len(x), _sizes(len(x))
        slopes = {m: self._slopes(m) for m in {*sizes, *(2 * m - 1 for m in sizes)} if m <= n}
        # order, first places, split after, weights (windows, m)
        blocks: list[tuple[int, NDArray[np.int64], int, Array]] = []
        for m in sizes:
            starts = _starts(n, m, m // 6)
            blocks.append((Order.SLOPE, starts, m - 1, slopes[m][starts]))
        # pairs of windows of equal length, and one twice as long as the other
        for p, q in sorted({pair for m in sizes for pair in ((m, m), (m, 2 * m - 1), (2 * m - 1, m))}):
            if (m := p + q - 1) <= n:
                starts = _starts(n, m, min(p, q) // 4)
                change = np.zeros((len(starts), m))
                change[:, :p] -= slopes[p][starts]
                change[:, p - 1 :] += slopes[q][starts + p - 1]
                blocks.append((Order.CHANGE, starts, p - 1, change))
        # all of them as one sparse matrix, with the weights of each place's variance in each contrast
        self.order = np.concatenate([np.full(len(starts), order) for order, starts, _, _ in blocks])
        self.first = np.concatenate([starts for _, starts, _, _ in blocks])
        self.split = np.concatenate([starts + after for _, starts, after, _ in blocks])
        self.lengths = np.concatenate([np.full(len(starts), weights.shape[1]) for _, starts, _, weights in blocks])
        self.last = self.first + self.lengths - 1
        columns = np.concatenate([(starts[:, None] + np.arange(w.shape[1])).ravel() for _, starts, _, w in blocks])
        data, ends = np.concatenate([w.ravel() for *_, w in blocks]), np.append(0, np.cumsum(self.lengths))
        self.rows = sparse.csr_matrix((data, columns, ends), shape=(len(self.first), n))
        squares = self.rows.multiply(self.rows).tocsr()
        self.squares = sparse.diags(1 / np.asarray(squares.sum(1)).ravel()) @ squares
        self.penalty = np.sqrt(2 * np.log(np.e * n / self.lengths))
        self._correlations: dict[float, Array] = {}
        self._roots: dict[float, tuple[Array, Array]] = {}
        self._nulls: dict[tuple[float, str, int, int], Array] = {}

    def _slopes(self, m: int) -> Array:
        """(n - m + 1, m) weights of the least-squares slope over m places from each."""
        x, w = sliding_window_view(self.x, m), sliding_window_view(self.counts, m)
        off = w * (x - (np.sum(w * x, axis=1) / np.sum(w, axis=1))[:, None])
        return off / np.sum(off * x, axis=1)[:, None]

    def correlations(self, phi: float) -> Array:
        """(places, places) correlation of the noise at this phi."""
        if phi not in self._correlations:
            self._correlations[phi] = covariance(self.counts, phi)
        return self._correlations[phi]

    def root(self, phi: float) -> tuple[Array, Array]:
        """Root of the correlation over places, and the standard error of every contrast of unit noise."""
        if phi not in self._roots:
            root = np.linalg.cholesky(self.correlations(phi) + 1e-12 * np.eye(len(self.x)))
            self._roots[phi] = np.asarray(root), np.sqrt(np.sum(np.asarray(self.rows @ root) ** 2, axis=1))
        return self._roots[phi]

    def statistics(self, values: Array, sd: Array, phi: float) -> Array:
        """(windows, series) contrasts over their standard errors; the noise within a window has the size of its
        points."""
        return (self.rows @ values) / (self.root(phi)[1][:, None] * np.sqrt(np.asarray(self.squares @ sd**2)))

    def null(self, phi: float, known: str, count: int, seed: int = 0) -> Array:
        """Sorted largest penalised statistics of `count` series of noise, of one sign.

        `known` says how its size is known: "estimated" from the series itself, "bounded" by given errors, or
        "measured".
        """
        key = phi, known, count, seed
        if key not in self._nulls:
            noise = self.root(phi)[0] @ np.random.default_rng(seed).standard_normal((len(self.x), count))
            sd = np.ones_like(noise) if known == "measured" else self.noise.fit(noise, phi)[1][0]
            sd = np.minimum(sd, 1.0) if known == "bounded" else sd
            excess = self.statistics(noise, sd, phi)
            both = (excess - self.penalty[:, None]).max(0), (-excess - self.penalty[:, None]).max(0)
            self._nulls[key] = np.sort(np.concatenate(both))
        return self._nulls[key]

    def both_signs(self, statistics: Array, order: int) -> float:
        """The level up to which windows of both signs are beyond it and their penalty; above it is no extremum."""
        mine = self.order == order
        excess = (sign * statistics[mine] - self.penalty[mine] for sign in (1, -1))
        return min(float(one.max()) for one in excess)

    def extrema(self, statistics: Array, order: int, threshold: float) -> list[Extremum]:
        """The extrema between windows of alternating sign beyond `threshold` and their penalty, from left to right."""
        # the windows beyond the threshold, and of these the earliest of each sign in turn
        pick = np.flatnonzero((self.order == order) & (np.abs(statistics) - self.penalty > threshold))
        first, split, last = self.first[pick], self.split[pick], self.last[pick]
        sign, beyond = np.sign(statistics[pick]).astype(int), np.abs(statistics[pick]) - self.penalty[pick]
        runs: list[int] = []  # the earliest window of each sign in turn
        for k in np.lexsort((-beyond, last)):
            before = runs[-1] if runs else None
            if before is None or (sign[k] != sign[before] and first[k] >= split[before] and split[k] >= last[before]):
                runs.append(int(k))
        # how far beyond it is the most significant window of each run
        best = []
        for i, k in enumerate(runs):
            mine = sign == sign[k]
            if i:
                mine &= (first >= split[runs[i - 1]]) & (split >= last[runs[i - 1]])
            if i + 1 < len(runs):
                mine &= (split <= first[runs[i + 1]]) & (last <= split[runs[i + 1]])
            mine[k] = True
            best.append(float(beyond[mine].max()))
        found = []
        for (i, k), (j, q) in itertools.pairwise(enumerate(runs)):
            # the last window of this sign and, given that, the first to end of the next: the narrowest sure interval
            of_this = np.flatnonzero((sign == sign[k]) & (split <= first[q]) & (last <= split[q]) & (first >= first[k]))
            k = int(of_this[np.lexsort((last[of_this], -first[of_this]))[0]]) if len(of_this) else k
            of_next = np.flatnonzero((sign == sign[q]) & (first >= split[k]) & (split >= last[k]))
            end = int(last[of_next].min()) if len(of_next) else int(last[q])
            left = int(first[k])
            found.append(Extremum(order, int(sign[k]), left, max(end, left + 1), min(best[i], best[j])))
        return found


def p_value(evidence: float, null: Array) -> float:
    """Share of one-signed nulls at or above `evidence`; beyond their top tenth an exponential tail."""
    above = np.sum(null >= evidence)
    top = null[int(0.9 * len(null)) :]
    if above >= len(top):
        return float(above / len(null))
    tail = 0.1 * np.exp(-(evidence - top[0]) / max(float(np.mean(top - top[0])), 1e-9))
    return float(max(min(tail, 0.1), LEAST))


def _sizes(n: int) -> list[int]:
    sizes, m = [], 2
    while m <= n:
        sizes.append(m)
        m = int(np.ceil(m * GROW))
    return sizes


def _starts(n: int, m: int, hop: int) -> NDArray[np.int64]:
    return np.array(sorted({*range(0, n - m + 1, max(1, hop)), n - m}))


@lru_cache(maxsize=4)
def windows_of(x: bytes, counts: bytes) -> Windows:
    """The windows of these places, shared by all series that have them."""
    return Windows(np.frombuffer(x), np.frombuffer(counts))
