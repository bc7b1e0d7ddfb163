"""Whether chains mixed: rank-normalised split R̂ and the effective sample size of the mean (Vehtari et al. 2021).

`rhat` and `ess_mean` are those of arviz (a test holds that), whose import alone takes longer than to read a run and
show it. How large R̂ may be depends on the chains' memory: their means differ by chance the more, the fewer independent
draws they hold. `memory_of` measures that within chains, since an ESS that counts the chains' spread explains any.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import fdtri, ndtri

# Each test refuses at most this share of sound stationary chains, all three below 1% together. Lower levels miss
# chains of five independent draws each that lie three standard deviations apart; higher ones refuse sound chains. Steps
# of common noise share a drift by chance, so that one of them is refused with many others: it is the rarest.
RHAT_LEVEL, MEANS_LEVEL, DRIFT_LEVEL = 0.002, 0.005, 0.0005
# An R̂ (Gelman and Rubin 1992) and a drift in standard deviations of the draws that do no harm, however many draws show
# it: the error between chains covers the one, and the other moves the mean by a quarter of a standard deviation.
HARMLESS_RHAT, HARMLESS_DRIFT = 1.1, 0.5


@dataclass(frozen=True)
class Memory:
    """The integrated autocorrelation time in draws (1 + 2 Σ ρ), and the degrees of freedom with which it is known.

    `looks` is how many independent steps those of a run amount to.
    """

    time: float
    dof: float
    looks: float = 1.0


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


def memory_of(values: np.ndarray) -> Memory:
    """The memory of chains, within chains and pooled over the steps of a run: `values` (step, chain, draw).

    The sum of autocorrelations is cut where its noise outgrows what is left of it, and what the estimated mean takes
    away is given back (Wolff 2004, hep-lat/0306017, equations 49 and 52, with S = 1.5). Several chains are taken as
    deviations from their mean at each draw: a drift that is common to them is no memory.
    """
    _, chains, draws = values.shape
    away = values - values.mean(1, keepdims=True) if chains > 1 else values
    away = away - away.mean(2, keepdims=True)
    squares = (away**2).mean((1, 2))
    away = away[squares > 0]
    if not len(away) or draws < 4:
        return Memory(1.0, 0.0)
    # Each step counts alike, however large its spread: chains remember about equally long all along a run.
    spectrum = np.abs(np.fft.rfft(away, 2 * draws, axis=2)) ** 2
    covariance = np.fft.irfft(spectrum, axis=2)[:, :, :draws].mean(1) / draws
    rho = (covariance / covariance[:, :1]).mean(0)
    total = max(chains - 1, 1) * draws
    for window in range(1, draws // 2):
        gathered = 1 + 2 * float(rho[1 : window + 1].sum())
        # The mean of n draws takes gathered / n off every autocorrelation, the one at lag 0 included.
        time = max(gathered / max(1 - (2 * window + 1 - gathered) / draws, 0.1), 1 / np.log10(10 + total))
        decay = 1.5 / np.log((time + 1) / (time - 1)) if time > 1 else 0.0
        if np.exp(-window / decay) < decay / np.sqrt(window * total) if decay else True:
            break
    # Steps of common noise are fewer looks at the memory than steps: as many as their correlations leave.
    flat = away.reshape(len(away), -1)
    correlation = np.corrcoef(flat) if len(flat) > 1 else np.ones((1, 1))
    looks = 1 / float(np.mean(correlation**2))
    return Memory(time, looks * total / (2 * window + 1), looks)


def rhat_limit(shape: tuple[int, int], memory: Memory) -> float:
    """The R̂ that sound chains of this shape (chain, draw) exceed with probability `RHAT_LEVEL`, at least 1.1.

    With R̂² = 1 + (B/W − 1)/n over 2m half-chains of n draws, B/W of independent draws has Fisher's law of 2m − 1 and
    many degrees of freedom; with an autocorrelation time τ it is τ times as large, and as uncertain as τ is.
    """
    chains, draws = shape
    if memory.dof <= 0 or chains < 2 or draws < 4:
        return float("nan")
    largest = memory.time * fdtri(2 * chains - 1, memory.dof, 1 - RHAT_LEVEL)
    return float(max(HARMLESS_RHAT, np.sqrt(1 + max(largest - 1, 0) / (draws // 2))))


def chains_agree(values: np.ndarray, memory: Memory) -> bool:
    """Whether chains (chain, draw) disagree by no more than their memory explains, or harmlessly; False for one chain.

    R̂ compares half-chains in 2m − 1 directions and ranks their draws; the means of whole chains are compared besides,
    which sees few long-remembering chains in separate places.
    """
    ratio = rhat(values)
    if not ratio > HARMLESS_RHAT:
        return not np.isnan(ratio)
    between, explained = variances_of_mean(values, memory)
    far = between > explained * fdtri(len(values) - 1, memory.dof, 1 - MEANS_LEVEL)
    return bool(ratio <= rhat_limit(values.shape, memory) and not far)


def drifts(values: np.ndarray, memory: Memory) -> bool:
    """Whether chains (chain, draw) drift together by half a standard deviation or more, which is not chance."""
    chains, draws = values.shape
    if memory.dof <= 0 or draws < 4:
        return False
    time = np.linspace(-0.5, 0.5, draws)
    slope = float((values.mean(0) * time).sum() / (time**2).sum())
    spread = max(float(values.var(1).mean()) - slope**2 * time.var(), 0.0)
    chance = spread * memory.time / (chains * draws * time.var()) * fdtri(1, memory.dof, 1 - DRIFT_LEVEL)
    return slope**2 > max(chance, HARMLESS_DRIFT**2 * spread)


def variances_of_mean(values: np.ndarray, memory: Memory) -> tuple[float, float]:
    """The variance of the mean of one chain of (chain, draw): as chains differ, and as σ² τ / draws explains it."""
    between = float(values.mean(1).var(ddof=1)) if len(values) > 1 else np.nan
    return between, float(values.var(1).mean()) * variance_ratio(memory, values.shape[1])


def variance_ratio(memory: Memory, draws: int) -> float:
    """The variance of the mean of so many draws of a chain over that which they have around it."""
    # The mean of n correlated draws takes τ / n off their variance around it.
    return memory.time / draws / max(1 - memory.time / draws, 0.1)


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
