"""λ̂ as a function of gamma, fitted to trials, and its limit at gamma 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from devmon.sampling.constants import DEPARTURE, RATIO, RESAMPLINGS

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """λ̂(gamma) = s q(gamma) + ½ Σ mⱼ aⱼ / (aⱼ + gamma), q the law of the Hessian's spectrum, all weights ≥ 0.

    - `limit`, `low`, `high`: λ̂ at gamma 0 and its 90% interval, as far as the errors of the trials move it
    - `gamma` (k,), `value` (k,): the curve: at 0, at the smallest gamma tried, then from a tenth of it to the largest
    - `slope`: d log λ̂ / d log gamma at the smallest gamma tried: 0 on a plateau, −1 where λ̂ is a curvature trace
    """

    limit: float
    low: float
    high: float
    gamma: Array
    value: Array
    slope: float

    def missing(self, limit: float) -> float:
        """The share of this limit that λ̂ lacks at the smallest gamma tried."""
        return float(max(0.0, 1 - self.value[1] / limit)) if limit > 0 else 0.0


def fit(gammas: Sequence[float], values: Array, covariance: Array, law: Callable[[float], float]) -> Fit:
    """The fit to λ̂ (trial,) at `gammas`, by non-negative least squares in the metric of their `covariance`.

    `law(gamma)` is what a quadratic loss of the Hessian's spectrum gives, and knows scales below the gammas tried. What
    the trials show beyond it are scales aⱼ, half a decade apart, each of which costs a standard deviation per 30% of λ̂.
    """
    points = np.asarray(gammas, dtype=np.float64)
    least, largest = float(points.min()), float(points.max())
    shown = np.concatenate([[0.0, least], np.geomspace(least / 10, largest, 40)])
    scales = np.geomspace(least / RATIO, 100 * largest, 2 + int(2 * np.log10(100 * largest * RATIO / least)))

    def columns(at: Array) -> Array:
        poles = 0.5 * scales / (scales + at[:, None])
        return np.column_stack([[law(float(gamma)) for gamma in at], poles])

    # One row a trial, whitened, then one a scale that holds it to the Hessian.
    spread = np.linalg.inv(np.linalg.cholesky(covariance + 1e-12 * np.trace(covariance) * np.eye(len(points))))
    prior = np.column_stack([np.zeros(len(scales)), np.eye(len(scales)) / (2 * DEPARTURE * abs(values).max())])
    matrix, curve = np.vstack([spread @ columns(points), prior]), columns(shown)
    noise = np.random.default_rng(0).standard_normal((RESAMPLINGS, len(points)))
    targets = [spread @ values, *(spread @ values + noise)]
    weights = [nnls(matrix, np.concatenate([target, np.zeros(len(scales))]))[0] for target in targets]
    limits = np.array([curve[0] @ w for w in weights])

    # The slope is that of the curve around the smallest gamma.
    best = curve @ weights[0]
    around = columns(np.array([least / 1.1, least * 1.1])) @ weights[0]
    slope = float(np.log(around[1] / around[0]) / np.log(1.1**2)) if (around > 0).all() else 0.0
    low, high = np.quantile(limits, [0.05, 0.95])
    return Fit(float(limits[0]), float(low), float(high), shown, best, slope)
