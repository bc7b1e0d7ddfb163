"""The hard cases of `llc_hard.py`: model, loss and data at a minimum of the empirical loss, with λ there.

Label noise never moves w* off that minimum: w* is the least-squares or maximum-likelihood solution, or the noise is
made orthogonal to the tangent features of the network, so that neither gradient nor curvature at w* changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from devmon.sampling import classification_loss, regression_loss
from devmon.testing import exact

# Eigenvalues below this share of the largest count as 0: those of float32 weights are below 1e-8 where they should be.
RANK = 1e-6

Made = tuple[nn.Module, Any, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """`build(seed)` gives the model at w*, its loss and data; `known` is λ, None where the Hessian's rank says it."""

    group: str
    name: str
    build: Callable[[int], Made]
    seed: int = 0
    known: float | None = None

    def make(self) -> Made:
        return self.build(self.seed)

    def truth(self, model: nn.Module, data: Any, nbeta: float, gamma: float) -> float:
        """λ; for the tanh unit, whose localised law has no limit in gamma, λ̂(nbeta, gamma) by quadrature."""
        if self.group == "tanh":
            return tanh_law(data[0], nbeta, gamma)
        if self.known is not None:
            return self.known
        h = self.curvatures(model, regression_loss, data)
        return float((h > RANK * h.max()).sum()) / 2

    def curvatures(self, model: nn.Module, loss: Any, data: Any) -> np.ndarray:
        """Eigenvalues of the Hessian of the empirical loss at w*, in float64."""
        wide = {name: p.detach().double() for name, p in model.named_parameters()}
        flat = torch.cat([p.flatten() for p in wide.values()])
        batch = tuple(t.double() if t.is_floating_point() else t for t in data)

        def mean_loss(vector: Tensor) -> Tensor:
            parts = zip(wide.items(), vector.split([p.numel() for p in wide.values()]), strict=True)
            named = {name: part.view_as(p) for (name, p), part in parts}
            return loss(lambda x: torch.func.functional_call(model, named, (x,)), batch).mean()

        rows = [torch.autograd.functional.hvp(mean_loss, flat, unit)[1] for unit in torch.eye(len(flat)).double()]
        return torch.linalg.eigvalsh(torch.stack(rows)).numpy()


class Product(nn.Module):
    """x → W_L … W_1 x."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.tensor(w, dtype=torch.float32) for w in weights])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x @ weight.T
        return x


class TanhUnit(nn.Module):
    """x → a tanh(b x) at a = b = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * torch.tanh(self.b * x)


def linear_regression(seed: int, scales: tuple[float, ...], n: int, noise: float) -> Made:
    """One output; feature i has standard deviation scales[i]. λ = d / 2, reached where gamma ≪ nbeta min(scales²)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(scales), generator=generator) * torch.tensor(scales)
    truth = torch.randn(len(scales), 1, generator=generator) / torch.tensor(scales)[:, None]
    y = x @ truth + noise * torch.randn(n, 1, generator=generator)
    model = nn.Linear(len(scales), 1, bias=False)
    model.weight.data = torch.linalg.lstsq(x.double(), y.double()).solution.T.float()
    return model, regression_loss, (x, y)


def deep_linear(seed: int, widths: list[int], rank: int, n: int, spread: float, noise: float) -> Made:
    """w* on a stratum that attains λ, singular values log-uniform from 1 / spread to spread; noise orthogonal to x."""
    model = Product(exact.deep_linear_point(widths, rank, np.random.default_rng(seed), spread=spread))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, widths[0], generator=generator)
    with torch.no_grad():
        y = model(x)
    return model, regression_loss, (x, y + noise * _orthogonal_noise(x.double(), y.shape[1], generator))


def relu_network(seed: int, inputs: int, live: int, dead: int, n: int, noise: float) -> Made:
    """One hidden layer; `dead` units have a bias that no input overcomes. λ = rank of the Hessian / 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=generator)
    model = nn.Sequential(nn.Linear(inputs, live + dead), nn.ReLU(), nn.Linear(live + dead, 1, bias=False))
    with torch.no_grad():
        weight = torch.randn(live + dead, inputs, generator=generator)
        model[0].weight.copy_(weight / weight.norm(dim=1, keepdim=True))
        model[0].bias.copy_(0.5 * torch.randn(live + dead, generator=generator))
        model[0].bias[live:] = -10.0
        model[2].weight.copy_(torch.randn(1, live + dead, generator=generator).sign())
        y, active = model(x), (model[0](x) > 0).double()[:, :live]
        design = torch.cat([x.double(), torch.ones(n, 1).double()], 1)
        tangents = (active[:, :, None] * design[:, None, :]).flatten(1)
    return model, regression_loss, (x, y + noise * _orthogonal_noise(tangents, 1, generator))


