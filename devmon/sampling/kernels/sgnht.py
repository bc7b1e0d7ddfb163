"""The stochastic gradient Nosé-Hoover thermostat: friction that adapts until the kinetic temperature is 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SGNHTState:
    """Positions and velocities (chain, parameter), and the friction of a step (chain, 1)."""

    position: Tensor
    center: Tensor
    velocity: Tensor
    friction: Tensor


@dataclass(frozen=True)
class SGNHT:
    """BAOAB whose friction z adapts: z ← z + (‖v‖²/d − 1) / (2 inertia), before and after the noise.

    Ding et al. 2014, in the symmetric order of Leimkuhler and Shang 2016. The noise of a step is that of BAOAB at
    `momentum` for z = −log momentum, where z starts; minibatch noise raises z until the velocities, at the moment of
    the noise, have kinetic temperature ‖v‖²/d = 1 again. So isotropic gradient noise is removed without knowing its
    size, up to terms in √lr; noise in a few directions is shared out among all. One thermostat a chain, d the
    parameters that move. `lr` is that of BAOAB, and on a quadratic the law is BAOAB's. A small `inertia` follows fast
    and shakes the friction.
    """

    lr: float
    nbeta: float
    gamma: float
    prior: float = 0.0
    momentum: float = 0.5
    inertia: float = 30.0

    noise_gain = 0.0  # the thermostat takes minibatch noise out of the law, up to √lr

    def init(self, position: Tensor, center: Tensor) -> SGNHTState:
        """The state at `position`, which the steps will overwrite, with velocities 0."""
        friction = position.new_full((len(position), 1), -math.log(self.momentum))
        return SGNHTState(position, center, torch.zeros_like(position), friction)

    def step(self, state: SGNHTState, grad: Tensor, noise: Tensor, mask: Tensor | None = None) -> SGNHTState:
        """One step; see `devmon.sampling.kernels.sgld.SGLD.step`."""
        h, start = math.sqrt(self.lr), -math.log(self.momentum)
        drift = grad.mul_(self.nbeta)
        drift.add_(state.position, alpha=self.gamma + self.prior).add_(state.center, alpha=-self.gamma)
        if mask is not None:
            drift.mul_(mask)
            noise.mul_(mask)
        moving = noise.shape[1] if mask is None else mask.sum()
        velocity = state.velocity.add_(drift, alpha=-h)
        state.position.add_(velocity, alpha=h / 2)
        friction = state.friction + (velocity.square().sum(1, keepdim=True) / moving - 1) / (2 * self.inertia)
        # The noise of an Ornstein-Uhlenbeck step with this friction has variance (1 − exp(−2z)) / z times the rate at
        # the start; the quotient is 2 in the limit z = 0, where it would be 0 / 0.
        small = friction.abs() < 1e-6
        spread = -torch.expm1(-2 * friction) / torch.where(small, 1.0, friction)
        spread = torch.where(small, 2.0, spread) * start
        velocity.mul_(torch.exp(-friction)).add_(noise.mul_(spread.sqrt()))
        state.friction = friction + (velocity.square().sum(1, keepdim=True) / moving - 1) / (2 * self.inertia)
        state.position.add_(velocity, alpha=h / 2)
        return state
