"""Metropolis acceptance of an SGLD step, judged beside chains that it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from devmon.sampling.flat import Evaluator


@dataclass(frozen=True)
class Proposal:
    """The density and the step whose Metropolis acceptance is asked for: those of `devmon.sampling.SGLD`."""

    lr: float
    nbeta: float
    gamma: float
    prior: float


class Judge:
    """The Metropolis acceptance of one SGLD proposal from where the chains are, on the minibatch that they meet there.

    min(1, p(w′) q(w | w′) / p(w) q(w′ | w)) with p ∝ exp(−U), U = nbeta L_B + (gamma/2)‖w − w*‖² + (prior/2)‖w‖², and
    q(· | w) = N(w − (lr/2) ∇U(w), lr): MALA (Roberts and Tweedie 1996). The proposal is judged and dropped, so the
    chains go their way; it costs one more pass and noise of its own.
    """

    def __init__(
        self, proposal: Proposal, evaluator: Evaluator, rows: Tensor, noise: Iterator[Tensor], where: Tensor | None
    ) -> None:
        self.proposal, self.rows, self.noise, self.where = proposal, rows, noise, where
        self.center = evaluator.flat.center
        self.there, self.grads = torch.empty_like(rows), torch.empty_like(rows)
        self.score = evaluator.bind(self.there, self.grads)

    def __call__(self, index: Tensor, losses: Tensor, grads: Tensor, slopes: Tensor | None) -> Tensor:
        """Acceptance (chain,) for the examples `index`, `losses` and `grads` at the rows, and the noise at w*."""
        p = self.proposal
        # Propose: a step of SGLD with normals that no chain uses.
        drift, noise = self._drift(self.rows, grads), next(self.noise)
        if self.where is not None:
            noise.mul_(self.where)
        self.there.copy_(self.rows).add_(drift, alpha=-p.lr / 2).add_(noise, alpha=p.lr**0.5)
        losses_there = self.score(index).to(torch.float64).mean(1)
        # The same control variates at both ends, in the gradient and, as the linear term, in the energy itself.
        if slopes is not None:
            self.grads.sub_(slopes)
        back = self._drift(self.there, self.grads)
        energy = p.nbeta * (losses_there - losses)
        if slopes is not None:
            energy -= p.nbeta * torch.linalg.vecdot(slopes, self.there - self.rows)
        # ½‖b‖² − ½‖a‖² = ((a + b)/2)·(b − a): no difference of two large squares.
        for strength, origin in ((p.gamma, self.center), (p.prior, torch.zeros_like(self.center))):
            if strength:
                middle = (self.there + self.rows) / 2 - origin
                energy += strength * torch.linalg.vecdot(middle, self.there - self.rows)
        # log q(w | w′) − log q(w′ | w): the way there used `noise`, the way back would need `away` / √lr.
        away = (self.rows - self.there).add_(back, alpha=p.lr / 2)
        ratio = torch.linalg.vecdot(noise, noise) / 2 - torch.linalg.vecdot(away, away) / (2 * p.lr)
        return (ratio - energy).clamp(max=0).exp()

    def _drift(self, rows: Tensor, grads: Tensor) -> Tensor:
        """∇U at the rows, 0 where a parameter rests."""
        p = self.proposal
        drift = grads * p.nbeta
        drift.add_(rows - self.center, alpha=p.gamma)
        if p.prior:
            drift.add_(rows, alpha=p.prior)
        return drift if self.where is None else drift.mul_(self.where)
