"""Attention patterns of any torch model, read off the calls that compute them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from devmon.anatomy.forward import forward, original
from devmon.errors import InstrumentError

SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})


def attention_patterns(model: nn.Module, tokens: Tensor, who: str = "attention_patterns") -> list[Tensor]:
    """Attention patterns, one tensor (batch, head, q, k) per attention call in call order, which is layer order.

    Seen are `F.scaled_dot_product_attention` (the pattern is computed again from its arguments), softmax over the
    keys of a (batch, head, pos, pos) tensor, and `nn.MultiheadAttention`; patterns over other lengths, as in
    cross-attention, are left out. Hugging Face models run with eager attention meanwhile. Nothing the model computes
    is changed. Half precision is raised to float32, other dtypes are kept. Raises InstrumentError where no pattern
    is seen.
    """
    model = original(model)
    with _Capture(tokens.shape[0], tokens.shape[1]) as capture, _eager(model), _no_fast_path():
        forward(model, tokens, who)
    if not capture.patterns:
        raise InstrumentError(
            f"{who} needs attention patterns; {type(model).__name__} shows none for {tokens.shape[1]} positions: use "
            "F.scaled_dot_product_attention, a softmax over (batch, head, pos, pos) or nn.MultiheadAttention "
            "(flash and flex kernels hide theirs), or leave this instrument out"
        )
    return capture.patterns


def stack_heads(layers: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks per-layer arrays (..., head) to (..., layer, head), NaN where a layer has fewer heads than another."""
    heads = max(values.shape[-1] for values in layers)
    pads = [[(0, 0)] * (v.ndim - 1) + [(0, heads - v.shape[-1])] for v in layers]
    return np.stack([np.pad(v, p, constant_values=np.nan) for v, p in zip(layers, pads, strict=True)], axis=-2)


class _Capture(TorchFunctionMode):
    """Collects patterns while it is entered; inner calls of an intercepted function are not seen twice."""

    def __init__(self, batch: int, length: int) -> None:
        super().__init__()
        self.batch, self.length = batch, length
        self.patterns: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._keep(_pattern(*args, **kwargs))
        elif func is F.multi_head_attention_forward:
            self._keep(func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})[1])
        elif func in SOFTMAX and output.ndim == 4:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim in (-1, 3) and output.shape[0] == self.batch:
                self._keep(output)
        return output

    def _keep(self, pattern: Tensor) -> None:
        if pattern.shape[-2:] != (self.length, self.length) or pattern.shape[:-2].numel() % self.batch:
            return
        pattern = pattern.detach().reshape(self.batch, -1, self.length, self.length)
        self.patterns.append(pattern.float() if pattern.dtype in (torch.float16, torch.bfloat16) else pattern.clone())


def _pattern(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights (..., q, k) that scaled_dot_product_attention applies to the values, without dropout."""
    if query.dtype in (torch.float16, torch.bfloat16):
        query, key = query.float(), key.float()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Eager attention in a Hugging Face model while inside: its other kernels may hide the pattern."""
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    change = getattr(model, "set_attn_implementation", None)
    if change is None or before in (None, "eager"):
        yield
        return
    change("eager")
    try:
        yield
    finally:
        change(before)


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """nn.MultiheadAttention without its fused inference kernel, whose pattern nobody sees."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
