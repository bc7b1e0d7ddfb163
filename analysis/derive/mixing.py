"""Whether chains mixed: rank-normalised split R̂ and the effective sample size of the mean (Vehtari et al. 2021).

The numbers are those of arviz (a test holds that), whose import alone takes longer than to read a run and show it.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri


def rhat(values: np.ndarray) -> float:
    """The larger of the split R̂ of location and spread of draws (chain, draw); NaN for one chain or under 4 draws."""
    if values.shape[0] < 2 or values.shape[1] < 4:
        return float("nan")
    halves = _split(values)
    return float(max(_ratio(_ranked(halves)), _ratio(_ranked(np.abs(halves - np.median(halves))))))


def ess_mean(values: np.ndarray) -> float:
    """How many independent draws would know the mean as well as these of (chain, draw); NaN under 4 draws.

    Chains are split in halves; autocorrelations are summed in pairs of lags while these are positive, none larger than
    the one before it (Geyer 1992).
    """
    if values.shape[1] < 4:
        return float("nan")
    halves = _split(values)
    draws = halves.shape[1]
    if np.ptp(halves) < 1e-15:
        return float(halves.size)
    spectrum = np.abs(np.fft.rfft(halves - halves.mean(1, keepdims=True), 2 * draws, axis=1)) ** 2
    covariance = np.fft.irfft(spectrum, axis=1)[:, :draws].mean(0) / draws
    variance = covariance[0] + halves.mean(1).var(ddof=1)
    rho = 1 - (covariance[0] * draws / (draws - 1) - covariance) / variance
    rho[0] = 1.0
    pairs = rho[: draws // 2 * 2].reshape(-1, 2).sum(1)
    lag = 2 * np.arange(len(pairs))
    last = int(np.argmax((pairs <= 0) | (lag + 4 >= draws)))
    beyond = rho[2 * last] if pairs[last] >= 0 or rho[2 * last] > 0 else 0.0
    time = -1 + 2 * np.minimum.accumulate(pairs[:last]).sum() + beyond
    return float(halves.size / max(time, 1 / np.log10(halves.size)))


def _split(values: np.ndarray) -> np.ndarray:
    half = values.shape[1] // 2
    return np.concatenate([values[:, :half], values[:, -half:]]).astype(np.float64)


def _ranked(values: np.ndarray) -> np.ndarray:
    """Normal scores of the ranks among all values, equal for equal values."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[where].reshape(values.shape)
    return ndtri((rank - 3 / 8) / (values.size + 1 / 4))


def _ratio(values: np.ndarray) -> float:
    """√((between / within + n − 1) / n) of chains of n draws."""
    draws = values.shape[1]
    within, between = values.var(1, ddof=1).mean(), draws * values.mean(1).var(ddof=1)
    return float(np.sqrt((between / within + draws - 1) / draws))
