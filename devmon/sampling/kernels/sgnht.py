"""The stochastic gradient Nosé-Hoover thermostat: friction that adapts until the kinetic temperature is 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from devmon.sampling.kernels.sampler import force, masked


@dataclass
class SGNHTState:
    """Positions and velocities (chain, parameter), and for each chain (chain, 1) the friction, the kinetic energies
    ‖v‖² since it was set last, summed, and the factors of velocity and noise in this step."""

    position: Tensor
    mask: Tensor | None
    velocity: Tensor
    friction: Tensor
    kinetic: Tensor
    energies: int  # how many make up `kinetic`
    moving: int  # parameters
    keep: Tensor
    spread: Tensor


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
    copies: ClassVar[int] = 2
    noise_gain: ClassVar[float] = 0.0  # the thermostat takes minibatch noise out of the law, up to √lr

    def init(self, position: Tensor, mask: Tensor | None) -> SGNHTState:
        """With velocities 0; see `devmon.sampling.kernels.sampler.Sampler`."""
        one = torch.ones(len(position), 1, dtype=torch.float64, device=position.device)
        moving = position.shape[1] if mask is None else int(mask.sum())
        friction, velocity = -math.log(self.momentum) * one, torch.zeros_like(position)
        return SGNHTState(position, mask, velocity, friction, 0 * one, 0, moving, one, one)

    def pull(self, state: SGNHTState, part: slice, away: Tensor, grad: Tensor) -> None:
        """The kick."""
        drift = masked(force(self, state.position[:, part], away, grad), state.mask, part)
        velocity = state.velocity[:, part].add_(drift, alpha=-math.sqrt(self.lr))
        state.kinetic += torch.linalg.vecdot(velocity, velocity)[:, None]

    def turn(self, state: SGNHTState) -> None:
        """The friction, from the kinetic energies after the noise of the last step and after the kicks of this one."""
        state.energies += 1
        state.friction = state.friction + (state.kinetic / state.moving - state.energies) / (2 * self.inertia)
        state.kinetic, state.energies = torch.zeros_like(state.kinetic), 1
        # The noise of an Ornstein-Uhlenbeck step with this friction has variance (1 − exp(−2z)) / z times the rate at
        # the start; the quotient is 2 in the limit z = 0, where it would be 0 / 0.
        small = state.friction.abs() < 1e-6
        spread = -torch.expm1(-2 * state.friction) / torch.where(small, 1.0, state.friction)
        spread = torch.where(small, 2.0, spread) * -math.log(self.momentum)
        state.keep, state.spread = (t.to(state.position.dtype) for t in (torch.exp(-state.friction), spread.sqrt()))

    def push(self, state: SGNHTState, part: slice, noise: Tensor) -> None:
        """Both drifts, and friction and noise between them."""
        h, position, velocity = math.sqrt(self.lr), state.position[:, part], state.velocity[:, part]
        noise = masked(noise, state.mask, part)
        position.add_(velocity, alpha=h / 2)
        velocity.mul_(state.keep).add_(noise.mul_(state.spread))
        position.add_(velocity, alpha=h / 2)
        state.kinetic += torch.linalg.vecdot(velocity, velocity)[:, None]
