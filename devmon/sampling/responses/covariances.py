"""Covariances of losses over draws, as the answer of λ̂ to a change of the data, with their errors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from devmon.analysis.derive.errors import LEVEL, Z

# Batches of draws that a covariance is kept on, over all chains: their spread knows an error to 1/√(2·15) = 18%.
BATCHES = 16

# Items whose products with the observable are held at once: 4 chains × 200 draws × 2048 × 8 bytes = 13 MB.
ITEMS_AT_ONCE = 2048

# Correlation of neighbouring batches up to which they count as independent, and how many times what they explain the
# chains may differ: as in `devmon.analysis.derive.errors`. Larger limits give smaller, less honest errors.
MAX_CORRELATION, MAX_RATIO = 0.1, 1.5


class Response(NamedTuple):
    """−nβ² Cov and its standard error, (item,), and by batches of draws, (replicate, item), whose mean is the value."""

    value: np.ndarray
    se: np.ndarray
    replicates: np.ndarray


def responses(observable: np.ndarray, losses: np.ndarray, nbeta: float, *, mirrored: bool = False) -> Response:
    """−nβ² Cov[observable, loss] of each item, from an observable (chain, draw) and losses (chain, draw, item).

    The law of the draws is exp(−nβ L …), so raising the weight of an item in L by h changes nβ E[observable] by h times
    this (fluctuation and response, Baker et al. 2025, 2504.18274, whose χ is this over nβ²). The covariance is
    Σ (a − ā)(b − b̄) / N: low by a share of 1 / (effective draws). `mirrored` chains come in pairs that count as one.
    The se is the half-width of a 90% Student interval over 1.645.
    """
    chains, draws, items = losses.shape
    units = chains // 2 if mirrored else chains
    count = batches_of(units, draws)
    skip = draws % count
    centred = observable[:, skip:] - observable[:, skip:].mean()
    means = np.empty((units, count, items))
    for start in range(0, items, ITEMS_AT_ONCE):
        part = losses[:, skip:, start : start + ITEMS_AT_ONCE].astype(np.float64)
        part -= part.mean((0, 1))
        product = part * (-(nbeta**2) * centred[:, :, None])
        # a pair is one draw of a symmetric estimate: what is odd in the displacement cancels in it
        product = product.reshape(units, -1, *product.shape[1:]).mean(1)
        means[:, :, start : start + ITEMS_AT_ONCE] = product.reshape(units, count, -1, part.shape[2]).mean(2)
    return Response(means.mean((0, 1)), error_of(means), means.reshape(-1, items))


def influences(examples: np.ndarray, queries: np.ndarray, nbeta: float) -> tuple[Response, np.ndarray]:
    """−nβ² Cov of each query with each example, as `Response` over (query, example) flattened, and the correlations.

    From losses (chain, draw, example) and (chain, draw, query). Kreer et al. 2025 (2509.26544): −Cov is the change of
    E[query loss] by the weight of the example in nβ L; correlations are plain ones, positive where the two move as one.
    """
    chains, draws, _ = examples.shape
    count = batches_of(chains, draws)
    skip = draws % count
    a, b = (
        part - part.mean((0, 1))
        for part in (queries[:, skip:].astype(np.float64), examples[:, skip:].astype(np.float64))
    )
    # one product of matrices for each batch of draws: (chain, batch, query, example)
    batched = [part.reshape(chains, count, -1, part.shape[2]) for part in (a, b)]
    means = np.einsum("cbdq,cbde->cbqe", *batched, optimize=True) / batched[0].shape[2]
    sizes = np.sqrt((a**2).mean((0, 1)))[:, None] * np.sqrt((b**2).mean((0, 1)))
    correlation = means.mean((0, 1)) / np.where(sizes > 0, sizes, np.nan)
    flat = -(nbeta**2) * means.reshape(chains, count, -1)
    return Response(flat.mean((0, 1)), error_of(flat), flat.reshape(-1, flat.shape[2])), correlation


def unpaired(losses: np.ndarray) -> np.ndarray:
    """The same losses, of another chain (of half the draws away, where there is one): what is left is no covariance."""
    chains, draws = losses.shape[:2]
    return np.roll(losses, 1, 0) if chains > 1 else np.roll(losses, draws // 2, 1)


def averaged(response: Response, batches: int, *, units: int) -> Response:
    """The mean over the items, as one item."""
    groups = response.replicates.mean(1, keepdims=True)
    return Response(groups.mean(0), error_of(groups.reshape(units, batches, 1)), groups)


def spread(replicates: np.ndarray) -> float:
    """Root mean square over items without the noise, from replicates (replicate, item): of products of two different
    batches, which share none. 0 where that is negative, NaN for one replicate."""
    count = len(replicates)
    if count < 2:
        return float("nan")
    square = (replicates.sum(0) ** 2 - (replicates**2).sum(0)) / (count * (count - 1))
    return float(np.sqrt(np.maximum(square.mean(), 0.0)))


def batches_of(units: int, draws: int) -> int:
    """Batches that each chain, or pair, is cut into: a power of 2, about `BATCHES` in all, of two draws at least."""
    count = 1
    while 2 * count * units <= BATCHES and draws >= 4 * count:
        count *= 2
    return count


def error_of(means: np.ndarray) -> np.ndarray:
    """Standard errors (item,) from batch means (chain, batch, item), scaled so that ±1.645 se is a 90% interval.

    Batches are joined until neighbours look independent and chains differ by no more than their batches explain, all
    items judged together; NaN where one is left.
    """
    chains, count, items = means.shape
    finite = np.isfinite(means).all((0, 1))
    if not finite.all():
        errors = np.full(items, np.nan)
        if finite.any():
            errors[finite] = error_of(means[:, :, finite])
        return errors
    while True:
        joined = means.reshape(chains, count, -1, items).mean(2)
        away = joined - joined.mean((0, 1))
        total = (away**2).sum((0, 1))
        size = chains * count
        if count == 1 or size == 2:
            break
        # each item counts alike, however large its noise: what is judged is the memory of the chains
        scale = np.where(total > 0, total, np.inf)
        correlation = (away[:, 1:] * away[:, :-1]).sum((0, 1)) / scale * count / (count - 1)
        ratio = joined.mean(1).var(0, ddof=1) * (size - 1) * count / scale if chains > 1 else 0 * scale
        if correlation.mean() <= MAX_CORRELATION and ratio.mean() <= MAX_RATIO:
            break
        count //= 2
    if size < 2:
        return np.full(items, np.nan)
    widen = stdtrit(size - 1, 0.5 + LEVEL / 2) / Z
    return np.asarray(np.sqrt(total / (size - 1) / size) * widen)
