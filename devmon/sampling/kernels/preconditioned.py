"""SGLD with RMSprop's diagonal preconditioner, frozen once it is learned so that the law stays right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PreconditionedState:
    """Positions and squared gradients (chain, parameter), the preconditioner M once frozen, and the steps taken."""

    position: Tensor
    center: Tensor
    square: Tensor
    scale: Tensor
    taken: int


@dataclass(frozen=True)
class PreconditionedSGLD:
    """w ← w − (lr/2) M (nbeta ∇L_B + gamma (w − w*)) + N(0, lr M), M = 1 / (√V + eps) with mean 1 over parameters.

    V is the running mean of the squared drift nbeta ∇L_B + gamma (w − w*) over the first `adapt` steps, which take M as
    it is then; afterwards M is frozen and the stationary law is that of SGLD with lr M per coordinate (a changing M
    would need the Γ term that Li et al. 2016 leave out; here it is zero). Let burn-in be longer than `adapt`. `eps` is
    relative to the root mean square of the drift: it bounds M for parameters without a gradient.
    """

    lr: float
    nbeta: float
    gamma: float
    prior: float = 0.0
    adapt: int = 50
    eps: float = 0.1

    def init(self, position: Tensor, center: Tensor) -> PreconditionedState:
        """The state at `position`, which the steps will overwrite; M starts at 1."""
        return PreconditionedState(position, center, torch.zeros_like(position), torch.ones_like(position), 0)

    def step(
        self, state: PreconditionedState, grad: Tensor, noise: Tensor, mask: Tensor | None = None
    ) -> PreconditionedState:
        """One step; see `devmon.sampling.kernels.sgld.SGLD.step`."""
        drift = grad.mul_(self.nbeta)
        drift.add_(state.position, alpha=self.gamma + self.prior).add_(state.center, alpha=-self.gamma)
        # While M is learned the law is not yet the right one; from `adapt` steps on nothing here depends on the path.
        if state.taken < self.adapt:
            state.taken += 1
            state.square.lerp_(drift.square(), 1 / state.taken)
            least = self.eps * state.square.mean(1, keepdim=True).sqrt()
            state.scale = (state.square.sqrt() + least + (least == 0)).reciprocal_()  # M is 1 before any drift
            state.scale /= state.scale.mean(1, keepdim=True)
        move = noise.mul_(state.scale.sqrt()).mul_(self.lr**0.5).addcmul_(drift, state.scale, value=-0.5 * self.lr)
        state.position.add_(move if mask is None else move.mul_(mask))
        return state
