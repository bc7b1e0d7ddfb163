"""The curve within a window: a quintic smoothing spline beside noise that is known.

Its third derivative is white noise (the second a random walk), so slope and curvature are smooth; a parabola is free.
The prior variance is the likeliest of POWERS by restricted likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dgetrf, dgetrs, dpotrf, dpttrf, dsygst, dsytrd, dtrtrs
from scipy.special import ndtri

from devmon.analysis.detection.constants import DRAWS, FREE, GRID, POWERS, RESOLVED, SPAN
from devmon.analysis.series import Array


class Places:
    """What splines on the same places of a window have in common: the `x` at which the curve is looked at, and there,
    on a window of length 1, parabolas and kernels, and of the kernel without what a parabola has of it the lower
    triangle, `bent`."""

    def __init__(self, x: Array) -> None:
        u = (x - x[0]) / np.ptp(x)
        at = _looked_at(u)
        self.x = x[0] + np.ptp(x) * at
        free = min(3, len(x) - 1)
        parabola, parabola_at = (np.vander(2 * t - 1, free, increasing=True) for t in (u, at))
        self.kernel, self.kernel_at = _kernel(u, u), _kernel(at, u)
        self.free, self.free_at = FREE * parabola @ parabola.T, FREE * parabola_at @ parabola.T
        self.parabola = np.linalg.qr(parabola)[0]
        self.bent = np.tril(_without(self.parabola, self.kernel))


@lru_cache(maxsize=512)  # windows: those of the curves of a run, which most series share; 30 kB each, at most 350
def places_of(x: bytes) -> Places:
    """Those of the places x (as bytes)."""
    return Places(np.frombuffer(x))


class Spline:
    """f and its slope at the places `x` of the window: posterior mean, and DRAWS of it as new noise moves it."""

    def __init__(self, x: Array, values: Array, noise: Array, seed: int = 0) -> None:
        self.middle, self.scale, self.seed = float(values.mean()), float(np.ptp(values)) or 1.0, seed
        self.places = places = places_of(x.tobytes())
        self.x = places.x
        self.values = (values - self.middle) / self.scale
        self.noise = noise / self.scale**2
        self.noise.flat[:: len(x) + 1] += 1e-8  # 1e-4 of the window's range: keeps it well posed
        # root of the noise, lower triangle; then the curve on the grid, given the likeliest prior variance
        self.root = dpotrf(self.noise, lower=1)[0]
        self.power = POWERS[self._likeliest()]
        self.factor = dgetrf(self.power * places.kernel + places.free + self.noise)[:2]
        across = self.power * places.kernel_at + places.free_at
        self.mean = self.middle + self.scale * (across @ dgetrs(*self.factor, self.values)[0])

    def _likeliest(self) -> int:
        """Index of the prior variance of the largest restricted likelihood."""
        places, n = self.places, len(self.values)
        # beside white noise, and without what a parabola has: the values z and the kernel A
        flat = np.linalg.qr(dtrtrs(self.root, places.parabola, lower=1)[0])[0]
        z = dtrtrs(self.root, self.values, lower=1)[0]
        z = z - flat @ (flat.T @ z)
        half = dsygst(places.bent, self.root, lower=1)[0]
        half.flat[:: n + 1] /= 2
        kernel = _without(flat, half + half.T)
        # in a basis that begins with z, A is tridiagonal; so one pass gives log |1 + power A| and z'(1 + power A)^-1 z
        # of all powers: the last pivot is that of z
        bordered = np.zeros((n + 1, n + 1))
        bordered[1:, 0], bordered[1:, 1:] = z, kernel
        _, diagonal, beside, _, _ = dsytrd(bordered, lower=1)
        powers = np.array(POWERS)[:, None]
        diagonal = 1 + powers * diagonal[:0:-1]
        beside = np.append(powers * beside[:0:-1], 0 * powers, axis=1)
        pivots, _, failed = dpttrf(diagonal.ravel(), beside.ravel()[:-1])
        # a power at which rounding has made A negative outweighs the noise too far, and so do those after it
        pivots = pivots.reshape(diagonal.shape)[: (failed - 1) // n if failed else None]
        return int(np.argmax(-0.5 * (np.log(pivots).sum(1) + z @ z / pivots[:, -1])))

    @cached_property
    def slope(self) -> Array:
        return np.gradient(self.mean, self.x)

    def draws(self, start: int = 0, stop: int | None = None) -> Array:
        """(stop - start, DRAWS) the curve at these places as it would come out with new noise upon it."""
        places, part = self.places, slice(start, stop)
        across = self.power * places.kernel_at[part] + places.free_at[part]
        gain = dgetrs(*self.factor, across.T, trans=1)[0].T
        again = gain @ self.root @ _normal(self.seed, len(self.values))
        return self.mean[part, None] + self.scale * again

    def slopes(self, start: int, stop: int) -> Array:
        """(stop - start, DRAWS) the slopes of these curves."""
        low, high = max(start - 1, 0), min(stop + 1, len(self.x))
        return np.gradient(self.draws(low, high), self.x[low:high], axis=0)[start - low : stop - low]


def summit(x: Array, curves: Array, at: NDArray[np.int64]) -> Array:
    """Where each of `curves` (x, n) has its extremum beside place `at` (n,): the parabola through three places, no
    further than halfway to the next."""
    inner, of, last = np.clip(at, 1, len(x) - 2), np.arange(curves.shape[1]), len(x) - 1
    # slopes on both sides, of which that of the parabola at the middle is the mean, each weighed by the other gap
    before, after = x[inner] - x[inner - 1], x[inner + 1] - x[inner]
    to, on = (curves[inner, of] - curves[inner - 1, of]) / before, (curves[inner + 1, of] - curves[inner, of]) / after
    bend = on - to
    off = -0.5 * (to * after + on * before) / np.where(bend == 0, np.inf, bend)
    low, high = x[at] + x[np.maximum(at - 1, 0)], x[at] + x[np.minimum(at + 1, last)]
    return np.clip(x[inner] + off, low / 2, high / 2)


def trend(
    x: Array, values: Array, sd: Array, spline: Callable[[int, int, int, int], Spline], level: float
) -> tuple[Array, Array, Array]:
    """Low, middle and high at each place: splines of SPAN places that overlap by half, blended linearly; the band
    holds the noise of a point."""
    n, length = len(x), min(len(x), SPAN)
    middle, weight = np.zeros(n), np.zeros(n)
    for start in sorted({*range(0, n - length + 1, max(1, length // 2)), n - length}):
        inside = np.arange(start, start + length)
        share = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
        curve = spline(start, start + length - 1, start, start + length - 1)
        middle[inside] += share * np.interp(x[inside], curve.x, curve.mean)
        weight[inside] += share
    middle /= weight
    half = ndtri((1 + level) / 2) * np.hypot(sd, RESOLVED)
    return middle - half, middle, middle + half


def _looked_at(u: Array) -> Array:
    """GRID evenly spaced places of a window of length 1; where its points `u` lie closer together than half of that, as
    checkpoints of even step do late on the axis of log step, instead the points and the middles between them."""
    even = np.linspace(0, 1, GRID)
    close = np.flatnonzero(np.diff(u) < 0.5 * even[1])
    gap = np.clip(np.searchsorted(u, even, side="right") - 1, 0, len(u) - 2)  # that each of these lies in
    own = np.concatenate([u[close], u[close + 1], (u[close] + u[close + 1]) / 2])
    return np.unique(np.concatenate([even[~np.isin(gap, close)], own]))


@lru_cache(maxsize=128)  # one for each number of places in a window
def _normal(seed: int, places: int) -> Array:
    return np.random.default_rng(seed).standard_normal((places, DRAWS))


def _without(basis: Array, kernel: Array) -> Array:
    """A symmetric kernel without the directions of an orthonormal basis."""
    rest = kernel - basis @ (basis.T @ kernel)
    return rest - (rest @ basis) @ basis.T


def _kernel(a: Array, b: Array) -> Array:
    """Covariance of twice integrated Brownian motion: the integral of (a-t)²(b-t)²/4 up to the smaller of a and b."""
    low, off = np.minimum(a[:, None], b), np.abs(a[:, None] - b)
    square = low * low
    return low * square * (square / 5 + off * low / 2 + off * off / 3) / 4
