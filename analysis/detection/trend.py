"""The smoothed curve over the whole series, with the band in which a new value would lie."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import norm

from devmon.analysis.detection.constants import RESOLVED, SPAN
from devmon.analysis.detection.spline import Spline
from devmon.analysis.series import Array


def trend(
    x: Array, values: Array, sd: Array, spline: Callable[[int, int], Spline], level: float
) -> tuple[Array, Array, Array]:
    """Low, middle and high at each place: splines of SPAN places that overlap by half, blended linearly; the band
    holds the noise of a point."""
    n, length = len(x), min(len(x), SPAN)
    middle, weight = np.zeros(n), np.zeros(n)
    for start in sorted({*range(0, n - length + 1, max(1, length // 2)), n - length}):
        inside = np.arange(start, start + length)
        share = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
        curve = spline(start, start + length - 1)
        middle[inside] += share * np.interp(x[inside], curve.x, curve.mean)
        weight[inside] += share
    middle /= weight
    half = norm.ppf((1 + level) / 2) * np.hypot(sd, RESOLVED)
    return middle - half, middle, middle + half
