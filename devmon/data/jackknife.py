"""Errors of what is no mean: by leaving out groups of items, and by drawing items again."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from devmon.data.probe import clustered_groups
from devmon.snapshot import derive_seed

BOOTSTRAPS = 200  # draws: a standard error is known to 5% of itself


def jackknife(whole: np.ndarray | float, without: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard error (…) of a value from the same without each of g independent groups of about equal size.

    se² = (g - 1)/g Σ (without - mean without)² (Tukey 1958); `without` is (group, …). Also its pseudo-values about the
    value, whole + (g - 1)(mean without - without), by fixed groups as `clustered_groups`. It holds for smooth functions
    of means, and for ranks where groups are large against the ranks that matter; NaN for a single group.

    >>> jackknife(2.0, np.array([2.5, 2.0, 1.5]))[0].round(3)  # of the mean of 1, 2, 3: its standard deviation over √3
    np.float64(0.577)
    """
    without = np.asarray(without, np.float64)
    g = len(without)
    centred = without.mean(0) - without
    se = np.sqrt((g - 1) * (centred**2).mean(0)) if g > 1 else np.full(without.shape[1:], np.nan)
    return se, clustered_groups(np.asarray(whole) + (g - 1) * centred, np.ones(g))


def jackknife_of_mean(of: Callable[[np.ndarray], float], values: np.ndarray) -> tuple[float, float, np.ndarray]:
    """A function of the mean over items (axis 0), its jackknife standard error, its pseudo-values by group; NaN where
    the function is, and for a single item."""
    n, mean = len(values), values.mean(0)
    value = of(mean)
    if n < 2 or math.isnan(value):
        return value, math.nan, clustered_groups(np.full(n, math.nan), np.ones(n))
    se, groups = jackknife(value, np.array([of(mean + (mean - row) / (n - 1)) for row in values]))
    return value, float(se), groups


def bootstrap_of_sizes(of: Callable[[np.ndarray], float], values: np.ndarray) -> tuple[float, float, np.ndarray]:
    """As `jackknife_of_mean` for a function of the sizes |mean| of parts, `values` (item, part), with the standard
    error of the bootstrap.

    The size of a part whose mean is about 0 is noise folded at 0. A slope (the jackknife) takes that for more than it
    is, 1.4 times in a participation ratio, and so does drawing about the mean found, 1.2 times: the mean is first moved
    toward 0 by its own squared error (positive-part James-Stein, each part by itself), 1.1 times.
    """
    value, se, groups = jackknife_of_mean(of, values)
    n, mean = len(values), values.mean(0)
    if n < 2 or math.isnan(value):
        return value, se, groups
    noise = values.var(0, ddof=1) / n
    shrunk = mean * np.maximum(0.0, 1 - noise / np.maximum(mean**2, 1e-300))
    generator = np.random.default_rng(derive_seed(0, "bootstrap_of_sizes"))
    shares = generator.multinomial(n, np.full(n, 1 / n), BOOTSTRAPS) / n
    drawn = np.array([of(each) for each in shares @ (values - mean) + shrunk])
    return value, float(np.nanstd(drawn, ddof=1)), groups
