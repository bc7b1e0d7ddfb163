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
from devmon.anatomy.passes.run import full_precision
from devmon.anatomy.residual import find_blocks, residual_stream
from devmon.anatomy.sites import Reads, Site
from devmon.data.probe import minibatches
from devmon.snapshot import Snapshot

MOST_KEPT = 4 * 2**30  # bytes of one step, on the device: what exceeds it is computed again by who asks next
OUTPUT = ("output", 0)  # beside the sites


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
    anatomy = Anatomy.of(snapshot, layout, who)
    asked = [OUTPUT, *(at for site in sites for at in anatomy.expand(site))]

    def make(missing: list[Any]) -> list[Tensor]:
        # What is missing is read in one pass a minibatch, whichever instruments ask for it.
        rest = [key for key in missing if key != OUTPUT]
        parts = [anatomy.run(part, rest) for part in _parts(inputs, batch_size)]
        return [torch.cat([output if key == OUTPUT else reads[key] for output, reads in parts]) for key in missing]

    output, *values = _shared(snapshot, ("activations", layout), inputs, asked, make)
    return output, Reads(dict(zip(asked[1:], values, strict=True)))


def stream(
    snapshot: Snapshot, inputs: Tensor, blocks: str | None, who: str, batch_size: int = 32
) -> tuple[Tensor, ...]:
    """`residual_stream` of all `inputs`, (batch, pos, d) on the CPU; the blocks are looked for where `blocks` is None.

    Of inputs of floats, such as images, the mean over their places, (batch, 1, d). In float32 where the weights are in
    half precision: its roundings are as large as the distances between neighbouring states.
    """

    def make(missing: list[Any]) -> list[Tensor]:
        # Layers are moved to the CPU one minibatch at a time: the stream of all inputs may not fit the device.
        path = blocks or find_blocks(snapshot.model, inputs[:1], who)
        model = full_precision(snapshot)
        parts = [residual_stream(model, part, path, who) for part in _parts(inputs, batch_size)]
        if inputs.is_floating_point():
            parts = [[state.mean(1, keepdim=True) for state in part] for part in parts]
        layers = [torch.cat([state.cpu() for state in layer]) for layer in zip(*parts, strict=True)]
        snapshot.memo[depth] = len(layers)
        return layers

    # Which layers there are is known once the model has run: before that all of them are asked for.
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
    # The same data are the same key whoever holds them: two watches have equal probes, not one tensor.
    data = inputs.detach().cpu().contiguous()
    digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    kept = snapshot.memo.setdefault(("shared", *what, digest, str(data.dtype), data.shape), {})
    missing = [key for key in asked if key not in kept]
    if not missing:
        return [kept[key] for key in asked]

    tensors = make(missing)
    names = list(range(len(tensors))) if missing == ["all"] else missing
    known = kept | dict(zip(names, tensors, strict=True))
    held = sum(t.nbytes for key, memo in snapshot.memo.items() if key[0] == "shared" for t in memo.values())
    if held + sum(t.nbytes for t in tensors) <= MOST_KEPT:
        kept.update(known)
    return [known[key] for key in (names if missing == ["all"] else asked)]
