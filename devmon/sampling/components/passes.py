"""Forward and backward passes of variants on common minibatches, so many at once as fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from devmon.sampling.center import Memo, around
from devmon.sampling.components.masks import Component
from devmon.sampling.components.variants import Kept, Variants
from devmon.sampling.data import Examples
from devmon.sampling.flat import Flat
from devmon.sampling.kernels.sampler import Sampler
from devmon.sampling.losses import Loss
from devmon.sampling.schedule import Schedule

# Numbers of examples' tokens that pass at once: enough that a small model spends its time on sums and not on dispatch,
# few enough that a core's caches hold an activation. Moves cost and memory alone; an accelerator takes all that fit.
AT_ONCE = {"cpu": 4096, "cuda": 2**18}


@dataclass(frozen=True)
class Plan:
    """What all components have in common: data, minibatches by step (step, chain or 1, batch), and losses at w*,
    float64 (n,); `full` is the gradient at w* by the name of a parameter."""

    examples: Examples
    kernel: Sampler
    schedule: Schedule
    chains: Sequence[int]
    index: Tensor
    table: Tensor
    center: Mapping[str, Tensor]
    full: Mapping[str, Tensor]
    positions: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loss: Loss,
        examples: Examples,
        components: Sequence[Component],
        kernel: Sampler,
        schedule: Schedule,
        chains: Sequence[int],
        dtype: torch.dtype,
        memo: Memo | None = None,
    ) -> Plan:
        names = {name for component in components for name in component.mask.names}
        flat = Flat(model, loss, dtype, sorted(names))
        device = flat.center.device
        examples = examples.to(device, dtype)
        streams = schedule.streams(chains)
        index = torch.stack([schedule.batches(stream, examples.n) for stream in streams], 1).to(device)
        found = around(model, flat, examples, schedule, [index], schedule.batch_size, memo=memo)
        center, full = (
            dict(zip(flat.names, flat.parts(vector), strict=True)) for vector in (flat.center.clone(), found.gradient)
        )
        return cls(examples, kernel, schedule, chains, index, found.losses, center, full, examples.positions())

    def baseline(self) -> Tensor:
        """(chain, draw), on the CPU."""
        mean = self.table[self.index].mean(2).expand(-1, len(self.chains)).cpu()
        return mean.unflatten(0, (self.schedule.draws, self.schedule.steps_per_draw)).mean(1).T.contiguous()


class Passes:
    """Forward and backward passes of variants, so many at once as fit."""

    def __init__(self, plan: Plan, variants: Variants) -> None:
        self.plan, self.variants = plan, variants
        device = next(iter(plan.center.values())).device.type
        tokens = plan.schedule.batch_size * plan.positions
        self.at_once = max(1, AT_ONCE.get(device, AT_ONCE["cuda"]) // tokens)

    def at_center(
        self, index: Tensor, starts: Collection[int], resting: Collection[nn.Module], names: Collection[str]
    ) -> tuple[Kept, dict[str, Tensor]]:
        """What enters the blocks `starts` and what the modules `resting` return for minibatches `index` (row, batch)
        at w*, (row, batch, …), and ∇L_B(w*) − ∇L(w*) of the parameters `names`, (row, …)."""
        noise = {name: self.plan.full[name].new_empty((len(index), *self.plan.full[name].shape)) for name in names}
        parts: list[Kept] = []
        for first in range(0, len(index), self.at_once):
            some = slice(first, first + self.at_once)
            batch = self.plan.examples.batch(index[some].flatten())
            if not names:
                parts += [self.variants.read(batch, starts, resting)] if starts else []
                continue
            leaves = {}
            for name in names:
                center = self.plan.center[name]
                leaves[name] = center.expand(len(index[some]), *center.shape).clone().requires_grad_()
            with self.variants.reading(starts, resting) as kept, torch.enable_grad():
                losses = self.variants.losses(leaves, batch)
                found = torch.autograd.grad(losses.mean(1).sum(), list(leaves.values()), allow_unused=True)
            parts.append(kept)
            for name, gradient in zip(names, found, strict=True):
                noise[name][some] = (0 if gradient is None else gradient) - self.plan.full[name]
        return _joined(parts, index.shape), noise

    def score(
        self,
        values: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        index: Tensor,
        start: int,
        kept: Kept,
    ) -> Tensor:
        """Losses (variant, batch) at `values` (variant, …) by name, and their mean's gradients, left in `grads`.

        Variant i meets the minibatch i modulo the rows of `index`, for which `kept` was read.
        """
        variants, losses, done = len(next(iter(values.values()))), [], 0
        while done < variants:
            some = slice(done, done + self.at_once)
            rows = torch.arange(variants, device=index.device)[some] % len(index)
            try:
                batch = self.plan.examples.batch(index[rows].flatten())
                leaves = {name: value[some].detach().requires_grad_() for name, value in values.items()}
                with torch.enable_grad():
                    part = self.variants.losses(leaves, batch, start, _rows(kept, rows))
                    found = torch.autograd.grad(part.mean(1).sum(), list(leaves.values()), allow_unused=True)
            except torch.OutOfMemoryError:
                if self.at_once == 1:
                    raise
                self.at_once = (self.at_once + 1) // 2
                continue
            for name, gradient in zip(leaves, found, strict=True):
                grads[name][some] = 0 if gradient is None else gradient
            losses.append(part.detach())
            done += self.at_once
        return torch.cat(losses)


def _joined(parts: Sequence[Kept], shape: torch.Size) -> Kept:
    """What was read in several passes as one, (row, batch, …)."""

    def join(values: Sequence[Any]) -> Any:
        if isinstance(values[0], tuple):
            return (join([value[0] for value in values]), *values[0][1:])
        return torch.cat(list(values)).unflatten(0, shape)

    return {module: join([part[module] for part in parts]) for module in (parts[0] if parts else {})}


def _rows(kept: Kept, rows: Tensor) -> Kept:
    """What was read of some minibatches, as the batch of a pass."""

    def pick(value: Any) -> Any:
        return (pick(value[0]), *value[1:]) if isinstance(value, tuple) else value[rows].flatten(0, 1)

    return {module: pick(value) for module, value in kept.items()}
