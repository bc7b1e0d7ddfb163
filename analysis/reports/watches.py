"""What a report says of one watch: the variables followed, and what its kind of measurement gives beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr

from devmon.analysis.derive.circuit import circuit_overlap
from devmon.analysis.derive.directions import direction_cosine
from devmon.analysis.derive.essential import essential_dynamics
from devmon.analysis.derive.representation import similarity
from devmon.analysis.derive.susceptibilities import sign_changes, susceptibility_components
from devmon.analysis.derive.watch_series import MAX_ELEMENTS, followed, is_llc
from devmon.analysis.plots.style import thin
from devmon.analysis.reports.content import Block, Figure, Heading, Paragraph
from devmon.analysis.reports.drawing import Page
from devmon.analysis.reports.feature_figures import births_blocks, densities_figure
from devmon.analysis.reports.figures import PANELS, bands, stack
from devmon.analysis.reports.findings import Findings
from devmon.analysis.reports.glossary import TOPICS
from devmon.analysis.reports.prose.words import called
from devmon.analysis.reports.token_figures import token_blocks
from devmon.analysis.reports.watch_figures import (
    components_figure,
    directions_figure,
    essential_figure,
    feature_circuit_figure,
    heads_figure,
    layers_figure,
    pairs_figure,
    positions_figure,
    square_figure,
    steering_figure,
    susceptibilities_figure,
)
from devmon.analysis.run import has_rows
from devmon.analysis.series import Series
from devmon.analysis.wording import number
from devmon.errors import DataError

MAX_COMPARED = 60  # steps of which all pairs are compared: the heat map has a column for each
MAX_LAYERS = 4  # layers whose pairs of steps are drawn, a figure each
MAX_LINES_OF_LAYERS = 16  # layers drawn as lines; more are rows of a heat map
MAX_ROWS_OF_HEADS = 4 * MAX_ELEMENTS  # elements that a heat map has rows for; of more, the maximum is drawn
PAGE_PANELS = 72  # panels of plain series on a page: about 3 MB of SVG; shared evenly among the watches
PAIR_DIMS = {
    "step",
    "kind",
    "layer",
    "head",
    "layer_from",
    "head_from",
}  # dimensions of the composition of pairs of heads


def topic_of(data: xr.Dataset) -> str:
    """The section a watch belongs to, by the class of its instrument."""
    kind = str(data.attrs.get("instrument", "")).rpartition(".")[2]
    return next((key for key, _, kinds in TOPICS if kind in kinds and has_rows(data)), "watches")


def panels_each(findings: Findings) -> int:
    """How many plain series a watch may draw, so that those of all watches fit on a page: at least one, at most two
    figures full."""
    wanted = [len(_plain(findings, name, data)) for name, data in findings.watches.items() if has_rows(data)]
    fits = (most for most in range(2 * PANELS, 1, -1) if sum(min(n, most) for n in wanted) <= PAGE_PANELS)
    return next(fits, 1)


def watch_blocks(page: Page, findings: Findings, name: str, most: int) -> list[Block]:
    """Heading, one sentence of what was measured, figures with at most `most` plain series; a note where there are
    none."""
    data = findings.run[name]
    blocks: list[Block] = [Heading(name)]
    if doc := str(data.attrs.get("doc", "")):
        blocks.append(Paragraph(doc, "soft"))
    if not has_rows(data):
        return [*blocks, Paragraph("No row was stored.", "note")]
    if is_llc(data):
        return [*blocks, Paragraph("Its curve and the health of each estimate are shown above.", "note")]
    drawn: list[Block] = [
        *_arrays(page, findings, name),
        *_curves(page, findings, name, most),
        *_derived(page, name, data, findings.components.get(name)),
    ]
    return [*blocks, *(drawn or [Paragraph("It has no scalar or small array to follow; its rows are stored.", "note")])]


def _form(data: xr.Dataset, variable: str) -> str:
    """How a followed variable is drawn: "lines" of its layers, the "heat" map of its elements, or "plain" series."""
    array = data[variable]
    others = [str(dim) for dim in array.dims if dim != "step"]
    if others == ["layer"] and array.sizes["layer"] <= MAX_LINES_OF_LAYERS:
        return "lines"
    few = array.size // array.sizes["step"] <= MAX_ROWS_OF_HEADS
    return "heat" if others and few and array.size else "plain"


def _own(findings: Findings, name: str, variable: str) -> list[Series]:
    """The series of one variable of a watch: it, or its maximum and its elements."""
    prefix = f"{name}/{variable}"
    starts = (f"{prefix} max", f"{prefix}[")
    return [each for each in findings.by_watch[name] if each.name == prefix or each.name.startswith(starts)]


def _plain(findings: Findings, name: str, data: xr.Dataset) -> list[Series]:
    """The series of a watch that are drawn as curves: its scalars, and the maximum of what is too large to show."""
    if is_llc(data):
        return []
    plain: list[Series] = []
    for variable in followed(data):
        if _form(data, variable) == "plain":
            own = _own(findings, name, variable)
            plain += own if data[variable].ndim == 1 else own[:1]
    return plain


def _arrays(page: Page, findings: Findings, name: str) -> list[Figure]:
    data, drawn = findings.run[name], []
    for variable in followed(data):
        form, own = _form(data, variable), _own(findings, name, variable)
        if form == "lines":
            drawn.append(layers_figure(page, name, data, variable, own))
        elif form == "heat":
            drawn.append(heads_figure(page, name, data, variable, own))
    return drawn


def _curves(page: Page, findings: Findings, name: str, most: int) -> list[Block]:
    """At most `most` plain series, a few a figure, and how many more there are; the loss by position beside them."""
    data, drawn = findings.run[name], list[Block]()
    sure = [event for event in findings.events if event.sure]
    plain = _plain(findings, name, data)
    shown = _chosen(plain, {event.series for event in sure}, most)
    for start in range(0, len(shown), PANELS):
        part = shown[start : start + PANELS]
        caption = f"{name}: {', '.join(called(findings.labels, series.name) for series in part)}.{bands(part)}"
        drawn.append(stack(page, f"{name}-series", part, sure, caption, findings.labels))
    if more := len(plain) - len(shown):
        left_out = f"{more} of {len(plain)} series of {name} are not drawn here: choose them under Any series."
        drawn.append(Paragraph(left_out, "note"))
    if "loss_by_position" in data and data["loss_by_position"].ndim == 2:
        drawn.append(positions_figure(page, name, data))
    return drawn


def _chosen(series: Sequence[Series], eventful: set[str], most: int) -> list[Series]:
    """At most `most` of the series in their order, those with an event before the others."""
    ranked = sorted(range(len(series)), key=lambda i: (series[i].name not in eventful, i))[:most]
    return [series[i] for i in sorted(ranked)]


def _derived(page: Page, name: str, data: xr.Dataset, components: xr.Dataset | None = None) -> list[Block]:
    """What is made of stored sketches, outputs, edges and pairs of heads; a note where there is too little of them."""
    makers: list[Callable[[], Sequence[Block]]] = []
    if components is not None:
        makers.append(lambda: [components_figure(page, name, components)])
    if "sketch" in data and {"step", "item"} <= set(data["sketch"].dims) and data.sizes["step"] > 1:
        makers.append(lambda: _similarity(page, name, data))
    if "outputs" in data and "step" in data["outputs"].dims:
        makers.append(lambda: [essential_figure(page, name, essential_dynamics(_finite(data["outputs"])))])
    if "edge_id" in data and data.sizes["step"] > 1:
        makers.append(lambda: [_overlap(page, name, data)])
    if "composition" in data and set(data["composition"].dims) == PAIR_DIMS:
        makers.append(lambda: [pairs_figure(page, name, data)])
    if {"node_site", "edge"} <= set(data.data_vars):
        makers.append(lambda: [feature_circuit_figure(page, name, data)])
    if {"slope", "slope_random_sd", "kl"} <= set(data.data_vars):
        makers.append(lambda: [steering_figure(page, name, data)])
    if {"direction", "cosine_halves"} <= set(data.data_vars) and data.sizes["step"] > 1:
        makers.append(lambda: [directions_figure(page, name, direction_cosine(data))])
    if "top_susceptibility" in data and data.sizes["step"] > 1:
        makers.append(lambda: _susceptibilities(page, name, data))
    if "nats" in data and set(data["nats"].dims) == {"step", "token"} and data.sizes["step"] > 1:
        makers.append(lambda: token_blocks(page, name, data))
    if "density" in data and {"step", "latent"} <= set(data["density"].dims) and data.sizes["step"] > 1:
        makers.append(lambda: [densities_figure(page, name, data)])
        if "moved" not in data or not data["moved"].isnull().all():
            makers.append(lambda: births_blocks(page, name, data))
    blocks: list[Block] = []
    for make in makers:
        try:
            blocks += make()
        except DataError as error:
            blocks.append(Paragraph(f"Not shown: {error}.", "note"))
    return blocks


def _similarity(page: Page, name: str, data: xr.Dataset) -> list[Figure]:
    """A heat map of all pairs of steps for each layer, of at most MAX_LAYERS of them."""
    kept = np.unique(np.linspace(0, data.sizes["step"] - 1, min(data.sizes["step"], MAX_COMPARED)).round().astype(int))
    compared = similarity(data.isel(step=kept))
    share = "" if len(kept) == data.sizes["step"] else f", {len(kept)} of {data.sizes['step']} steps"
    drawn, layers = [], compared["layer"].values
    for i in thin(len(layers), MAX_LAYERS):
        which = f" of layer {layers[i]}" if "layer" in data["sketch"].dims else ""
        caption = (
            f"{name}: similarity of the representation{which} at all pairs of steps (debiased CKA{share}): 1 is the "
            "same up to rotation and scale, 0 nothing in common. A block along the diagonal is a time without change."
        )
        if len(layers) > MAX_LAYERS and i == 0:
            caption += f" {MAX_LAYERS} of {len(layers)} layers are drawn."
        layer = compared.isel(layer=i, drop=True)
        layer["cka"].attrs["long_name"] = f"CKA of the representation{which}"
        drawn.append(square_figure(page, f"{name}-similarity", layer, "cka", caption))
    return drawn


def _susceptibilities(page: Page, name: str, data: xr.Dataset) -> list[Block]:
    """Which signs changed, or that none surely did, and the tokens in the components of all steps together."""
    changes = sign_changes(data)
    told = [
        f"that of {component} to {probe} turns {'positive' if to > 0 else 'negative'} between steps {after} and "
        f"{before} (p {number(p, 2)})"
        for component, probe, to, after, before, p in zip(
            *(changes[key].values for key in ("component", "probe", "to", "after", "before", "p")), strict=True
        )
    ]
    found = (
        f"Susceptibilities that change sign: {'; '.join(told)}." if told else "No susceptibility surely changes sign."
    )
    count = max(2, min(3, data.sizes["component"] - 1))  # with all of them no basis turns
    return [Paragraph(found), susceptibilities_figure(page, name, data, susceptibility_components(data, count))]


def _overlap(page: Page, name: str, data: xr.Dataset) -> Figure:
    """A heat map of how many of the strongest edges of a circuit two steps share."""
    overlap = circuit_overlap(data)
    chance = float(overlap["chance"])
    caption = f"{name}: Jaccard overlap of the {overlap.attrs['k']} highest-ranked edges at all pairs of steps"
    caption += f"; two random sets would share {chance:.2g}." if np.isfinite(chance) else "."
    return square_figure(page, f"{name}-overlap", overlap, "jaccard", caption)


def _finite(outputs: xr.DataArray) -> xr.DataArray:
    """The steps at which every output is finite."""
    good = np.isfinite(outputs.transpose("step", ...).values.reshape(outputs.sizes["step"], -1)).all(1)
    return outputs.isel(step=np.flatnonzero(good))
