"""What is known of the loss at w*, once for all that sample around the same weights: losses of examples, the gradient
of their mean, and how the gradients of single examples spread."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from devmon.anatomy.passes.kept import MOST_KEPT
from devmon.anatomy.passes.reads import digest
from devmon.sampling.data import Examples, Tree, as_examples, map_tree
from devmon.sampling.flat import Flat, check_finite, score_at_center
from devmon.sampling.losses import Loss
from devmon.sampling.schedule import Schedule

Memo = dict[Any, Any]  # what is known of one model, for all that measure it (`devmon.snapshot.Snapshot.memo`)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Center:
    """At w*, for the parameters that one `Flat` samples. All of it is to be read and not written.

    - `losses` (n,): float64, NaN for examples that were not taken
    - `gradient` (parameter,): of the mean loss of those that were
    - `traces` (tensor,): float64, of the covariance of single examples' gradients, by parameter tensor
    - `variance` (parameter,): the diagonal of it, where a mask asks for some entries of a tensor; else None
    """

    losses: Tensor
    gradient: Tensor
    traces: Tensor
    variance: Tensor | None

    def of(self, names: list[str], parts: Flat, where: Tensor | None) -> Center:
        """The same for the parameters `names` alone, and 0 where `where` is False; those here are of `parts`."""

        def some(vector: Tensor) -> Tensor:
            if names != parts.names:
                pieces = dict(zip(parts.names, vector.split(parts.sizes), strict=True))
                vector = torch.cat([pieces[name] for name in names])
            return vector if where is None else vector * where

        traces = self.traces[[parts.names.index(name) for name in names]]
        variance = None if where is None or self.variance is None else some(self.variance)
        return Center(self.losses, some(self.gradient), traces, variance)

    def spread(self) -> float:
        """The trace of the covariance of single examples' gradients."""
        return float(self.traces.sum() if self.variance is None else self.variance.sum(dtype=torch.float64))


def around(
    model: nn.Module,
    flat: Flat,
    examples: Examples,
    schedule: Schedule,
    batches: Iterable[Tensor],
    micro: int,
    where: Tensor | None = None,
    memo: Memo | None = None,
) -> Center:
    """What chains of this schedule, which meet `batches` of examples, need at w* for the parameters of `flat`, a twin
    of `model`: the gradient, over the whole data for control variates and otherwise over as many examples as one chain
    meets, the same on every rank, 0 where `where` is False; and the losses of all that some chain meets.

    What another run has left in `memo` is not computed again. There it is taken for all parameters at once, so that it
    serves every mask; at most 4 GiB are left.
    """
    index = schedule.for_gradient(examples.n).to(flat.device)
    found = _shared(model, flat, examples, index, schedule.batch_size, micro, where, memo)
    # The losses of what else is met are those of this run alone.
    met = torch.zeros(examples.n, dtype=torch.bool, device=flat.device)
    for order in batches:
        met[order.flatten()] = True
    if len(left := (met & found.losses.isnan()).nonzero().flatten()):
        rest = score_at_center(flat, examples, left, micro)
        found = replace(found, losses=torch.where(rest.isnan(), found.losses, rest))
    return found


def _shared(
    model: nn.Module,
    flat: Flat,
    examples: Examples,
    index: Tensor,
    batch_size: int,
    micro: int,
    where: Tensor | None,
    memo: Memo | None,
) -> Center:
    if memo is None or alone(memo):
        return measure(flat, examples, index, batch_size, micro, where)
    whole = flat if flat.whole else Flat(model, flat.loss, flat.dtype, autocast=flat.autocast)
    of_data = content(examples.tree), named(flat.loss), str(flat.dtype), str(flat.autocast)
    key = ("center", *of_data, len(index), batch_size, micro)
    if key not in memo:
        held = sum(2 * value.gradient.nbytes for value in memo.values() if isinstance(value, Center))
        if held + 2 * whole.numel * flat.dtype.itemsize > MOST_KEPT:
            return measure(flat, examples, index, batch_size, micro, where)
        memo[key] = measure(whole, examples, index, batch_size, micro, each=True)
    found: Center = memo[key]
    return found.of(flat.names, whole, where)


