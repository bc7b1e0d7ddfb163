"""What a report says of one watch: its headline variables, and what its kind of measurement gives beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr

from devmon.analysis.derive.circuit import circuit_overlap
from devmon.analysis.derive.essential import essential_dynamics
from devmon.analysis.derive.representation import similarity
from devmon.analysis.derive.watch_series import MAX_ELEMENTS, headline, is_llc
from devmon.analysis.detection.events import Event
from devmon.analysis.plots.style import thin
from devmon.analysis.reports.content import Block, Figure, Heading, Text
from devmon.analysis.reports.drawing import Page
from devmon.analysis.reports.figures import (
    PANELS,
    bands,
    essential_figure,
    heads_figure,
    layers_figure,
    pairs_figure,
    positions_figure,
    square_figure,
    stack,
)
from devmon.analysis.reports.glossary import TOPICS
from devmon.analysis.reports.tables import has_rows
from devmon.analysis.series import Series
from devmon.errors import DataError

MAX_COMPARED = 60  # steps of which all pairs are compared
MAX_LAYERS = 4  # layers whose pairs of steps are drawn


def topic_of(data: xr.Dataset) -> str:
    """The section a watch belongs to, by the class of its instrument."""
    kind = str(data.attrs.get("instrument", "")).rpartition(".")[2]
    return next((key for key, _, kinds in TOPICS if kind in kinds and has_rows(data)), "watches")


def watch_blocks(
    page: Page, name: str, data: xr.Dataset, series: Sequence[Series], events: Sequence[Event]
) -> list[Block]:
    """Heading, one sentence of what was measured, figures; a note where there are none."""
    blocks: list[Block] = [Heading(name)]
    if doc := str(data.attrs.get("doc", "")):
        blocks.append(Text(doc, "soft"))
    if not has_rows(data):
        return [*blocks, Text("No row was stored.", "note")]
    if is_llc(data):
        return [*blocks, Text("Its curve and the health of each estimate are shown above.", "note")]
    drawn = [*_followed(page, name, data, series, events), *_derived(page, name, data)]
    return [*blocks, *(drawn or [Text("It has no scalar or small array to follow; its rows are stored.", "note")])]


def _followed(
    page: Page, name: str, data: xr.Dataset, series: Sequence[Series], events: Sequence[Event]
) -> list[Block]:
    mine = [one for one in series if one.name.startswith(f"{name}/")]
    sure = [event for event in events if event.sure]
    drawn: list[Block] = []
    lines: list[Series] = []
    for variable in headline(data):
        array, prefix = data[variable], f"{name}/{variable}"
        own = [one for one in mine if one.name == prefix or one.name.startswith((f"{prefix} max", f"{prefix}["))]
        others = [str(dim) for dim in array.dims if dim != "step"]
        many = array.size // array.sizes["step"] > 4 * MAX_ELEMENTS
        if not others:
            lines += own
        elif others == ["layer"] and array.sizes["layer"] <= 16:
            drawn.append(layers_figure(page, name, data, variable, own))
        elif not many and array.size:
            drawn.append(heads_figure(page, name, data, variable, own))
        else:
            lines += own[:1]
    shown = _chosen(lines, {event.series for event in sure}, min(2 * PANELS, page.left))
    page.left -= len(shown)
    for start in range(0, len(shown), PANELS):
        part = shown[start : start + PANELS]
        caption = f"{name}: {', '.join(one.name.partition('/')[2] for one in part)}.{bands(part)}"
        drawn.append(stack(page, f"{name}-series", part, sure, caption))
    if more := len(lines) - len(shown):
        drawn.append(
            Text(f"{more} of {len(lines)} series of {name} are not drawn here: choose them under Any series.", "note")
        )
    if "loss_by_position" in data and data["loss_by_position"].ndim == 2:
        drawn.append(positions_figure(page, name, data))
    return drawn


def _chosen(lines: Sequence[Series], eventful: set[str], room: int) -> list[Series]:
    """At most `room` of the series in their order, those with an event before the others."""
    ranked = sorted(range(len(lines)), key=lambda i: (lines[i].name not in eventful, i))[:room]
    return [lines[i] for i in sorted(ranked)]


def _derived(page: Page, name: str, data: xr.Dataset) -> list[Block]:
    """What is made of stored sketches, outputs, edges and pairs of heads; a note where there is too little of them."""
    makers: list[Callable[[], list[Figure]]] = []
    if "sketch" in data and {"step", "item"} <= set(data["sketch"].dims) and data.sizes["step"] > 1:
        makers.append(lambda: _similarity(page, name, data))
    if "outputs" in data and "step" in data["outputs"].dims:
        makers.append(lambda: [essential_figure(page, name, essential_dynamics(_finite(data["outputs"])))])
    if "edge_id" in data and data.sizes["step"] > 1:
        makers.append(lambda: [_overlap(page, name, data)])
    if "composition" in data and set(data["composition"].dims) == {"step", "kind", "layer", "head", "layer_from", "head_from"}:  # fmt: skip
        makers.append(lambda: [pairs_figure(page, name, data)])
    blocks: list[Block] = []
    for make in makers:
        try:
            blocks += make()
        except DataError as error:
            blocks.append(Text(f"Not shown: {error}.", "note"))
    return blocks


def _similarity(page: Page, name: str, data: xr.Dataset) -> list[Figure]:
    kept = np.unique(np.linspace(0, data.sizes["step"] - 1, min(data.sizes["step"], MAX_COMPARED)).round().astype(int))
    found = similarity(data.isel(step=kept))
    told = "" if len(kept) == data.sizes["step"] else f", {len(kept)} of {data.sizes['step']} steps"
    drawn, layers = [], found["layer"].values
    for i in thin(len(layers), MAX_LAYERS):
        layer = layers[i]
        which = f" of layer {layer}" if "layer" in data["sketch"].dims else ""
        caption = (
            f"{name}: similarity of the representation{which} at all pairs of steps (debiased CKA{told}): 1 is the same up "
            "to rotation and scale, 0 nothing in common. A block along the diagonal is a time without change."
        )
        if len(layers) > MAX_LAYERS and i == 0:
            caption += f" {MAX_LAYERS} of {len(layers)} layers are drawn."
        one = found.isel(layer=i, drop=True)
        one["cka"].attrs["long_name"] = f"CKA of the representation{which}"
        drawn.append(square_figure(page, f"{name}-similarity", one, "cka", caption))
    return drawn


def _overlap(page: Page, name: str, data: xr.Dataset) -> Figure:
    found = circuit_overlap(data)
    chance = float(found["chance"])
    caption = f"{name}: Jaccard overlap of the {found.attrs['k']} highest-ranked edges at all pairs of steps"
    caption += f"; two random sets would share {chance:.2g}." if np.isfinite(chance) else "."
    return square_figure(page, f"{name}-overlap", found, "jaccard", caption)


def _finite(outputs: xr.DataArray) -> xr.DataArray:
    """The steps at which every output is finite."""
    good = np.isfinite(outputs.transpose("step", ...).values.reshape(outputs.sizes["step"], -1)).all(1)
    return outputs.isel(step=np.flatnonzero(good))
