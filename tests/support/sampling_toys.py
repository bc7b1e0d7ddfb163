"""Losses whose laws are known, a small network, and one way to sample them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from devmon.sampling import Settings, sample

CURVATURE = (4.0, 1.0, 0.3, 0.05)


class Bowl(nn.Module):
    """L = ½ Σ hᵢ (wᵢ − cᵢ)² − x·(w − c), the same for every example but for its slope x (their mean should be 0)."""

    def __init__(self, curvature=CURVATURE, offset=1.5):
        super().__init__()
        self.w = nn.Parameter(torch.full((len(curvature),), offset, dtype=torch.float64))
        self.register_buffer("c", self.w.detach().clone())
        self.register_buffer("h", torch.tensor(curvature, dtype=torch.float64))


def bowl_loss(model, batch):
    away = model.w - model.c
    return 0.5 * (model.h * away**2).sum() - batch @ away


def slopes(n=200, d=4, size=0.0):
    x = size * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return x - x.mean(0)


def run(model=None, data=None, loss=bowl_loss, *, seed=0, stacked=True, chains_only=None, group=None, **settings):
    defaults = {"lr": 0.01, "gamma": 2.0, "nbeta": 50.0, "chains": 512, "draws": 400, "burn_in": 250}
    defaults |= {"batch_size": 10, "float64": True}
    settings = Settings(**(defaults | settings))
    model = Bowl() if model is None else model
    data = slopes() if data is None else data
    return sample(model, loss, data, settings, seed=seed, chains=chains_only, stacked=stacked, group=group)


def assert_within_ess_gated(result, expected, percent=1.0, sigmas=4.0):
    """Enough effective draws for the claim first, then both the error bar and the percentage."""
    value, se = result["llc"].item(), result["se"].item()
    assert se < percent / 100 * expected, f"too few draws: {value} ± {se}"
    assert abs(value - expected) < sigmas * se, f"{value} ± {se}, expected {expected}"
    assert abs(value - expected) < 2 * percent / 100 * expected, f"{value} ± {se}, expected {expected}"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x):
        return self.layers(x)


def net_and_data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = Net()
    for parameter in net.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return net, (torch.randn(60, 5, generator=generator), torch.randint(3, (60,), generator=generator))


# -- a well whose examples differ ------------------------------------------------------------------------------------

WELL = np.array([4.0, 1.0, 2.0, 0.5])


class Well(nn.Module):
    """ℓ = ½ Σ bᵢ wᵢ² + x·w + c w₀³ for each example (b, x, c), at w* = 0, in float64; two parameters of two entries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))


def well_loss(model: nn.Module, batch: Any) -> Tensor:
    curvature, slope, cubic = batch
    w = torch.cat([model.first, model.second])  # type: ignore[list-item]
    return 0.5 * (curvature * w**2).sum(1) + slope @ w + cubic * w[0] ** 3


def items(n: int, *, slope: float = 0.0, cubic: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`n` examples whose curvatures are 0 to 2 times those of the data, with random slopes."""
    generator = torch.Generator().manual_seed(seed)
    times = 2 * torch.rand(n, 4, generator=generator, dtype=torch.float64)
    slopes = slope * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return times * torch.from_numpy(WELL), slopes, torch.full((n,), cubic, dtype=torch.float64)


def plain(n: int = 8, cubic: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The data: all examples alike, a minimum at 0."""
    curvature = torch.from_numpy(WELL).expand(n, 4).clone()
    return curvature, torch.zeros(n, 4, dtype=torch.float64), torch.full((n,), cubic, dtype=torch.float64)


def harmonic(of: tuple[Tensor, Tensor, Tensor], nbeta: float, gamma: float, free: slice = slice(None)) -> np.ndarray:
    """−nβ² Cov[L, ℓ − L] = −½ nβ² tr(H Σ (B − H) Σ), Σ = (nβ H + γ)⁻¹, of each item where the slice `free` moves."""
    h, b = WELL[free], of[0].numpy()[:, free]
    variance = 1 / (nbeta * h + gamma)
    return -0.5 * nbeta**2 * ((b - h) * h * variance**2).sum(1)
