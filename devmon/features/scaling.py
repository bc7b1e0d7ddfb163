"""Units of a dictionary: the same function with other scales of its inputs, outputs and latents."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from devmon.features.dictionary import Coder, CrossLayer, Gate, Jump


def mean_norm_scale(x: Tensor, parts: int) -> Tensor:
    """c (part,) for which the mean of ‖c x‖ over places is √d, for x (n, part · d) of parts side by side.

    Penalties and thresholds then mean the same at every width and layer (Anthropic, April 2024; SAELens).
    """
    by_part = x.unflatten(1, (parts, -1))
    mean = by_part.norm(dim=-1).mean(0)
    return torch.where(mean > 0, by_part.shape[-1] ** 0.5 / mean.clamp(min=torch.finfo(x.dtype).tiny), 1.0)


def spread(scale: Tensor, width: int) -> Tensor:
    """(part,) as (width,), each part's number at all its coordinates."""
    return scale.repeat_interleave(width // len(scale))


def rescaled(coder: Coder, inputs: Tensor, outputs: Tensor) -> Coder:
    """The dictionary of x for one of `inputs` · x, with targets `outputs` · y; both (part,)."""
    if isinstance(coder, CrossLayer):
        ends = torch.tensor([end for _, end in coder.pairs()], device=outputs.device)
        return replace(
            coder,
            W_enc=coder.W_enc * inputs[:, None, None],
            W_dec=coder.W_dec / outputs[ends][:, None, None],
            b_dec=coder.b_dec / outputs[:, None],
        )
    each_input, each_output = spread(inputs, coder.inputs), spread(outputs, coder.outputs)
    skip = None if coder.W_skip is None else coder.W_skip * each_input[:, None] / each_output
    return replace(
        coder,
        W_enc=coder.W_enc * each_input[:, None],
        W_dec=coder.W_dec / each_output,
        b_dec=coder.b_dec / each_output,
        W_skip=skip,
    )


def with_latents(coder: Coder, by: Tensor) -> Coder:
    """The same function with activations `by` · f, (m,) > 0: rows of the decoder are divided by them.

    The k largest of `Largest` stay the same only where all of `by` are equal.
    """
    activation = coder.activation
    if isinstance(activation, Jump):
        activation = Jump(activation.threshold * by)
    elif isinstance(activation, Gate):
        activation = Gate(activation.gain, activation.shift * by)
    if isinstance(coder, CrossLayer):
        shaped = by.view(coder.b_enc.shape)
        starts = torch.tensor([start for start, _ in coder.pairs()], device=by.device)
        return replace(
            coder,
            W_enc=coder.W_enc * shaped[:, None],
            b_enc=coder.b_enc * shaped,
            W_dec=coder.W_dec / shaped[starts][..., None],
            activation=activation,
        )
    return replace(
        coder,
        W_enc=coder.W_enc * by,
        b_enc=coder.b_enc * by,
        W_dec=coder.W_dec / by[:, None],
        activation=activation,
    )


def unit_rows(coder: Coder) -> Coder:
    """The same function with `norms()` of 1, so that f is what a latent adds, in units of the target."""
    norms = coder.norms()
    return with_latents(coder, torch.where(norms > 0, norms, 1.0))
