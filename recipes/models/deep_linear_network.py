"""A deep linear network: its task, the levels of its staircase, and the law of λ̂ at the lowest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from devmon.snapshot import derive_seed

WIDTHS, TARGET = (8, 4, 4, 8), (3.0, 1.5, 0.75)  # of the layers; singular values of the map to learn


class Deep(nn.Module):
    """A product of matrices without biases, x (batch, inputs) to (batch, outputs)."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.product().T

    def product(self) -> Tensor:
        """(outputs, inputs)."""
        first, *rest = self.parameters()  # in the order of the layers
        product: Tensor = first
        for weight in rest:
            product = weight @ product
        return product


def task(seed: int) -> Tensor:
    """The map to learn, (outputs, inputs), with the singular values TARGET and directions drawn at random."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "task"))
    left, right = (torch.linalg.qr(torch.randn(w, w, generator=generator))[0] for w in (WIDTHS[-1], WIDTHS[0]))
    return (left[:, : len(TARGET)] * torch.tensor(TARGET)) @ right[:, : len(TARGET)].T


def copying_loss(model: nn.Module, product: Tensor) -> Tensor:
    """½E‖f(x) − product x‖² for white inputs x, of products (batch, outputs, inputs), shape (batch,)."""
    return 0.5 * (model.product() - product).square().sum((-2, -1))  # type: ignore[operator]


def level(rank: int) -> float:
    """The loss when `rank` singular values are learnt and the others are not."""
    return 0.5 * sum(value**2 for value in TARGET[rank:])


def law_at_rank_zero(nbeta: float, gamma: float, draws: int = 50_000) -> float:
    """λ̂ at w* = 0 in the limit of endless chains, by importance sampling of the outer matrices.

    Given those, with singular values s and t, the middle matrix is Gaussian: λ̂ = E ½ Σ nβ s²t² / (γ + nβ s²t²), where
    the prior of the outer ones is weighted by ∏ (1 + nβ s²t² / γ)^-½. They are drawn as square ones, which the weight
    ∏ (st)^(outer − middle) turns into theirs: nearly even weights.
    """
    # singular values of square matrices in place of the outer ones, (draw, middle)
    (outer, middle, _, _), rng = WIDTHS, np.random.default_rng(0)
    s, t = (np.linalg.svd(rng.standard_normal((draws, middle, middle)), compute_uv=False) for _ in range(2))
    x = nbeta / gamma**3 * np.einsum("ns,nt->nst", s**2, t**2)  # nβ s²t² / γ, with s and t in units of γ^-½
    # the importance of each draw, in logarithms: a product of 16 factors would underflow at large nβ
    log = (outer - middle) * (np.log(s) + np.log(t)).sum(1) - 0.5 * np.log1p(x).sum((1, 2))
    weight = np.exp(log - log.max())
    return float(weight @ (0.5 * x / (1 + x)).sum((1, 2)) / weight.sum())
