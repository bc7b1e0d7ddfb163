"""What stands around the layers in a trace: embedding, final norm, unembedding, and how logits are had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.frozen_norm import FUNCTIONS
from devmon.anatomy.layout import FUNCTIONAL
from devmon.anatomy.proposing.stack import Stack
from devmon.anatomy.proposing.trace import Trace, is_linear, is_table, same, under


def read_ends(trace: Trace, stack: Stack, stream: Tensor) -> dict[str, Any]:
    """`embed`, `norm`, `unembed`, `direct`, `cap`, `heads` and `logits`; `stream` is what the last layer gives."""
    calls = [call for call in trace.calls if call.gave is not None]
    inside = [call for call in calls if under(call.path, [stack.path])]
    # Outside, before, on the tokens: the embedding.
    start, end = min(c.start for c in inside), max(c.end for c in inside)
    ends: dict[str, Any] = {"heads": _heads(trace.model, stack)}
    for call in calls:
        tokens = call.given is not None and trace.tokens and call.given.shape == trace.inputs.shape
        if call.end < start and tokens and torch.equal(call.given, trace.inputs) and is_table(call.module):  # type: ignore[arg-type]
            ends["embed"] = call.path
            break

    # Behind, the last linear map: the unembedding, if logits are what it gives, or a cap of it.
    logits, found = trace.logits, None
    after = [call for call in calls if call.start > end and is_linear(call.module)]
    if logits is None or not trace.tokens or not after:
        return ends
    found = after[-1]
    assert found.gave is not None
    assert found.given is not None
    rows, places = found.gave.shape[:-1].numel(), trace.inputs.numel()
    flat = logits.ndim == 2 and len(logits) == places
    whole = logits.ndim == 3 and logits.shape[:2] == trace.inputs.shape
    last = not whole and not flat and rows == len(trace.inputs)
    if not (whole or flat or last):
        return ends  # of a class, or of something else: the unembedding is none of every place
    ends["unembed"] = found.path
    if adapter := trace.adapter or ("flat" if flat else "last" if last else ""):
        ends["logits"] = adapter
    if (cap := _cap(found.gave.flatten(), logits.flatten())) is not None:
        ends["cap"] = cap

    # Between the last layer and the unembedding: a norm, or more than that.
    read = found.given
    if last and read.shape != stream.shape:
        stream_at, read_at = stream[:, -1], read.reshape(len(stream), -1)
    else:
        stream_at, read_at = stream.reshape(read.shape) if stream.numel() == read.numel() else stream, read
    if same(stream_at, read_at):
        return ends
    for call in calls:
        if (
            call.start > end
            and call.given is not None
            and _one_stream(call.given, stream)
            and not is_linear(call.module)
        ):
            gave = call.gave
            assert gave is not None
            gave = gave if same(call.given, stream) else gave.transpose(0, 1)
            at = gave[:, -1] if last and read.shape != stream.shape and gave.ndim == 3 else gave
            if at.numel() == read_at.numel() and same(at.reshape(read_at.shape), read_at):
                return ends | {"norm": call.path}
    for name, function in FUNCTIONS.items():  # called without a module
        if same(function(stream_at, (stream.shape[-1],)), read_at):
            return ends | {"norm": FUNCTIONAL + name}
    return ends | {"direct": False}


def _one_stream(given: Tensor | None, stream: Tensor) -> bool:
    """Whether a module was given the stream, which may be (pos, batch, d) there."""
    return same(given, stream) or (given is not None and given.ndim == 3 and same(given.transpose(0, 1), stream))


def _cap(written: Tensor, logits: Tensor) -> float | None:
    """c where logits are c tanh(written / c); None where they are what was written."""
    if written.shape != logits.shape or same(written, logits):
        return None
    at = int(written.abs().argmax())
    x, y = float(written[at].abs()), float(logits[at].abs())
    if not 0 < y < x:
        return None
    low, high = y, 1e6  # c tanh(x / c) grows with c from below y to x
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if middle * torch.tanh(torch.tensor(x / middle)) < y else (low, middle)
    cap = float(f"{low:.3g}")
    return cap if same(cap * torch.tanh(written / cap), logits) else None


def _heads(model: nn.Module, stack: Stack) -> int | str:
    """The path of an attribute, of the first layer or of the model, that holds the number of heads; else the number."""
    block: Any = model.get_submodule(stack.path)[stack.first]  # type: ignore[index]
    owners = [("", block)] if stack.together == 1 else []
    owners += [(path, m) for path, m in block.named_modules() if path] if stack.together == 1 else []
    owners += [("", model)]
    for path, owner in owners:
        for inner, holder in (("", owner), ("config", getattr(owner, "config", None))):
            for name, value in (vars(holder) if hasattr(holder, "__dict__") else {}).items():
                told = "head" in name and "kv" not in name and "key" not in name and "dim" not in name
                if told and type(value) is int and value == stack.heads and not name.startswith("_"):
                    return ".".join(part for part in (path, inner, name) if part)
    return stack.heads
