"""Hooks that read and write the sites of a model in its forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from devmon.anatomy.parts import Parts
from devmon.anatomy.sites import Reads, Write
from devmon.errors import InstrumentError


@dataclass
class Taps:
    """The hooks of one `Anatomy.tapped`."""

    anatomy: Parts
    wanted: set[tuple[str, int]]
    writes: Mapping[tuple[str, int], Write]
    grad: bool

    def __post_init__(self) -> None:
        self.reads = Reads()
        self.fired: set[tuple[str, int]] = set()
        self.layer = -1
        self.shape: tuple[int, int] = (0, 0)
        self.before: Tensor | None = None

    def attach(self) -> Iterator[Any]:
        a, layout = self.anatomy, self.anatomy.layout
        for layer, block in enumerate(a.blocks):
            yield block.register_forward_pre_hook(self._enter(layer), with_kwargs=True)
            yield block.register_forward_hook(self._output("resid_post", layer))
            if layout.qkv:
                if self._any(layer, "q", "k", "v"):
                    yield a._module(layer, "qkv").register_forward_hook(self._fused(layer))
            else:
                for name, path in (("q", "query"), ("k", "key"), ("v", "value")):
                    if self._any(layer, name):
                        yield a._module(layer, path).register_forward_hook(self._output(name, layer, heads=True))
            if self._any(layer, "z"):
                yield a._module(layer, "out").register_forward_pre_hook(self._input("z", layer, heads=True))
            if self._any(layer, "attn_out", "resid_mid"):
                yield self._last(layer, "out", layout.attention_end).register_forward_hook(self._attention(layer))
            if self._any(layer, "neurons"):
                yield a._module(layer, "neurons").register_forward_pre_hook(self._input("neurons", layer))
            if self._any(layer, "mlp_out"):
                hook = self._output("mlp_out", layer)
                yield self._last(layer, "neurons", layout.mlp_end).register_forward_hook(hook)
        if self._any(0, "normed"):
            yield a.unembedding.register_forward_pre_hook(self._input("normed", 0))
        if self._any(0, "unembedded"):
            yield a.unembedding.register_forward_hook(self._output("unembedded", 0))

    def pattern(self, found: Tensor) -> Tensor | None:
        """What `Patterns` does with an attention pattern: the pattern to use instead, or None."""
        key = ("pattern", self.layer)
        if key in self.fired or found.shape[-3] != self.anatomy.heads:
            return None
        return self._meet(key, found)

    def _any(self, layer: int, *names: str) -> bool:
        return any((name, layer) in self.wanted or (name, layer) in self.writes for name in names)

    def _last(self, layer: int, linear: str, end: str) -> nn.Module:
        block = self.anatomy.blocks[layer]
        return (
            block.get_submodule(end)
            if end and not self.anatomy.layout.post_norm
            else self.anatomy._module(layer, linear)
        )

    def _meet(self, key: tuple[str, int], value: Tensor) -> Tensor | None:
        """Notes that a site was reached and reads it; its new value where it is written or the graph must pass it."""
        if key not in self.wanted and key not in self.writes:
            return None
        self.fired.add(key)
        new = value
        if key in self.writes:
            write = self.writes[key]
            new = write(value) if callable(write) else write.to(value).expand_as(value)
            if new.shape != value.shape:
                raise InstrumentError(
                    f"{self.anatomy.who}: {key[0]!r} of layer {key[1]} is {tuple(value.shape)}, "
                    f"what is written there is {tuple(new.shape)}"
                )
        if key in self.wanted:
            if self.grad and not new.requires_grad:
                new = new.detach().requires_grad_()
            self.reads[key] = new if self.grad else new.detach().clone()
        return new if key in self.writes or self.grad else None

    def _shaped(self, value: Tensor, heads: bool) -> Tensor:
        value = value.view(*self.shape, -1) if value.ndim == 2 and self.shape[0] else value
        return value.unflatten(-1, (-1, self.anatomy.d_head)) if heads else value

    def _enter(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state = args[0] if args else kwargs["hidden_states"]
            self.layer, self.shape, self.before = layer, (state.shape[0], state.shape[1]), state
            new = self._meet(("resid_pre", layer), state)
            if new is None:
                return None
            self.before = new
            return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

        return hook

    def _input(self, name: str, layer: int, heads: bool = False) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            new = self._meet((name, layer), self._shaped(args[0], heads))
            return None if new is None else (new.reshape(args[0].shape), *args[1:])

        return hook

    def _output(self, name: str, layer: int, heads: bool = False) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            new = self._meet((name, layer), self._shaped(value, heads))
            if new is None:
                return None
            new = new.reshape(value.shape)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    def _fused(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Any:
            parts = self.anatomy.split(layer, output)
            new = [self._meet((name, layer), part) for name, part in zip("qkv", parts, strict=True)]
            if all(part is None for part in new):
                return None
            return self.anatomy.join([p if n is None else n for p, n in zip(parts, new, strict=True)])

        return hook

    def _attention(self, layer: int) -> Callable[..., Any]:
        """`attn_out`, and through it `resid_mid`, which is the stream before plus what attention adds."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            new = self._meet(("attn_out", layer), self._shaped(value, False))
            if self._any(layer, "resid_mid"):
                assert self.before is not None
                added = self._shaped(value, False) if new is None else new
                middle = self._meet(("resid_mid", layer), self.before + added)
                new = new if middle is None else middle - self.before
            if new is None:
                return None
            new = new.reshape(value.shape)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook
