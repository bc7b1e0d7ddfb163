"""From a trace to layouts that may be right: by order of calls, by shapes, and by which tensors are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

from torch import Tensor

from devmon.anatomy.frozen_norm import FUNCTIONS
from devmon.anatomy.layout import FUNCTIONAL, Layout
from devmon.anatomy.proposing.ends import read_ends
from devmon.anatomy.proposing.stack import Stack
from devmon.anatomy.proposing.trace import Call, Trace, is_linear, same, under
from devmon.anatomy.variants.builtin import Projection
from devmon.anatomy.variants.fused import ORDERS


def guesses(trace: Trace, stack: Stack) -> Iterator[Layout]:
    """Layouts that may be right, the likeliest first. All agree with the order of calls and the shapes."""
    layer = _Layer(trace, stack, stack.last)  # the first may read what is normed already, which hides its norm
    ends = read_ends(trace, stack, layer.after if layer.batch_first else layer.after.transpose(0, 1))
    for maps in layer.maps():
        yield replace(layer.layout(maps), **ends)


class _Layer:
    """The calls within the layer that begins with module `first` of the list, with their paths in it."""

    def __init__(self, trace: Trace, stack: Stack, first: int) -> None:
        self.trace, self.stack = trace, stack
        self.prefixes = [f"{stack.path}.{first + i}".strip(".") for i in range(stack.together)]
        self.calls = [call for call in trace.calls if self.inside(call) is not None and call.gave is not None]
        # The module itself where it is called; else the first and last that run in it.
        own = [call for call in self.calls if call.path in self.prefixes]
        whole = own[:1] if stack.together == 1 else []
        self.enter = whole[0] if whole else min(self.calls, key=lambda call: call.start)
        self.leave = whole[0] if whole else max(self.calls, key=lambda call: call.end)
        self.named_ends: dict[str, Any] = {}
        for name, call, default in (
            ("enter", self.enter, self.prefixes[0]),
            ("leave", self.leave, self.prefixes[-1]),
        ):
            if call.path != default:
                self.named_ends[name] = self.relative(call)
        assert self.enter.given is not None
        assert self.leave.gave is not None
        self.before, self.after = self.enter.given, self.leave.gave
        turned = (*trace.inputs.shape[1::-1],)  # (pos, batch)
        self.batch_first = not (trace.tokens and self.before.ndim == 3 and self.before.shape[:2] == turned)
        self.attention = next(a for a in trace.attentions if any(under(p, self.prefixes) for p in a.within))
        self.linear = [call for call in self.calls if is_linear(call.module)]
        whole_maps = [call for call in self.linear if not isinstance(call.module, Projection)]  # whose parts are theirs
        self.linear = [c for c in self.linear if not any(under(c.path, [o.path]) and c is not o for o in whole_maps)]

    def inside(self, call: Call) -> str | None:
        return call.path if under(call.path, self.prefixes) else None

    def relative(self, call: Call) -> str:
        """The path of a call as a layout of this stack has it."""
        for number, prefix in enumerate(self.prefixes):
            if call.path == prefix or call.path.startswith(f"{prefix}."):
                inner = call.path[len(prefix) :].strip(".")
                return inner if self.stack.together == 1 else f"{number}.{inner}".strip(".")
        raise AssertionError(call.path)

    def maps(self) -> Iterator[dict[str, Call | str]]:
        """Which linear calls are queries, keys and values, and which writes what the heads read."""
        at = self.attention.at
        early = [call for call in self.linear if call.end < at and call.given is not None]
        late = [call for call in self.linear if call.start > at]
        # A projection that is called within the attention's own module goes by that module's path.
        for out in late:
            assert out.given is not None
            assert out.gave is not None
            width, heads = out.given.shape[-1], self.stack.heads
            if width % heads or out.gave.shape != self.before.shape:
                continue
            size = width // heads
            for call in reversed(early):
                assert call.gave is not None
                grouped = call.gave.shape[-1] - width
                if grouped > 0 and grouped % (2 * size) == 0:
                    for order in self._orders(call, width):
                        yield {"qkv": call, "out": out, "fused": order}
            sized = [call for call in early if call.gave is not None and call.gave.shape[-1] % size == 0]
            for three in _triples(sized):
                q, k, v = three
                assert q.gave is not None
                assert k.gave is not None
                assert v.gave is not None
                if q.gave.shape[-1] == width and k.gave.shape[-1] == v.gave.shape[-1] <= width:
                    yield {"query": q, "key": k, "value": v, "out": out}

    def _orders(self, call: Call, width: int) -> tuple[str, ...]:
        assert call.gave is not None
        if isinstance(call.module, Projection):
            return ("parts",)
        even = call.gave.shape[-1] == 3 * width
        return ORDERS if even else tuple(order for order in ORDERS if " " not in order)

    def layout(self, maps: dict[str, Call | str]) -> Layout:
        """The layout that has these maps, with the norms, the ends and the MLP around them."""
        named = [call for call in maps.values() if isinstance(call, Call)]
        paths = {name: self.relative(call) if isinstance(call, Call) else call for name, call in maps.items()}
        source, out = next(call for call in named if call is not maps["out"]), maps["out"]
        assert isinstance(out, Call)
        assert source.given is not None

        # What the stream passes on its way into the attention, and what the attention's output on its way out.
        norm = self._norm(source.given, self.before) or ""
        ends, middle = self._end(out, self.before)
        # The stream between the two parts is then known, and with it what the MLP reads and adds.
        mlp = self._mlp([call for call in self.linear if call not in named], out, middle, "post_norm" in ends, norm)
        fields: dict[str, Any] = paths | ends | mlp | self.named_ends
        return Layout(
            blocks=self.stack.path, together=self.stack.together, hybrid=self.stack.hybrid,
            batch_first=self.batch_first, attention_norm=norm, **fields,
        )  # fmt: skip

    def _end(self, out: Call, before: Tensor) -> tuple[dict[str, Any], Tensor]:
        """`attention_end`, with `post_norm` where it is a norm of the stream, and the stream after the attention."""
        assert out.gave is not None
        post = self._post_norm(out, before + out.gave)
        if post is not None:
            assert post.gave is not None
            return {"post_norm": True, "attention_end": self.relative(post)}, post.gave
        passed = self._through(out)
        if passed is None:
            return {}, before + out.gave
        assert passed.gave is not None
        return {"attention_end": self.relative(passed)}, before + passed.gave

    def _mlp(self, others: list[Call], out: Call, middle: Tensor, post: bool, norm: str) -> dict[str, Any]:
        """`neurons`, `mlp_norm`, `mlp_end` and `parallel`, from the linear maps that are not the attention's; `middle`
        is the stream after attention, `norm` what the attention reads through."""
        writes = [call for call in others if call.gave is not None and call.gave.shape[-1] == middle.shape[-1]]
        down = max(writes, key=lambda call: call.end, default=None)
        if down is None:
            # No map of a layer's own writes the stream (experts, a convolution): the module that gives what is added.
            added = self.after - middle
            whole = [call for call in self.calls if call.start > out.end and same(call.gave, added)]
            if not whole or whole[0].given is None:
                return {}
            return {"mlp_end": self.relative(whole[0]), "mlp_norm": self._norm(whole[0].given, middle) or ""}

        # The last map that writes the stream, and what it passes after.
        assert down.gave is not None
        last = self._post_norm(down, middle + down.gave) if post else self._through(down)
        fields: dict[str, Any] = {"neurons": self.relative(down)}
        fields |= {} if last is None else {"mlp_end": self.relative(last)}
        if post:
            return fields
        # The first map that reads it: the stream after attention, or before it, through a norm of its own or the same.
        first = min((call for call in others if call.given is not None), key=lambda call: call.start)
        assert first.given is not None
        after = self._norm(first.given, middle)
        if after is not None:
            return fields | {"mlp_norm": after}
        before = self._norm(first.given, self.before)
        return fields | {"parallel": True, "mlp_norm": "" if before in (None, norm) else before}

    def _norm(self, read: Tensor, stream: Tensor) -> str | None:
        """What the stream passes before it is read: "" for nothing, None where that is not seen."""
        if same(read, stream):
            return ""
        for call in self.calls:
            if is_linear(call.module) or not call.alone or call is self.enter is self.leave:
                continue
            if same(call.gave, read) and same(call.given, stream):
                return self.relative(call)
        for name, function in FUNCTIONS.items():  # called without a module
            if same(function(stream, (stream.shape[-1],)), read):
                return FUNCTIONAL + name
        return None

    def _through(self, linear: Call) -> Call | None:
        """The module that what a map writes passes before it is added: a norm or a scale, no dropout."""
        for call in self.calls:
            read = call.start > linear.end and call.alone and same(call.given, linear.gave)
            if read and call.gave is not None and not same(call.gave, call.given) and not is_linear(call.module):
                return call
        return None

    def _post_norm(self, linear: Call, stream: Tensor) -> Call | None:
        """The norm that the stream itself passes after an addition, where its layer goes on from there."""
        for call in self.calls:
            if call.start > linear.end and call is not self.leave and call.given is not None and call.gave is not None:
                passed = same(call.given, stream) and not same(call.gave, call.given)
                if passed and not is_linear(call.module) and any(True for _ in call.module.parameters()):
                    users = [c for c in self.linear if c.start > call.end and c.given is not None]
                    if same(call.gave, self.after) or self._ends_in_norm(users):
                        return call
        return None

    def _ends_in_norm(self, users: list[Call]) -> bool:
        """Whether what the layer gives is what a norm gave, after the maps that follow."""
        after = max((call.end for call in users), default=0)
        return any(
            call.start > after and call is not self.leave and call.gave is not None and same(call.gave, self.after)
            and call.given is not None and not same(call.given, call.gave) and not is_linear(call.module)
            for call in self.calls
        )  # fmt: skip


def _triples(calls: list[Call]) -> Iterator[tuple[Call, Call, Call]]:
    """Three calls as queries, keys and values: first as their names say, then in the order of calls."""
    if len(calls) < 3:
        return

    def strange(three: tuple[Call, ...]) -> tuple[int, tuple[int, ...]]:
        names = [call.path.rpartition(".")[2].lower() for call in three]
        wrong = sum(letter not in name for letter, name in zip("qkv", names, strict=True))
        return wrong, tuple(call.start for call in three)

    triples = (three for three in permutations(calls, 3) if same(three[0].given, three[1].given))
    yield from sorted(triples, key=strange)
