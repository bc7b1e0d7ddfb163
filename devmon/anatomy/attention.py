"""Attention patterns of any torch model, read off, and written into, the calls that compute them."""

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
from devmon.anatomy.running import Call, Running, by_block
from devmon.errors import InstrumentError

SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})
SHOWN = (None, "eager", "sdpa")  # the attention of transformers whose calls are seen here


def attention_patterns(model: nn.Module, tokens: Tensor, who: str = "attention_patterns") -> list[Tensor]:
    """The patterns of `layer_patterns` in the order of the layers."""
    return list(layer_patterns(model, tokens, who).values())


def layer_patterns(model: nn.Module, tokens: Tensor, who: str = "layer_patterns") -> dict[int, Tensor]:
    """Attention patterns (batch, head, q, k) by layer: the index of the block in its list, so that blocks which do not
    attend (convolutions, state spaces) count too.

    Seen are `F.scaled_dot_product_attention` (the pattern is computed again from its arguments), softmax over the
    keys of a (batch, head, pos, pos) tensor or of a causal (batch · head, pos, pos) one, and `nn.MultiheadAttention`.
    A learned sink, a last column without a place, is left out of the pattern, whose rows then sum to less than 1;
    patterns over other lengths, as in cross-attention, are left out whole. Hugging Face models with other kernels run
    with eager attention meanwhile. Nothing the model computes is changed. Half precision is raised to float32, other
    dtypes are kept. Raises InstrumentError where no pattern is seen, or where they are of an encoder and a decoder.
    """
    with shown_patterns(model, tokens) as seen:
        forward(model, tokens, who)
    return seen(who)


@contextmanager
def shown_patterns(
    model: nn.Module, tokens: Tensor, also: Callable[[Tensor], Tensor | None] | None = None
) -> Iterator[Callable[[str], dict[int, Tensor]]]:
    """Sees the patterns of a forward pass of `tokens` (batch, pos) inside; what it yields gives them after the pass, as
    `layer_patterns` does. Of images (batch, …) it is those over as many places as the first has. `also` is shown each
    pattern (batch, head, q, k) too, and may put another in its place."""
    model = original(model)
    batch, length = tokens.shape[0], None if tokens.is_floating_point() else tokens.shape[1]
    patterns: list[Tensor] = []
    during: list[list[Call]] = []
    running = Running(model)

    def keep(pattern: Tensor) -> Tensor | None:
        nonlocal length
        if length is None and pattern.ndim == 4 and len(pattern) == batch and pattern.shape[2] == pattern.shape[3]:
            length = pattern.shape[2]  # of images the places are known here; windows are of another batch
        # Some modules attend with (batch · head) in one dimension.
        if pattern.shape[-2:] == (length, length) and pattern.shape[:-2].numel() % batch == 0:
            square = pattern.detach().reshape(batch, -1, *pattern.shape[-2:])
            half = square.dtype in (torch.float16, torch.bfloat16)
            patterns.append(square.float() if half else square.clone())
            during.append(list(running.now))
        return None if also is None else also(pattern)

    def by_layer(who: str) -> dict[int, Tensor]:
        if not patterns:
            raise InstrumentError(
                f"{who} needs attention patterns; {type(model).__name__} shows none for {length or 'its'} positions: "
                "use F.scaled_dot_product_attention, a softmax over (batch, head, pos, pos) or nn.MultiheadAttention "
                "(flash and flex kernels hide theirs), or leave this instrument out"
            )
        return by_block(patterns, during, who, type(model).__name__, running.abreast)

    with Patterns.of(model, keep), running.watched():
        yield by_layer


def hides_patterns(model: nn.Module) -> bool:
    """Whether the model runs with another kernel where its patterns are to be seen, which may round otherwise."""
    kernels = {getattr(getattr(part, "config", None), "_attn_implementation", None) for part in model.modules()}
    return not kernels <= set(SHOWN)


