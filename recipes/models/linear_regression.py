"""Linear regression in a context: its sequences, the best that any predictor can do, and a transformer to learn it."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.anatomy import Layout
from devmon.data.regression import regression_examples, ridge_predictions

DIMS, PAIRS, NOISE = 4, 8, 0.125  # of x, examples in a sequence, variance of the noise of y
WIDTH, HEADS, LAYERS, HIDDEN = 64, 4, 2, 64  # of the transformer
ZERO = DIMS + NOISE  # the error of predicting 0


def sequences(count: int, generator: torch.Generator, pool: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens (count, 2 PAIRS, 1 + DIMS), and the y (count, PAIRS) that are to be predicted.

    Every first token holds x in its last DIMS entries, every second one its y in the first. The weights of a sequence
    are from N(0, 1), or one of the `pool` (task, DIMS).
    """
    if pool is None:
        weights = torch.randn(count, DIMS, 1, generator=generator)[..., 0]
    else:
        weights = pool[torch.randint(len(pool), (count,), generator=generator)]
    x, y = regression_examples(weights, PAIRS, NOISE, generator)
    tokens = torch.zeros(count, 2 * PAIRS, 1 + DIMS)
    tokens[:, ::2, 1:], tokens[:, 1::2, 0] = x, y
    return tokens, y


def ridge(tokens: Tensor) -> Tensor:
    """Predictions (batch, PAIRS) of the posterior mean of w given the pairs before: no predictor has a lower error."""
    return ridge_predictions(tokens[:, ::2, 1:], tokens[:, 1::2, 0], NOISE)


@cache
def ridge_errors(count: int = 100_000) -> tuple[float, ...]:
    """Expected squared error of `ridge` at each pair: NOISE + E[tr (1 + XᵀX / NOISE)⁻¹], the mean over `count` X."""
    x = torch.randn(count, PAIRS, DIMS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for k in range(PAIRS):
        precision = torch.eye(DIMS, dtype=x.dtype) + x[:, :k].mT @ x[:, :k] / NOISE
        errors.append(NOISE + float(torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1).sum(-1).mean()))
    return tuple(errors)


class Block(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, pos, width)
        batch, pos, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, pos, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(z.transpose(1, 2).reshape(batch, pos, width))
        return x + self.down(torch.relu(self.up(self.norm_2(x))))


class Regressor(nn.Module):
    """Tokens (batch, 2 PAIRS, 1 + DIMS) to predictions of y (batch, PAIRS), each made at its x. 51 712 parameters."""

    anatomy = Layout(
        blocks="blocks",
        qkv="qkv",
        out="out",
        heads="heads",
        attention_norm="norm_1",
        mlp_norm="norm_2",
        neurons="down",
        norm="norm",
    )

    def __init__(self, width: int = WIDTH, heads: int = HEADS, layers: int = LAYERS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embed = nn.Linear(1 + DIMS, width, bias=False)
        self.position = nn.Parameter(0.02 * torch.randn(2 * PAIRS, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, 1 + DIMS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))[:, ::2, 0]
