"""Whether a change is abrupt: more than drift and random walks do anywhere in a curve as long.

A change over L places is compared with those over L places elsewhere in the same curve: t = change / root mean square
of the others, on as many degrees of freedom as there are changes side by side. The largest -log tail probability over
all lengths is compared with that of simulated random walks, correlated noise and walks beneath white noise, of whose
families the worst counts.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr  # the distribution of t: its tails are those of scipy.stats.t, without the checks

from devmon.analysis.detection.constants import DRAWS
from devmon.analysis.detection.windows import p_value
from devmon.analysis.series import Array


def lags(n: int) -> list[int]:
    """Lengths of a change, in places: 1, 2, 3, 4, 6, 8, ... up to a third of the curve."""
    found = sorted({round(2 ** (k / 2)) for k in range(2 * int(np.log2(max(n, 2))) + 1)})
    return [lag for lag in found if lag <= max(n // 3, 1)]


def surprise(values: Array, lag: int, part: slice = slice(None)) -> Array:
    """(..., n - lag) -log tail probability of each change over `lag` places, or of `part` of them, against the others
    that do not touch it."""
    return _surprise(*_against_others(values, lag, part), lag)


def largest_surprise(values: Array, lag: int) -> Array:
    """(...,) the largest `surprise` of all changes over `lag` places: of those with as many others, that of the
    largest t."""
    t, others = _against_others(values, lag, slice(None))
    order = np.argsort(others, kind="stable")
    first = np.flatnonzero(np.diff(others[order], prepend=-1))
    return _surprise(np.maximum.reduceat(t[..., order], first, axis=-1), others[order][first], lag).max(-1)


def _against_others(values: Array, lag: int, part: slice) -> tuple[Array, NDArray[np.int64]]:
    """t of each change over `lag` places, and how many others there are that do not touch it."""
    change = np.square(values[..., lag:] - values[..., :-lag])
    count = change.shape[-1]
    total = np.concatenate([np.zeros((*change.shape[:-1], 1)), np.cumsum(change, axis=-1)], axis=-1)
    place = np.arange(count)[part]
    start = np.maximum(place - lag + 1, 0)
    stop = np.minimum(place + lag, count)
    others = count - (stop - start)
    elsewhere = np.maximum(total[..., -1:] - (total[..., stop] - total[..., start]), 1e-30)
    return np.sqrt(change[..., part] * np.maximum(others, 1) / elsewhere), others


def _surprise(t: Array, others: NDArray[np.int64], lag: int) -> Array:
    tail = np.maximum(stdtr(np.maximum(others / lag, 1), -t), np.finfo(np.float64).tiny)  # 0 where it underflows
    return np.where(others > 0, -np.log(tail), 0.0)


@lru_cache(maxsize=32)
def nulls(n: int) -> tuple[Array, ...]:
    """Sorted largest surprises of DRAWS series of n places, for each family of drift."""
    rng = np.random.default_rng(n)
    families = []
    for phi, white in ((0.0, 0.0), (0.8, 0.0), (0.95, 0.0), (1.0, 0.0), (1.0, 0.3), (1.0, 1.0), (1.0, 3.0)):
        drift = rng.standard_normal((DRAWS, n))
        for i in range(1, n):
            drift[:, i] += phi * drift[:, i - 1]
        series = drift + white * rng.standard_normal((DRAWS, n))
        families.append(np.sort(np.max([largest_surprise(series, lag) for lag in lags(n)], axis=0)))
    return tuple(families)


def abruptness(values: Array, start: float, end: float) -> float:
    """The p-value of the change between two places (indices, fractional) against drift."""
    n = len(values)
    low, high = max(int(np.floor(start)) - 1, 0), min(int(np.ceil(end)) + 1, n - 1)
    most = 0.0
    for lag in lags(n):
        if lag <= high - low:
            most = max(most, float(surprise(values, lag, slice(low, high - lag + 1)).max()))
    return max(p_value(most, family) for family in nulls(n))
