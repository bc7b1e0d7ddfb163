"""The components of a model as masks of its parameters, and random masks of equal size to compare them with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.layout import Layout
from devmon.anatomy.residual import find_blocks
from devmon.errors import InstrumentError
from devmon.sampling.data import Examples, leaves
from devmon.sampling.masks import Mask, as_mask
from devmon.snapshot import derive_seed

KINDS = ("heads", "mlps", "layers")

# The largest share of a set of parameters that a random mask takes: at more than half, the mask and the component would
# mostly be the same parameters, and what is compared with would be the component itself.
LARGEST_SHARE = 0.5


@dataclass(frozen=True)
class Component:
    """A part of a model whose parameters move while all others rest.

    - `name`, and `mask`: its parameters; `size`: how many
    - `layer`: the block that holds them all, or -1
    - `start`: the first block that holds any of them, -1 where a parameter is outside the blocks
    - `null`: the name of the random component that it is compared with, "" for none
    """

    name: str
    mask: Mask
    size: int
    layer: int
    start: int
    null: str = ""


def components_of(
    model: nn.Module,
    components: Sequence[str] | Mapping[str, Any],
    examples: Examples,
    *,
    layout: Layout | None = None,
    null: bool = True,
    seed: int = 0,
    who: str = "components",
) -> tuple[list[Component], list[nn.Module]]:
    """The components asked for, each followed by the random one it is compared with, and the blocks of the model.

    `components` is a choice of "heads", "mlps" and "layers" for a model that `devmon.anatomy.Anatomy` knows, or masks
    by name (`devmon.sampling.masks.as_mask`) for any model; the blocks of a model of unknown form are looked for, and
    none where there are none. Raises InstrumentError for a word that is no component, a mask that selects nothing that
    may move, and a model whose heads cannot be told.
    """
    named = dict(model.named_parameters())
    moving = {n for n, p in named.items() if p.requires_grad and p.numel()} or {
        n for n, p in named.items() if p.numel()
    }
    if isinstance(components, Mapping):
        masks = {str(name): as_mask(mask, model) for name, mask in components.items()}
        blocks = _blocks(model, layout, examples, who)
    else:
        anatomy = _anatomy(model, components, layout, who)
        masks, blocks = _known(anatomy, named, components), anatomy.blocks
    where = {id(p): layer for layer, block in enumerate(blocks) for p in block.parameters()}
    layers = {name: where.get(id(named[name]), -1) for name in named}

    # As in a run of its own, what is frozen rests.
    found: list[Component] = []
    for name, mask in masks.items():
        entries = {n: _entries(mask, n, named[n]) for n in (named if mask is None else mask.names) if n in moving}
        if not entries:
            raise InstrumentError(f"{who}: all parameters of {name!r} are frozen: leave it out, or let them train")
        found.append(_component(name, entries, layers))
    if not found:
        raise InstrumentError(f"{who}: expected at least one component, got none of {tuple(components)}")
    if not null:
        return found, blocks

    # One random mask serves all components of one size that are compared with the same parameters.
    drawn: dict[str, Component] = {}
    with_null = []
    for component in found:
        random = _random(component, named, moving, layers, seed)
        if random is not None:
            drawn.setdefault(random.name, random)
        with_null.append(replace(component, null="" if random is None else random.name))
    return [*with_null, *drawn.values()], blocks


def _component(name: str, entries: Mapping[str, Tensor], layers: Mapping[str, int]) -> Component:
    where = {layers[n] for n in entries}
    whole = all(bool(e.all()) for e in entries.values())
    mask = Mask(tuple(entries), {} if whole else dict(entries), name)
    size = sum(int(e.sum()) for e in entries.values())
    return Component(name, mask, size, where.pop() if len(where) == 1 else -1, min(layers[n] for n in entries))


def _entries(mask: Mask | None, name: str, parameter: Tensor) -> Tensor:
    whole = torch.ones(parameter.shape, dtype=torch.bool)
    entries = whole if mask is None else mask.entries.get(name, whole).cpu()
    if entries.shape != parameter.shape:
        raise InstrumentError(
            f"the mask of {name!r} has shape {tuple(entries.shape)}, the parameter {tuple(parameter.shape)}"
        )
    return entries


# -- what anatomy knows ----------------------------------------------------------------------------------------------


def _anatomy(model: nn.Module, components: Sequence[str], layout: Layout | None, who: str) -> Anatomy:
    unknown = [word for word in components if word not in KINDS]
    if isinstance(components, str) or unknown:
        raise InstrumentError(
            f"{who}: components must be some of {KINDS}, or masks by name, got {components!r}: "
            'write {"my part": "blocks.0.*"} for parameters of your own choice'
        )
    try:
        return Anatomy(model, layout, who)
    except InstrumentError as error:
        raise InstrumentError(f"{error}; or give components as masks by name") from error


def _known(anatomy: Anatomy, named: Mapping[str, Tensor], kinds: Sequence[str]) -> dict[str, Mask | None]:
    """Masks by name, in the order of the layers: heads, MLP, then the whole layer."""
    masks: dict[str, Mask | None] = {}
    names = {id(parameter): name for name, parameter in named.items()}
    for layer in range(anatomy.layers):
        if "heads" in kinds:
            for head in range(anatomy.heads):
                entries = _head(anatomy, layer, head, names)
                masks[f"layer {layer} head {head}"] = Mask(tuple(entries), entries)
        if "mlps" in kinds and (inside := _mlp(anatomy, layer, names)):
            masks[f"layer {layer} mlp"] = Mask(inside)
        if "layers" in kinds:
            masks[f"layer {layer}"] = Mask(tuple(names[id(p)] for p in anatomy.blocks[layer].parameters()))
    return masks


def _head(anatomy: Anatomy, layer: int, head: int, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The head's columns of queries, keys and values, biases included, and its rows of the output map.

    With grouped attention the keys and values are those of its group.
    """
    entries: dict[str, Tensor] = {}

    def marks(module: nn.Module, which: str) -> Tensor | None:
        """Marks of a parameter, (in, out) or (out,), as a view: what is set in it is set in `entries`."""
        parameter = getattr(module, which, None)
        if parameter is None or id(parameter) not in names:
            return None
        mark = entries.setdefault(names[id(parameter)], torch.zeros(parameter.shape, dtype=torch.bool))
        return mark if mark.ndim == 1 or type(module).__name__ == "Conv1D" else mark.T

    group = head * anatomy.kv_heads // anatomy.heads
    for part in ("qkv",) if anatomy.layout.qkv else ("query", "key", "value"):
        for which in ("weight", "bias"):
            if (mark := marks(anatomy.module(layer, part), which)) is None:
                continue
            if part == "qkv":
                for one in anatomy.split(layer, mark):
                    one[..., head if one.shape[-2] == anatomy.heads else group, :] = True
            else:
                mark.unflatten(-1, (-1, anatomy.d_head))[..., head if part == "query" else group, :] = True
    if (mark := marks(anatomy.module(layer, "out"), "weight")) is not None:
        mark.unflatten(0, (anatomy.heads, anatomy.d_head))[head] = True
    return entries


