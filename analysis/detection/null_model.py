"""The signal model of the detector: smooth drift in log step, plus noise that may be autocorrelated.

    y = b0 + b1 x + f(x) + e,    x = log10(step + origin),  origin = the smallest positive step

f is a Gaussian process with a Matérn-5/2 covariance of length >= 0.3 decades; e is stationary over the index of the
checkpoints: a share `white` of white noise, the rest AR(1) with correlation `rho` up to .99, so that a random walk is
within reach. Where standard errors are given, noise of constant size and noise shaped like them compete.

The covariances form a finite grid of `Theta`. For each, everything that does not depend on the values is computed once
for a set of steps (`Grid`) and the scale is profiled out, so that a likelihood over the grid, for one series or
for a thousand simulated ones, is matrix multiplication. Restricted likelihood: Patterson & Thompson (1971). The simpler
covariances have the greater prior odds (`Theta.prior`): what they explain needs no smooth part and no second noise. A
smooth part that all but goes through the points is worth considering where the noise is tiny, as that of a series of
learning coefficients estimated with the same batches; on what is not smooth, FREER keeps it away.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from devmon.analysis.series import Array

MOST_POINTS = 128  # neighbours are averaged beyond this many checkpoints; their covariance is averaged exactly
LENGTHS = (0.3, 0.8)  # decades
AMPLITUDES = (1.0, 2.5, 6.0, 40.0, 400.0)  # of f, in standard deviations of the noise
RHOS = (0.0, 0.4, 0.7, 0.85, 0.95, 0.99)
NOISES = (
    *((rho, 0.0) for rho in RHOS),
    (0.9, 0.3),
    (0.99, 0.03),
    (0.99, 0.2),
    (0.99, 0.6),
)  # (rho, share of white noise)
# of noise shaped like the standard errors, which is no walk: such a walk would be any loss that falls as its errors do
ERRORS = tuple((rho, white) for rho, white in NOISES if rho < 0.95)
SMOOTH = 1.0  # log odds against a smooth part
FREE = 0.6  # a smooth part that takes more of the points all but goes through them
FREER = 6.0  # log odds against one, further to SMOOTH
FREEST = 0.9  # one that takes more of the points is not considered
MIXED = 2.0  # against a mixture of AR(1) and white noise
UNEVEN = 1.0  # against noise that grows or shrinks
FEW_NOISES = ((0.0, 0.0), (0.4, 0.0), (0.85, 0.0), (0.99, 0.0))


@dataclass(frozen=True)
class Theta:
    """One covariance: f of `amplitude` (in noise sd) and `length` (decades); noise of `rho` and `white` share.

    `shape` is "flat", "se", "growing" or "shrinking": how the size of the noise runs over the checkpoints.
    """

    amplitude: float
    length: float
    rho: float
    white: float
    shape: str

    @property
    def prior(self) -> float:
        """Log prior odds, 0 for white or AR(1) noise of one size and nothing else."""
        return (
            -SMOOTH * (self.amplitude > 0)
            - MIXED * (self.white > 0)
            - UNEVEN * (self.shape in ("growing", "shrinking"))
        )


class Grid:
    """What the steps alone decide: the time axis, the covariances V(theta), their inverse roots and determinants.

    `steps` (n,) sorted; `se` (n,) or None, with noise of other shapes beside it unless not `flat`. `x` (m,) are the points
    of the model, m = min(n, about MOST_POINTS); `inverse` (theta, m, m) holds L⁻¹ for V = L Lᵀ, `logdet` (theta,) half the log
    determinant of V, `freedom` (theta,) the share of the points that the smooth part takes, `innovation` (theta,) the
    geometric mean of the innovations of the noise (what the points before do not tell of the next), in noise sd, `prior`
    (theta,) log odds.
    """

    def __init__(self, steps: Array, se: Array | None = None, *, flat: bool = True) -> None:
        positive = steps[steps > 0]
        self.origin = float(positive[0]) if len(positive) else 1.0
        self.steps = steps
        self.raw_x = np.log10(steps + self.origin)
        self.starts = _groups(self.raw_x)
        self.x = self.average(self.raw_x)
        self.gaps = np.diff(self.x)
        self.thetas: list[Theta] = []
        self.sds: dict[str, Array] = {}  # (m,) relative size of the noise, by its shape
        self.noise: list[Array] = []  # (m, m), one for each theta; entries are shared
        self.smooth: list[Array] = []
        kernels = {length: self._average_both(matern(self.raw_x, self.raw_x, length)) for length in LENGTHS}
        nothing = np.zeros((len(self.x), len(self.x)))
        lag = np.abs(np.subtract.outer(np.arange(len(steps)), np.arange(len(steps))))
        for shape, (sd, noises) in _shapes(self.raw_x, se, flat).items():
            self.sds[shape] = self.average(sd)
            for rho, white in noises:
                correlation = (1 - white) * rho**lag + white * np.eye(len(steps))
                noise = self._average_both(sd[:, None] * correlation * sd)
                for amplitude, length in [(0.0, 1.0)] + [(a, ell) for a in AMPLITUDES for ell in LENGTHS]:
                    if amplitude > 6 and rho > 0.8:
                        continue  # a smooth curve that dwarfs a random walk is nearly a smooth curve with white noise
                    self.thetas.append(Theta(amplitude, length, rho, white, shape))
                    self.noise.append(noise)
                    self.smooth.append(amplitude**2 * kernels[length] if amplitude else nothing)
        root = np.linalg.cholesky(np.array(self.noise) + np.array(self.smooth))
        self.logdet = np.log(np.diagonal(root, axis1=1, axis2=2)).sum(1)
        self.inverse = np.linalg.inv(root)
        self.innovation = np.exp([np.linalg.slogdet(noise)[1] / (2 * len(self.x)) for noise in self.noise])
        self.freedom = np.array([self._freedom(k) for k in range(len(self.thetas))]) / len(self.x)
        self.prior = np.array([theta.prior for theta in self.thetas]) - FREER * (self.freedom > FREE)
        self.__dict__.update(self.only(np.flatnonzero(self.freedom <= FREEST)).__dict__)

    def _freedom(self, k: int) -> float:
        """Degrees of freedom that the smooth part takes under covariance k: trace of S in E[f | y] = S y."""
        return float(np.sum((self.inverse[k] @ self.smooth[k]) * self.inverse[k])) if self.thetas[k].amplitude else 0.0

    def only(self, thetas: NDArray[np.int64]) -> Grid:
        """The grid with some of its covariances."""
        grid = copy(self)
        grid.thetas = [self.thetas[k] for k in thetas]
        grid.noise, grid.smooth = [self.noise[k] for k in thetas], [self.smooth[k] for k in thetas]
        grid.logdet, grid.inverse = self.logdet[thetas], self.inverse[thetas]
        grid.prior, grid.freedom, grid.innovation = self.prior[thetas], self.freedom[thetas], self.innovation[thetas]
        return grid

    def average(self, values: Array) -> Array:
        """Values at the n steps (last axis) averaged into the m points of the model."""
        counts = np.diff(np.append(self.starts, len(self.steps)))
        return np.add.reduceat(values, self.starts, axis=-1) / counts

    def _average_both(self, matrix: Array) -> Array:
        return self.average(self.average(matrix).T)

    def step_of(self, x: Array | float) -> Array:
        """The optimizer step at a place on the time axis."""
        return np.maximum(10.0 ** np.asarray(x) - self.origin, 0.0)

    @cached_property
    def drift(self) -> Array:
        """(m, 2): a constant and a straight line in x."""
        return np.stack([np.ones_like(self.x), self.x - self.x.mean()], axis=1)


class Whitened:
    """A grid with its fixed effects projected out: the likelihood of "nothing but smooth drift and noise".

    `columns` (m, p) are the fixed effects; the points named in `spikes` have a free value of their own, which
    is the same as leaving them out. `project` (theta, m, m) is A = (I - Q Qᵀ) L⁻¹, so that ||A y||² is the generalised
    residual sum of squares; `penalty` (theta,) is ½ log|V| + ½ log|Xᵀ V⁻¹ X| less the log prior odds.
    """

    def __init__(self, grid: Grid, columns: Array, spikes: tuple[int, ...] = ()) -> None:
        self.grid, self.spikes = grid, spikes
        self.columns = np.concatenate([columns, np.eye(len(grid.x))[:, list(spikes)]], axis=1)
        self.df = len(grid.x) - self.columns.shape[1]
        q, r = np.linalg.qr(grid.inverse @ self.columns)
        self.project = grid.inverse - q @ (q.transpose(0, 2, 1) @ grid.inverse)
        self.penalty = grid.logdet - grid.prior + np.log(np.abs(np.diagonal(r, axis1=1, axis2=2))).sum(1)

    def rss(self, y: Array) -> Array:
        """(theta,) residual sum of squares of one series y (m,)."""
        return np.square(self.project @ y).sum(1)

    @cached_property
    def leverage(self) -> tuple[Array, Array]:
        """Diagonal (theta, m) and first off-diagonal (theta, m - 1) of P = Aᵀ A."""
        own = np.square(self.project).sum(1)
        return own, np.stack([(project[:, :-1] * project[:, 1:]).sum(0) for project in self.project])

    def loglik(self, rss: Array) -> Array:
        """Restricted log likelihood with the scale profiled out, plus the log prior odds; theta is the first axis of `rss`."""
        penalty = self.penalty.reshape(-1, *[1] * (rss.ndim - 1))
        return -self.df / 2 * np.log(rss) - penalty

    def as_curve(self, rss: Array) -> Array:
        """`loglik` (theta, ...) where the smooth part is what is asked for: it has no odds against it."""
        smooth = np.array([theta.amplitude > 0 for theta in self.grid.thetas])
        return self.loglik(rss) + SMOOTH * smooth.reshape(-1, *[1] * (rss.ndim - 1))

    def noise_sd(self, y: Array, theta: int) -> float:
        """Standard deviation of the noise e under one covariance, in the units of y."""
        return float(np.sqrt(np.square(self.project[theta] @ y).sum() / self.df))

    def smoother(self, theta: int, at: Array, columns_at: Array) -> tuple[Array, Array]:
        """The linear smoother of drift, jumps and f at the places `at` (g,), where the columns are `columns_at`.

        Returns S (g, m) with E[curve | y] = S y, and the covariance (g, g) of the curve for a noise sd of 1.
        """
        grid, t = self.grid, self.grid.thetas[theta]
        columns_at = np.concatenate([columns_at, np.zeros((len(at), len(self.spikes)))], axis=1)
        kernel = np.zeros((len(at), len(grid.x)))
        prior = np.zeros((len(at), len(at)))
        if t.amplitude:
            kernel = grid.average(t.amplitude**2 * matern(at, grid.raw_x, t.length))
            prior = t.amplitude**2 * matern(at, at, t.length)
        inverse = grid.inverse[theta]
        whitened = inverse @ self.columns
        coefficients = np.linalg.pinv(whitened) @ inverse  # (p, m)
        kernel_white = kernel @ inverse.T
        remainder = columns_at - kernel_white @ whitened
        smoother = kernel_white @ inverse + remainder @ coefficients
        covariance = prior - kernel_white @ kernel_white.T
        covariance += remainder @ np.linalg.pinv(whitened.T @ whitened) @ remainder.T
        return smoother, covariance


def normalised(logs: Array) -> Array:
    """Weights that sum to 1 over the first axis from log weights."""
    weights = np.exp(logs - np.max(logs, axis=0))
    return np.asarray(weights / weights.sum(0))


def leading(weights: Array, most: int) -> Array:
    """The `most` largest weights, summing to 1; the others 0."""
    kept = np.zeros_like(weights)
    largest = np.argsort(-weights, kind="stable")[:most]
    kept[largest] = weights[largest]
    return np.asarray(kept / kept.sum())


def matern(a: Array, b: Array, length: float) -> Array:
    """Matérn-5/2 correlation between the places a and b."""
    r = np.sqrt(5.0) * np.abs(a[:, None] - b[None, :]) / length
    return (1 + r + r**2 / 3) * np.exp(-r)


def shares(weights: Array, total: int) -> NDArray[np.int64]:
    """`total` split in proportion to `weights` (largest remainders), the same way every time."""
    exact = weights * total
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts


def _shapes(x: Array, se: Array | None, flat: bool) -> dict[str, tuple[Array, tuple[tuple[float, float], ...]]]:
    """Relative noise sd at each checkpoint, and the noises to try with it."""
    ramp = 10.0 ** ((x - x[0]) / max(x[-1] - x[0], 1e-12) - 0.5)
    shapes = {"flat": (np.ones(len(x)), NOISES)} if flat else {}
    if se is not None:
        shapes["se"] = (se / np.sqrt(np.mean(se**2)), ERRORS if flat else NOISES)
    if flat:
        shapes |= {"growing": (ramp, FEW_NOISES), "shrinking": (1 / ramp, FEW_NOISES)}
    return shapes


def _groups(x: Array) -> NDArray[np.int64]:
    """First index of each group of neighbours: single points, or equal stretches of x where there are too many."""
    if len(x) <= MOST_POINTS:
        return np.arange(len(x))
    low, high = 0.0, float(x[-1] - x[0])
    for _ in range(40):  # the narrowest stretch that leaves at most MOST_POINTS groups
        middle = (low + high) / 2
        low, high = (low, middle) if len(_stretches(x, middle)) <= MOST_POINTS else (middle, high)
    return np.asarray(_stretches(x, high), dtype=np.int64)


def _stretches(x: Array, width: float) -> Sequence[int]:
    starts = [0]
    while True:
        following = int(np.searchsorted(x, x[starts[-1]] + width, side="left"))
        following = max(following, starts[-1] + 1)
        if following >= len(x):
            return starts
        starts.append(following)
