"""Closed forms that an LLC estimate must meet: known learning coefficients, and the laws of the samplers themselves.

A learning coefficient λ with multiplicity θ rules the volume {K < ε} ~ ε^λ (−log ε)^(θ−1) and so the free energy
n L + λ log n − (θ−1) log log n. Rescaling K leaves it alone. The values are those of the most singular true
parameter; elsewhere on the set of true parameters the local coefficient can be larger, which is why
`deep_linear_point` builds weights where it is attained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Known = tuple[Fraction, int]  # (λ, θ)


# -- known coefficients ----------------------------------------------------------------------------------------------


def regular(parameters: int) -> Known:
    """An identifiable model with positive definite information: λ = d / 2."""
    return Fraction(parameters, 2), 1


def normal_crossing(powers: Sequence[int]) -> Known:
    """K = ∏ w_j^(2 k_j) under a smooth positive prior: λ = min 1 / (2 k_j) over k_j > 0, θ how often it is attained."""
    candidates = [Fraction(1, 2 * k) for k in powers if k > 0]
    return min(candidates), candidates.count(min(candidates))


def even_powers(powers: Sequence[int]) -> Known:
    """K = Σ w_j^(2 k_j): each coordinate adds 1 / (2 k_j)."""
    return sum((Fraction(1, 2 * k) for k in powers), Fraction(0)), 1


def reduced_rank(inputs: int, hidden: int, outputs: int, rank: int) -> Known:
    """y = B A x + noise with a true product of `rank` (Aoyagi and Watanabe 2005)."""
    m, h, n, r = inputs, hidden, outputs, rank
    if not 0 <= r <= min(m, h, n):
        raise ValueError(f"rank must be from 0 to the smallest width {min(m, h, n)}, got {r}")
    if m + h < n + r:
        return Fraction(h * (m - r) + n * r, 2), 1
    if n + h < m + r:
        return Fraction(h * (n - r) + m * r, 2), 1
    if m + n < h + r:
        return Fraction(m * n, 2), 1
    eighths = 2 * (h + r) * (m + n) - (m - n) ** 2 - (h + r) ** 2
    odd = eighths % 4 != 0
    return Fraction(eighths + odd, 8), 1 + odd


def deep_linear(widths: Sequence[int], rank: int) -> Known:
    """A product of matrices, `widths` from input to output, with a true product of `rank` (Aoyagi 2024).

    The excess widths M = width − rank enter in increasing order for as long as their sum holds up against the next
    one; λ follows from those l + 1 that entered, θ = a (l − a) + 1.
    """
    if not 0 <= rank <= min(widths):
        raise ValueError(f"rank must be from 0 to the smallest width {min(widths)}, got {rank}")
    excess = sorted(width - rank for width in widths)
    entered = excess[:2]
    for further in excess[2:]:
        if sum(entered) < (len(entered) - 1) * further:
            break
        entered.append(further)
    layers, total = len(entered) - 1, sum(entered)
    a = total - (math.ceil(Fraction(total, layers)) - 1) * layers
    pairs = Fraction(total**2 - sum(x * x for x in entered), 2)
    fixed = Fraction(rank * (widths[0] + widths[-1] - rank), 2)
    spread = Fraction(a * (layers - a), 4 * layers) - Fraction((layers - 1) * total**2, 4 * layers)
    return fixed + spread + pairs / 2, a * (layers - a) + 1


def deep_linear_strata(widths: Sequence[int], rank: int) -> tuple[Fraction, tuple[int, ...]]:
    """λ as half the least codimension over all strata, and the ranks of the partial products where it is attained.

    Slow and independent of `deep_linear`: going from rank r to s of the partial product at a layer of width h costs
    (r − s)(h − s), and fixing the product within the matrices of its rank costs rank · (inputs + outputs − rank).
    """

    @cache
    def cheapest(layer: int, before: int) -> tuple[float, tuple[int, ...]]:
        if layer == len(widths):
            return (0, ()) if before == rank else (math.inf, ())
        options = []
        for after in range(rank, min(before, widths[layer]) + 1):
            cost, ranks = cheapest(layer + 1, after)
            options.append((cost + (before - after) * (widths[layer] - after), (after, *ranks)))
        return min(options)

    cost, ranks = cheapest(1, widths[0])
    return Fraction(int(cost) + rank * (widths[0] + widths[-1] - rank), 2), ranks


def tanh_network(hidden: int) -> Known:
    """f(x) = Σ a_h tanh(b_h x) with true function 0 and `hidden` units (Aoyagi and Watanabe 2006)."""
    i = math.isqrt(hidden)
    return Fraction(hidden + i * i + i, 4 * i + 2), 1 + (i * i == hidden)


def deep_linear_point(
    widths: Sequence[int], rank: int, rng: np.random.Generator, *, scale: float = 1.0, spread: float = 1.0
) -> list[NDArray[np.float64]]:
    """Weights W_k (width k, width k − 1) whose product has `rank`, generic on a stratum that attains the least λ.

    Singular values that are not zero lie log-uniformly from `scale / spread` to `scale * spread`. At a spread of 1 the
    curvature across the stratum is even; a spread of 2 makes it uneven by up to 2^(4 (layers − 1)).
    """
    _, ranks = deep_linear_strata(widths, rank)
    weights, image = [], np.eye(widths[0])  # columns span the image of the partial product
    for width, before, after in zip(widths[1:], (widths[0], *ranks), ranks, strict=False):
        source = np.linalg.qr(np.hstack([image, rng.standard_normal((len(image), len(image)))]))[0][:, : len(image)]
        source[:, :before] = image @ _orthogonal(before, rng)
        target = _orthogonal(width, rng)
        free = min(width - after, len(image) - before)  # directions that the partial product never meets
        values = spread ** rng.uniform(-1, 1, after + free) if spread != 1 else np.ones(after + free)
        weight = (target[:, :after] * values[:after]) @ source[:, :after].T
        weight += (target[:, after : after + free] * values[after:]) @ source[:, before : before + free].T
        weights.append(scale * weight)
        image = target[:, :after]
    return weights


def _orthogonal(size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


# -- laws of the samplers --------------------------------------------------------------------------------------------


def gibbs_quadratic(curvature: ArrayLike, nbeta: float, gamma: float) -> float:
    """λ̂ of L = ½ Σ hᵢ wᵢ² under exp(−nbeta L − (gamma/2)‖w‖²): Σ ½ nbeta hᵢ / (nbeta hᵢ + gamma)."""
    h = np.asarray(curvature, dtype=np.float64)
    return float((0.5 * nbeta * h / (nbeta * h + gamma)).sum())


def sgld_quadratic(curvature: ArrayLike, nbeta: float, gamma: float, lr: ArrayLike, noise: ArrayLike = 0.0) -> float:
    """The stationary λ̂ of SGLD itself on L = ½ Σ hᵢ wᵢ², step size and additive gradient noise included.

    With aᵢ = nbeta hᵢ + gamma a step is w ← (1 − lr aᵢ/2) w + N(0, lr + (lr nbeta/2)² noiseᵢ), so the variance is
    (1 + lr nbeta² noiseᵢ / 4) / (aᵢ (1 − lr aᵢ/4)) and λ̂ = Σ ½ nbeta hᵢ varianceᵢ. `noise` is the variance of the
    minibatch gradient, `lr` one number or one a coordinate (a frozen preconditioner). Raises ValueError where unstable.
    """
    h = np.asarray(curvature, dtype=np.float64)
    steps, variances = np.asarray(lr, dtype=np.float64), np.asarray(noise, dtype=np.float64)
    a = nbeta * h + gamma
    if (steps * a >= 4).any():
        raise ValueError(f"SGLD is stable for lr (nbeta h + gamma) < 4, got {float((steps * a).max()):.3g}")
    variance = (1 + steps * nbeta**2 * variances / 4) / (a * (1 - steps * a / 4))
    return float((0.5 * nbeta * h * variance).sum())


def gibbs_one(loss: Callable[[NDArray], NDArray], nbeta: float, gamma: float, center: float = 0.0) -> float:
    """nbeta E[L(w)] − nbeta L(w*) for one weight under the localised law, by the trapezoidal rule on a fine grid."""
    width = 12 / math.sqrt(gamma)
    w = center + np.linspace(-width, width, 400_001)
    energy = nbeta * (loss(w) - loss(np.array([center])))
    weight = np.exp(-(energy + 0.5 * gamma * (w - center) ** 2))
    return float((energy * weight).sum() / weight.sum())


def gibbs_two(loss: Callable[[NDArray, NDArray], NDArray], nbeta: float, gamma: float, points: int = 4001) -> float:
    """The same for two weights around (0, 0), on a grid that is denser towards the axes."""
    width = 8 / math.sqrt(gamma)
    t = np.linspace(-1, 1, points)
    w, jacobian = width * t**3, 3 * width * t**2
    x, y = np.meshgrid(w, w, indexing="ij")
    energy = nbeta * loss(x, y)
    weight = np.exp(-(energy + 0.5 * gamma * (x**2 + y**2))) * np.outer(jacobian, jacobian)
    return float((energy * weight).sum() / weight.sum())


def gibbs_crossing_three(nbeta: float, gamma: float, points: int = 4001) -> float:
    """The same for K = (w1 w2 w3)² around 0 (λ = ½, θ = 3): given two weights, the third is Gaussian of precision
    gamma + 2 nbeta (w1 w2)², which leaves two integrals."""
    width = 8 / math.sqrt(gamma)
    t = np.linspace(0, 1, points)[1:]
    w, jacobian = width * t**3, t**2
    square = np.multiply.outer(w, w) ** 2
    precision = gamma + 2 * nbeta * square
    gauss = jacobian * np.exp(-0.5 * gamma * w**2)
    weight = np.outer(gauss, gauss) / np.sqrt(precision)
    return float((weight * nbeta * square / precision).sum() / weight.sum())