def _mlp(anatomy: Anatomy, layer: int, names: Mapping[int, str]) -> tuple[str, ...]:
    """The parameters of a block that are neither its attention's nor a norm's."""
    layout, block = anatomy.layout, anatomy.blocks[layer]
    if not layout.neurons:
        return ()
    attention = [path for path in (layout.query, layout.key, layout.value, layout.qkv, layout.out) if path]
    common = attention[0].split(".")[:-1]
    for path in attention[1:]:
        common = [a for a, b in zip(common, path.split("."), strict=False) if a == b][: len(common)]
    apart = [*attention, layout.attention_norm, layout.mlp_norm, layout.attention_end, layout.mlp_end]
    apart = [path for path in [*apart, ".".join(common)] if path]
    inside = []
    for path, module in block.named_modules():
        own = list(module.parameters(recurse=False))
        norm = all(parameter.ndim < 2 for parameter in own)
        if not norm and not any(path == a or path.startswith(f"{a}.") for a in apart):
            inside += [names[id(parameter)] for parameter in own]
    return tuple(inside)


def _blocks(model: nn.Module, layout: Layout | None, examples: Examples, who: str) -> list[nn.Module]:
    """The blocks of any model: those that anatomy knows, else those that one example finds, else none."""
    try:
        anatomy = Anatomy(model, layout, who)
        if all(anatomy.ends(layer) == (block, block) for layer, block in enumerate(anatomy.blocks)):
            return anatomy.blocks
    except InstrumentError:
        if layout is not None:
            raise
    try:
        path = find_blocks(model, leaves(examples.tree)[0][:1], who)
    except Exception:  # a model that takes its inputs in another form: its passes are not shared
        return []
    return list(model.get_submodule(path).children())


# -- random masks ----------------------------------------------------------------------------------------------------


def _random(
    component: Component, named: Mapping[str, Tensor], moving: set[str], layers: Mapping[str, int], seed: int
) -> Component | None:
    """As many random parameters: of its own tensors, in each as many as it has there, where it has at most half of
    each; else of its block, of all blocks, or of the whole model, of the first of which it is at most half."""
    mask, text = component.mask, f"{component.size} random of "
    counts = {n: (int(mask.entries[n].sum()) if n in mask.entries else named[n].numel()) for n in mask.names}
    if all(count <= LARGEST_SHARE * named[n].numel() for n, count in counts.items()):
        place = f"layer {component.layer}" if component.layer >= 0 else "the model"
        words = "attention" if component.name.startswith(f"{place} head ") else f"the tensors of {component.name}"
        text += f"{place}, {words}" if words == "attention" else words
        generator = _generator(seed, *counts, *counts.values())
        return _component(text, {n: _choose(named[n], c, generator) for n, c in counts.items()}, layers)
    pools = {
        f"layer {component.layer}": [n for n in named if layers[n] == component.layer and component.layer >= 0],
        "all layers": [n for n in named if layers[n] >= 0],
        "the model": list(named),
    }
    for place, pool in pools.items():
        pool = [n for n in pool if n in moving]
        sizes = [named[n].numel() for n in pool]
        if component.size <= LARGEST_SHARE * sum(sizes):
            chosen = _choose(torch.empty(sum(sizes), device="meta"), component.size, _generator(seed, place, *pool))
            entries = {n: e.view(named[n].shape) for n, e in zip(pool, chosen.split(sizes), strict=True) if e.any()}
            return _component(text + place, entries, layers)
    return None


def _generator(seed: int, *what: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "random component", *what))


def _choose(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    marks = torch.zeros(math.prod(like.shape), dtype=torch.bool)
    marks[torch.randperm(len(marks), generator=generator)[:count]] = True
    return marks.view(like.shape)
