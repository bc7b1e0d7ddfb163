"""`anatomy_of(model)`: the `Layout` line of a model, proposed by what its modules do, and tried before it is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from devmon.anatomy.find import candidates
from devmon.anatomy.fit import try_layout
from devmon.anatomy.forward import original
from devmon.anatomy.layout import Layout
from devmon.anatomy.parts import Parts
from devmon.anatomy.proposing.guess import guesses
from devmon.anatomy.proposing.stack import find_stacks
from devmon.anatomy.proposing.trace import Trace, is_linear, trace
from devmon.anatomy.residual import find_blocks
from devmon.errors import InstrumentError

MOST = 400  # layouts that are tried: a fused map has 36 orders, three maps 6, and a block few linear maps
LIKELY = 40  # of these, where nobody asked: the usual orders come first, and a model is refused within seconds
SAID = {
    "declared": "its own declaration: tried, it gives what the model computes",
    "known": "of a known family, nothing to declare: tried, it gives what the model computes",
    "proposed": "tried: it gives what the model computes",
    "none": "no parts: this says how logits are had, for instruments of behaviour",
}


@dataclass(frozen=True)
class Proposal:
    """What is known of where the parts of a model are; `print` shows it whole.

    - `layout`: the layout that gives what the model computes, None where none of those tried does
    - `source`: "declared" (by the model), "known" (of a family), "proposed", or "none" where no parts were found: the
      layout then says at most how logits are had
    - `blocks`: the path of the layers for instruments of representations, where there are such
    - `refused`: layouts that were tried before it, each with what they do not give
    - `unplaced`: parts of the first layer with weights that the layout does not name, by path
    - `block`: all parts of the first layer, path to (class and shape, its place in the layout or "")
    """

    model: str
    layout: Layout | None
    source: str
    blocks: str
    refused: tuple[tuple[Layout, str], ...]
    unplaced: tuple[str, ...]
    block: Mapping[str, tuple[str, str]]
    adapter_text: str = ""
    note: str = ""

    @property
    def line(self) -> str:
        """The line to write into the model's class."""
        if self.layout is None:
            return ""
        return f"anatomy = {spell(self.layout, self.adapter_text)}"

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.note}" if self.note else self.model]
        if self.layout is not None:
            lines += ["", self.line, "", SAID[self.source]]
        if self.blocks:
            lines += ["", f'for LinearProbe, Sketch and the like: blocks="{self.blocks}"']
        if self.block:
            wide = max(map(len, self.block))
            rows = [f"  {path:{wide}}  {kind:24}  {place}".rstrip() for path, (kind, place) in self.block.items()]
            lines += ["", "the first layer has", *rows]
        if self.unplaced:
            lines += ["", f"not placed: {', '.join(self.unplaced)}"]
        if self.refused:
            lines += ["", f"{len(self.refused)} other layout{'s' * (len(self.refused) > 1)} tried; the first:"]
            lines += [f"  {spell(layout)}\n    {why}" for layout, why in self.refused[:3]]
        return "\n".join(lines)


def anatomy_of(model: nn.Module, inputs: Any = None) -> Proposal:
    """Look at a model and propose its `Layout`, by shapes, order of calls and a rebuild of what it computes.

    `inputs` are tokens (batch, pos), images or other tensors that the model takes; without them some are made up. A
    layout that the model declares, or has of its family, is tried first and kept where it fits. Raises InstrumentError
    where the model runs on nothing, and where it declares a layout that does not fit, with the line that does.
    """
    bare, who = original(model), "anatomy_of"
    traced = trace(bare, inputs)
    stated = _stated(bare, traced, who)
    found, source, refused = (*stated, ()) if stated is not None else _proposed(traced)
    stack = next(iter(find_stacks(traced)), None)
    try:
        blocks = find_blocks(traced.model, traced.inputs[:1], who)
    except InstrumentError:
        blocks = ""
    if found is None:
        why = "no layout of those tried gives what it computes"
        if stack is None:
            why = "no attention was seen"
            if places := sorted(
                {path.rpartition(".layers")[0] or path for a in traced.attentions for path in a.within[-1:]}
            ):
                why = f"no one list of layers holds all attention ({', '.join(places)}), as in an encoder–decoder"
        note = f"{why}; instruments of behaviour, of weights, and with blocks=... of representations need no layout"
        block = _block(traced, f"{stack.path}.{stack.first}", None) if stack is not None else {}
        adapter = Layout(logits=traced.adapter) if traced.adapter else None
        return Proposal(type(bare).__name__, adapter, "none", blocks, refused, (), block, traced.adapter_text, note)
    parts = Parts(traced.model, found, who)
    path = next(path for path, module in traced.model.named_modules() if module is parts.body)
    first = _first(traced, parts, path)
    block = _block(traced, first, found)
    unplaced = tuple(
        path for path, (_, place) in block.items() if not place and _has_weights(traced.model, f"{first}.{path}")
    )
    note = ""
    if traced.tokens and not parts.has_logits and not found.unembed:
        note = "its unembedding is no module (an nn.Linear with the tied weight would be): no logits are taken apart"
    return Proposal(type(bare).__name__, found, source, blocks, refused, unplaced, block, traced.adapter_text, note)


