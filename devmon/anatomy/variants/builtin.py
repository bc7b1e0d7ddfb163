"""`nn.MultiheadAttention` run as modules: its maps of queries, keys and values are parameters, which no hook sees."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Module):
    """The maps of queries, keys and values of one `nn.MultiheadAttention`, side by side, as a module of their own.

    It holds no parameter: `weight` (3 d, d) and `bias` are those of the attention.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.__dict__["attention"] = attention  # not a part of it
        self.in_features = attention.embed_dim

    @property
    def weight(self) -> Tensor:
        return self.__dict__["attention"].in_proj_weight

    @property
    def bias(self) -> Tensor | None:
        return self.__dict__["attention"].in_proj_bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def can_open(module: nn.Module) -> bool:
    """Whether this is an `nn.MultiheadAttention` whose maps read one stream, with nothing added to its keys."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
    )


class Opened:
    """From here to `remove`, attention modules run through their projections and their `out_proj`, module by module.

    What they compute is the same up to rounding. Calls that attend to another sequence run as before. The fused
    inference kernels of torch, which run no module, are off meanwhile.
    """

    def __init__(self, projections: dict[nn.MultiheadAttention, Projection]) -> None:
        self.before = [(attention, vars(attention).get("forward")) for attention in projections]
        self.fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        for attention, projection in projections.items():
            vars(attention)["forward"] = partial(_attend, attention, projection)

    def remove(self) -> None:
        torch.backends.mha.set_fastpath_enabled(self.fast)
        for attention, forward in self.before:
            vars(attention).pop("forward", None)
            if forward is not None:
                vars(attention)["forward"] = forward


def _attend(
    attention: nn.MultiheadAttention,
    projection: Projection,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`nn.MultiheadAttention.forward` of a sequence that attends to itself, written out."""
    if not (query is key and key is value):
        rest: dict[str, Any] = {
            "key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights, "is_causal": is_causal,
        }  # fmt: skip
        return type(attention).forward(attention, query, key, value, **rest)

    # One bias (batch or 1, head or 1, q, k) for both masks.
    alone, heads, first = query.ndim == 2, attention.num_heads, attention.batch_first
    x = query[None] if alone and first else query[:, None] if alone else query
    bias = None
    if attn_mask is not None:
        bias = _added(attn_mask, x.dtype)
        bias = bias[None, None] if bias.ndim == 2 else bias.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, x.dtype)
        padding = (padding[None] if alone else padding)[:, None, None, :]
        bias = padding if bias is None else bias + padding

    # The two maps are calls of modules on the stream as it lies, so that hooks see them; in between stands a call on
    # (batch, head, pos, dim) that `Patterns` sees.
    fused = projection(x)
    fused = fused if first else fused.transpose(0, 1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in fused.chunk(3, -1))
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    out = attention.out_proj(z if first else z.transpose(0, 1))
    out = (out[0] if first else out[:, 0]) if alone else out
    if not need_weights:
        return out, None
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = (scores if bias is None else scores + bias).log_softmax(-1).exp()  # a softmax would be a second pattern
    weights = weights.mean(1) if average_attn_weights else weights
    return out, weights[0] if alone else weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores: True is where nothing is attended to."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