def stack_heads(layers: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks per-layer arrays (..., head) to (..., layer, head), NaN where a layer has fewer heads than another."""
    # NaN, not zero: a head that does not exist has no score, and means leave it out.
    heads = max(values.shape[-1] for values in layers)
    pads = [[(0, 0)] * (v.ndim - 1) + [(0, heads - v.shape[-1])] for v in layers]
    return np.stack([np.pad(v, p, constant_values=np.nan) for v, p in zip(layers, pads, strict=True)], axis=-2)


class Patterns(TorchFunctionMode):
    """Shows `meet` every attention pattern (batch, head, q, k) while entered, and uses the one that it returns, if any.

    Calls within an intercepted function are not seen twice. Where `meet` returns None the model's own kernel answers.
    """

    def __init__(self, meet: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.meet = meet

    @classmethod
    @contextmanager
    def of(cls, model: nn.Module, meet: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """The mode, with a model that uses no kernel that hides its pattern."""
        with cls(meet), _shown(model), no_fast_path():
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A fused kernel never holds its pattern: it is worked out from the arguments, and the kernel's own answer
        # stays, bit for bit, unless the pattern is written.
        if func is F.scaled_dot_product_attention:
            pattern = _pattern(*args, **kwargs)
            new = self.meet(pattern)
            if new is None:
                return func(*args, **kwargs)
            value = args[2] if len(args) > 2 else kwargs["value"]
            value = value.repeat_interleave(pattern.shape[-3] // value.shape[-3], dim=-3)
            return (new.to(value.dtype) @ value).reshape(*pattern.shape[:-1], value.shape[-1])

        # `nn.MultiheadAttention` gives its pattern when asked, by a second call; inside it nothing can be put in place.
        output = func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            shown = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})[1]
            if self.meet(shown) is not None:
                raise InstrumentError(
                    "the pattern of nn.MultiheadAttention can be read, not written: use "
                    "F.scaled_dot_product_attention in the model"
                )

        # Attention that is written out.
        elif func in SOFTMAX and output.ndim in (3, 4):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim in (-1, output.ndim - 1) and (keys := _keys(output)):
                new = self.meet(output[..., :keys])
                return output if new is None else torch.cat([new, output[..., keys:]], -1)
        return output


def _keys(weights: Tensor) -> int:
    """How many columns of a softmax (…, q, k) are places that are attended to, 0 where it is no attention.

    Four dimensions tell attention from a softmax over the vocabulary. Of three, (batch · head, q, k), it has to be
    causal. A column more than there are queries, which the first place attends to as no later one, is a sink without a
    value (GPT-OSS, `attn = softmax(cat([scores, sinks], -1))[..., :-1]`).
    """
    queries, keys = weights.shape[-2:]
    if keys == queries + 1 and queries > 1 and _is_causal(weights[..., :-1]) and bool((weights[..., 0, -1] > 0).all()):
        return queries
    return keys if weights.ndim == 4 or (keys == queries > 1 and _is_causal(weights)) else 0


def _is_causal(weights: Tensor) -> bool:
    return not bool(weights.triu(1).any())


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
    # In place, as nothing else holds the scores: a pattern is as large as a layer's states, and is made in every layer.
    scores = (query @ key.transpose(-2, -1)).mul_(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill_(later, -math.inf)
    if attn_mask is None:
        return scores.softmax(-1)
    hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.isneginf()
    scores = scores.masked_fill(hidden, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    # A row in which nothing may be attended to is NaN after softmax; kernels give zeros.
    empty = hidden.all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(empty, 0.0) if bool(empty.any()) else scores.softmax(-1)


@contextmanager
def _shown(model: nn.Module) -> Iterator[None]:
    """Eager attention in Hugging Face models inside, where theirs would hide the pattern."""
    changed: list[tuple[Any, Any]] = []
    for part in model.modules():
        before = getattr(getattr(part, "config", None), "_attn_implementation", None)
        if before not in SHOWN and hasattr(part, "set_attn_implementation"):
            changed.append((part.set_attn_implementation, before))
            changed[-1][0]("eager")
    try:
        yield
    finally:
        for change, before in reversed(changed):
            change(before)


@contextmanager
def no_fast_path() -> Iterator[None]:
    """nn.MultiheadAttention without its fused inference kernel, whose pattern nobody sees."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