def measure(
    flat: Flat,
    examples: Examples,
    index: Tensor,
    batch_size: int,
    micro: int,
    where: Tensor | None = None,
    each: bool = False,
) -> Center:
    """What is known at w* from the examples `index` (k,), which go through in passes of `micro`; of the gradient 0
    where `where` is False. `each` asks for the variances of single parameters, a mask does too.

    The parts of `batch_size` that they are summed in are disjoint minibatches: how they spread is the noise of one, and
    Σ_b |b| (g_b − g)² over them has the mean (parts − 1) Var. Raises InstrumentError when the loss has another shape
    than (batch,) or is not finite at w*.
    """
    table = torch.full((examples.n,), torch.nan, dtype=torch.float64, device=index.device)
    mean = torch.zeros(flat.numel, dtype=flat.dtype, device=flat.device)
    traces = torch.zeros(len(flat.sizes), dtype=torch.float64, device=flat.device)
    squares = torch.zeros_like(mean) if each or where is not None else None
    done = 0

    def take(number: int | None, gradient: Tensor | None) -> None:
        # Welford's running mean and sum of squares, each part with the weight of its examples. The gradients of a small
        # model come together, and are taken by parameter as those of a large one are.
        share, weight = len(part) / (done + len(part)), done * len(part) / (done + len(part))
        together = gradient.split(flat.sizes, 1) if number is None and gradient is not None else [gradient]
        for i, own in enumerate(together, number or 0):
            for block, within in flat.blocks(i):
                slope = torch.zeros_like(mean[block]) if own is None else own[0, within]
                away = (slope if where is None else slope * where[block]) - mean[block]
                mean[block].add_(away, alpha=share)
                traces[i].add_(torch.linalg.vecdot(away, away), alpha=weight)
                if squares is not None:
                    squares[block].addcmul_(away, away, value=weight)

    flat.hold(flat.center_parts())
    parts = index.split(min(batch_size, max(1, len(index) // 2)))
    for part in parts:
        losses = flat.in_parts(examples.batch, part, micro, take)
        table[part] = losses.to(torch.float64)
        done += len(part)
    check_finite(table[index])
    freedom = max(len(parts) - 1, 1)
    return Center(table, mean, traces / freedom, None if squares is None else squares.div_(freedom))


def known(memo: Memo | None, key: tuple[Hashable, ...], make: Callable[[], Value]) -> Value:
    """What `make` gives, from `memo` where it is there already."""
    if memo is None:
        return make()
    if key not in memo:
        memo[key] = make()
    return memo[key]


def alone(memo: Memo) -> bool:
    """Whether a single run of this step samples, so that nothing needs to be left for another."""
    return getattr(memo.get("plan"), "runs", 2) < 2


def content(tree: Tree) -> str:
    """The same for equal data, whoever holds them."""
    return repr(map_tree(lambda t: (digest(t), tuple(t.shape), t.dtype), tree))


def named(loss: Loss) -> Hashable:
    """The loss itself, as a key."""
    try:
        hash(loss)
    except TypeError:
        return id(loss)
    return loss


class Sampled:
    """An instrument whose chains begin at the snapshot's weights. What it needs there it has in common with others of
    its step that sample with the same loss, data, batch size and precision."""

    def at_center(self) -> tuple[Hashable, int, int]:
        """What is the same for all that share it; how many examples' gradients it takes, and tokens of an example."""
        me: Any = self
        examples = as_examples(me.data)
        count = me.of_gradient(examples.n)
        kind = me.float64, me.precision, me.batch_size, me.micro_batch
        return ("center", content(examples.tree), named(me.loss), *kind, count), count, examples.positions()
