"""The modules of one model, and its weights by head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.find import find
from devmon.anatomy.forward import original
from devmon.anatomy.frozen_norm import FrozenNorm
from devmon.anatomy.layout import Layout
from devmon.errors import InstrumentError


class Parts:
    """The modules of one model, and its weights by head."""

    def __init__(self, model: nn.Module, layout: Layout | None = None, who: str = "Anatomy") -> None:
        self.model, self.who = original(model), who
        self.layout, self.body, self.guessed = find(self.model, layout, who)
        self.blocks = list(self.body.get_submodule(self.layout.blocks).children())
        first, out = self.blocks[0], self._linear(0, "out")
        self.heads = int(self._setting(self.layout.heads, first))
        width, self.d_model = out.shape
        self.d_head = width // self.heads
        if self.d_head * self.heads != width:
            raise InstrumentError(
                f"{who}: {self.layout.out!r} reads {width} numbers, no multiple of {self.heads} heads: declare `heads`"
            )
        grouped = (sum(self._sizes(0)) - width) // 2 if self.layout.qkv else self._linear(0, "key").shape[1]
        self.kv_heads = grouped // self.d_head
        self.layers = len(self.blocks)
        self.parallel = bool(self._setting(self.layout.parallel, first))

    # -- weights, all as matrices that a row vector is multiplied with --

    def W_Q(self, layer: int) -> Tensor:
        """(head, d, d_head), as `W_K` and `W_V` are with `kv_heads` heads repeated for each head of their group."""
        return self._in(layer, 0)

    def W_K(self, layer: int) -> Tensor:
        return self._in(layer, 1)

    def W_V(self, layer: int) -> Tensor:
        return self._in(layer, 2)

    def W_O(self, layer: int) -> Tensor:
        """(head, d_head, d)."""
        return self._linear(layer, "out").unflatten(0, (self.heads, self.d_head))

    def W_out(self, layer: int) -> Tensor:
        """(neuron, d)."""
        return self._linear(layer, "neurons")

    @property
    def W_E(self) -> Tensor:
        """(vocab, d), unscaled where a family scales its embeddings."""
        return self._named("embed").weight

    @property
    def W_U(self) -> Tensor:
        """(d, vocab)."""
        return _matrix(self.unembedding)

    @property
    def unembedding(self) -> nn.Module:
        """The linear map to logits."""
        found = getattr(self._holder, "get_output_embeddings", lambda: None)()
        if found is None and self.layout.unembed:
            found = self._named("unembed")
        if found is None:
            raise InstrumentError(
                f"{self.who} needs an unembedding; {type(self.model).__name__} shows none: declare `unembed`"
            )
        return found

    @cached_property
    def final_norm(self) -> FrozenNorm:
        """The norm before the unembedding; the identity where there is none."""
        return FrozenNorm(self._named("norm") if self.layout.norm else None, self.d_model, like=self._like)

    def end_norm(self, layer: int, part: str) -> FrozenNorm:
        """The norm or scale between what `part` ("attention" or "mlp") writes and the residual stream."""
        path = self.layout.attention_end if part == "attention" else self.layout.mlp_end
        module = self.blocks[layer].get_submodule(path) if path and not self.layout.post_norm else None
        return FrozenNorm(module, self.d_model, like=self._like)

    def norm_in(self, layer: int, part: str) -> Callable[[Tensor], Tensor]:
        """What the stream passes on its way into `part` ("attention" or "mlp"), as a function of tensors (…, d)."""
        path = self.layout.attention_norm if part == "attention" else self.layout.mlp_norm
        if part == "mlp" and self.parallel and not path:
            path = self.layout.attention_norm
        return self.blocks[layer].get_submodule(path) if path else lambda x: x

    def capped(self, unembedded: Tensor) -> Tensor:
        """Logits from what the unembedding writes."""
        cap = self._setting(self.layout.cap, self.blocks[0], None)
        return cap * torch.tanh(unembedded / cap) if cap else unembedded

    def need_sum(self) -> None:
        """Raises InstrumentError unless the final stream is a sum of what the layers add and the unembedding reads it."""
        name, layout = type(self.model).__name__, self.layout
        if layout.post_norm or not layout.direct:
            why = "passes a norm after each addition" if layout.post_norm else "is not what its unembedding reads"
            raise InstrumentError(
                f"{self.who} needs a residual stream that is summed up and unembedded; that of {name} {why}: leave this "
                "instrument out, or probe the stream (LinearProbe)"
            )
        _ = self.unembedding

    def bias(self, layer: int, part: str) -> Tensor:
        """The bias (d,) of the linear map "out" or "neurons"; zeros where it has none."""
        module = self._module(layer, part)
        found = getattr(module, "bias", None)
        return self._linear(layer, part).new_zeros(self.d_model) if found is None else found

    # -- inside --

    @property
    def _like(self) -> Tensor:
        return self._linear(0, "out")

    @cached_property
    def _has_logits(self) -> bool:
        found = getattr(self._holder, "get_output_embeddings", lambda: None)()
        return found is not None or bool(self.layout.unembed)

    @cached_property
    def _holder(self) -> nn.Module:
        """The outermost transformers model that holds the blocks, or the module that holds their list."""
        around = [m for m in self.model.modules() if hasattr(m, "get_output_embeddings")]
        return next((m for m in around if any(inner is self.body for inner in m.modules())), self.body)

    def _end(self, layer: int, path: str, stream: Tensor, added: Tensor) -> Tensor:
        end = self.blocks[layer].get_submodule(path) if path else None
        if end is None:
            return stream + added
        return end(stream + added) if self.layout.post_norm else stream + end(added)

    def _named(self, name: str) -> Any:
        path = getattr(self.layout, name)
        if not path:
            raise InstrumentError(
                f"{self.who} needs the {name!r} of {type(self.model).__name__}: declare it in its layout"
            )
        return self.body.get_submodule(path)

    def _module(self, layer: int, name: str) -> nn.Module:
        path = getattr(self.layout, name)
        if not path:
            raise InstrumentError(f"{self.who}: {type(self.model).__name__} has no {name!r}: declare it in its layout")
        return self.blocks[layer].get_submodule(path)

    def _linear(self, layer: int, name: str) -> Tensor:
        return _matrix(self._module(layer, name))

    def _sizes(self, layer: int) -> list[int]:
        """The widths of q, k, v in a fused map."""
        total, width = self._linear(layer, "qkv").shape[1], self._linear(layer, "out").shape[0]
        rest = (total - width) // 2
        return [width, rest, rest]

    def split(self, layer: int, fused: Tensor) -> list[Tensor]:
        """q, k, v (…, head, d_head) from what the fused map writes (…, all)."""
        if self.layout.fused == "heads":
            return list(fused.unflatten(-1, (self.heads, 3, self.d_head)).unbind(-2))
        return [part.unflatten(-1, (-1, self.d_head)) for part in fused.split(self._sizes(layer), -1)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        if self.layout.fused == "heads":
            return torch.stack(list(parts), -2).flatten(-3)
        return torch.cat([part.flatten(-2) for part in parts], -1)

    def _in(self, layer: int, which: int) -> Tensor:
        if self.layout.qkv:
            weight = self.split(layer, self._linear(layer, "qkv"))[which]
        else:
            weight = self._linear(layer, ("query", "key", "value")[which]).unflatten(-1, (-1, self.d_head))
        weight = weight.transpose(0, 1)
        return weight if len(weight) == self.heads else weight.repeat_interleave(self.heads // self.kv_heads, 0)

    def _setting(self, value: Any, block: nn.Module, default: Any = ...) -> Any:
        if not isinstance(value, str):
            return value
        for root in (block, self.body):
            found: Any = root
            for name in value.split("."):
                found = getattr(found, name, ...)
            if found is not ...:
                return found
        if default is not ...:
            return default
        raise InstrumentError(
            f"{self.who}: {type(self.body).__name__} has no {value!r}: declare `heads` as a number, or its path"
        )


def _matrix(module: nn.Module) -> Tensor:
    """The weight of a linear map as (in, out)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight if type(module).__name__ == "Conv1D" else weight.T
