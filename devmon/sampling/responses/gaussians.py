"""Two Gaussian nulls around w*: that of the localisation alone, and that of the chains' own covariance."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from devmon.sampling.masks import Mask
from devmon.snapshot import derive_seed

Displacements = dict[str, Tensor]  # by parameter, (draw, *shape)


def moving(model: nn.Module, mask: Mask | None) -> dict[str, nn.Parameter]:
    """The parameters that a chain of this mask moves."""
    named = dict(model.named_parameters())
    if not any(p.requires_grad for p in named.values()):
        chosen = named
    else:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    return {name: p for name, p in chosen.items() if mask is None or name in mask.names}


class SecondMoment:
    """Called at each draw: `count` random sums of the displacements δ from w*, Σ cₜ δₜ / √draws with normal c.

    Given the chains these are independent draws of the Gaussian with their second moments E[δ δᵀ], whatever the number
    of parameters: the harmonic well that is as wide as the chains. Costs memory for `count` copies of what moves.
    """

    def __init__(self, mask: Mask | None, count: int, burn_in: int, total: int, seed: int) -> None:
        self.mask, self.count, self.burn_in, self.total, self.seed = mask, count, burn_in, total, seed
        self.center: dict[str, Tensor] = {}
        self.sums: Displacements = {}

    def __call__(self, model: nn.Module, chain: int, draw: int) -> None:
        parameters = moving(model, self.mask)
        if not self.center:
            self.center = {name: p.detach().clone() for name, p in parameters.items()}
            self.sums = {name: p.new_zeros(self.count, *p.shape) for name, p in self.center.items()}
        if draw < self.burn_in:
            return
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "gaussian", chain, draw))
        weights = torch.randn(self.count, generator=generator) / math.sqrt(self.total)
        for name, p in parameters.items():
            away = (p.detach() - self.center[name]).flatten()
            self.sums[name].view(self.count, -1).addr_(weights.to(away), away)


def localisation(model: nn.Module, mask: Mask | None, precision: float, count: int, seed: int) -> Displacements:
    """`count` draws of N(0, 1/precision) of what the mask moves: the law at nβ = 0."""
    drawn = {}
    for name, p in moving(model, mask).items():
        generator = torch.Generator().manual_seed(derive_seed(seed, "localisation", name))
        noise = torch.randn(count, *p.shape, generator=generator, dtype=torch.float64) / math.sqrt(precision)
        if mask is not None and name in mask.entries:
            noise *= mask.entries[name].cpu()
        drawn[name] = noise
    return drawn


@torch.no_grad()
def both_sides(
    model: nn.Module, displacements: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[nn.Module, int, int]]:
    """A private copy of the model at w* + δ and at w* − δ, with 0 or 1 for the side and the number of the draw."""
    moved = copy.deepcopy(model).to(dtype).eval()
    parameters = dict(moved.named_parameters())
    center = {name: parameters[name].detach().clone() for name in displacements}
    for draw in range(len(next(iter(displacements.values())))):
        for side, sign in enumerate((1, -1)):
            for name, away in displacements.items():
                parameters[name].copy_(center[name] + sign * away[draw].to(center[name]))
            yield moved, side, draw
