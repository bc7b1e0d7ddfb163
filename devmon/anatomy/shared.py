"""What is read once for all the instruments of a step: activations, the stream of any model, losses of the next token.

What an earlier instrument of the same step has read is not computed again (`Snapshot.memo`), so these are called before
the model is changed, and what they return is not written into. Up to 4 GiB are kept until the step is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.forward import next_token
from devmon.anatomy.layout import Layout
from devmon.anatomy.residual import find_blocks, residual_stream
from devmon.anatomy.sites import Reads, Site
from devmon.data.probe import minibatches
from devmon.snapshot import Snapshot

MOST_KEPT = 4 * 2**30  # bytes


def activations(
    snapshot: Snapshot,
    inputs: Tensor,
    sites: Iterable[Site],
    who: str,
    layout: Layout | None = None,
    batch_size: int = 32,
) -> tuple[Tensor, Reads]:
    """The output (batch, …) of the snapshot's model for `inputs` (batch, …), and the sites asked for, of all inputs.

    Raises InstrumentError for a model or a site that `Anatomy` does not know.
    """
    anatomy = Anatomy(snapshot.model, layout, who)
    asked = [("output", 0), *(one for site in sites for one in anatomy.expand(site))]

    def make(missing: list[Any]) -> list[Tensor]:
        rest = [one for one in missing if one[0] != "output"]
        parts = [anatomy.run(part, rest) for part in _parts(inputs, batch_size)]
        return [torch.cat([o if one[0] == "output" else r[one] for o, r in parts]) for one in missing]

    found = _shared(snapshot, ("activations", layout), inputs, asked, make)
    return found[0], Reads(dict(zip(asked[1:], found[1:], strict=True)))


def stream(
    snapshot: Snapshot, inputs: Tensor, blocks: str | None, who: str, batch_size: int = 32
) -> tuple[Tensor, ...]:
    """`residual_stream` of all `inputs`, (batch, pos, d) on the CPU; the blocks are looked for where `blocks` is None.

    Of inputs of floats, such as images, the mean over their places, (batch, 1, d).
    """

    def make(missing: list[Any]) -> list[Tensor]:
        path = blocks or find_blocks(snapshot.model, inputs[:1], who)
        parts = [residual_stream(snapshot.model, part, path, who) for part in _parts(inputs, batch_size)]
        if inputs.is_floating_point():
            parts = [[state.mean(1, keepdim=True) for state in part] for part in parts]
        layers = [torch.cat([state.cpu() for state in layer]) for layer in zip(*parts, strict=True)]
        snapshot.memo[depth] = len(layers)
        return layers

    depth = ("depth of the stream", blocks)
    wanted: list[Any] = list(range(snapshot.memo[depth])) if depth in snapshot.memo else ["all"]
    return tuple(_shared(snapshot, ("stream", blocks), inputs, wanted, make))


def predictions(snapshot: Snapshot, tokens: Tensor, who: str, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """`next_token` of all `tokens` (batch, pos): nats and hits, both (batch, pos - 1) on the CPU."""

    def make(missing: list[Any]) -> list[Tensor]:
        parts = [
            next_token(snapshot.model, part, who, check=first == 0)
            for first, part in enumerate(_parts(tokens, batch_size))
        ]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    nats, hits = _shared(snapshot, ("predictions",), tokens, ["nats", "hits"], make)
    return nats, hits


def _parts(inputs: Tensor, batch_size: int) -> list[Tensor]:
    return [inputs[rows] for rows in minibatches(len(inputs), batch_size)]


def _shared(
    snapshot: Snapshot,
    what: tuple[Any, ...],
    inputs: Tensor,
    asked: list[Any],
    make: Callable[[list[Any]], list[Tensor]],
) -> list[Tensor]:
    """The tensors of `asked` from the memo; those that are not there from `make`, one each in the order given (or more,
    numbered from 0, where `asked` is ["all"])."""
    data = inputs.detach().cpu().contiguous()
    digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    kept = snapshot.memo.setdefault(("shared", *what, digest, str(data.dtype), data.shape), {})
    missing = [one for one in asked if one not in kept]
    if not missing:
        return [kept[one] for one in asked]
    made = make(missing)
    names = list(range(len(made))) if missing == ["all"] else missing
    found = kept | dict(zip(names, made, strict=True))
    held = sum(t.nbytes for key, memo in snapshot.memo.items() if key[0] == "shared" for t in memo.values())
    if held + sum(t.nbytes for t in made) <= MOST_KEPT:
        kept.update(found)
    return [found[one] for one in (names if missing == ["all"] else asked)]
