"""Underdamped Langevin dynamics by the BAOAB splitting: no step-size bias where the loss is quadratic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from devmon.sampling.kernels.sampler import force, masked


@dataclass
class BAOABState:
    """Positions and velocities (chain, parameter), and what of them moves (parameter,)."""

    position: Tensor
    mask: Tensor | None
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
    copies: ClassVar[int] = 2

    @property
    def noise_gain(self) -> float:
        """How much more a minibatch's noise widens the law than it does for SGLD at this lr: momentum remembers it."""
        return (1 + self.momentum) / (1 - self.momentum)

    def init(self, position: Tensor, mask: Tensor | None) -> BAOABState:
        """At rest; see `devmon.sampling.kernels.sampler.Sampler`."""
        return BAOABState(position, mask, torch.zeros_like(position))

    def pull(self, state: BAOABState, part: slice, away: Tensor, grad: Tensor) -> None:
        """The kick."""
        drift = masked(force(self, state.position[:, part], away, grad), state.mask, part)
        state.velocity[:, part].add_(drift, alpha=-math.sqrt(self.lr))

    def turn(self, state: BAOABState) -> None:
        """Nothing depends on all parameters."""

    def push(self, state: BAOABState, part: slice, noise: Tensor) -> None:
        """Both drifts, and the noise between them."""
        h, position, velocity = math.sqrt(self.lr), state.position[:, part], state.velocity[:, part]
        noise = masked(noise, state.mask, part)
        position.add_(velocity, alpha=h / 2)
        velocity.mul_(self.momentum).add_(noise, alpha=math.sqrt(1 - self.momentum**2))
        position.add_(velocity, alpha=h / 2)
