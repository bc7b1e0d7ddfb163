"""Metropolis acceptance of an SGLD step, judged beside chains that it leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from devmon.sampling.evaluators import Evaluator
from devmon.sampling.kernels.sampler import Normals, force, masked


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
    chains go their way; it costs one more pass and noise of its own, and the memory of the proposal.
    """

    def __init__(
        self, proposal: Proposal, evaluator: Evaluator, rows: Tensor, noise: Normals, where: Tensor | None
    ) -> None:
        self.proposal, self.rows, self.noise, self.where = proposal, rows, noise, where
        self.flat = evaluator.flat
        self.there = torch.empty_like(rows)
        self.score = evaluator.bind(self.flat.parts(self.there))

    def __call__(
        self, index: Tensor, losses: Tensor, grads: Mapping[int | None, Tensor | None], variate: Tensor | None
    ) -> Tensor:
        """Acceptance (chain,) for the examples `index` with `losses` and `grads` at the rows, by parameter; `variate`,
        (chain or 1, parameter), is added to gradients at both ends."""
        p, rows, there = self.proposal, self.rows, self.there
        # Propose: a step of SGLD with normals that no chain uses. log q(w′ | w) = −‖noise‖²/2.
        ratio = torch.zeros_like(losses)
        there.copy_(rows)
        for part, noise in next(self.noise):
            noise = masked(noise, self.where, part)
            ratio += torch.linalg.vecdot(noise, noise) / 2
            there[:, part].add_(noise, alpha=p.lr**0.5)
        for number, gradient in grads.items():
            for part, within in self.flat.blocks(number):
                there[:, part].add_(self._drift(rows, number, part, within, gradient, variate), alpha=-p.lr / 2)
        # Score there. The gradients that come say how the way back would be made, and nothing of them is kept.
        energy = torch.zeros_like(losses)

        def take(number: int | None, gradient: Tensor | None) -> None:
            for part, within in self.flat.blocks(number):
                back = self._drift(there, number, part, within, gradient, variate)
                start, end = (self.flat.away(ends, number, part, within) for ends in (rows, there))
                moved = there[:, part] - rows[:, part]
                # ½‖b‖² − ½‖a‖² = ((a + b)/2)·(b − a): no difference of two large squares.
                energy.add_(p.gamma * torch.linalg.vecdot((start + end) / 2, moved))
                if p.prior:
                    energy.add_(p.prior * torch.linalg.vecdot((rows[:, part] + there[:, part]) / 2, moved))
                if variate is not None:  # control variates: the linear term that their gradients come from
                    energy.add_(p.nbeta * torch.linalg.vecdot(variate[:, part], moved))
                # log q(w | w′): the way back would need this noise, over √lr.
                away = back.mul_(p.lr / 2).sub_(moved)
                ratio.sub_(torch.linalg.vecdot(away, away) / (2 * p.lr))

        there_losses = self.score(index, take).to(torch.float64).mean(1)
        energy += p.nbeta * (there_losses - losses)
        return (ratio - energy).clamp(max=0).exp()

    def _drift(
        self,
        rows: Tensor,
        number: int | None,
        part: slice,
        within: slice,
        gradient: Tensor | None,
        variate: Tensor | None,
    ) -> Tensor:
        """∇U at the rows in one block, 0 where a parameter rests."""
        away = self.flat.away(rows, number, part, within)
        slope = torch.zeros_like(away) if gradient is None else gradient[:, within]
        if variate is not None:
            slope = slope + variate[:, part]
        return masked(force(self.proposal, rows[:, part], away, slope), self.where, part)
