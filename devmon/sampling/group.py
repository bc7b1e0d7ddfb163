"""A group of chains, step by step: minibatches, noise, the paired baseline and control variates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from devmon.sampling.acceptance import Judge
from devmon.sampling.evaluators import Evaluator, Looped
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
    - `where`: True where a parameter moves and False where it rests, (parameter,); None if all move
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
        schedule, device = self.schedule, self.evaluator.flat.device
        # Stacked chains move as one lane. Looped ones have a lane each and take turns: a further chain then needs
        # memory for its weights and the kernel's state alone.
        apart = isinstance(self.evaluator, Looped)
        parts = [slice(i, i + 1) for i in range(len(chains))] if apart else [slice(0, len(chains))]
        lanes = [_Lane(self, chains[part]) for part in parts]
        # The baseline is looked up, not computed: the minibatch met at w has its losses at w* in the table already.
        index = torch.stack(
            [self.batches[stream] for stream in schedule.streams(chains)], 1
        )  # (step, chain or 1, batch)
        baseline = self.table[index].mean(2).expand(-1, len(chains))
        at_center = _AtCenter(self, 1 if apart else index.shape[1]) if schedule.control_variate else None
        shape = (len(Accumulator._fields), schedule.draws, len(chains))
        sums = torch.zeros(shape, dtype=torch.float64, device=device)
        whole = Accumulator(*sums)
        whole.baseline.copy_(baseline.unflatten(0, (schedule.draws, schedule.steps_per_draw)).sum(1))
        for step in range(schedule.draws * schedule.steps_per_draw):
            draw, within = divmod(step, schedule.steps_per_draw)
            if within == 0:
                totals = [Accumulator(*sums[:, draw, part]) for part in parts]
            variate = None
            for part, lane, total in zip(parts, lanes, totals, strict=True):
                met = index[step] if schedule.shared_batches else index[step, part]  # one row where chains share it
                if at_center is not None and (variate is None or not schedule.shared_batches):
                    variate = at_center(met)
                lane.step(met, variate, total, draw, first=within == 0)
        self.evaluator.flat.release()
        mean = Accumulator(*(sums / schedule.steps_per_draw).transpose(1, 2).cpu())
        distance = mean.distance.sqrt()
        return Traces(**(mean._asdict() | {"distance": distance}))


class _Lane:
    """Chains that move together: all of a group where they are stacked, else one, so that its weights stay at hand."""

    def __init__(self, group: Group, chains: Sequence[int]) -> None:
        self.group, self.chains, self.flat = group, chains, group.evaluator.flat
        schedule = group.schedule
        self.rows = self.flat.start(len(chains))
        self.values = self.flat.parts(self.rows)
        self.state = group.sampler.init(self.rows, group.where)
        self.score = group.evaluator.bind(self.values)
        self.noise = schedule.normals("noise", chains, self.rows)
        self.judge = None
        if schedule.proposal is not None:
            proposals = schedule.normals("proposal", chains, self.rows)
            self.judge = Judge(schedule.proposal, group.evaluator, self.rows, proposals, group.where)

    def step(self, met: Tensor, variate: Tensor | None, total: Accumulator, draw: int, *, first: bool) -> None:
        """Scores the examples `met` where the chains are, adds to `total`, and moves. `variate` is added to their
        gradient, with control variates; `first` says that the draw begins here."""
        if first:
            self._tell(draw)
        # The chains move by each gradient as it comes, so that no gradient of all parameters is held: nothing may look
        # at the weights from here to the noise. Only a step that is judged, once a draw, holds them first.
        pull = partial(self._pull, variate, total)
        if self.judge is None or not first:
            losses = self.score(met, pull).to(torch.float64).mean(1)
        else:
            grads: dict[int | None, Tensor | None] = {}
            losses = self.score(met, grads.__setitem__).to(torch.float64).mean(1)
            # Judged once a draw, which then stands for all its steps in the mean.
            total.acceptance.add_(self.group.schedule.steps_per_draw * self.judge(met, losses, grads, variate))
            for number, gradient in grads.items():
                pull(number, gradient)
        total.loss.add_(losses)
        # The noise comes in blocks of its own, in the order of the parameters, whatever order the gradients came in.
        self.group.sampler.turn(self.state)
        for part, noise in next(self.noise):
            self.group.sampler.push(self.state, part, noise)

    def _pull(self, variate: Tensor | None, total: Accumulator, number: int | None, gradient: Tensor | None) -> None:
        """Adds to `total` what a parameter contributes to its inner products, then moves it by its gradient."""
        for part, within in self.flat.blocks(number):
            away = self.flat.away(self.rows, number, part, within)
            slope = torch.zeros_like(away) if gradient is None else gradient[:, within]
            # Control variates: the noise of this minibatch at w* leaves the gradient, and what it adds to the score to
            # first order is kept, to be subtracted by whoever reads the traces.
            if variate is not None:
                slope = slope + variate[:, part]
                total.linear.sub_(torch.linalg.vecdot(away, variate[:, part]))
            total.distance.add_(torch.linalg.vecdot(away, away))
            total.slope.add_(torch.linalg.vecdot(away, slope))
            total.first_order.add_(torch.linalg.vecdot(away, self.group.full[part]))
            if getattr(self.group.sampler, "prior", 0.0):
                total.prior_slope.add_(torch.linalg.vecdot(away, self.rows[:, part]))
            self.group.sampler.pull(self.state, part, away, slope)
        # An operation that still needs the weights as they were now raises an error, in place of a wrong gradient.
        if number is not None:
            torch.autograd.graph.increment_version(self.flat.parameters[number])

    def _tell(self, draw: int) -> None:
        """Gives the model each chain's weights for those that asked to see them."""
        for row, chain in enumerate(self.chains):
            if self.group.on_draw:
                self.flat.hold([value[row] for value in self.values])
            for call in self.group.on_draw:
                call(self.flat.model, chain, draw)


class _AtCenter:
    """The control variate ∇L(w*) − ∇L_B(w*) of a step's minibatches, (chain or 1, parameter), in memory that the next
    call overwrites: `rows` minibatches at once."""

    def __init__(self, group: Group, rows: int) -> None:
        evaluator = group.evaluator
        self.flat, self.full = evaluator.flat, group.full
        self.variate = self.full.new_empty(rows, len(self.full))
        # Alone there is nothing to stack, and the model's own kernels are faster. w* is read where it is.
        if rows == 1:
            evaluator = Looped(self.flat, evaluator.examples, evaluator.micro)
        self.score = evaluator.bind([values.expand(rows, *values.shape) for values in self.flat.center_parts()])

    def __call__(self, index: Tensor) -> Tensor:
        self.score(index, self._take)
        return self.variate

    def _take(self, number: int | None, gradient: Tensor | None) -> None:
        for part, within in self.flat.blocks(number):
            if gradient is None:
                self.variate[:, part].copy_(self.full[part])
            else:
                torch.sub(self.full[part], gradient[:, within], out=self.variate[:, part])
