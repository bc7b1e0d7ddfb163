"""What patching measures at the last place: the logit difference, its slope at the sites, and the runs that patch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.sites import Reads, Site, Write
from devmon.errors import InstrumentError

Index = tuple[Any, ...]  # of a site's tensor (batch, pos, …)


def logit_difference(logits: Tensor, answer: Tensor, foil: Tensor, who: str = "logit_difference") -> Tensor:
    """Logit of `answer` minus logit of `foil` (batch,) at the last place of (batch, pos, vocab), in float64."""
    if max(int(answer.max()), int(foil.max())) >= logits.shape[-1]:
        raise InstrumentError(
            f"{who}: answers and foils go up to {max(int(answer.max()), int(foil.max()))}, the model has "
            f"{logits.shape[-1]} logits: give tokens of its vocabulary"
        )
    last = logits[:, -1].double()
    pair = torch.stack([answer, foil], 1).to(last.device)
    return last.gather(1, pair).diff(dim=1)[:, 0].neg()


def patched(value: Tensor, source: Tensor, index: Index) -> Tensor:
    """A copy of `value` that holds `source` at `index`."""
    new = value.clone()
    new[index] = source[index].to(value)
    return new


def run_patched(
    anatomy: Anatomy, tokens: Tensor, patches: Sequence[tuple[Site, Index, Tensor]], read: Iterable[Site] = ()
) -> tuple[Tensor, Reads]:
    """One forward pass in which each site of `patches` holds its tensor at its index; the logits and what was read."""
    write: dict[Site, Write] = {}
    for site, index, source in patches:
        write[site] = _writes(source, index)
    return anatomy.run(tokens, read, write)


def slopes(
    anatomy: Anatomy, tokens: Tensor, answer: Tensor, foil: Tensor, sites: Sequence[Site]
) -> Mapping[tuple[str, int], Tensor]:
    """∂ logit difference / ∂ site, (batch, pos, …) for each site, in one forward and one backward pass.

    Sites that are read lie in each other's paths: the slope is the total one, through everything after the site.
    """
    # The batch is summed: no sequence reads another, so each slope is that of its own difference.
    with torch.enable_grad():
        output, reads = anatomy.run(tokens, sites, grad=True)
        total = logit_difference(output, answer, foil, anatomy.who).sum()
        gradients = torch.autograd.grad(total, list(reads.values()), allow_unused=True)
    return {
        site: torch.zeros_like(value) if slope is None else slope.detach()
        for (site, value), slope in zip(reads.items(), gradients, strict=True)
    }


def _writes(source: Tensor, index: Index) -> Write:
    return lambda value: patched(value, source, index)


def check_heads(anatomy: Anatomy, heads: Iterable[tuple[int, int]]) -> None:
    """InstrumentError unless all pairs (layer, head) are of this model."""
    wrong = [pair for pair in heads if not (0 <= pair[0] < anatomy.layers and 0 <= pair[1] < anatomy.heads)]
    if wrong:
        raise InstrumentError(
            f"{anatomy.who}: heads={tuple(heads)} are not all in the {anatomy.layers} layers of {anatomy.heads} heads "
            f"of {type(anatomy.model).__name__}: give pairs (layer, head) of this model"
        )
