"""Stochastic gradient Langevin dynamics around w*."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from devmon.errors import InstrumentError
from devmon.sampling.kernels.sampler import force, masked


@dataclass
class SGLDState:
    """Where the chains are (chain, parameter), and what of it moves (parameter,)."""

    position: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class SGLD:
    """w ← w − (lr/2)(nbeta ∇L_B(w) + gamma (w − w*) + prior w) + N(0, lr), Welling and Teh 2011 with localisation.

    `lr` is the variance of the noise, `gamma` the precision of the Gaussian around w*, `prior` that of one around 0.
    On L = ½ Σ hᵢ wᵢ² with full batches the stationary variances are 1 / (aᵢ (1 − lr aᵢ / 4)), aᵢ = nbeta hᵢ + gamma:
    stable for lr aᵢ < 4. Minibatches add (lr nbeta / 2)² Var(∇L_B) to the noise of a step.
    """

    lr: float
    nbeta: float
    gamma: float
    prior: float = 0.0
    copies: ClassVar[int] = 1

    def init(self, position: Tensor, mask: Tensor | None) -> SGLDState:
        """See `devmon.sampling.kernels.sampler.Sampler`."""
        return SGLDState(position, mask)

    def pull(self, state: SGLDState, part: slice, away: Tensor, grad: Tensor) -> None:
        """w ← w − (lr/2) F."""
        position = state.position[:, part]
        drift = force(self, position, away, grad)
        position.add_(masked(drift, state.mask, part), alpha=-self.lr / 2)

    def turn(self, state: SGLDState) -> None:
        """Nothing depends on all parameters."""

    def push(self, state: SGLDState, part: slice, noise: Tensor) -> None:
        """w ← w + √lr N(0, 1)."""
        state.position[:, part].add_(masked(noise, state.mask, part), alpha=math.sqrt(self.lr))


def check_settings(lr: float, nbeta: float, gamma: float, prior: float = 0.0) -> None:
    """Raises InstrumentError unless lr and nbeta are positive and gamma and prior are not negative, all finite."""
    for name, value in {"lr": lr, "nbeta": nbeta, "gamma": gamma, "prior": prior}.items():
        least = "> 0" if name in ("lr", "nbeta") else ">= 0"
        number = isinstance(value, int | float) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and least == "> 0"):
            raise InstrumentError(f"{name} must be a finite number {least}, got {value!r}")
