"""What others would use to find changes in a series, each at its usual settings, as functions to the steps they report.

`strict` multiplies the penalty or threshold, so that a baseline can be held to the false alarms that the detector has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import ruptures
from scipy.special import gammaln
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from devmon.analysis.runs import hmm
from devmon.analysis.series import Array

from detection_families import log_of  # isort: skip

Baseline = Callable[[Array, Array, float], list[float]]


def pelt(model: str) -> Baseline:
    """Optimal segmentation (Killick et al. 2012) with a BIC-like penalty; noise by the median difference of
    neighbours."""

    def search(steps: Array, values: Array, strict: float = 1.0) -> list[float]:
        y, n = values / noise_of(values), len(values)
        penalty = {"l2": 2 * np.log(n), "linear": 4 * np.log(n), "rbf": 2.0}[model] * strict
        signal = y[:, None] if model != "linear" else np.column_stack([y, log_of(steps), np.ones(n)])
        breaks = ruptures.Pelt(model=model, jump=1, min_size=3 if model == "linear" else 2).fit(signal).predict(penalty)
        return _between(steps, [b - 1 for b in breaks[:-1]])

    return search


def window(steps: Array, values: Array, strict: float = 1.0) -> list[float]:
    """Sliding windows of a tenth of the points, mean before against mean after (ruptures), with the same penalty as
    PELT l2."""
    y, n = values / noise_of(values), len(values)
    width = max(4, 2 * (n // 20))
    if n <= width + 2:
        return []
    found = ruptures.Window(width=width, model="l2", jump=1).fit(y[:, None]).predict(pen=2 * np.log(n) * strict)
    return _between(steps, [b - 1 for b in found[:-1]])


def largest_step(steps: Array, values: Array, strict: float = 1.0) -> list[float]:
    """The largest change from one checkpoint to the next, whatever its size (beyond 1.4 (strict - 1) noise sd)."""
    change = np.abs(np.diff(values)) / noise_of(values)
    i = int(np.argmax(change))
    return _between(steps, [i]) if change[i] > 1.4 * (strict - 1) else []


def slopes(steps: Array, values: Array, strict: float = 1.0) -> list[float]:
    """Where the slope of a Gaussian-process smooth in log step is least in size (ends of stages as in Hoogland et al.
    2024) or greatest (middles of changes): all local extremes of |f'|."""
    at, slope = _gp_slope(steps, values)
    size = np.abs(slope)
    inner = size[1:-1]
    turns = np.flatnonzero(slope[1:] * slope[:-1] < 0)
    least = np.flatnonzero((inner < size[:-2]) & (inner < size[2:])) + 1
    most = np.flatnonzero((inner > size[:-2]) & (inner > size[2:])) + 1
    return [float(10 ** at[i] - steps[steps > 0][0]) for i in sorted({*turns, *least, *most})]


def slope_minima(steps: Array, values: Array, strict: float = 1.0) -> list[float]:
    """The slope-minimum rule alone."""
    at, slope = _gp_slope(steps, values)
    size = np.abs(slope)
    least = np.flatnonzero((size[1:-1] < size[:-2]) & (size[1:-1] < size[2:])) + 1
    return [float(10 ** at[i] - steps[steps > 0][0]) for i in least]


def hidden_markov(steps: Array, values: Array, strict: float = 1.0) -> list[float]:
    """Changes of state of a Gaussian hidden Markov model with 1 to 4 states, chosen by BIC."""
    y = ((values - values.mean()) / max(values.std(), 1e-12))[None, :, None]
    best, least = None, np.inf
    for states in (1, 2, 3, 4):
        chain, _ = hmm.fit(y, states, restarts=2)
        parameters = states * states - 1 + 2 * states
        score = -2 * float(hmm.log_likelihood(chain[0], y).sum()) + strict * parameters * np.log(len(values))
        if score < least:
            best, least = chain[0], score
    assert best is not None
    return _between(steps, list(np.flatnonzero(np.diff(hmm.viterbi(best, y)[0]))))


def bayesian_online(steps: Array, values: Array, strict: float = 1.0) -> list[float]:
    """Bayesian online change points (Adams & MacKay 2007): normal data of unknown mean and variance, hazard 1/n; a
    change where the most probable run length falls back."""
    y, n = (values - np.median(values)) / noise_of(values), len(values)
    hazard = 1 / (n * strict)
    mean, kappa, alpha, beta = np.zeros(1), np.full(1, 0.05), np.ones(1), np.ones(1)
    run, likeliest = np.ones(1), np.zeros(n, dtype=int)
    for t in range(n):
        scale2 = beta * (kappa + 1) / (alpha * kappa)
        logs = gammaln(alpha + 0.5) - gammaln(alpha) - 0.5 * np.log(2 * alpha * np.pi * scale2)
        logs -= (alpha + 0.5) * np.log1p((y[t] - mean) ** 2 / (2 * alpha * scale2))
        grown = run * np.exp(logs - logs.max())
        run = np.append(hazard * grown.sum(), (1 - hazard) * grown)
        run /= run.sum()
        beta = np.append(1.0, beta + kappa * (y[t] - mean) ** 2 / (2 * (kappa + 1)))
        mean = np.append(0.0, (kappa * mean + y[t]) / (kappa + 1))
        kappa, alpha = np.append(0.05, kappa + 1), np.append(1.0, alpha + 0.5)
        likeliest[t] = int(run.argmax())
    starts, t = [], n - 1
    while t > 0 and (begin := t - likeliest[t] + 1) > 0:
        starts.append(begin - 1)
        t = begin - 1
    return _between(steps, sorted(starts))


BASELINES: dict[str, Baseline] = {
    "PELT l2": pelt("l2"),
    "PELT linear": pelt("linear"),
    "PELT rbf": pelt("rbf"),
    "window l2": window,
    "GP slope extremes": slopes,
    "GP slope minima": slope_minima,
    "hidden Markov": hidden_markov,
    "Bayesian online": bayesian_online,
    "largest step": largest_step,
}
STRICTER = {"PELT l2": 400, "PELT linear": 400, "PELT rbf": 30, "Bayesian online": 1e12, "largest step": 30}


def noise_of(values: Array) -> float:
    """Standard deviation of white noise from the median absolute difference of neighbours."""
    return max(float(np.median(np.abs(np.diff(values)))) / (0.6745 * np.sqrt(2)), 1e-9)


def _between(steps: Array, before: list[int]) -> list[float]:
    """The steps in the middle, in log step, of the gaps that begin at the given checkpoints."""
    origin, x = steps[steps > 0][0], log_of(steps)
    return [float(10 ** ((x[i] + x[i + 1]) / 2) - origin) for i in before if 0 <= i < len(steps) - 1]


def _gp_slope(steps: Array, values: Array) -> tuple[Array, Array]:
    x = log_of(steps)
    y = (values - values.mean()) / max(values.std(), 1e-12)
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * RBF(0.5, (0.05, 5)) + WhiteKernel(0.1, (1e-5, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = GaussianProcessRegressor(kernel).fit(x[:, None], y)
    at = np.linspace(x[0], x[-1], 200)
    return at, np.gradient(model.predict(at[:, None]), at)
