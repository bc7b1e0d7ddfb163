"""Hooks that read and write the sites of a model in its forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from devmon.anatomy.parts import Parts
from devmon.anatomy.sites import ENDS, SITES, LayerSite, Reads, Write
from devmon.anatomy.variants.builtin import Opened
from devmon.errors import InstrumentError

# The part of a layout in which a site is seen, where it has another name.
SEEN_IN = {"q": "query", "k": "key", "v": "value", "z": "out", "attn_out": "out", "mlp_out": "neurons"}


@dataclass
class Taps:
    """The hooks of one `Anatomy.tapped`: `reads` is what they read, `fired` the sites that were reached."""

    parts: Parts
    wanted: set[LayerSite]
    writes: Mapping[LayerSite, Write]
    grad: bool

    def __post_init__(self) -> None:
        self.reads = Reads()
        self.fired: set[LayerSite] = set()
        # Of the layer that runs now: its number, the (batch, pos) of its stream, and the stream that it was given.
        self.layer = -1
        self.shape: tuple[int, int] = (0, 0)
        self.before: Tensor | None = None

    def attach(self) -> Iterator[Any]:
        """The handles of the hooks, which are attached as they are asked for."""
        parts = self.parts
        for layer in range(parts.layers):
            parts.optional(layer, "qkv")  # built-in attention makes itself known, and is opened below
        if parts.projections:
            yield Opened(parts.projections)
        for layer in range(parts.layers):
            # The first hook of a layer is always there: the others need to know which layer runs.
            enter, leave = parts.ends(layer)
            yield enter.register_forward_pre_hook(self._enter(layer), with_kwargs=True)
            yield leave.register_forward_hook(self._output("resid_post", layer))
            if parts.layout.qkv:
                if self._any(layer, "q", "k", "v"):
                    yield parts.module(layer, "qkv").register_forward_hook(self._fused(layer))
            else:
                for name in "qkv":
                    if self._any(layer, name):
                        hook = self._output(name, layer, heads=True)
                        yield parts.module(layer, SEEN_IN[name]).register_forward_hook(hook)
            if self._any(layer, "z"):
                yield parts.module(layer, "out").register_forward_pre_hook(self._input("z", layer, heads=True))
            if self._any(layer, "attn_out", "resid_mid"):
                yield self._last(layer, "out", "attention_end").register_forward_hook(self._attention(layer))
            if self._any(layer, "neurons"):
                yield parts.module(layer, "neurons").register_forward_pre_hook(self._input("neurons", layer))
            if self._any(layer, "mlp_out"):
                hook = self._output("mlp_out", layer)
                yield self._last(layer, "neurons", "mlp_end").register_forward_hook(hook)
        if self._any(0, "normed"):
            yield parts.unembedding.register_forward_pre_hook(self._input("normed", 0))
        if self._any(0, "unembedded"):
            yield parts.unembedding.register_forward_hook(self._output("unembedded", 0))

    def pattern(self, pattern: Tensor) -> Tensor | None:
        """What `Patterns` does with an attention pattern: the pattern to use instead, or None."""
        # The first of a layer with its number of heads: softmaxes over other things may follow or come before.
        key, given = ("pattern", self.layer), pattern.shape
        square = given[-2:] == (self.shape[1], self.shape[1])
        if key in self.fired or not square or heads_of(pattern, self.shape[0]) != self.parts.heads:
            return None
        new = self._meet(key, pattern.view(-1, self.parts.heads, *given[-2:]) if pattern.ndim == 3 else pattern)
        return None if new is None else new.reshape(given)

    def refuse_missing(self) -> None:
        """Raises InstrumentError where a site was not reached: its hook did not fire, which would go unseen."""
        order = (*SITES, *ENDS)
        missing = sorted((self.wanted | set(self.writes)) - self.fired, key=lambda at: (order.index(at[0]), at[1]))
        if not missing:
            return
        name, layer = missing[0]
        layout = self.parts.layout
        part = "qkv" if name in ("q", "k", "v") and layout.qkv else SEEN_IN.get(name, name)
        path = getattr(layout, part, "") or layout.blocks
        raise InstrumentError(
            f"{self.parts.who}: nothing was seen at {name!r} of layer {layer} of {type(self.parts.model).__name__}: "
            f"the forward pass does not run {path!r} as a module of its own, or not eagerly; declare another "
            "`anatomy = Layout(...)`"
        )

    # -- what a site's value meets -----------------------------------------------------------------------------------

    def _meet(self, key: LayerSite, value: Tensor) -> Tensor | None:
        """Notes that a site was reached and reads it; its new value where it is written or the graph must pass it."""
        if key not in self.wanted and key not in self.writes:
            return None
        self.fired.add(key)
        new = value
        if key in self.writes:
            write = self.writes[key]
            new = write(value) if callable(write) else write.to(value).expand_as(value)
            new = new.clone()  # some models (Falcon) add to it in place
            if new.shape != value.shape:
                raise InstrumentError(
                    f"{self.parts.who}: {key[0]!r} of layer {key[1]} is {tuple(value.shape)}, "
                    f"what is written there is {tuple(new.shape)}: write that shape"
                )
        if key in self.wanted:
            # With gradients the read tensor itself goes on through the model, so that the graph leads through it; a
            # model without trainable weights before it begins its graph here. Else it is a copy: blocks may write in
            # place.
            if self.grad and not new.requires_grad:
                new = new.detach().requires_grad_()
            self.reads[key] = new if self.grad else new.detach().clone()
        return new if key in self.writes or self.grad else None

    def _shaped(self, value: Tensor, heads: bool) -> Tensor:
        """(batch, pos, d) or (batch, pos, head, d_head), also of a model that runs its maps on (batch · pos, d)."""
        value = self._turned(value)
        value = value.view(*self.shape, -1) if value.ndim == 2 and self.shape[0] else value
        return value.unflatten(-1, (-1, self.parts.d_head)) if heads else value

    def _turned(self, value: Tensor) -> Tensor:
        """From (pos, batch, …) to (batch, pos, …) and back, where the layers have their stream so."""
        return value if self.parts.layout.batch_first or value.ndim < 3 else value.transpose(0, 1)

    def _any(self, layer: int, *names: str) -> bool:
        return any((name, layer) in self.wanted or (name, layer) in self.writes for name in names)

    def _last(self, layer: int, linear: str, end: str) -> nn.Module:
        """The module whose output is added to the stream; with `post_norm` the norm comes after the addition."""
        has_linear = bool(getattr(self.parts.layout, linear))
        module = None if self.parts.layout.post_norm and has_linear else self.parts.optional(layer, end)
        return self.parts.module(layer, linear) if module is None else module

    # -- hooks: each returns what torch uses in the place of an input or output, or None -----------------------------

    def _enter(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state = self._turned(args[0] if args else kwargs["hidden_states"])
            self.layer, self.shape, self.before = layer, (state.shape[0], state.shape[1]), state
            new = self._meet(("resid_pre", layer), state)
            if new is None:
                return None
            self.before, new = new, self._turned(new)
            return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

        return hook

    def _input(self, name: str, layer: int, heads: bool = False) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            value = args[0] if name in ENDS else self._shaped(args[0], heads)
            new = self._meet((name, layer), value)
            if new is None:
                return None
            return ((new if name in ENDS else self._turned(new)).reshape(args[0].shape), *args[1:])

        return hook

    def _output(self, name: str, layer: int, heads: bool = False) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            value = _first(output)
            if name in ENDS:
                return _in_place_of(output, self._meet((name, layer), value))
            new = self._meet((name, layer), self._shaped(value, heads))
            return _in_place_of(output, None if new is None else self._turned(new))

        return hook

    def _fused(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Any:
            parts = self.parts.split(layer, self._turned(output))
            new = [self._meet((name, layer), part) for name, part in zip("qkv", parts, strict=True)]
            if all(part is None for part in new):
                return None
            return self._turned(self.parts.join([p if n is None else n for p, n in zip(parts, new, strict=True)]))

        return hook

    def _attention(self, layer: int) -> Callable[..., Any]:
        """`attn_out`, and through it `resid_mid`, which is the stream before plus what attention adds."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            value = self._shaped(_first(output), False)
            new = self._meet(("attn_out", layer), value)
            if self._any(layer, "resid_mid"):
                assert self.before is not None
                added = value if new is None else new
                # No module holds the sum: it is read here, and written by what attention adds instead.
                middle = self._meet(("resid_mid", layer), self.before + added)
                new = new if middle is None else middle - self.before
            return _in_place_of(output, None if new is None else self._turned(new))

        return hook


def heads_of(pattern: Tensor, batch: int) -> int:
    """The heads of a pattern (batch, head, q, k) or (batch · head, q, k)."""
    return pattern.shape[-3] if pattern.ndim > 3 else len(pattern) // max(batch, 1)


def _first(output: Any) -> Tensor:
    """What a module returns, or the first of what it returns."""
    return output[0] if isinstance(output, tuple | list) else output


def _in_place_of(output: Any, new: Tensor | None) -> Any:
    """The same output with another first tensor, in the shape of the old one."""
    if new is None:
        return None
    new = new.reshape(_first(output).shape)
    return type(output)((new, *output[1:])) if isinstance(output, tuple | list) else new
