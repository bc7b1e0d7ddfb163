"""Activations made of known features: sparse sums of planted directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from devmon.snapshot import derive_seed


@dataclass(frozen=True, eq=False)
class Planted:
    """x = Σ_j present_j size_j `directions`_j + .. (n, d): a source of training data, new ones at each step.

    Feature j is present with probability `rate`, independent of the others, and its size is uniform on (.5, 1.5).
    `directions` (feature, d), whose lengths multiply the sizes, or (feature, part · d) for snapshots side by side;
    `mean` (d,) is added to all.
    """

    directions: Tensor
    rate: float
    mean: Tensor | None = None
    batch: int = 512
    seed: int = 0

    @property
    def places(self) -> float:
        return float("inf")

    def features(self, step: int) -> Tensor:
        """Sizes (n, feature), 0 where a feature is absent."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "planted", step))
        shape = self.batch, len(self.directions)
        present = torch.rand(shape, generator=generator) < self.rate
        return present * (0.5 + torch.rand(shape, generator=generator)).to(self.directions)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        x = self.features(step) @ self.directions
        x = x if self.mean is None else x + self.mean
        return x, x


def directions(features: int, d: int, seed: int = 0) -> Tensor:
    """Random directions of length 1, (feature, d)."""
    drawn = torch.randn(features, d, generator=torch.Generator().manual_seed(derive_seed(seed, "directions")))
    return drawn / drawn.norm(dim=-1, keepdim=True)


def best_cosines(found: Tensor, true: Tensor) -> Tensor:
    """(feature,): the largest cosine of each true direction (feature, d) with one that was found (m, d)."""
    unit = [each / each.norm(dim=-1, keepdim=True).clamp(min=1e-12) for each in (true, found)]
    return (unit[0] @ unit[1].T).amax(1)
