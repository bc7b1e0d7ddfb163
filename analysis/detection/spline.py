"""The curve within a window: a quintic smoothing spline beside noise that is known.

Its third derivative is white noise (the second a random walk), so slope and curvature are smooth; a parabola is free.
The prior variance is the likeliest of POWERS by restricted likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from devmon.analysis.detection.constants import DRAWS, FREE, GRID, POWERS, RESOLVED, SPAN
from devmon.analysis.series import Array


class Places:
    """What splines on the same places of a window have in common: GRID places `x` and `at` these, on a window of length
    1 parabolas and kernels, and the directions `rest` that no parabola has."""

    def __init__(self, x: Array) -> None:
        u, at = (x - x[0]) / np.ptp(x), np.linspace(0, 1, GRID)
        self.x = x[0] + np.ptp(x) * at
        free = min(3, len(x) - 1)
        parabola, parabola_at = (np.vander(2 * t - 1, free, increasing=True) for t in (u, at))
        self.rest = np.linalg.qr(parabola, mode="complete")[0][:, free:]
        self.kernel, self.kernel_at = _kernel(u, u), _kernel(at, u)
        self.free, self.free_at = FREE * parabola @ parabola.T, FREE * parabola_at @ parabola.T


@lru_cache(maxsize=512)  # windows: those of the curves of a run, which most series share; 30 kB each, at most 350
def places_of(x: bytes) -> Places:
    """Those of the places x (as bytes)."""
    return Places(np.frombuffer(x))


class Spline:
    """f and its slope on GRID places `x` of the window: posterior mean, and (GRID, DRAWS) as new noise moves it."""

    def __init__(self, x: Array, values: Array, noise: Array, seed: int = 0) -> None:
        self.middle, self.scale, self.seed = float(values.mean()), float(np.ptp(values)) or 1.0, seed
        self.places = places = places_of(x.tobytes())
        self.x = places.x
        self.values = (values - self.middle) / self.scale
        self.noise = noise / self.scale**2 + 1e-8 * np.eye(len(x))  # 1e-4 of the window's range: keeps it well posed
        # gain: from the values to the curve on the grid, given the likeliest prior variance
        power = POWERS[self._likeliest()]
        cov = power * places.kernel + places.free + self.noise
        across = power * places.kernel_at + places.free_at
        self.gain = np.linalg.solve(cov, across.T).T
        self.mean = self.middle + self.scale * (self.gain @ self.values)

    def _likeliest(self) -> int:
        """Index of the prior variance of the largest restricted likelihood."""
        rest = self.places.rest
        if rest.shape[1] == 0:
            return 0
        # one eigendecomposition beside the noise serves all powers
        root = np.linalg.inv(np.linalg.cholesky(rest.T @ self.noise @ rest)) @ rest.T
        size, vectors = np.linalg.eigh(root @ self.places.kernel @ root.T)
        square = (vectors.T @ (root @ self.values)) ** 2
        variance = 1 + np.array(POWERS)[:, None] * np.maximum(size, 0)
        return int(np.argmax(-0.5 * np.sum(np.log(variance) + square / variance, axis=1)))

    @cached_property
    def slope(self) -> Array:
        return np.gradient(self.mean, self.x)

    @cached_property
    def draws(self) -> Array:
        """The curve as it would come out with new noise upon it."""
        noise = np.linalg.cholesky(self.noise)
        again = self.gain @ (noise @ _normal(self.seed, len(noise)))
        return self.mean[:, None] + self.scale * again

    @cached_property
    def slopes(self) -> Array:
        return np.gradient(self.draws, self.x, axis=0)


def summit(x: Array, curves: Array, at: NDArray[np.int64]) -> Array:
    """Where each of `curves` (GRID, n), on evenly spaced x, has its extremum beside place `at` (n,): the parabola
    through three places."""
    inner, of = np.clip(at, 1, len(x) - 2), np.arange(curves.shape[1])
    before, here, after = (curves[inner + k, of] for k in (-1, 0, 1))
    bend = before - 2 * here + after
    off = 0.5 * (before - after) / np.where(bend == 0, np.inf, bend)
    return x[0] + np.clip(inner + off, np.maximum(at - 0.5, 0), at + 0.5) * (x[1] - x[0])


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


@lru_cache(maxsize=128)  # one for each number of places in a window
def _normal(seed: int, places: int) -> Array:
    return np.random.default_rng(seed).standard_normal((places, DRAWS))


def _kernel(a: Array, b: Array) -> Array:
    """Covariance of twice integrated Brownian motion: the integral of (a-t)²(b-t)²/4 up to the smaller of a and b."""
    low, off = np.minimum(a[:, None], b), np.abs(a[:, None] - b)
    return (low**5 / 5 + off * low**4 / 2 + off**2 * low**3 / 3) / 4
