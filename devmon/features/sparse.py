"""The few latents of each place that fire, coded and decoded without the many that do not.

A dense step of n places, d numbers and m latents is five products of 2 n d m operations, forward and back. Where k
latents fire, all but the first of them are of n d k.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from devmon.features.dictionary import Dictionary


class Chosen(NamedTuple):
    """Pairs (place, latent) in the order of the places, and where each place's begin, (n,)."""

    places: Tensor
    latents: Tensor
    offsets: Tensor


def k_of_each(scores: Tensor, k: int) -> tuple[Chosen, Tensor]:
    """The k largest of each row of scores (n, m), and the least of these, (n, 1)."""
    n = len(scores)
    top = scores.topk(k, dim=-1, sorted=False)
    offsets = torch.arange(0, n * k, k, device=scores.device)
    places = torch.arange(n, device=scores.device).repeat_interleave(k)
    return Chosen(places, top.indices.flatten(), offsets), top.values.amin(-1, keepdim=True)


def k_of_all(scores: Tensor, k: float) -> tuple[Chosen, Tensor]:
    """The k · n largest of scores (n, m), and the least positive one of these, 0 where there is none."""
    n, m = scores.shape
    top = scores.flatten().topk(min(round(k * n), n * m), sorted=False)
    at = top.indices.sort().values
    places = at // m
    ends = torch.bincount(places, minlength=n).cumsum(0)
    positive = top.values[top.values > 0]
    least = positive.min() if len(positive) else scores.new_zeros(())
    return Chosen(places, at % m, ends - ends.diff(prepend=ends.new_zeros(1))), least


def activations_at(coder: Dictionary, x: Tensor, h: Tensor, chosen: Chosen) -> Tensor:
    """max(h, 0) at the pairs, (pair,), with gradients to the encoder; `h` (n, m) is without a graph."""
    values: Tensor = _At.apply(x, coder.b_dec if coder.centred else None, coder.W_enc, coder.b_enc, h, chosen)
    return values.relu()


def decoded(coder: Dictionary, values: Tensor, chosen: Chosen, x: Tensor) -> Tensor:
    """ŷ (n, d_out) of the activations at the pairs."""
    bags = F.embedding_bag(chosen.latents, coder.W_dec, chosen.offsets, mode="sum", per_sample_weights=values)
    y = bags + coder.b_dec
    return y if coder.W_skip is None else y + x @ coder.W_skip


class _At(torch.autograd.Function):
    """h at the pairs. Back: ∂W_enc[:, j] = Σ g (x − b_dec) over the pairs of latent j, and the same of the biases."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b_dec: Tensor | None, W_enc: Tensor, b_enc: Tensor, h: Tensor, chosen: Chosen
    ) -> Tensor:
        ctx.save_for_backward(x, b_dec, W_enc)
        ctx.chosen = chosen
        return h[chosen.places, chosen.latents]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, b_dec, W_enc = ctx.saved_tensors
        (gradient,), m = gradients, W_enc.shape[1]
        places, latents, _ = ctx.chosen
        order = latents.argsort(stable=True)
        ends = torch.bincount(latents, minlength=m).cumsum(0)
        starts = ends - ends.diff(prepend=ends.new_zeros(1))
        to_bias = gradient.new_zeros(m).index_add(0, latents, gradient)
        weighted = F.embedding_bag(places[order], x, starts, mode="sum", per_sample_weights=gradient[order])  # (m, d)
        to_decoder = None
        if b_dec is not None:
            weighted = weighted - to_bias[:, None] * b_dec
            to_decoder = -(W_enc @ to_bias)
        return None, to_decoder, weighted.T, to_bias, None, None