def softmax_regression(seed: int, inputs: int, classes: int, n: int) -> Made:
    """Labels drawn from a model of the class, w* their maximum likelihood: λ = inputs (classes − 1) / 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=generator)
    logits = x @ torch.randn(inputs, classes, generator=generator) / math.sqrt(inputs)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    wide, onehot = x.double(), nn.functional.one_hot(labels, classes).double()
    weight = torch.zeros(classes, inputs, dtype=torch.float64)
    # Newton steps; the Hessian has the null space of a common shift of all classes.
    for _ in range(20):
        p = (wide @ weight.T).softmax(1)
        gradient = (p - onehot).T @ wide / n
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        hessian = torch.einsum("nab,ni,nj->aibj", inner, wide, wide).reshape(weight.numel(), -1) / n
        weight -= (torch.linalg.pinv(hessian, hermitian=True) @ gradient.flatten()).view_as(weight)
    model = nn.Linear(inputs, classes, bias=False)
    model.weight.data = weight.float()
    return model, classification_loss, (x, labels)


def tanh_unit(seed: int, n: int) -> Made:
    """True function 0: λ = ½ with multiplicity 2, approached like 1 / log n."""
    x = 2 * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) - 1
    return TanhUnit(), regression_loss, (x, torch.zeros(n, 1))


def tanh_law(x: Tensor, nbeta: float, gamma: float) -> float:
    """λ̂(nbeta, gamma) of the tanh unit at its origin by quadrature over both weights."""
    grid = np.concatenate([[0], np.geomspace(1e-6, 1e4, 600)])
    mean = np.array([float((torch.tanh(b * x.double()) ** 2).mean()) for b in grid])

    def loss(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return 0.5 * a**2 * np.interp(np.abs(b[0]), grid, mean)[None, :]  # b varies along the columns alone

    return exact.gibbs_two(loss, nbeta, gamma, points=2001)


def _orthogonal_noise(features: Tensor, outputs: int, generator: torch.Generator) -> Tensor:
    e = torch.randn(len(features), outputs, generator=generator, dtype=torch.float64)
    return (e - features @ torch.linalg.lstsq(features, e, driver="gelsd").solution).float()


def log_uniform(size: int, decades: float) -> tuple[float, ...]:
    """Standard deviations whose squares, the curvatures, go log-uniformly from 1 down to 10^−decades."""
    return tuple(10 ** (-0.5 * decades * i / (size - 1)) for i in range(size))


def _cases() -> list[Case]:
    cases: list[Case] = []

    def add(group: str, name: str, build: Callable[..., Made], seeds: range, known: float | None, **how: Any) -> None:
        cases.extend(Case(group, f"{name}, seed {seed}", partial(build, **how), seed, known) for seed in seeds)

    # Regressions: one direction far more curved than the rest, spectra without a gap, label noise.
    for factor in (10.0, 1000.0):
        scales = (factor, *[1.0] * 9)
        for noise, seeds in ((0.0, range(2)), (1.0, range(2, 4) if factor == 10 else range(2, 3))):
            name = f"feature x{factor:g}, noise {noise:g}"
            add("one feature", name, linear_regression, seeds, 5.0, scales=scales, n=5000, noise=noise)
    for decades in (3, 5):
        for noise, seeds in ((0.0, range(2)), (1.0, range(2, 3))):
            name = f"spectrum to 1e-{decades}, noise {noise:g}"
            scales = log_uniform(40, decades)
            add("spectrum", name, linear_regression, seeds, 20.0, scales=scales, n=10_000, noise=noise)
    add("label noise", "regression d 20", linear_regression, range(2), 10.0, scales=(1.0,) * 20, n=2000, noise=1.0)
    add("label noise", "regression d 50", linear_regression, range(2), 25.0, scales=(1.0,) * 50, n=20_000, noise=3.0)
    # Deep linear networks: curvatures across the stratum uneven by up to 2^(4 (layers − 1)).
    rng = np.random.default_rng(11)
    for seed in range(10):
        widths = rng.integers(3, 13, rng.integers(3, 6)).tolist()
        rank = int(rng.integers(1, min(widths) + 1))
        known, name = float(exact.deep_linear(widths, rank)[0]), f"deep linear {'-'.join(map(str, widths))} rank {rank}"
        how = {"widths": widths, "rank": rank, "n": 50_000, "spread": 2.0, "noise": float(seed % 2)}
        add("deep linear", name, deep_linear, range(seed, seed + 1), known, **how)
    for seed, (m, h, n, rank, spread) in enumerate(
        [(5, 3, 5, 1, 1.0), (10, 4, 6, 2, 1.0), (12, 8, 10, 4, 1.5), (6, 6, 6, 2, 2.0), (9, 5, 7, 3, 2.0)]
    ):
        known = float(exact.reduced_rank(m, h, n, rank)[0])
        how = {"widths": [m, h, n], "rank": rank, "n": 50_000, "spread": spread, "noise": float(seed % 2)}
        add("reduced rank", f"reduced rank {m}-{h}-{n} rank {rank}", deep_linear, range(seed, seed + 1), known, **how)
    # Networks with more flat directions than a gap shows, and a point without curvature.
    for seed, (inputs, live, dead, noise) in enumerate(
        [(4, 5, 5, 0.0), (6, 4, 8, 0.0), (3, 6, 2, 0.3), (5, 3, 12, 0.3)]
    ):
        how = {"inputs": inputs, "live": live, "dead": dead, "n": 5000, "noise": noise}
        add(
            "relu",
            f"relu {inputs}-{live}+{dead} dead, noise {noise:g}",
            relu_network,
            range(seed, seed + 1),
            None,
            **how,
        )
    for seed, (inputs, classes) in enumerate([(5, 3), (10, 4), (20, 3), (8, 6)]):
        known = inputs * (classes - 1) / 2
        how = {"inputs": inputs, "classes": classes, "n": 10_000}
        add("softmax", f"softmax {inputs}x{classes}", softmax_regression, range(seed, seed + 1), known, **how)
    add("tanh", "tanh unit at the origin, n 2000", tanh_unit, range(1), 0.5, n=2000)
    add("tanh", "tanh unit at the origin, n 50000", tanh_unit, range(1, 2), 0.5, n=50_000)
    return cases


CASES = _cases()
