"""Linear regression in a context: sequences of examples, and the predictions that are best for what is known of w.

y = w·x + noise with one w a sequence, drawn from N(0, 1) or from a fixed pool (Raventós et al. 2023, 2306.15063).
"""

from __future__ import annotations

import torch
from torch import Tensor


def regression_examples(weights: Tensor, pairs: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x (batch, pair, dim) from N(0, 1) and y (batch, pair) = w·x + N(0, noise), of weights (batch, dim)."""
    x = torch.randn(len(weights), pairs, weights.shape[1], generator=generator)
    y = (x @ weights[..., None])[..., 0] + noise**0.5 * torch.randn(len(weights), pairs, generator=generator)
    return x, y


def ridge_predictions(x: Tensor, y: Tensor, noise: float) -> Tensor:
    """Predictions (batch, pair) of each y from the pairs before it by (XᵀX + noise)⁻¹ Xᵀy, in float64.

    The posterior mean for w from N(0, 1): no predictor has a lower squared error there.
    """
    x, y = x.double(), y.double()
    predictions = torch.zeros_like(y)
    for k in range(1, y.shape[1]):
        gram = x[:, :k].mT @ x[:, :k] + noise * torch.eye(x.shape[2], dtype=x.dtype)
        weight = torch.linalg.solve(gram, x[:, :k].mT @ y[:, :k, None])
        predictions[:, k] = (x[:, k, None] @ weight)[:, 0, 0]
    return predictions


def pool_predictions(x: Tensor, y: Tensor, noise: float, pool: Tensor) -> Tensor:
    """Predictions (batch, pair) by the posterior mean over a pool (task, dim) of w (dMMSE), in float64.

    Σ_m p_m w_m·x with p = softmax_m(-Σ (y_i - w_m·x_i)² / (2 noise)) over the pairs before; of the first pair the mean
    of the pool.
    """
    guesses = x.double() @ pool.double().mT  # (batch, pair, task)
    evidence = -(y.double()[..., None] - guesses).square().cumsum(1) / (2 * noise)
    before = torch.cat([torch.zeros_like(evidence[:, :1]), evidence[:, :-1]], 1)
    return (before.softmax(-1) * guesses).sum(-1)
