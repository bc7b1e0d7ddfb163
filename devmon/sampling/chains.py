"""Running chains: the same traces however they are grouped, and fewer at once where memory ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from devmon.errors import InstrumentError
from devmon.sampling.constants import STACK_BELOW
from devmon.sampling.data import Examples
from devmon.sampling.flat import Evaluator, Flat, Looped, Stacked, gradient_at_center, score_at_center
from devmon.sampling.group import Group, OnDraw, Traces
from devmon.sampling.kernels.sampler import Sampler
from devmon.sampling.losses import Loss
from devmon.sampling.masks import Mask
from devmon.sampling.schedule import Schedule


def run_chains(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    sampler: Sampler,
    schedule: Schedule,
    chains: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    mask: Mask | None = None,
    on_draw: Sequence[OnDraw] = (),
) -> tuple[Traces, int, float]:
    """The traces of the chains numbered `chains`, the number of parameters sampled, and the trace of the covariance of
    a minibatch's gradient at w* (loss²/weight², 0 where a batch is all data).

    A chain's noise and batches follow from the schedule's seed and its own number, so any split over calls, groups or
    ranks gives the same traces up to rounding. Each on_draw(model, chain, draw) sees the weights at the start of a
    draw. Raises InstrumentError for a batch size that the data do not allow and a loss that is not finite at w*.
    """
    if schedule.batch_size > examples.n or schedule.batch_size < 1:
        raise InstrumentError(f"batch_size must be from 1 to the {examples.n} examples, got {schedule.batch_size}")
    flat = Flat(model, loss, dtype, None if mask is None else mask.names)
    device = flat.center.device
    where = None if mask is None else mask.vector(flat.names, flat.shapes, flat.center)
    examples = examples.to(device, dtype)
    batches = {stream: schedule.batches(stream, examples.n).to(device) for stream in schedule.streams(chains)}
    # What is needed at w*, once for all chains: the gradient, over the whole data for control variates and otherwise
    # over as many examples as one chain meets, the same on every rank; and the losses of all that some chain meets.
    index = schedule.for_gradient(examples.n).to(device)
    table, full, spread = gradient_at_center(flat, examples, index, schedule.batch_size, where)
    met = torch.zeros(examples.n, dtype=torch.bool, device=device)
    for order in batches.values():
        met[order.flatten()] = True
    if len(left := (met & table.isnan()).nonzero().flatten()):
        table[left] = score_at_center(flat, examples, left, schedule.batch_size)[left]
    stack = schedule.stacked if schedule.stacked is not None else _stacking_pays(flat, examples, schedule, len(chains))
    evaluator: Evaluator = Stacked(flat, examples) if stack else Looped(flat, examples)
    group = Group(evaluator, sampler, schedule, batches, table, full, where, on_draw)
    # Group by group. The exception is left before a smaller group starts: while it is handled it holds the frame, and
    # with it the memory, of the group that did not fit.
    size = schedule.group or _group_size(schedule, stack, len(chains))
    parts: list[Traces] = []
    done = 0
    while done < len(chains):
        some = chains[done : done + size]
        part = None
        try:
            part = group.run(some)
        except torch.OutOfMemoryError:
            if len(some) == 1:
                raise
        if part is None:
            size = (len(some) + 1) // 2
            continue
        parts.append(part)
        done += len(some)
    sampled = int(where.sum()) if where is not None else flat.center.numel()
    # A minibatch's mean spreads as its examples do over their number, less what leaves none out.
    finite = 0.0 if schedule.replacement else schedule.batch_size / examples.n
    noise = spread / schedule.batch_size * (1 - finite)
    return Traces(*(torch.cat(column) for column in zip(*parts, strict=True))), sampled, noise


def _stacking_pays(flat: Flat, examples: Examples, schedule: Schedule, chains: int) -> bool:
    if chains < 2:
        return False
    work = flat.center.numel() * schedule.batch_size * examples.numel()
    if flat.center.device.type == "cpu" and work > STACK_BELOW:
        return False
    return Stacked(flat, examples).works()


def _group_size(schedule: Schedule, stack: bool, chains: int) -> int:
    """Chains held at once: all that are stacked or share a gradient at w*, otherwise one."""
    return chains if stack or (schedule.control_variate and schedule.shared_batches) else 1
