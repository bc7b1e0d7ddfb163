"""A hidden Markov model with normal emissions of diagonal covariance, over several sequences at once: EM and Viterbi.

Rabiner (1989), Proc. IEEE 77(2); Dempster, Laird & Rubin (1977). Everything runs in logs, and batched: many starting
points and many subsets of the sequences are fitted side by side, so arrays are (fit, run, time, state). A missing value
(NaN) has no say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from devmon.analysis.series import Array

MIN_SD = 0.05  # smallest standard deviation of a state, in standard deviations of the series
PRIOR = 0.1  # added to each count of a start or a transition, so that none has probability 0
STAY = 0.9  # probability of staying in a state, to begin with
ROUNDS = 200  # of EM at most
MIN_GAIN = 1e-5  # gain of the objective, per observation, below which EM ends


@dataclass(frozen=True)
class Chain:
    """One or many models: `start` (..., K), `transition` (..., K, K) from row to column, `mean` and `sd` (..., K,
    D)."""

    start: Array
    transition: Array
    mean: Array
    sd: Array

    def __getitem__(self, which: int | NDArray[np.int64]) -> Chain:
        return Chain(self.start[which], self.transition[which], self.mean[which], self.sd[which])

    def ordered(self, order: NDArray[np.int64]) -> Chain:
        """The same model with its states in another order."""
        return Chain(self.start[order], self.transition[np.ix_(order, order)], self.mean[order], self.sd[order])


def fit(
    y: Array, states: int, *, used: Array | None = None, restarts: int = 8, prior: float = PRIOR, seed: int = 0
) -> tuple[Chain, Array]:
    """The best of `restarts` fits to the runs y (R, T, D), for each row of `used` (F, R; 1 where a run counts).

    Returns the F models and the course (rounds, F) of their objective before each round: log likelihood + prior · Σ log
    of all starts and transitions, which no round of EM lowers. One start has its states in equal stretches of time, the
    others at values drawn as k-means++ does.
    """
    used = np.ones((1, len(y))) if used is None else np.asarray(used, dtype=np.float64)
    # all starts of all folds are fitted together, as one stack of models
    first = [_starts(y[row > 0], states, restarts, np.random.default_rng([seed, states])) for row in used]
    chain = Chain(*(np.concatenate(part) for part in zip(*first, strict=True)))
    weights = np.repeat(used, restarts, axis=0)  # (F * restarts, R)
    enough = MIN_GAIN * max(float(np.isfinite(y).sum()) / len(y), 1.0)
    course: list[Array] = []
    # a model whose objective gains too little is left as it is; the others go on
    going = np.arange(len(weights))
    while len(going) and len(course) < ROUNDS:
        updated, objective = _round(y, chain[going], weights[going], prior)
        for part, new in ((chain.start, updated.start), (chain.transition, updated.transition),
                          (chain.mean, updated.mean), (chain.sd, updated.sd)):  # fmt: skip
            part[going] = new
        before = course[-1] if course else np.full(len(weights), -np.inf)
        course.append(before.copy())
        course[-1][going] = objective
        going = going[objective - before[going] >= enough]
    # of each fold the start that came highest
    rows = np.arange(len(used))
    history = np.array(course).reshape(len(course), len(used), restarts)
    best = history[-1].argmax(1)
    return chain[rows * restarts + best], history[:, rows, best]


def log_likelihood(chain: Chain, y: Array) -> Array:
    """(..., R) log p(y of each run) under one model, or under each of many."""
    alpha = _forward(chain, log_density(chain, y))
    return _log_sum(alpha[..., -1, :])


def log_density(chain: Chain, y: Array) -> Array:
    """(..., R, T, K) log density of what was observed at each time, given the state."""
    mean, sd = chain.mean[..., None, None, :, :], chain.sd[..., None, None, :, :]
    value = y[..., None, :]
    terms = -0.5 * ((value - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)
    return np.where(np.isfinite(value), terms, 0.0).sum(-1)


def posterior(chain: Chain, y: Array) -> Array:
    """(..., R, T, K) probability of each state at each time, given the whole run."""
    density = log_density(chain, y)
    alpha = _forward(chain, density)
    return np.exp(alpha + _backward(chain, density) - _log_sum(alpha[..., -1, :])[..., None, None])


def viterbi(chain: Chain, y: Array) -> NDArray[np.int64]:
    """(R, T) the likeliest path of each run through the states of one model."""
    density = log_density(chain, y)
    moves = _log(chain.transition)
    runs, times, states = density.shape
    score = _log(chain.start) + density[:, 0]
    came = np.zeros((times, runs, states), dtype=np.int64)
    for t in range(1, times):
        through = score[:, :, None] + moves
        came[t] = through.argmax(1)
        score = through.max(1) + density[:, t]
    path = np.empty((runs, times), dtype=np.int64)
    path[:, -1] = score.argmax(1)
    for t in range(times - 1, 0, -1):
        path[:, t - 1] = came[t, np.arange(runs), path[:, t]]
    return path


def _round(y: Array, chain: Chain, weights: Array, prior: float) -> tuple[Chain, Array]:
    """One round of EM for each fit: the new models, and the objective of the old ones (fit,)."""
    # E: the likelihood of each run by the forward and the backward pass, and the objective before this round
    density = log_density(chain, y)
    alpha, beta = _forward(chain, density), _backward(chain, density)
    total = _log_sum(alpha[..., -1, :])  # (fit, run)
    log_moves = _log(chain.transition)
    regular = prior * (_log(chain.start).sum(-1) + log_moves.sum((-1, -2))) if prior else 0.0
    objective = (weights * total).sum(-1) + regular
    # expected states at each time and moves between them, weighted by whether the run counts
    state = np.exp(alpha + beta - total[..., None, None]) * weights[..., None, None]  # (fit, run, time, state)
    after = (density + beta)[..., 1:, None, :]
    move = np.exp(alpha[..., :-1, :, None] + log_moves[:, None, None] + after - total[..., None, None, None])
    moves = (move * weights[..., None, None, None]).sum((1, 2)) + prior
    start = state[:, :, 0].sum(1) + prior
    # M: moments of each state over the values that are known; a state that holds none keeps its own
    known = np.isfinite(y).astype(np.float64)
    value = np.where(known > 0, y, 0.0)
    mass = np.einsum("frtk,rtd->fkd", state, known)
    held = mass > 1e-8
    safe = np.where(held, mass, 1.0)
    mean = np.where(held, np.einsum("frtk,rtd->fkd", state, value) / safe, chain.mean)
    apart = np.square(value[None, :, :, None] - mean[:, None, None]) * known[None, :, :, None]
    variance = np.einsum("frtk,frtkd->fkd", state, apart) / safe
    sd = np.where(held, np.sqrt(np.maximum(variance, MIN_SD**2)), chain.sd)
    row = moves.sum(-1, keepdims=True)
    transition = np.where(row > 0, moves / np.where(row > 0, row, 1.0), chain.transition)
    return Chain(start / start.sum(-1, keepdims=True), transition, mean, sd), objective


def _forward(chain: Chain, density: Array) -> Array:
    """(..., R, T, K) log p(values up to a time, state then)."""
    alpha = np.empty_like(density)
    alpha[..., 0, :] = _log(chain.start)[..., None, :] + density[..., 0, :]
    for t in range(1, density.shape[-2]):
        alpha[..., t, :] = _moved(alpha[..., t - 1, :], chain.transition) + density[..., t, :]
    return alpha


def _backward(chain: Chain, density: Array) -> Array:
    """(..., R, T, K) log p(values after a time | state then)."""
    beta = np.zeros_like(density)
    back = np.swapaxes(chain.transition, -1, -2)
    for t in range(density.shape[-2] - 2, -1, -1):
        beta[..., t, :] = _moved(beta[..., t + 1, :] + density[..., t + 1, :], back)
    return beta


def _moved(logs: Array, transition: Array) -> Array:
    """log Σ_i exp(logs_i) transition_ij, the largest of `logs` (..., R, K) taken out first."""
    top = logs.max(-1, keepdims=True)
    return _log(np.exp(logs - top) @ transition) + top


def _log_sum(logs: Array) -> Array:
    top = logs.max(-1, keepdims=True)
    return (top + np.log(np.exp(logs - top).sum(-1, keepdims=True)))[..., 0]


def _log(values: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(values)


def _starts(y: Array, states: int, restarts: int, generator: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    _, times, dims = y.shape
    values = np.where(np.isfinite(y), y, 0.0)  # the mean of a series in standard units
    rows = values.reshape(-1, dims)
    cuts = np.linspace(0, times, states + 1).astype(int)
    stretches = np.array([values[:, a : max(b, a + 1)].mean((0, 1)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)])
    means = [stretches]
    while len(means) < restarts:
        chosen = rows[generator.integers(len(rows), size=1)]
        while len(chosen) < states:
            away = np.square(rows[:, None] - chosen).sum(-1).min(1) + 1e-12
            chosen = np.concatenate([chosen, rows[generator.choice(len(rows), size=1, p=away / away.sum())]])
        means.append(chosen)
    transition = np.full((states, states), (1 - STAY) / max(states - 1, 1))
    np.fill_diagonal(transition, STAY if states > 1 else 1.0)
    return (
        np.full((restarts, states), 1 / states),
        np.repeat(transition[None], restarts, axis=0),
        np.array(means),
        np.full((restarts, states, dims), 0.5),
    )
