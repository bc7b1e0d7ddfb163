"""Which block runs: the place of an attention call in the stack of layers, which may hold others between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from devmon.errors import InstrumentError


class Call(NamedTuple):
    """The `number`-th module of the list at `path` runs, in the `serial`-th call to a module of that list."""

    path: str
    number: int
    serial: int


class Running:
    """While entered, `now` are the calls to modules of lists that are under way, outermost first; `abreast` are the
    paths of lists whose modules are given the same tensor one after the other, as a list of heads: no stack of layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.now: list[Call] = []
        self.calls: Counter[str] = Counter()
        self.abreast: set[str] = set()
        self._given: dict[str, Tensor | None] = {}

    @contextmanager
    def watched(self) -> Iterator[Running]:
        lists = [(path, m) for path, m in self.model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
        handles = []
        for path, each in lists:
            for index, child in enumerate(each):
                handles.append(child.register_forward_pre_hook(self._enter(path, index), with_kwargs=True))
                handles.append(child.register_forward_hook(self._leave(path), always_call=True))
        try:
            yield self
        finally:
            self._given.clear()
            for handle in handles:
                handle.remove()

    def _enter(self, path: str, index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if given is not None and given is self._given.get(path):
                self.abreast.add(path)
            self._given[path] = given
            self.now.append(Call(path, index, self.calls[path]))
            self.calls[path] += 1

        return hook

    def _leave(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            gave = output[0] if isinstance(output, tuple | list) and output else output
            if gave is self._given.get(path):  # a block that adds in place, or does nothing
                self._given[path] = None
            at = max(i for i, call in enumerate(self.now) if call.path == path)
            del self.now[at]

        return hook


def by_block(
    patterns: Sequence[Tensor], during: Sequence[Sequence[Call]], who: str, name: str, abreast: Set[str] = frozenset()
) -> dict[int, Tensor]:
    """Patterns (batch, head, q, k) by the number of their block, from the calls `during` which each was seen; modules
    of the lists `abreast` are heads of one block.

    A block's number is its index in the list of blocks, or the how many-eth call it is where a block runs more than
    once (ALBERT). What attends several times in one block are heads of one layer, the same pattern once. Without a
    list that all of them lie in, they are numbered as they come. Raises InstrumentError for two stacks of which one
    attends to the other.
    """
    heads = [tuple(call for call in calls if call.path in abreast) for calls in during]
    during = [[call for call in calls if call.path not in abreast] for calls in during]
    blocks = _blocks(during)
    if blocks is None:
        # Two lists, and blocks that attend twice: an encoder and a decoder. Else the stack has parts in a row.
        innermost = [calls[-1][::2] if calls else None for calls in during]
        stacks = sorted({calls[-1].path for calls in during if calls})
        if len(stacks) > 1 and max(Counter(innermost).values()) > 1:
            raise InstrumentError(
                f"{who}: {name} attends in several stacks ({', '.join(stacks)}), more than once in a block, as an "
                "encoder–decoder does: hand over one of them (Monitor(model=...) takes such a path)"
            )
        # One block of heads in a list, or each pattern a block.
        keys = [head[-1].path if head else str(at) for at, head in enumerate(heads)]
        order = list(dict.fromkeys(keys))
        blocks = [order.index(key) for key in keys]

    layers: dict[int, list[tuple[Any, Tensor]]] = {}
    for number, head, pattern in zip(blocks, heads, patterns, strict=True):
        seen = layers.setdefault(number, [])
        if not any(h == head and each.shape == pattern.shape and torch.equal(each, pattern) for h, each in seen):
            seen.append((head, pattern))
    return {number: torch.cat([pattern for _, pattern in layers[number]], 1) for number in sorted(layers)}


def _blocks(during: Sequence[Sequence[Call]]) -> list[int] | None:
    """The number of the block of each pattern; None where no one list holds them all."""
    common = [call.path for call in during[0] if all(any(c.path == call.path for c in calls) for calls in during)]
    chosen = [[next(c for c in calls if c.path == path) for calls in during] for path in common]
    if not chosen:
        return None

    # Of lists in lists, the innermost whose modules tell the patterns apart; of one pattern the outermost.
    telling = [calls for calls in chosen if len({call.serial for call in calls}) > 1]
    calls = telling[-1] if telling else chosen[0]

    # Stages of several blocks each: a module of the list holds patterns of several modules of lists within.
    within: dict[int, set[Call]] = {}
    for call, all_calls in zip(calls, during, strict=True):
        inner = all_calls[all_calls.index(call) + 1 :]
        within.setdefault(call.serial, set()).update(inner[:1])
    if any(len(inner) > 1 for inner in within.values()):
        return list(range(len(during)))
    again = len({call.serial for call in calls}) > len({call.number for call in calls})
    first = min(call.serial for call in calls)
    return [call.serial - first if again else call.number for call in calls]
