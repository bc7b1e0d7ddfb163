"""Which parameters are sampled: whole parameters by component, name or pattern, or any own mask."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from devmon.errors import InstrumentError


@dataclass(frozen=True)
class Mask:
    """Parameters that move: `names`, and within some of them the entries of `entries[name]` (boolean) alone."""

    names: tuple[str, ...]
    entries: Mapping[str, Tensor] = field(default_factory=dict)
    text: str = ""

    def vector(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], like: Tensor) -> Tensor | None:
        """True where a parameter moves, (parameter,), in the layout of `names`, where `like` is; None if all move."""
        if not self.entries:
            return None
        parts = []
        for name, shape in zip(names, shapes, strict=True):
            entries = self.entries.get(name, torch.ones(shape, dtype=torch.bool))
            if tuple(entries.shape) != shape:
                raise InstrumentError(f"the mask of {name!r} has shape {tuple(entries.shape)}, the parameter {shape}")
            parts.append(entries.to(like.device, torch.bool).reshape(-1))
        return torch.cat(parts)

    def __str__(self) -> str:
        return self.text or ", ".join(self.names)


def as_mask(mask: Any, model: nn.Module) -> Mask | None:
    """A mask of `model` from what a user writes; None samples everything.

    - a parameter name or pattern (`"blocks.0.*"`, `"*.bias"`), or several: whole parameters;
    - a mapping of parameter names to boolean tensors of their shapes: entries;
    - a component, for Hugging Face families that devinterp knows: `"layer 1 head 3"`, `"layer 0 mlp"`, `"embed"`,
      `"unembed"`.

    Raises InstrumentError for a mask that selects nothing or names what the model does not have.
    """
    if mask is None or isinstance(mask, Mask):
        return mask
    named = dict(model.named_parameters())
    if isinstance(mask, Mapping):
        return _entries(mask, named, "an own mask")
    patterns = [mask] if isinstance(mask, str) else list(mask)
    chosen: list[str] = []
    for pattern in patterns:
        matching = fnmatch.filter(named, pattern)
        if not matching and len(patterns) == 1 and (component := _component(pattern, model)) is not None:
            return _entries(component, named, pattern)
        if not matching:
            raise InstrumentError(
                f"the mask {pattern!r} selects no parameter: give a name or pattern such as {_examples(named)}"
            )
        chosen += [name for name in matching if name not in chosen]
    return Mask(tuple(chosen), text=", ".join(patterns))


def _entries(mask: Mapping[str, Tensor], named: Mapping[str, Tensor], text: str) -> Mask:
    unknown = [name for name in mask if name not in named]
    if unknown:
        raise InstrumentError(f"the mask names {unknown[0]!r}; the model has {_examples(named)}")
    moving = {name: entries.bool() for name, entries in mask.items() if entries.any()}
    if not moving:
        raise InstrumentError(f"the mask {text!r} selects no entry of any parameter: set some entries to True")
    whole = all(bool(entries.all()) for entries in moving.values())
    return Mask(tuple(moving), {} if whole else moving, text)


def _component(text: str, model: nn.Module) -> Mapping[str, Tensor] | None:
    """devinterp's weight restriction for a component, as boolean tensors; None where it knows no such component."""
    if not (hasattr(model, "config") or hasattr(model, "cfg")):
        return None
    words = re.sub(r"layer (\d+)", r"l\1", text.strip().lower())
    words = re.sub(r" head (\d+)$", r"h\1", words)
    from devinterp.slt.weight_restrictions import create_param_masks

    try:
        masks = create_param_masks(model, words)
    except ValueError as error:
        raise InstrumentError(f"the mask {text!r} names no parameter and no component: {error}") from error
    if not masks and words == "unembed":  # a family whose unembedding transformers has renamed since
        head = getattr(model, "get_output_embeddings", lambda: None)()
        masks = {name: None for name, p in model.named_parameters() if head is not None and p is head.weight}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: torch.ones(shapes[name], dtype=torch.bool) if m is None else m for name, m in masks.items()}


def _examples(named: Mapping[str, Any]) -> str:
    names = list(named)
    return ", ".join(map(repr, names[:3])) + (" …" if len(names) > 3 else "")
