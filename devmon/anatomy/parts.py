"""The modules of one transformer by what they do, and its weights by head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.find import find
from devmon.anatomy.forward import original
from devmon.anatomy.frozen_norm import FrozenNorm, FunctionalNorm
from devmon.anatomy.layout import FUNCTIONAL, Layout
from devmon.anatomy.linear import linear_map, table
from devmon.anatomy.variants.builtin import Projection, can_open
from devmon.anatomy.variants.fused import join, split
from devmon.errors import InstrumentError


class Parts:
    """The modules of `model` that a layout names, how many heads and layers they make, weights, norms.

    - `layout`, and `guessed`: whether nothing but the names of modules speaks for it
    - `body`: the module that the layout is relative to; `blocks`: its layers
    - `layers`, `heads`, `kv_heads` (fewer with grouped attention), `d_model`, `d_head`
    - `parallel`: attention and MLP read the same stream

    `found` is one of `candidates`, the first where it is not given. Weights are matrices that a row vector is
    multiplied with, (in, out): what the modules compute (`linear_map`), which the weights that they hold need not be.
    Raises InstrumentError as `find` does, and where the heads do not share the width of the output map evenly.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout | None = None,
        who: str = "Parts",
        found: tuple[Layout, nn.Module, bool] | None = None,
    ) -> None:
        self.model, self.who = original(model), who
        self._maps: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self.layout, self.body, self.guessed = find(self.model, layout, who) if found is None else found
        self.blocks = self.layout.layers(self.body)
        self.projections: dict[nn.MultiheadAttention, Projection] = {}  # of built-in attention that a layout names
        self.layers = len(self.blocks)
        self.parallel = bool(self._setting(self.layout.parallel, False))

        # Sizes are those of the weights, not of a config, which families spell differently: heads side by side are
        # what `out` reads, and what a fused map or `key` writes more than that belongs to keys and values.
        self.heads = int(self._setting(self.layout.heads))
        width, self.d_model = self._matrix(0, "out").shape
        self.d_head = width // self.heads
        if self.d_head * self.heads != width:
            raise InstrumentError(
                f"{who}: {self.layout.out!r} reads {width} numbers, no multiple of {self.heads} heads: declare `heads`"
            )
        if self.layout.qkv:
            grouped = (self._matrix(0, "qkv").shape[1] - width) // 2
        else:
            grouped = self._matrix(0, "key").shape[1]
        self.kv_heads = grouped // self.d_head
        if not self.kv_heads or self.heads % self.kv_heads or grouped % self.d_head:
            raise InstrumentError(
                f"{who}: keys are {grouped} numbers wide, which is no number of heads of {self.d_head} that "
                f"{self.heads} query heads could share: declare `heads`"
            )

    # -- modules -----------------------------------------------------------------------------------------------------

    def module(self, layer: int | None, part: str) -> nn.Module:
        """The module that the layout names as `part` of a layer, or of the model (None: "embed", "norm", "unembed").

        Raises InstrumentError where the layout names none.
        """
        module = self.optional(layer, part)
        if module is None:
            raise InstrumentError(
                f"{self.who} needs the {part!r} of {type(self.model).__name__}: declare it in its layout"
            )
        return module

    def optional(self, layer: int | None, part: str) -> nn.Module | None:
        """As `module`, or None."""
        path = getattr(self.layout, part)
        if not path:
            return None
        if path.startswith(FUNCTIONAL):
            return FunctionalNorm(path.removeprefix(FUNCTIONAL))
        module = (self.body if layer is None else self.blocks[layer]).get_submodule(path)
        if isinstance(module, nn.MultiheadAttention) and can_open(module):
            return self.projections.setdefault(module, Projection(module))
        return module

    def ends(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The modules that the stream enters a layer by and leaves it by."""
        return self.layout.ends(self.blocks[layer])

    @property
    def unembedding(self) -> nn.Module:
        """The linear map to logits."""
        module = self._output_embeddings
        module = self.optional(None, "unembed") if module is None else module
        if module is None:
            raise InstrumentError(
                f"{self.who} needs an unembedding; {type(self.model).__name__} shows none: declare `unembed`"
            )
        return module

    @property
    def has_logits(self) -> bool:
        """Whether the model has an unembedding."""
        return self._output_embeddings is not None or bool(self.layout.unembed)

    def need_sum(self) -> None:
        """Raises InstrumentError unless the final stream is the sum of what layers add and the unembedding reads it."""
        name, layout = type(self.model).__name__, self.layout
        if layout.post_norm or layout.hybrid or not layout.direct:
            why = "passes a norm after each addition" if layout.post_norm else "is not what its unembedding reads"
            why = "passes blocks of another kind" if layout.hybrid else why
            raise InstrumentError(
                f"{self.who} needs a residual stream that is summed up and unembedded; that of {name} {why}: leave "
                "this instrument out, or probe the stream (LinearProbe)"
            )
        _ = self.unembedding

    # -- weights -----------------------------------------------------------------------------------------------------

    def W_Q(self, layer: int) -> Tensor:
        """(head, d, d_head), as `W_K` and `W_V` are with `kv_heads` heads repeated for each head of their group."""
        return self._input_weight(layer, 0)

    def W_K(self, layer: int) -> Tensor:
        """As `W_Q`."""
        return self._input_weight(layer, 1)

    def W_V(self, layer: int) -> Tensor:
        """As `W_Q`."""
        return self._input_weight(layer, 2)

    def W_O(self, layer: int) -> Tensor:
        """(head, d_head, d)."""
        return self._matrix(layer, "out").unflatten(0, (self.heads, self.d_head))

    def W_out(self, layer: int) -> Tensor:
        """(neuron, d)."""
        return self._matrix(layer, "neurons")

    @property
    def W_E(self) -> Tensor:
        """(vocab, d), what the module of embeddings gives; a scale that the model applies later is not in it."""
        return table(self.module(None, "embed"), self.who, self.layout.embed)

    @property
    def W_U(self) -> Tensor:
        """(d, vocab)."""
        return self._map(self.unembedding, self.layout.unembed or "unembed")[0]

    @property
    def bias_U(self) -> Tensor | None:
        """The bias (vocab,) of the unembedding; None where it has none."""
        return self._map(self.unembedding, self.layout.unembed or "unembed")[1]

    def bias(self, layer: int, part: str) -> Tensor:
        """The bias (d,) of the linear map "out" or "neurons"; zeros where it has none."""
        weight, bias = self._map(self.module(layer, part), getattr(self.layout, part))
        return weight.new_zeros(self.d_model) if bias is None else bias

    def bias_in(self, layer: int, which: int) -> Tensor | None:
        """The bias (head, d_head) of queries (0), keys (1) or values (2), not repeated; None where there is none."""
        part = "qkv" if self.layout.qkv else ("query", "key", "value")[which]
        bias = self._map(self.module(layer, part), getattr(self.layout, part))[1]
        if bias is None:
            return None
        return self.split(layer, bias)[which] if self.layout.qkv else bias.unflatten(0, (-1, self.d_head))

    @property
    def has_mlp(self) -> bool:
        """Whether the layout names what an MLP adds."""
        return bool(self.layout.neurons or self.layout.mlp_end)

    def split(self, layer: int, fused: Tensor) -> list[Tensor]:
        """q, k, v (…, head, d_head) from what the fused map writes (…, all)."""
        return split(fused, self.layout.fused, self.heads, self.kv_heads, self.d_head)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return join(parts, self.layout.fused, self.heads, self.kv_heads, self.d_head)

    # -- norms and ends ----------------------------------------------------------------------------------------------

    @cached_property
    def final_norm(self) -> FrozenNorm:
        """The norm before the unembedding; the identity where there is none."""
        return FrozenNorm(self.optional(None, "norm"), self.d_model, like=self._matrix(0, "out"))

    def end_norm(self, layer: int, part: str) -> FrozenNorm:
        """The norm or scale between what `part` ("attention" or "mlp") writes and the residual stream."""
        module = None if self.layout.post_norm else self.optional(layer, f"{part}_end")
        return FrozenNorm(module, self.d_model, like=self._matrix(0, "out"))

    def norm_in(self, layer: int, part: str) -> Callable[[Tensor], Tensor]:
        """What the stream passes on its way into `part` ("attention" or "mlp"), as a function of tensors (…, d)."""
        module = self.optional(layer, f"{part}_norm")
        if module is None and part == "mlp" and self.parallel:
            # Parallel parts may share one norm (Phi, GPT-J), which their layouts name for attention alone.
            module = self.optional(layer, "attention_norm")
        return (lambda x: x) if module is None else module

    @property
    def resolved(self) -> Layout:
        """The layout with the numbers and flags that its attributes hold in this model in their place."""
        cap = self._setting(self.layout.cap, None) or ""
        return replace(self.layout, heads=self.heads, parallel=self.parallel, cap=cap)

    def capped(self, unembedded: Tensor) -> Tensor:
        """Logits from what the unembedding writes: c tanh(x / c) where the model caps them at ±c."""
        cap = self._setting(self.layout.cap, None)
        return cap * torch.tanh(unembedded / cap) if cap else unembedded

    # -- private -----------------------------------------------------------------------------------------------------

    @cached_property
    def _output_embeddings(self) -> nn.Module | None:
        """The unembedding that a model of transformers shows: that of the outermost model that holds the blocks."""
        for module in self.model.modules():
            if hasattr(module, "get_output_embeddings") and any(inner is self.body for inner in module.modules()):
                return module.get_output_embeddings()  # type: ignore[operator]
        return None

    def _matrix(self, layer: int, part: str) -> Tensor:
        return self._map(self.module(layer, part), getattr(self.layout, part))[0]

    def _map(self, module: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
        """Matrix (in, out) and bias of a module, worked out once: this object lives for one set of weights."""
        if module not in self._maps:
            self._maps[module] = linear_map(module, self.who, path)
        return self._maps[module]

    def _input_weight(self, layer: int, which: int) -> Tensor:
        if self.layout.qkv:
            weight = self.split(layer, self._matrix(layer, "qkv"))[which]
        else:
            weight = self._matrix(layer, ("query", "key", "value")[which]).unflatten(-1, (-1, self.d_head))
        weight = weight.transpose(0, 1)  # (d, head, d_head) before
        return weight if len(weight) == self.heads else weight.repeat_interleave(self.heads // self.kv_heads, 0)

    def _setting(self, value: Any, default: Any = ...) -> Any:
        """A number or flag of the layout, looked up where it is the path of an attribute of a block or of the body."""
        if not isinstance(value, str):
            return value
        for attribute in (self.blocks[0], self.body):
            setting: Any = attribute
            for name in value.split("."):
                setting = getattr(setting, name, ...)
            if setting is not ...:
                return setting
        if default is not ...:
            return default
        raise InstrumentError(
            f"{self.who}: {type(self.body).__name__} has no {value!r}: declare `heads` as a number, or its path"
        )
