"""Which layout fits a model, and the module that it is relative to."""

from __future__ import annotations

from torch import nn

from devmon.anatomy.forward import refuse_two_stacks
from devmon.anatomy.layout import FUNCTIONAL, LAYOUTS, Layout, lacks
from devmon.errors import InstrumentError


def find(model: nn.Module, layout: Layout | None, who: str) -> tuple[Layout, nn.Module, bool]:
    """The first of `candidates`."""
    return candidates(model, layout, who)[0]


def candidates(model: nn.Module, layout: Layout | None, who: str) -> list[tuple[Layout, nn.Module, bool]]:
    """The layouts that may fit, best first: each with the module that holds the blocks' list, and whether only names
    speak for it. Names do not say how the parts are put together, so `Anatomy` tries them.

    Raises InstrumentError where a declared layout names what is not there, or no known layout has all its paths.
    """
    refuse_two_stacks(model, who)

    # 1. A declaration, the caller's or the first that a module makes of itself. Where it does not fit, nothing else is
    # tried: it was meant, so what it lacks is told.
    if layout is None:
        own = next((m for m in model.modules() if isinstance(getattr(m, "anatomy", None), Layout)), None)
        layout = None if own is None else own.anatomy  # type: ignore[assignment]
    if layout is not None and (layout.blocks or layout.out):
        fitting = [(layout, module, False) for module in model.modules() if not _lacks(module, layout)]
        if fitting:
            return fitting
        where = next((m for m in model.modules() if not _lacks_blocks(m, layout)), model)
        raise InstrumentError(
            f"{who}: the layout of {type(model).__name__} names {_lacks(where, layout)!r}, which "
            f"{type(where).__name__} does not have: correct that path"
        )

    # 2. The family of transformers that a module says it belongs to; modules inside may have a config of their own.
    found: list[tuple[Layout, nn.Module, bool]] = []
    for module in model.modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        for known in [LAYOUTS[kind]] if kind in LAYOUTS else []:
            if not _lacks(module, known):
                found.append((known, module, False))

    # 3. Any layout whose paths all exist, that with the most paths first: families have variants, and kin.
    for known in sorted(dict.fromkeys(LAYOUTS.values()), key=lambda each: -len(each.in_block)):
        found += [(known, m, True) for m in model.modules() if not _lacks(m, known)]

    # Of several towers that of the text comes first, as it writes the logits.
    if found:
        return sorted(found, key=lambda each: not each[0].embed)
    raise InstrumentError(
        f"{who} does not know where the parts of {type(model).__name__} are: give its class an attribute "
        'anatomy = Layout(blocks="blocks", query="attention.q", key="attention.k", value="attention.v", '
        'out="attention.out", neurons="mlp.down", heads=4, norm="norm", unembed="unembed") with its own paths '
        "(devmon.anatomy.Layout); `devmon anatomy script.py:model` or anatomy_of(model) writes that line"
    )


def _lacks_blocks(module: nn.Module, layout: Layout) -> str:
    """The path of the list of blocks where the module lacks it, "" else."""
    try:
        blocks = module.get_submodule(layout.blocks)
    except AttributeError:
        return layout.blocks
    return "" if isinstance(blocks, (nn.ModuleList, nn.Sequential)) and len(blocks) else layout.blocks


def _lacks(module: nn.Module, layout: Layout) -> str:
    """The first path of the layout that the module lacks, "" for none."""
    if missing := _lacks_blocks(module, layout):
        return missing
    layers = layout.layers(module)
    if not layers:
        return layout.out
    for layer in layers:
        if missing := lacks(layer, layout.in_block):
            return missing
    ends = (layout.embed, layout.norm, layout.unembed)
    return lacks(module, tuple(path for path in ends if not path.startswith(FUNCTIONAL)))
