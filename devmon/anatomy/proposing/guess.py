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
        for rest in layer.rest(maps):
            yield replace(rest, **ends)


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
            if width % heads or out.gave.shape[-1] != self.before.shape[-1]:
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

    def rest(self, maps: dict[str, Call | str]) -> Iterator[Layout]:
        """The norms, the MLP and the ends around given maps."""
        fields: dict[str, Any] = {
            name: self.relative(call) if isinstance(call, Call) else call for name, call in maps.items()
        }
        named = [call for call in maps.values() if isinstance(call, Call)]
        source, out = next(c for c in named if c is not maps["out"]), maps["out"]
        assert isinstance(out, Call)
        assert source.given is not None
        assert out.gave is not None
        fields["attention_norm"] = self._norm(source.given, self.before)

        # The MLP: the last linear map in the layer that writes the stream, and the first that reads it.
        others = [call for call in self.linear if call not in named]
        writes = [c for c in others if c.gave is not None and c.gave.shape[-1] == self.before.shape[-1]]
        down = max(writes, key=lambda call: call.end, default=None)
        attended = self._through(out)
        written = out.gave if attended is None else attended.gave
        assert written is not None
        middle = self.before + written
        post = self._post_norm(out, self.before + out.gave)
        if post is not None:
            fields |= {"post_norm": True, "attention_end": self.relative(post)}
            assert post.gave is not None
            middle = post.gave
        elif attended is not None:
            fields["attention_end"] = self.relative(attended)
        if down is not None:
            assert down.gave is not None
            fields["neurons"] = self.relative(down)
            first = min((c for c in others if c.given is not None), key=lambda call: call.start)
            assert first.given is not None
            last = self._post_norm(down, middle + down.gave) if post is not None else self._through(down)
            if last is not None:
                fields["mlp_end"] = self.relative(last)
            if post is None:
                apart = self._norm(first.given, middle)
                fields["mlp_norm"] = apart or ""
                if apart is None:  # it reads the stream before attention, through a norm of its own or the same
                    fields["parallel"] = True
                    apart = self._norm(first.given, self.before)
                    fields["mlp_norm"] = "" if apart in (None, fields["attention_norm"]) else apart
        else:
            added = self.after - middle
            whole = [c for c in self.calls if c.gave is not None and same(c.gave, added) and c.start > out.end]
            if whole:
                fields["mlp_end"] = self.relative(whole[0])
                assert whole[0].given is not None
                fields["mlp_norm"] = self._norm(whole[0].given, middle) or ""
        fields["attention_norm"] = fields["attention_norm"] or ""
        fields |= self.named_ends
        yield Layout(
            blocks=self.stack.path, together=self.stack.together, hybrid=self.stack.hybrid,
            batch_first=self.batch_first, **fields,
        )  # fmt: skip

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
