"""Running chains: minibatches, noise, the paired baseline and control variates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from devmon.errors import InstrumentError
from devmon.sampling.acceptance import Proposal, _Judge
from devmon.sampling.data import Examples, draw_batches
from devmon.sampling.flat import Evaluator, Flat, Looped, Stacked, gradient_at_center, score_at_center
from devmon.sampling.losses import Loss
from devmon.sampling.masks import Mask
from devmon.snapshot import derive_seed

NOISE_BLOCK = 8192  # numbers drawn at once for one chain of a small model; depends on nothing but the model's size
STACK_BELOW = 3e7  # parameters times numbers in a batch: below it one CPU core spends its time on dispatch, not on sums


Probe = Callable[[nn.Module, int, int], None]


class Sampler(Protocol):
    """A kernel: pure functions over stacked parameters that may use up the memory they are given.

    `step` updates the position in place (the model's parameters are views of it) and returns the next state.
    """

    def init(self, position: Tensor, center: Tensor) -> Any: ...

    def step(self, state: Any, grad: Tensor, noise: Tensor, mask: Tensor | None = None) -> Any: ...


@dataclass(frozen=True)
class Plan:
    """How the chains are run. `stacked` and `group` (chains held at once; None: chosen) change cost, not numbers.

    Where a group does not fit into the accelerator's memory it is halved, and its chains start again.
    """

    draws: int
    batch_size: int
    steps_per_draw: int = 1
    seed: int = 0
    control_variate: bool = False
    shared_batches: bool = False
    replacement: bool = False
    proposal: Proposal | None = None
    stacked: bool | None = None
    group: int | None = None

    def batches(self, chain: int | None, n: int) -> Tensor:
        """The indices that `chain` (None: every chain) meets, (step, batch): a function of the seed and the chain."""
        what = ("batches",) if chain is None else ("batches", chain)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *what))
        steps = self.draws * self.steps_per_draw
        return draw_batches(n, self.batch_size, steps, generator, replacement=self.replacement)


@dataclass
class Traces:
    """Float64 arrays (chain, draw), on the CPU: means over the steps of a draw, for the distance the root mean square.

    `linear` is (∇L_B(w*) − ∇L(w*))·(w − w*), the first-order noise of the score (0 without control variates);
    `slope` is ∇L_B(w)·(w − w*) with the gradient that moved the chain; `acceptance` is what `Plan.proposal` asks for.
    """

    loss: Tensor
    baseline: Tensor
    distance: Tensor
    slope: Tensor
    linear: Tensor
    acceptance: Tensor


def run_chains(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    sampler: Sampler,
    plan: Plan,
    chains: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    mask: Mask | None = None,
    probes: Sequence[Probe] = (),
) -> tuple[Traces, int]:
    """The traces of the chains numbered `chains`, and the number of parameters sampled.

    A chain's noise and batches follow from the plan's seed and its own number, so any split over calls, groups or
    ranks gives the same traces up to rounding. Each probe(model, chain, draw) sees the weights at the start of a draw.
    """
    if plan.batch_size > examples.n or plan.batch_size < 1:
        raise InstrumentError(f"batch_size must be from 1 to the {examples.n} examples, got {plan.batch_size}")
    flat = Flat(model, loss, dtype, None if mask is None else mask.names)
    device = flat.center.device
    where = None if mask is None else mask.vector(flat.names, flat.shapes, flat.center)
    examples = examples.to(device, dtype)
    streams: Sequence[int | None] = [None] if plan.shared_batches else chains
    batches = {stream: plan.batches(stream, examples.n).to(device) for stream in streams}
    full = None
    if plan.control_variate:
        table, full = gradient_at_center(flat, examples, plan.batch_size)
    else:
        met = torch.zeros(examples.n, dtype=torch.bool, device=device)
        for order in batches.values():
            met[order.flatten()] = True
        table = score_at_center(flat, examples, met.nonzero().flatten(), plan.batch_size)
    stack = plan.stacked if plan.stacked is not None else _stacking_pays(flat, examples, plan, len(chains))
    evaluator: Evaluator = Stacked(flat, examples) if stack else Looped(flat, examples)
    size = plan.group or _group_size(plan, stack, len(chains))
    parts: list[Traces] = []
    done = 0
    while done < len(chains):
        group = chains[done : done + size]
        part = None
        try:
            part = _run_group(flat, evaluator, sampler, plan, group, batches, table, full, where, probes)
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
        if part is None:  # what this group held is free again by now: the same chains, fewer at once
            size = (len(group) + 1) // 2
            continue
        parts.append(part)
        done += len(group)
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in Traces.__dataclass_fields__}
    sampled = int(where.sum()) if where is not None else flat.center.numel()
    return Traces(**joined), sampled


@torch.no_grad()
def _run_group(
    flat: Flat,
    evaluator: Evaluator,
    sampler: Sampler,
    plan: Plan,
    group: Sequence[int],
    batches: dict[int | None, Tensor],
    table: Tensor,
    full: Tensor | None,
    where: Tensor | None,
    probes: Sequence[Probe],
) -> Traces:
    center, apart = flat.center, isinstance(evaluator, Looped)
    copies = center.expand(1 if plan.shared_batches else len(group), -1).clone() if full is not None else None
    if copies is not None:
        slopes = torch.zeros_like(copies)
        score_copies = (Looped(flat, evaluator.examples) if len(copies) == 1 else evaluator).bind(copies, slopes)
    streams: Sequence[int | None] = [None] if plan.shared_batches else group
    index = torch.stack([batches[stream] for stream in streams], 1)  # (step, chain or 1, batch)
    baseline = table[index].mean(2).expand(-1, len(group))
    parts = [slice(i, i + 1) for i in range(len(group))] if apart else [slice(0, len(group))]
    grads = torch.zeros_like(center.expand(1 if apart else len(group), -1))  # lanes take turns, so one will do
    lanes = [_Lane(evaluator, sampler, plan, group[part], center, grads, where) for part in parts]
    sums = torch.zeros(6, plan.draws, len(group), dtype=torch.float64, device=center.device)
    away = torch.empty_like(grads)
    for step in range(plan.draws * plan.steps_per_draw):
        draw, within = divmod(step, plan.steps_per_draw)
        if copies is not None and full is not None:
            score_copies(index[step])
            slopes.sub_(full)
        for part, lane in zip(parts, lanes, strict=True):
            loss, start, square, slope, linear, acceptance = sums[:, draw, part]
            met = index[step] if plan.shared_batches else index[step, part]
            losses = lane.score(met).to(torch.float64).mean(1)
            loss += losses
            start += baseline[step, part]
            torch.sub(lane.rows, center, out=away)
            if probes and within == 0:
                for row, slope_row, chain in zip(lane.rows, grads, group[part], strict=True):
                    flat.bind(row, slope_row)
                    for probe in probes:
                        probe(flat.model, chain, draw)
            noise_at_center = None
            if copies is not None:
                noise_at_center = slopes if plan.shared_batches else slopes[part]
                grads.sub_(noise_at_center)
                linear += torch.linalg.vecdot(away, noise_at_center)
            square += torch.linalg.vecdot(away, away)
            slope += torch.linalg.vecdot(away, grads)
            if lane.judge is not None and within == 0:
                acceptance += plan.steps_per_draw * lane.judge(met, losses, grads, noise_at_center)
            lane.state = sampler.step(lane.state, grads, next(lane.noise), where)
    loss, start, square, slope, linear, acceptance = (sums / plan.steps_per_draw).transpose(1, 2).cpu()
    return Traces(loss, start, square.sqrt(), slope, linear, acceptance)


class _Lane:
    """Chains that move together: all of a group where they are stacked, else one, so that its weights stay at hand."""

    def __init__(
        self,
        evaluator: Evaluator,
        sampler: Sampler,
        plan: Plan,
        chains: Sequence[int],
        center: Tensor,
        grads: Tensor,
        where: Tensor | None,
    ) -> None:
        self.rows = center.expand(len(chains), -1).clone()
        self.state = sampler.init(self.rows, center)
        self.score = evaluator.bind(self.rows, grads)
        self.noise = _noise(plan.seed, "noise", chains, self.rows)
        self.judge = None
        if plan.proposal is not None:
            proposals = _noise(plan.seed, "proposal", chains, self.rows)
            self.judge = _Judge(plan.proposal, evaluator, self.rows, center, proposals, where)


def _noise(seed: int, what: str, group: Sequence[int], rows: Tensor) -> Iterator[Tensor]:
    """Standard normals (chain, parameter), step after step; each chain has its own stream."""
    generators = [torch.Generator(rows.device).manual_seed(derive_seed(seed, what, chain)) for chain in group]
    block = rows.new_empty(len(group), max(1, NOISE_BLOCK // rows.shape[1]), rows.shape[1])
    while True:
        for part, generator in zip(block, generators, strict=True):
            part.normal_(generator=generator)
        yield from block.unbind(1)


def _stacking_pays(flat: Flat, examples: Examples, plan: Plan, chains: int) -> bool:
    if chains < 2:
        return False
    work = flat.center.numel() * plan.batch_size * examples.numel()
    if flat.center.device.type == "cpu" and work > STACK_BELOW:
        return False
    return Stacked(flat, examples).works()


def _group_size(plan: Plan, stack: bool, chains: int) -> int:
    """Chains held at once: all that are stacked or share a gradient at w*, otherwise one."""
    return chains if stack or (plan.control_variate and plan.shared_batches) else 1
