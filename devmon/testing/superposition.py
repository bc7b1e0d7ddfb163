"""The toy model of superposition in two dimensions, exactly: its loss, its polygons, their levels and λ.

f(x) = ReLU(WᵀWx + b) with W (2, features), on inputs with one active feature: x = u eᵢ, i uniform, u ~ U[0, 1]; the
loss is E‖x − f(x)‖² (Elhage et al. 2022; Chen et al. 2023, arXiv:2310.06301). Training moves between critical points at
which k columns form a regular k-gon of one length and one bias and the other features are dead (W = 0). A dead feature
whose bias is positive predicts its mean, 1/(2c), and each lowers the loss by 1/(4c²): the names are "5", "5+", "4++" …
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

FEWEST = 4  # sides from which the polygons are considered


def errors(weight: Tensor, bias: Tensor) -> Tensor:
    """E‖x − f(x)‖² given the active feature, (…, features), of weight (…, 2, features) and bias (…, features).

    For input u eᵢ the error at output j is ∫₀¹ (ReLU(g u + b) − δ u)² du with g = Wᵢ·Wⱼ, b = bⱼ, δ = 1 where i = j:
    a cubic on the part of [0, 1] where the unit is on, and δ u² on the rest.
    """
    g = weight.mT @ weight  # (…, input, output)
    b, same = bias[..., None, :].expand_as(g), torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    crossing = (-b / torch.where(g == 0, 1.0, g)).clamp(0, 1)
    crossing = torch.where(g == 0, torch.where(b > 0, 0.0, 1.0).to(g), crossing)
    on, off = torch.where(g >= 0, crossing, 0.0), torch.where(g >= 0, 1.0, crossing)

    def primitive(u: Tensor) -> Tensor:
        return (g - same) ** 2 * u**3 / 3 + (g - same) * b * u**2 + b**2 * u

    return (primitive(off) - primitive(on) + same * (1 - off**3 + on**3) / 3).sum(-1)


def population_loss(weight: Tensor, bias: Tensor) -> Tensor:
    """E‖x − f(x)‖², shape (…), of weight (…, 2, features) and bias (…, features): no sampling, differentiable."""
    return errors(weight, bias).mean(-1)


@dataclass(frozen=True)
class Plateau:
    """A critical point: `sides` columns of `length` at equal angles with `bias`, and `positive` dead features that
    predict their mean. `level` is its loss. `llc` is its learning coefficient, NaN where it is not known: for 4 sides,
    where the loss has a kink, and where the point is a saddle.
    """

    sides: int
    positive: int
    features: int
    length: float
    bias: float
    level: float
    llc: float

    @property
    def name(self) -> str:
        return f"{self.sides}{'+' * self.positive}"

    def point(self, dead: float = -0.2) -> tuple[Tensor, Tensor]:
        """Weight (2, features) and bias (features,) in float64; `dead` is the bias of dead features that are off."""
        angle = 2 * math.pi * torch.arange(self.sides, dtype=torch.float64) / self.sides
        weight = torch.zeros(2, self.features, dtype=torch.float64)
        weight[:, : self.sides] = self.length * torch.stack([angle.cos(), angle.sin()])
        bias = torch.full((self.features,), dead, dtype=torch.float64)
        bias[: self.sides] = self.bias
        bias[self.sides : self.sides + self.positive] = 1 / (2 * self.features)
        return weight, bias

    def curvatures(self) -> NDArray[np.float64]:
        """Eigenvalues (3 features,) of the loss's Hessian, ascending; `gibbs_quadratic` makes λ̂ at nbeta and gamma of
        them."""
        weight, bias = self.point()
        split = weight.numel()

        def loss(point: Tensor) -> Tensor:
            return population_loss(point[:split].view_as(weight), point[split:])

        hessian: Any = torch.autograd.functional.hessian(loss, torch.cat([weight.flatten(), bias]))
        return np.linalg.eigvalsh(hessian.numpy())


@cache
def plateau(sides: int, positive: int, features: int) -> Plateau:
    """The critical point of that name; ValueError where there are not enough features.

    λ of five and more sides is half the rank of the Hessian, as the loss is constant along what is left: 3 sides − 1
    (a rotation is free) and 3 more for each dead feature that is on, whereas one that is off is free to move.

    >>> found = plateau(5, 1, 6)
    >>> found.name, round(found.length, 5), round(found.bias, 5), round(found.level, 5), found.llc
    ('5+', 1.17046, -0.2823, 0.0618, 8.5)
    """
    if not (sides >= FEWEST and positive >= 0 and sides + positive <= features):
        raise ValueError(
            f"a polygon has from {FEWEST} sides and no more with its dead features than there are features, got "
            f"{sides} sides and {positive} dead of {features} features"
        )
    length, bias, error = _polygon(sides)
    level = (error + features - sides) / (3 * features) - positive / (4 * features**2)
    found = Plateau(sides, positive, features, length, bias, level, math.nan)
    regular = sides > 4 and found.curvatures().min() > -1e-6
    return replace(found, llc=(3 * sides - 1 + 3 * positive) / 2) if regular else found


def plateaus(features: int) -> Iterator[Plateau]:
    """All of them, by sides and then by dead features that are on."""
    for sides in range(FEWEST, features + 1):
        for positive in range(features - sides + 1):
            yield plateau(sides, positive, features)


def plateau_at(weight: Tensor, bias: Tensor, *, within: float = 0.1) -> Plateau | None:
    """The plateau at which weights (2, features) and biases (features,) lie, or None between two of them.

    Columns of more than half the polygon's length count as its sides. Their lengths and angles must be those of the
    regular polygon up to a share `within`, their biases up to `within`, the loss that of the plateau up to less than
    half the step that one dead feature makes; a dead feature is on above half its best bias.
    """
    weight, bias = weight.detach().double().cpu(), bias.detach().double().cpu()
    features = len(bias)
    norms = weight.norm(dim=0)
    for sides in range(FEWEST, features + 1):
        length, center, _ = _polygon(sides)
        alive = norms > length / 2
        if int(alive.sum()) != sides:
            continue
        angle = torch.atan2(weight[1], weight[0])[alive].sort().values
        gaps = torch.diff(angle, append=angle[:1] + 2 * math.pi) * sides / (2 * math.pi)
        regular = max(_largest(gaps - 1), _largest(norms[alive] / length - 1), _largest(bias[alive] - center)) <= within
        found = plateau(sides, int((bias[~alive] > 1 / (4 * features)).sum()), features)
        near = abs(float(population_loss(weight, bias)) - found.level) < 0.45 / (4 * features**2)
        if regular and near:
            return found
    return None


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


@cache
def _polygon(sides: int) -> tuple[float, float, float]:
    """Length, bias and h = 3 × the squared error of all sides, at the best regular polygon."""
    if sides == 4:
        return 1.0, 0.0, 0.0  # nothing is lost: neighbours are orthogonal, opposites are cut off

    def error(point: NDArray[np.float64]) -> float:
        weight, bias = Plateau(sides, 0, sides, point[0], point[1], 0.0, 0.0).point()
        return 3 * sides * float(population_loss(weight, bias))

    best = minimize(error, [1.2, -0.3], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14})
    return float(best.x[0]), float(best.x[1]), float(best.fun)
