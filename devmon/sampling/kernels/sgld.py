"""Stochastic gradient Langevin dynamics around w*."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from devmon.errors import InstrumentError


@dataclass
class SGLDState:
    """Where the chains are: `position` and `center` (w*) broadcast to (chain, parameter)."""

    position: Tensor
    center: Tensor


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

    def init(self, position: Tensor, center: Tensor) -> SGLDState:
        """The state at `position`, which the steps will overwrite."""
        return SGLDState(position, center)

    def step(self, state: SGLDState, grad: Tensor, noise: Tensor, mask: Tensor | None = None) -> SGLDState:
        """One step from the gradient of the mean loss and standard normals, all (chain, parameter); the state given,
        the gradient and the noise are used up. Where `mask` is 0 a parameter rests."""
        if mask is not None:
            grad.mul_(mask)
            noise.mul_(mask)
        if self.prior:
            noise.sub_(
                state.position if mask is None else state.position * mask, alpha=0.5 * math.sqrt(self.lr) * self.prior
            )
        state.position.lerp_(state.center, self.lr * self.gamma / 2)
        state.position.add_(grad, alpha=-self.lr * self.nbeta / 2).add_(noise, alpha=math.sqrt(self.lr))
        return state


def check_settings(lr: float, nbeta: float, gamma: float, prior: float = 0.0) -> None:
    """Raises InstrumentError unless lr and nbeta are positive and gamma and prior are not negative, all finite."""
    for name, value in {"lr": lr, "nbeta": nbeta, "gamma": gamma, "prior": prior}.items():
        least = "> 0" if name in ("lr", "nbeta") else ">= 0"
        number = isinstance(value, int | float) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and least == "> 0"):
            raise InstrumentError(f"{name} must be a finite number {least}, got {value!r}")
