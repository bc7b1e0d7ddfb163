"""The standard error of a mean of correlated draws, and of its changes along a run."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from scipy.special import fdtri, stdtrit

from devmon.analysis.derive.mixing import memory_of, variance_ratio, variances_of_mean

LEVEL = 0.90
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)


def mean_and_error(values: np.ndarray, shared: bool = False) -> tuple[float, float, float]:
    """Mean, standard error and degrees of freedom of correlated draws (chain, draw).

    The draws of each chain are cut into batches; the largest of 16, 8, 4, 2 batches is used whose means look
    independent (lag-1 correlation at most 0.1, spread of the chains no larger than they explain by a half), else one
    batch a chain. The error is scaled so that ±1.645 se is the Student interval. Chains that share minibatches
    (`shared`) are no replicates: then the batches are of their average.
    """
    if not np.isfinite(values).all():
        return float("nan"), float("nan"), 0.0
    if shared:
        independent = mean_and_error(values)
        together = mean_and_error(values.mean(0, keepdims=True))
        return max(independent, together, key=lambda estimate: estimate[1])
    # One batch a chain is always valid, and wide: its degrees of freedom are the chains less one.
    chains, draws = values.shape
    between = values.mean(1).var(ddof=1) / chains if chains > 1 else 0.0
    variance, dof = (between, chains - 1) if chains > 1 else (np.nan, 0)
    # More batches know the error better, for as long as they are longer than the chain's memory: neighbours are not
    # correlated, and chains differ by no more than their batches explain.
    for count in (16, 8, 4, 2):
        if draws < 2 * count:
            continue
        means = values[:, draws % count :].reshape(chains, count, -1).mean(2)
        away = means - means.mean()
        total = (away**2).sum()
        candidate = total / (means.size - 1) / means.size
        paired = (away[:, 1:] * away[:, :-1]).sum() * count / (count - 1)
        if (paired <= 0.1 * total and between <= 1.5 * candidate) or (chains == 1 and count == 2):
            variance, dof = candidate, means.size - 1
            break
    if dof < 1:
        return float(values.mean()), float("nan"), 0.0
    widen = stdtrit(dof, 0.5 + LEVEL / 2) / Z
    return float(values.mean()), float(np.sqrt(variance) * widen), float(dof)


def pooled_errors(values: np.ndarray, shared: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors and degrees of freedom (step,) of the means of traces (step, chain, draw) along a run.

    se² = σ² τ / draws of all chains: the variance σ² of the draws is each step's own, the autocorrelation time τ is
    that of all steps together, for it varies little along a run and one step knows it badly. Where chains differ, over
    all steps, by more than that explains (F test at 1%: they remember more than their length shows), τ is taken from
    their means. Scaled so that ±1.645 se is the Student interval. Chains that share minibatches (`shared`) are no
    replicates: the larger of the error of independent chains and that of their average. NaN, and 0 degrees of freedom,
    where a draw is infinite.
    """
    values = _replicates(values, shared)
    scale, dof = _pooled(values)
    finite = np.isfinite(values).all((1, 2))
    se = np.full(len(values), np.nan)
    se[finite] = np.sqrt(scale * values[finite].var(2).mean(1))
    return se, np.where(finite, dof, 0.0)


def covariance(values: np.ndarray, shared: bool = False) -> np.ndarray:
    """The covariance (step, step) of the means of traces (step, chain, draw) that are paired over steps.

    The variance of a step is the square of its `pooled_errors`, and that of the change between any two steps, which is
    C_ii + C_jj − 2 C_ij, is found in the same way: from the draws of their difference, with the autocorrelation time
    of all changes from step to step. The noise that steps share cancels in a change, and what is left of it forgets
    sooner or later than the chains do. NaN where a draw is infinite.
    """
    finite = np.isfinite(values).all((1, 2))
    whole = np.full((len(values), len(values)), np.nan)
    if not finite.any():
        return whole
    kept = _replicates(values, shared)[finite]
    away = kept - kept.mean(2, keepdims=True)
    draws = np.einsum("icd,jcd->ij", away, away) / away[0].size
    alone = np.diag(draws)
    of_level, of_change = _pooled(kept)[0], _pooled(np.diff(kept, axis=0))[0]
    of_change = of_level if np.isnan(of_change) else of_change  # nothing changes: no change has an error
    changes = of_change * (alone[:, None] + alone - 2 * draws)
    whole[np.ix_(finite, finite)] = (of_level * (alone[:, None] + alone) - changes) / 2
    return whole


def _replicates(values: np.ndarray, shared: bool) -> np.ndarray:
    """The chains; where they share minibatches their average, if its error is the larger."""
    if not shared:
        return values
    together = values.mean(1, keepdims=True)
    return max(values, together, key=lambda chains: np.nansum(pooled_errors(chains)[0]))


def _pooled(values: np.ndarray) -> tuple[float, float]:
    """By how much the variance of a mean (all chains of a step) is that of the draws, and with which freedom."""
    _, chains, draws = values.shape
    finite = values[np.isfinite(values).all((1, 2))]
    memory = memory_of(finite)
    if memory.dof <= 0:
        return np.nan, 0.0
    between, explained = np.array([variances_of_mean(each, memory) for each in finite]).T
    # The draws' own variance is known with as many degrees of freedom as their squares are independent.
    known = 1 / (1 / memory.dof + (memory.time + 1 / memory.time) / (2 * chains * draws))
    factor = 1.0
    if chains > 1:
        # Each step at which draws vary counts alike, and steps of common noise as fewer than they are.
        varied = explained > 0
        ratio = float(np.mean(between[varied] / explained[varied])) if varied.any() else 1.0
        of_means = (chains - 1) * memory.looks
        if ratio > fdtri(of_means, known, 0.99):
            factor, known = ratio, of_means
    widen = stdtrit(known, 0.5 + LEVEL / 2) / Z
    return float(variance_ratio(memory, draws) * factor / chains * widen**2), float(known)


def paired_batches(values: np.ndarray, shared: bool = False) -> np.ndarray:
    """Means of batches of draws, (batch, step), of traces (step, chain, draw) that are paired over steps.

    Each chain is cut into 16, 8, 4, 2 or 1 batches, the most whose changes from step to step look independent: over all
    steps together their lag-1 correlation is at most 0.1, and chains differ by at most one and a half times what their
    batches explain. Chains that share minibatches (`shared`) are averaged first. NaN at a step with an infinite loss.
    """
    if shared:
        values = values.mean(1, keepdims=True)
    steps, chains, draws = values.shape
    changes = np.diff(values, axis=0) if steps > 1 else values
    changes = changes[np.isfinite(changes).all((1, 2))]
    for count in (16, 8, 4, 2):
        if draws < 2 * count or not len(changes):
            continue
        means = changes[:, :, draws % count :].reshape(len(changes), chains, count, -1).mean(3)
        # Each change counts alike, however large its noise: what is judged is the memory of the chains.
        away = means - means.mean((1, 2), keepdims=True)
        total = np.maximum((away**2).sum((1, 2)), 1e-200)  # 0 where nothing changes
        paired = (away[:, :, 1:] * away[:, :, :-1]).sum((1, 2)) * count / (count - 1)
        within = total / (chains * count - 1) / count
        between = means.mean(2).var(1, ddof=1) if chains > 1 else 0 * within
        if (np.mean(paired / total) <= 0.1 and np.mean(between / within) <= 1.5) or chains * count == 2:
            break
    else:
        count = 1
    batches = values[:, :, draws % count :].reshape(steps, chains * count, -1).mean(2).T
    return np.where(np.isfinite(values).all((1, 2)), batches, np.nan)
