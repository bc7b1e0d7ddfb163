"""Underdamped Langevin dynamics by the BAOAB splitting: no step-size bias where the loss is quadratic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class BAOABState:
    """Positions and velocities (chain, parameter)."""

    position: Tensor
    center: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class BAOAB:
    """Kick v ← v − h F, drift w ← w + (h/2) v, v ← c v + √(1 − c²) N(0, 1), drift w ← w + (h/2) v.

    F = nbeta ∇L_B + gamma (w − w*), c is `momentum` and h = √lr, unit mass, so that `lr` means what it means for SGLD
    at momentum c = 0 (there this is the scheme of Leimkuhler and Matthews 2013). The positions before each kick follow
    BAOAB's: on a quadratic their variance is exactly 1 / aᵢ, aᵢ = nbeta hᵢ + gamma, for every lr aᵢ < 4. `momentum`
    near 1 crosses flat directions sooner; minibatch noise widens the law as it widens that of SGLD, and the more the
    longer the momentum remembers it.
    """

    lr: float
    nbeta: float
    gamma: float
    prior: float = 0.0
    momentum: float = 0.5

    @property
    def noise_gain(self) -> float:
        """How much more a minibatch's noise widens the law than it does for SGLD at this lr: momentum remembers it."""
        return (1 + self.momentum) / (1 - self.momentum)

    def init(self, position: Tensor, center: Tensor) -> BAOABState:
        """The state at `position`, which the steps will overwrite, at rest."""
        return BAOABState(position, center, torch.zeros_like(position))

    def step(self, state: BAOABState, grad: Tensor, noise: Tensor, mask: Tensor | None = None) -> BAOABState:
        """One step; see `devmon.sampling.kernels.sgld.SGLD.step`."""
        h = math.sqrt(self.lr)
        drift = grad.mul_(self.nbeta)
        drift.add_(state.position, alpha=self.gamma + self.prior).add_(state.center, alpha=-self.gamma)
        if mask is not None:
            drift.mul_(mask)
            noise.mul_(mask)
        state.velocity.add_(drift, alpha=-h)
        state.position.add_(state.velocity, alpha=h / 2)
        state.velocity.mul_(self.momentum).add_(noise, alpha=math.sqrt(1 - self.momentum**2))
        state.position.add_(state.velocity, alpha=h / 2)
        return state
