"""A quadratic loss whose laws are known, a small network, and one way to sample them."""

import torch
from torch import nn

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
