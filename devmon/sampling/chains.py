"""Running chains: minibatches, noise, the paired baseline and control variates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from devmon.errors import InstrumentError
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
    """How the chains are run. `stacked` and `group` (chains held at once; None: chosen) change cost, not numbers."""

    draws: int
    batch_size: int
    steps_per_draw: int = 1
    seed: int = 0
    control_variate: bool = False
    shared_batches: bool = False
    replacement: bool = False
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
    `slope` is ∇L_B(w)·(w − w*) with the gradient that moved the chain.
    """

    loss: Tensor
    baseline: Tensor
    distance: Tensor
    slope: Tensor
    linear: Tensor


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
    probe: Probe | None = None,
) -> tuple[Traces, int]:
    """The traces of the chains numbered `chains`, and the number of parameters sampled.

    A chain's noise and batches follow from the plan's seed and its own number, so any split over calls, groups or
    ranks gives the same traces up to rounding. `probe(model, chain, draw)` sees the weights at the start of each draw.
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
        met = torch.cat([order.flatten() for order in batches.values()]).unique()
        table = score_at_center(flat, examples, met, plan.batch_size)
    stack = plan.stacked if plan.stacked is not None else _stacking_pays(flat, examples, plan, len(chains))
    evaluator: Evaluator = Stacked(flat, examples) if stack else Looped(flat, examples)
    size = plan.group or _group_size(flat, plan, stack, len(chains))
    parts = []
    for start in range(0, len(chains), size):
        group = chains[start : start + size]
        parts.append(_run_group(flat, evaluator, sampler, plan, group, batches, table, full, where, probe))
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
    probe: Probe | None,
) -> Traces:
    center = flat.center
    rows = center.expand(len(group), -1).clone()
    grads = torch.zeros_like(rows)
    state = sampler.init(rows, center)
    score = evaluator.bind(rows, grads)
    if full is not None:
        copies = center.expand(1 if plan.shared_batches else len(group), -1).clone()
        slopes = torch.zeros_like(copies)
        score_copies = (Looped(flat, evaluator.examples) if len(copies) == 1 else evaluator).bind(copies, slopes)
    streams: Sequence[int | None] = [None] if plan.shared_batches else group
    index = torch.stack([batches[stream] for stream in streams], 1)  # (step, chain or 1, batch)
    baseline = table[index].mean(2).expand(-1, len(group))
    noise = _noise(plan.seed, group, rows)
    sums = torch.zeros(5, plan.draws, len(group), dtype=torch.float64, device=center.device)
    away = torch.empty_like(rows)
    for step in range(plan.draws * plan.steps_per_draw):
        loss, start, square, slope, linear = sums[:, step // plan.steps_per_draw]
        loss += score(index[step]).to(torch.float64).mean(1)
        start += baseline[step]
        torch.sub(rows, center, out=away)
        if probe is not None and step % plan.steps_per_draw == 0:
            for row, slope_row, chain in zip(rows, grads, group, strict=True):
                flat.bind(row, slope_row)
                probe(flat.model, chain, step // plan.steps_per_draw)
        if full is not None:
            score_copies(index[step])
            slopes.sub_(full)
            grads.sub_(slopes)
            linear += torch.linalg.vecdot(away, slopes)
        square += torch.linalg.vecdot(away, away)
        slope += torch.linalg.vecdot(away, grads)
        state = sampler.step(state, grads, next(noise), where)
    loss, start, square, slope, linear = (sums / plan.steps_per_draw).transpose(1, 2).cpu()
    return Traces(loss, start, square.sqrt(), slope, linear)


def _noise(seed: int, group: Sequence[int], rows: Tensor) -> Any:
    """Standard normals (chain, parameter), step after step; each chain has its own stream."""
    generators = [torch.Generator(rows.device).manual_seed(derive_seed(seed, "noise", chain)) for chain in group]
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


def _group_size(flat: Flat, plan: Plan, stack: bool, chains: int) -> int:
    if not stack:
        return chains if plan.control_variate and plan.shared_batches else 1
    if flat.center.device.type != "cuda":
        return chains
    free, _ = torch.cuda.mem_get_info(flat.center.device)
    return chains if free > 0 else 1
