"""The list of layers in a trace: where attention happens, and how many modules make a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from devmon.anatomy.proposing.trace import Trace


@dataclass
class Stack:
    """The list of layers: its path, how many of its modules make one, whether others lie between, and the heads."""

    path: str
    together: int
    hybrid: bool
    first: int  # the number of the module in the list with which the first layer begins
    heads: int
    last: int  # the same of the last layer


def find_stacks(trace: Trace) -> list[Stack]:
    """How the list in whose modules attention happens may make layers, the likeliest first; none where there is no list
    that holds all of it. Of several lists, the outermost of those that tell most of it apart."""
    lists = [
        (path, len(module))
        for path, module in trace.model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
    ]
    best: tuple[int, list[int], str, int] | None = None
    for path, size in lists:
        numbers = [_number(path, attention.within) for attention in trace.attentions]
        held = sorted({number for number in numbers if number is not None})
        if held and None not in numbers and (best is None or len(held) > best[0]):
            best = (len(held), held, path, size)
    if best is None:
        return []
    count, held, path, size = best
    heads = trace.attentions[0].heads
    # Attention in every p-th module, and nothing left over: p modules make a layer. Else others lie between.
    together = size // count
    regular = size == count * together and held == [together * number for number in range(count)]
    stacks = [Stack(path, together, False, 0, heads, held[-1])] if regular else []
    return stacks if regular and together == 1 else [*stacks, Stack(path, 1, True, held[0], heads, held[-1])]


def _number(path: str, within: tuple[str, ...]) -> int | None:
    """The number of the module of a list that holds an attention."""
    prefix = f"{path}." if path else ""
    for inner in within:
        head = inner[len(prefix) :].partition(".")[0] if inner.startswith(prefix) else ""
        if head.isdecimal():
            return int(head)
    return None
