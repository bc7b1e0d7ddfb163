"""How logits are had of a model that does not return them at every place (`Layout.logits`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.frozen_norm import FunctionalNorm
from devmon.anatomy.layout import FUNCTIONAL, Layout, lacks
from devmon.errors import InstrumentError

MAX_ERROR = (
    1e-2  # of the largest logit: what a model says of its last place, against norm and unembedding of that place
)


def declared(model: nn.Module) -> Layout | None:
    """The first layout that a module of the model declares."""
    found = (getattr(module, "anatomy", None) for module in model.modules())
    return next((layout for layout in found if isinstance(layout, Layout)), None)


def answer(model: nn.Module, inputs: Tensor, layout: Layout | None = None) -> Any:
    """`model(inputs)`, or where a layout has an adapter, its own or the given one, logits (batch, pos, vocab)."""
    layout = declared(model) if layout is None else layout
    if layout is None or not layout.logits or inputs.ndim != 2 or inputs.is_floating_point():
        return model(inputs)
    if not isinstance(layout.logits, str):
        return layout.logits(model, inputs)
    if layout.logits == "flat":
        rows = _tensor(model(inputs))
        if rows.ndim != 2 or len(rows) != inputs.numel():
            raise InstrumentError(
                f'logits="flat" is of a model that returns (batch · pos, vocab); {type(model).__name__} returned '
                f"{tuple(rows.shape)} for {tuple(inputs.shape)} tokens: correct that line of its layout"
            )
        return rows.unflatten(0, inputs.shape)
    if layout.logits == "last":
        return _from_last(model, inputs, layout)
    raise InstrumentError(f"logits={layout.logits!r} is no adapter: 'flat', 'last' or a function of model and tokens")


def _from_last(model: nn.Module, inputs: Tensor, layout: Layout) -> Tensor:
    """The unembedding of what the norm gives at all places."""
    paths = tuple(path for path in (layout.blocks, layout.norm, layout.unembed) if path[:2] != FUNCTIONAL)
    body = next((module for module in model.modules() if not lacks(module, paths)), None)
    if body is None or not layout.unembed:
        raise InstrumentError(f'logits="last" needs `norm` and `unembed` in the layout of {type(model).__name__}')
    _, last = layout.ends(layout.layers(body)[-1])
    functional = layout.norm[:2] == FUNCTIONAL
    source = last if functional or not layout.norm else body.get_submodule(layout.norm)

    # One pass as the model makes it, which tells the states of all places, and what it says of the last.
    seen: list[Tensor] = []
    handle = source.register_forward_hook(lambda module, args, output: seen.append(_tensor(output)))
    try:
        own = _tensor(model(inputs))
    finally:
        handle.remove()
    states = FunctionalNorm(layout.norm[2:])(seen[-1]) if functional else seen[-1]
    logits: Tensor = body.get_submodule(layout.unembed)(states)
    if isinstance(layout.cap, float | int):
        logits = layout.cap * torch.tanh(logits / layout.cap)
    own = own.reshape(len(inputs), -1, own.shape[-1])[:, -1]
    if torch.is_grad_enabled():  # a chain of a sampler, which began with a pass that was checked
        return logits
    off = float((logits[:, -1] - own).abs().max() / own.abs().max().clamp(min=1e-30))
    if off > MAX_ERROR:
        raise InstrumentError(
            f'logits="last": norm and unembedding of {type(model).__name__} are not what it says of the last place '
            f"(off by {off:.0%}): give a function, as in logits=lambda model, tokens: model(tokens, tokens)[0]"
        )
    return logits


def _tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0] if isinstance(output, tuple | list) else output.logits
    return output
