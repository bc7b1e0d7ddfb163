"""Running chains: the same traces however they are grouped, and fewer at once where memory ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from devmon.errors import InstrumentError
from devmon.sampling.center import Center, Memo, around
from devmon.sampling.data import Examples
from devmon.sampling.evaluators import Evaluator, Looped, Stacked
from devmon.sampling.flat import Flat
from devmon.sampling.group import Group, OnDraw, Traces
from devmon.sampling.kernels.sampler import Sampler
from devmon.sampling.losses import Loss
from devmon.sampling.masks import Mask
from devmon.sampling.memory import Plan, first_plan, most_for_examples
from devmon.sampling.schedule import Schedule

Result = TypeVar("Result")


def run_chains(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    sampler: Sampler,
    schedule: Schedule,
    chains: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    mask: Mask | None = None,
    on_draw: Sequence[OnDraw] = (),
    memo: Memo | None = None,
) -> tuple[Traces, int, float]:
    """The traces of the chains numbered `chains`, the number of parameters sampled, and the trace of the covariance of
    a minibatch's gradient at w* (loss²/weight², 0 where a batch is all data).

    A chain's noise and batches follow from the schedule's seed and its own number, so any split over calls, groups or
    ranks gives the same traces up to rounding. Each on_draw(model, chain, draw) sees the weights at the start of a
    draw. In `memo` runs at the same weights leave what they found there for each other. Raises InstrumentError for a
    batch size that the data do not allow and a loss that is not finite at w*.
    """
    if schedule.batch_size > examples.n or schedule.batch_size < 1:
        raise InstrumentError(f"batch_size must be from 1 to the {examples.n} examples, got {schedule.batch_size}")
    flat = Flat(model, loss, dtype, None if mask is None else mask.names, autocast=autocast)
    where = None if mask is None else mask.vector(flat.names, flat.shapes, flat.at_center[0])
    examples = examples.to(flat.device, dtype, most_for_examples(flat.device))
    batches = {stream: schedule.batches(stream, examples.n).to(flat.device) for stream in schedule.streams(chains)}

    # What is needed at w*, once for all chains.
    def at_center(plan: Plan) -> Center:
        return around(model, flat, examples, schedule, batches.values(), plan.micro, where, memo)

    plan = first_plan(flat, examples, schedule, sampler, len(chains))
    center, by_one = _within_memory(at_center, replace(plan, size=1, stacked=False))
    table, full, spread = center.losses, center.gradient, center.spread()
    del center  # and with it the variance, unless it is kept for others
    plan = replace(plan, micro=by_one.micro)
    flat.release()

    def run(plan: Plan) -> Traces:
        evaluator: Evaluator
        if plan.stacked:
            evaluator = Stacked(flat, examples, plan.micro)
        else:
            evaluator = Looped(flat, examples, plan.micro, whole=plan.whole)
        group = Group(evaluator, sampler, schedule, batches, table, full, where, on_draw)
        return group.run(chains[done : done + plan.size])

    parts: list[Traces] = []
    done = 0
    while done < len(chains):
        part, plan = _within_memory(run, replace(plan, size=min(plan.size, len(chains) - done)))
        parts.append(part)
        done += plan.size
    sampled = int(where.sum()) if where is not None else flat.numel
    # A minibatch's mean spreads as its examples do over their number, less what leaves none out.
    finite = 0.0 if schedule.replacement else schedule.batch_size / examples.n
    noise = spread / schedule.batch_size * (1 - finite)
    return Traces(*(torch.cat(column) for column in zip(*parts, strict=True))), sampled, noise


def _within_memory(work: Callable[[Plan], Result], plan: Plan) -> tuple[Result, Plan]:
    """What `work` returns by the first plan, from `plan` downwards, under which it can be done, and that plan."""
    while True:
        # The exception is left before a smaller plan is tried: while it is handled it holds the frame, and with it the
        # memory, of what did not fit.
        try:
            return work(plan), plan
        except RuntimeError as error:
            smaller = plan.after(error)
            if smaller is None:
                raise
        plan = smaller
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
