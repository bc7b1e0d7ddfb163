"""The curve within a window: a quintic smoothing spline beside noise that is known, with posterior draws.

Its third derivative is white noise (the second a random walk), so slope and curvature are smooth; a parabola is free.
The prior variance is averaged over POWERS by restricted likelihood.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from devmon.analysis.detection.constants import DRAWS, GRID, POWERS
from devmon.analysis.series import Array

FREE = 1e4  # prior variance of the parabola, for values of range 1


class Spline:
    """f and its slope on GRID places `x` of the window: posterior mean, and draws (GRID, DRAWS)."""

    def __init__(self, x: Array, values: Array, noise: Array, seed: int = 0) -> None:
        self.middle, self.scale, self.seed = float(values.mean()), float(np.ptp(values)) or 1.0, seed
        u, at = (x - x[0]) / np.ptp(x), np.linspace(0, 1, GRID)
        self.x = x[0] + np.ptp(x) * at
        self.values = (values - self.middle) / self.scale
        self.noise = noise / self.scale**2 + 1e-8 * np.eye(len(x))  # 1e-4 of the window's range: keeps it well posed
        free = min(3, len(x) - 1)
        self.parabola, self.parabola_at = (np.vander(2 * t - 1, free, increasing=True) for t in (u, at))
        self.kernel, self.kernel_at, self.kernel_both = _kernel(u, u), _kernel(at, u), _kernel(at, at)
        self.weights = self._weights(free)
        mean = sum(w * self._posterior(k)[0] for k, w in enumerate(self.weights) if w > 0)
        self.mean = self.middle + self.scale * np.asarray(mean)
        self.slope = np.gradient(self.mean, self.x)

    def _weights(self, free: int) -> Array:
        """Posterior weights of POWERS; those below 2% are 0."""
        rest = np.linalg.qr(self.parabola, mode="complete")[0][:, free:]
        if rest.shape[1] == 0:
            return np.eye(len(POWERS))[0]
        # one eigendecomposition beside the noise serves all powers
        root = np.linalg.inv(np.linalg.cholesky(rest.T @ self.noise @ rest)) @ rest.T
        size, vectors = np.linalg.eigh(root @ self.kernel @ root.T)
        square = (vectors.T @ (root @ self.values)) ** 2
        variance = 1 + np.array(POWERS)[:, None] * np.maximum(size, 0)
        loglik = -0.5 * np.sum(np.log(variance) + square / variance, axis=1)
        weights = np.exp(loglik - loglik.max())
        weights = np.where(weights < 0.02 * weights.sum(), 0, weights)
        return weights / weights.sum()

    def _posterior(self, k: int) -> tuple[Array, Array, Array]:
        """Mean on the grid for POWERS[k], and what its covariance needs."""
        flat = FREE * self.parabola_at @ self.parabola.T
        cov = POWERS[k] * self.kernel + FREE * self.parabola @ self.parabola.T + self.noise
        across = POWERS[k] * self.kernel_at + flat
        gain = np.linalg.solve(cov, across.T).T
        return gain @ self.values, gain, across

    @cached_property
    def draws(self) -> Array:
        rng = np.random.default_rng(self.seed)
        number = np.diff(np.floor(np.append(0, np.cumsum(self.weights)) * DRAWS + 0.5)).astype(int)
        parts = []
        noise = np.linalg.cholesky(self.noise)
        for k in np.flatnonzero(number).tolist():
            mean, gain, _ = self._posterior(k)
            again = noise @ rng.standard_normal((len(noise), number[k]))
            parts.append(mean[:, None] + gain @ again)
        return self.middle + self.scale * np.hstack(parts)

    @cached_property
    def slopes(self) -> Array:
        return np.gradient(self.draws, self.x, axis=0)


def _kernel(a: Array, b: Array) -> Array:
    """Covariance of twice integrated Brownian motion: the integral of (a-t)²(b-t)²/4 up to the smaller of a and b."""
    low, off = np.minimum(a[:, None], b), np.abs(a[:, None] - b)
    return (low**5 / 5 + off * low**4 / 2 + off**2 * low**3 / 3) / 4
