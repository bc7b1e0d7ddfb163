"""The axis of log step, and the places on it at which a series is looked at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from devmon.analysis.detection.constants import MOST
from devmon.analysis.series import Array


def log_axis(steps: Array) -> tuple[Array, float]:
    """log10(step + first) and `first`, the smallest positive step: 0 is one more place, and early steps keep theirs."""
    first = float(steps[steps > 0][0])
    return np.log10(steps + first), first


def bins(steps: Array) -> NDArray[np.int64]:
    """Index of the first point of each place.

    Up to MOST points are places of their own. More fall into bins whose edges are fixed on the axis: their number a
    decade is a power of two that follows the decades covered, so that later rows hardly ever move what early rows show.
    """
    if len(steps) <= MOST:
        return np.arange(len(steps))
    x, _ = log_axis(steps)
    number = np.floor(x * 2.0 ** np.floor(np.log2(MOST / np.ptp(x))))
    return np.flatnonzero(np.append(True, np.diff(number) > 0))


def counts(starts: NDArray[np.int64], n: int) -> Array:
    """(places,) points of each place."""
    return np.diff(np.append(starts, n)).astype(np.float64)


def averaged(values: Array, starts: NDArray[np.int64]) -> Array:
    """(..., places) means of the points of each place, along the last axis."""
    return np.add.reduceat(values, starts, axis=-1) / counts(starts, values.shape[-1])
