"""Soft entropy of directions: how evenly states fall to random unit vectors, and what labels say of where they fall."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import gammaln, ive
from torch import Tensor

EXACT = 60.0  # order of the Bessel function up to which SciPy gives it; above, the expansion is right to 1e-9
TERMS = 400  # of the continued fraction, which has 16 digits after κ/2 terms or so; κ is below 150 up to d = 2000


def temperature(d: int, vectors: int) -> float:
    """The ε at which one direction in d dimensions says as much as a choice among so many `vectors` does.

    ε = 1/κ with KL(von Mises-Fisher(κ) ‖ uniform) = ln n, ν = d/2 - 1:
    κ I_{ν+1}(κ)/I_ν(κ) - [ν ln(2/κ) + lnΓ(d/2) + ln I_ν(κ)] = ln n; to leading order 1/√(2 d ln n).

    >>> [round(temperature(d, 100), 4) for d in (4, 16, 64)]
    [0.0201, 0.054, 0.037]
    """

    def excess(log_kappa: float) -> float:
        kappa, nu = math.exp(log_kappa), d / 2 - 1
        known = nu * math.log(2 / kappa) + gammaln(d / 2) + _log_bessel(nu, kappa)
        return float(kappa * _ratio(nu, kappa) - known - math.log(vectors))

    guess = math.log(2 * d * math.log(vectors)) / 2
    return math.exp(-brentq(excess, guess - 4, guess + 6))


def _log_bessel(nu: float, x: float) -> float:
    """ln I_ν(x); Debye's expansion for large ν (Abramowitz & Stegun 9.7.7), to its third term."""
    if nu < EXACT:
        return float(np.log(ive(nu, x)) + x)
    z = x / nu
    root = math.sqrt(1 + z * z)
    t, eta = 1 / root, root + math.log(z / (1 + root))
    first, second = (3 * t - 5 * t**3) / 24, (81 * t**2 - 462 * t**4 + 385 * t**6) / 1152
    third = (30375 * t**3 - 369603 * t**5 + 765765 * t**7 - 425425 * t**9) / 414720
    series = math.log1p(first / nu + second / nu**2 + third / nu**3)
    return nu * eta - 0.5 * math.log(2 * math.pi * nu) - 0.5 * math.log(root) + series


def _ratio(nu: float, x: float) -> float:
    """I_{ν+1}(x) / I_ν(x) by its continued fraction, from the end."""
    value = 0.0
    for k in range(TERMS, 0, -1):
        value = 1 / (2 * (nu + k) / x + value)
    return value


def assigned(states: Tensor, vectors: Tensor, epsilon: float) -> Tensor:
    """softmax(⟨w, z/‖z‖⟩ / ε) of states (point, d) over unit vectors (…, n, d), as (…, point, n)."""
    unit = torch.nn.functional.normalize(states.to(vectors.dtype), dim=-1)
    return (unit @ vectors.mT / epsilon).softmax(-1)


def entropy(shares: np.ndarray) -> np.ndarray:
    """-Σ p ln p / ln n over the last dimension: 1 where all n are as likely."""
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.asarray(-(shares * logs).sum(-1) / math.log(shares.shape[-1]))


def information(shares: Tensor, label: np.ndarray, group: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Entropy of all points and what their labels say of it, (2,), and both without each group, (group, 2).

    `shares` (draw, point, n) are those of `assigned`, of which the draws are averaged, `label` and `group` (point,)
    integers from 0. H = that of the mean over labels, each as much as another, I = H - Σ_x H(mean of x) / labels.
    """
    # sums by label and group: what is left without a group is a difference
    draws, _, n = shares.shape
    labels = int(label.max()) + 1
    sums = torch.zeros(draws, labels * groups, n, dtype=torch.float64)
    sums.index_add_(1, torch.as_tensor(label * groups + group), shares.double().cpu())
    by = sums.view(draws, labels, groups, n).numpy()
    count = np.bincount(label * groups + group, minlength=labels * groups).reshape(labels, groups)

    def both(total: np.ndarray, number: np.ndarray) -> np.ndarray:
        there = number > 0
        means = total[:, there] / number[there, None]
        whole = entropy(means.mean(1))
        return np.array([whole.mean(), (whole - entropy(means).mean(1)).mean()])

    total, number = by.sum(2), count.sum(1)
    without = np.array([both(total - by[:, :, g], number - count[:, g]) for g in range(groups)])
    return both(total, number), without