def spell(layout: Layout, adapter_text: str = "") -> str:
    """A layout as it is written, without what is its default.

    >>> spell(Layout(blocks="h", out="attn.out", heads=4))
    'Layout(blocks="h", out="attn.out", heads=4)'
    """
    words = []
    for entry in fields(layout):
        value = getattr(layout, entry.name)
        if value == entry.default:
            continue
        if callable(value):
            text = adapter_text or getattr(value, "__name__", repr(value))
        else:
            text = f'"{value}"' if isinstance(value, str) else repr(value)
        words.append(f"{entry.name}={text}")
    return f"Layout({', '.join(words)})"


def corrected(model: nn.Module, layout: Layout, inputs: Any = None) -> str:
    """What to change in a layout that does not fit, "" where no layout was found that does."""
    try:
        traced = trace(model, inputs)
        found, _, _ = _proposed(traced)
    except InstrumentError:
        return ""
    if found is None:
        return ""
    was, now = (spell(each, traced.adapter_text) for each in (layout, found))
    return "" if was == now else f"one that does: anatomy = {now}"


def fitting(model: nn.Module) -> str:
    """The declaration of a model that declares none, "" where none of the likeliest fits, or where its stream would
    still not be a sum that is unembedded."""
    try:
        traced = trace(model)
        found, _, _ = _proposed(traced, LIKELY)
    except Exception:  # a remedy is looked for, and what goes wrong with the model is told already
        return ""
    if found is None or found.post_norm or found.hybrid or not found.direct or not found.unembed:
        return ""
    return spell(found, traced.adapter_text)


def _stated(model: nn.Module, traced: Trace, who: str) -> tuple[Layout, str] | None:
    """The layout that a model declares or has of its family, where it fits."""
    declares = any(isinstance(getattr(module, "anatomy", None), Layout) for module in model.modules())
    try:
        for layout, body, guessed in candidates(traced.model, None, who):
            if not guessed and try_layout(Parts(traced.model, None, who, (layout, body, guessed)), traced.inputs):
                return layout, "declared" if declares else "known"
    except InstrumentError as error:
        if declares:
            own = next(m.anatomy for m in model.modules() if isinstance(getattr(m, "anatomy", None), Layout))
            better = corrected(traced.model, own, traced.inputs)  # type: ignore[arg-type]
            raise InstrumentError(f"{error}{'; ' + better if better else ''}") from error
    return None


def _proposed(traced: Trace, most: int = MOST) -> tuple[Layout | None, str, tuple[tuple[Layout, str], ...]]:
    """The first of the guesses that fits, and those that did not."""
    refused: list[tuple[Layout, str]] = []
    seen: set[str] = set()
    for layout in (layout for stack in find_stacks(traced) for layout in guesses(traced, stack)):
        if (text := spell(layout, traced.adapter_text)) in seen or len(seen) >= most:
            continue
        seen.add(text)
        try:
            with torch.no_grad():
                fits = try_layout(Parts(traced.model, layout, "anatomy_of"), traced.inputs)
        except Exception as error:
            refused.append((layout, str(error).partition(". Say how")[0].removeprefix("anatomy_of: ")))
        else:
            if fits:
                return layout, "proposed", tuple(refused)
    return None, "none", tuple(refused)


def _first(traced: Trace, parts: Parts, body: str) -> str:
    """The path of the first layer."""
    inner = parts.blocks[0]
    if parts.layout.together > 1:
        return ".".join(part for part in (body, parts.layout.blocks) if part)
    return next(path for path, module in traced.model.named_modules() if module is inner)


def _block(traced: Trace, first: str, layout: Layout | None) -> dict[str, tuple[str, str]]:
    """The leaves of the first layer that ran, in order: path to (class and shape, place in the layout)."""
    places: dict[str, str] = {}
    if layout is not None:
        for entry in fields(layout):
            value = getattr(layout, entry.name)
            if isinstance(value, str) and value in layout.in_block:
                places.setdefault(value, entry.name)
    rows: dict[str, tuple[str, str]] = {}
    down = next((c for c in traced.calls if layout is not None and c.path == f"{first}.{layout.neurons}"), None)
    wide = None if down is None or down.given is None else down.given.shape[-1]
    for call in traced.calls:
        path = call.path.removeprefix(f"{first}.")
        number = path.partition(".")[0]
        outside = layout is not None and layout.together > 1 and not (
            number.isdecimal() and int(number) < layout.together
        )  # fmt: skip
        if call.path.startswith(f"{first}.") and not outside and not any(True for _ in call.module.children()):
            shape = (
                "" if call.given is None or call.gave is None else f" {call.given.shape[-1]} → {call.gave.shape[-1]}"
            )
            into = (
                "into neurons"
                if is_linear(call.module) and call.gave is not None and call.gave.shape[-1] == wide
                else ""
            )
            rows.setdefault(path, (f"{type(call.module).__name__}{shape}", places.get(path, into)))
    return rows


def _has_weights(model: nn.Module, path: str) -> bool:
    try:
        return any(parameter.ndim > 1 for parameter in model.get_submodule(path).parameters())
    except AttributeError:
        return False
