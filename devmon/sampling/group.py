"""A group of chains, step by step: minibatches, noise, the paired baseline and control variates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from devmon.sampling.acceptance import Judge
from devmon.sampling.flat import Evaluator, Looped
from devmon.sampling.kernels.sampler import Sampler
from devmon.sampling.schedule import Schedule

OnDraw = Callable[[nn.Module, int, int], None]  # of the model at the start of a draw, the chain and the draw


class Traces(NamedTuple):
    """Float64 arrays (chain, draw), on the CPU: means over the steps of a draw, for the distance the root mean square.

    `linear` is (∇L_B(w*) − ∇L(w*))·(w − w*), the first-order noise of the score (0 without control variates);
    `slope` is ∇L_B(w)·(w − w*) with the gradient that moved the chain; `first_order` is ∇L(w*)·(w − w*) and
    `prior_slope` w·(w − w*); `acceptance` is what `Schedule.proposal` asks for.
    """

    loss: Tensor
    baseline: Tensor
    distance: Tensor
    slope: Tensor
    linear: Tensor
    first_order: Tensor
    prior_slope: Tensor
    acceptance: Tensor


class Accumulator(NamedTuple):
    """Sums over the steps of a draw: those of `Traces`, with the squared distance in place of the distance."""

    loss: Tensor
    baseline: Tensor
    distance: Tensor
    slope: Tensor
    linear: Tensor
    first_order: Tensor
    prior_slope: Tensor
    acceptance: Tensor


@dataclass(frozen=True)
class Group:
    """Runs chains that are held in memory together, with what all groups share.

    - `batches`: examples met, (step, batch), by chain; by None where the chains share them
    - `table`: losses at w*, float64 (n,), NaN where an example is not met
    - `full`: ∇L(w*), (parameter,)
    - `where`: 1 where a parameter moves and 0 where it rests, (parameter,); None if all move
    """

    evaluator: Evaluator
    sampler: Sampler
    schedule: Schedule
    batches: Mapping[int | None, Tensor]
    table: Tensor
    full: Tensor
    where: Tensor | None
    on_draw: Sequence[OnDraw]

    @torch.no_grad()
    def run(self, chains: Sequence[int]) -> Traces:
        """The traces of the chains numbered `chains`."""
        schedule, center = self.schedule, self.evaluator.flat.center
        # Stacked chains move as one lane. Looped ones have a lane each and share the gradient, since they take turns: a
        # further chain then needs memory for its weights and the kernel's state alone.
        apart = isinstance(self.evaluator, Looped)
        parts = [slice(i, i + 1) for i in range(len(chains))] if apart else [slice(0, len(chains))]
        grads = torch.zeros_like(center.expand(1 if apart else len(chains), -1))
        away = torch.empty_like(grads)
        lanes = [_Lane(self, chains[part], grads, away) for part in parts]
        # The baseline is looked up, not computed: the minibatch met at w has its losses at w* in the table already.
        index = torch.stack(
            [self.batches[stream] for stream in schedule.streams(chains)], 1
        )  # (step, chain or 1, batch)
        baseline = self.table[index].mean(2).expand(-1, len(chains))
        center_noise = _CenterNoise(self, len(chains)) if schedule.control_variate else None
        shape = (len(Accumulator._fields), schedule.draws, len(chains))
        sums = torch.zeros(shape, dtype=torch.float64, device=center.device)
        for step in range(schedule.draws * schedule.steps_per_draw):
            draw, within = divmod(step, schedule.steps_per_draw)
            noise = None if center_noise is None else center_noise(index[step])
            for part, lane in zip(parts, lanes, strict=True):
                total = Accumulator(*sums[:, draw, part])
                total.baseline.add_(baseline[step, part])
                own = slice(None) if schedule.shared_batches else part  # all chains have one row where they share it
                lane.step(index[step, own], None if noise is None else noise[own], total, draw, first=within == 0)
        mean = Accumulator(*(sums / schedule.steps_per_draw).transpose(1, 2).cpu())
        distance = mean.distance.sqrt()
        return Traces(**(mean._asdict() | {"distance": distance}))


class _Lane:
    """Chains that move together: all of a group where they are stacked, else one, so that its weights stay at hand.

    `grads` and `away`, (chain, parameter), are memory that lanes may share: what they hold lasts for a step.
    """

    def __init__(self, group: Group, chains: Sequence[int], grads: Tensor, away: Tensor) -> None:
        self.group, self.chains, self.grads, self.away = group, chains, grads, away
        evaluator, schedule = group.evaluator, group.schedule
        self.center = evaluator.flat.center
        self.rows = self.center.expand(len(chains), -1).clone()
        self.state = group.sampler.init(self.rows, self.center)
        self.score = evaluator.bind(self.rows, grads)
        self.noise = schedule.normals("noise", chains, self.rows)
        self.judge = None
        if schedule.proposal is not None:
            proposals = schedule.normals("proposal", chains, self.rows)
            self.judge = Judge(schedule.proposal, evaluator, self.rows, proposals, group.where)

    def step(self, met: Tensor, noise: Tensor | None, total: Accumulator, draw: int, *, first: bool) -> None:
        """Scores the examples `met` where the chains are, adds to `total`, then moves. `noise` is that of their
        gradient at w*, with control variates; `first` says that the draw begins here."""
        grads, away = self.grads, self.away
        # Score first: it leaves the gradient at w in `grads`, which the kernel uses up at the end.
        losses = self.score(met).to(torch.float64).mean(1)
        total.loss.add_(losses)
        torch.sub(self.rows, self.center, out=away)
        if first:
            self._tell(draw)
        # Control variates: the noise of this minibatch at w* leaves the gradient, and what it adds to the score to
        # first order is kept, to be subtracted by whoever reads the traces.
        if noise is not None:
            grads.sub_(noise)
            total.linear.add_(torch.linalg.vecdot(away, noise))
        total.distance.add_(torch.linalg.vecdot(away, away))
        total.slope.add_(torch.linalg.vecdot(away, grads))
        total.first_order.add_(torch.linalg.vecdot(away, self.group.full))
        total.prior_slope.add_(torch.linalg.vecdot(away, self.rows))
        # Judged once a draw, which then stands for all its steps in the mean.
        if self.judge is not None and first:
            total.acceptance.add_(self.group.schedule.steps_per_draw * self.judge(met, losses, grads, noise))
        self.state = self.group.sampler.step(self.state, grads, next(self.noise), self.group.where)

    def _tell(self, draw: int) -> None:
        """Binds the model to each chain's weights for those that asked to see them."""
        if self.group.on_draw:
            flat = self.group.evaluator.flat
            for row, grad, chain in zip(self.rows, self.grads, self.chains, strict=True):
                flat.bind(row, grad)
                for call in self.group.on_draw:
                    call(flat.model, chain, draw)


class _CenterNoise:
    """∇L_B(w*) − ∇L(w*) of a step's minibatches, (chain or 1, parameter): one row where the chains share them."""

    def __init__(self, group: Group, chains: int) -> None:
        evaluator = group.evaluator
        copies = evaluator.flat.center.expand(1 if group.schedule.shared_batches else chains, -1).clone()
        self.full, self.slopes = group.full, torch.zeros_like(copies)
        alone = len(copies) == 1  # nothing to stack, and the model's own kernels are faster
        self.score = (Looped(evaluator.flat, evaluator.examples) if alone else evaluator).bind(copies, self.slopes)

    def __call__(self, index: Tensor) -> Tensor:
        self.score(index)
        return self.slopes.sub_(self.full)
