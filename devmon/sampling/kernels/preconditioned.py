"""SGLD with RMSprop's diagonal preconditioner, frozen once it is learned so that the law stays right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from devmon.sampling.constants import BLOCK
from devmon.sampling.kernels.sampler import force, masked


@dataclass
class PreconditionedState:
    """Positions (chain, parameter); squared drifts V until M is frozen and M itself from then on, `scale`; until then
    the drift of a step, which waits for M, and for each chain (chain, 1) what M is made of: the mean of V, the least
    of a root and the mean of the reciprocals."""

    position: Tensor
    mask: Tensor | None
    scale: Tensor
    drift: Tensor | None
    taken: int
    total: Tensor
    least: Tensor
    mean: Tensor


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
    copies: ClassVar[int] = 3  # while M is learned

    def init(self, position: Tensor, mask: Tensor | None) -> PreconditionedState:
        """M starts at 1; see `devmon.sampling.kernels.sampler.Sampler`."""
        one = torch.ones(len(position), 1, dtype=torch.float64, device=position.device)
        drift = torch.zeros_like(position) if self.adapt else None
        scale = torch.zeros_like(position) if self.adapt else torch.ones_like(position)
        return PreconditionedState(position, mask, scale, drift, 0, 0 * one, one, one)

    def pull(self, state: PreconditionedState, part: slice, away: Tensor, grad: Tensor) -> None:
        """V while M is learned, then the move by the gradient."""
        drift = force(self, state.position[:, part], away, grad)
        if state.taken >= self.adapt:
            state.drift = None  # M is frozen: nothing waits for it any more
        if state.drift is None:
            self._move(state, part, drift, state.scale[:, part])
            return
        square = state.scale[:, part].lerp_(drift.square(), 1 / (state.taken + 1))
        state.total += square.sum(1, keepdim=True)
        state.drift[:, part] = drift

    def turn(self, state: PreconditionedState) -> None:
        """The scales of M, which are means over all parameters. While M is learned the law is not yet the right one."""
        if state.drift is None:
            return
        size = state.position.shape[1]
        state.taken += 1
        state.least = self.eps * (state.total / size).sqrt()
        state.total, state.mean = torch.zeros_like(state.total), torch.ones_like(state.mean)
        blocks = [slice(start, start + BLOCK) for start in range(0, size, BLOCK)]
        sums = [self._learned(state, part).sum(1, keepdim=True, dtype=torch.float64) for part in blocks]
        state.mean = torch.stack(sums).sum(0) / size

    def push(self, state: PreconditionedState, part: slice, noise: Tensor) -> None:
        """The noise, after the move by the gradient where that had to wait for M."""
        scale = state.scale[:, part]
        if state.drift is not None:
            scale = self._learned(state, part)
            self._move(state, part, state.drift[:, part], scale)
            if state.taken == self.adapt:  # from here on nothing depends on the path
                state.scale[:, part] = scale
        state.position[:, part].add_(masked(noise, state.mask, part).mul_(scale.sqrt()), alpha=self.lr**0.5)

    def _learned(self, state: PreconditionedState, part: slice) -> Tensor:
        """M as it is while it is learned: 1 before any drift."""
        least, mean = (t.to(state.scale.dtype) for t in (state.least, state.mean))
        return (state.scale[:, part].sqrt() + least + (least == 0)).reciprocal_().div_(mean)

    def _move(self, state: PreconditionedState, part: slice, drift: Tensor, scale: Tensor) -> None:
        state.position[:, part].addcmul_(masked(drift, state.mask, part), scale, value=-self.lr / 2)
