"""Shares of a signal, with their error, and none where there is no signal."""

from __future__ import annotations

import numpy as np

from devmon.data.probe import clustered_groups

MIN_SIGNAL = 3.0  # standard errors: with fewer, shares of noise are reported; with more, early training is left blank
NO_SIGNAL = f"NaN where the denominator is not above {MIN_SIGNAL:g} of its standard errors"


def signal(values: np.ndarray) -> tuple[float, float, bool]:
    """Mean, standard error and whether the mean is above `MIN_SIGNAL` standard errors, of independent items (item,)."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean()) if len(values) else float("nan")
    se = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return mean, se, mean > MIN_SIGNAL * se  # False for NaN


def share(part: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r = Σ part / Σ whole over independent items, `part` (item, ...) and `whole` (item,); returns r, se (...).

    se = sd(part - r whole) / (√n |mean whole|), the linearised ratio estimator. Both are NaN where the mean of `whole`
    is not above `MIN_SIGNAL` of its standard errors: a share of nothing is no number.
    """
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    mean, _, there = signal(whole)
    if not there:
        return np.full(part.shape[1:], np.nan), np.full(part.shape[1:], np.nan)
    ratio = part.mean(0) / mean
    rest = part - ratio * whole.reshape(-1, *[1] * (part.ndim - 1))
    return ratio, rest.std(0, ddof=1) / np.sqrt(len(whole)) / mean


def share_groups(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The r of `share` on fixed groups of items, (replicate, ...), as `clustered_groups`; NaN where r is."""
    groups = clustered_groups(part, whole)
    return groups if signal(whole)[2] else np.full(groups.shape, np.nan)
