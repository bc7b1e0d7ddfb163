"""The figures of one watch: its layers, heads, positions, pairs of steps, pairs of heads, and the path of outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from devmon.analysis import plots
from devmon.analysis.derive.components import groups_of
from devmon.analysis.derive.learning.layers import layer_centre
from devmon.analysis.derive.watch_series import elements
from devmon.analysis.plots.heatmaps import short
from devmon.analysis.plots.style import MAX_COLUMNS, thin
from devmon.analysis.reports.content import Figure
from devmon.analysis.reports.drawing import Page, curves, heat
from devmon.analysis.reports.figures import bands
from devmon.analysis.reports.tables import numbers_table
from devmon.analysis.series import Series
from devmon.analysis.table import Row, Table, thinned
from devmon.analysis.wording import number, step

TOP_SHOWN = 4  # tokens of each component of the model in a table


def layers_figure(page: Page, name: str, data: xr.Dataset, variable: str, own: Sequence[Series]) -> Figure:
    """A line a layer, each with a switch."""
    drawing, ax = plots.plot_layers(data, variable)
    each = [series for series in own if "[" in series.name]
    parts = [
        (f"layer {layer}", [f"layer-{i}", f"layer-{i}-band", f"layer-{i}-control"])
        for i, layer in enumerate(data["layer"].values if "layer" in data.coords else range(data.sizes["layer"]))
    ]
    centre = layer_centre(data, variable)
    known = np.flatnonzero(np.isfinite(centre["centre"].values))
    caption = f"{name}: {variable} of each layer.{bands(own)}"
    if len(known):
        ends = dict.fromkeys((int(known[0]), int(known[-1])))
        told = (f"{_plus(centre, i)} at step {step(float(centre['step'][i]))}" for i in ends)
        caption += f" Centre of gravity: layer {', '.join(told)}; {number(float(centre['even']))} if even."
    where = [curves(ax, each)] if each else []
    return page.add(f"{name}-{variable}", drawing, caption, numbers_table(own), where, parts if len(parts) > 1 else [])


def _plus(centre: xr.Dataset, i: int) -> str:
    """A centre with its standard error, where that is known."""
    value, se = (float(centre[name][i]) for name in ("centre", "centre_se"))
    return f"{number(value, 2)} ± {number(se, 2)}" if np.isfinite(se) else number(value, 2)


def heads_figure(page: Page, name: str, data: xr.Dataset, variable: str, own: Sequence[Series]) -> Figure:
    """A heat map with a row for each element of an array."""
    array = data[variable].transpose("step", ...)
    drawing, ax = plots.plot_heads(data, variable)
    others = ", ".join(str(dim) for dim in array.dims if dim != "step")
    caption = f"{name}: {variable} at each checkpoint, one row for each {others}."
    rows = [short(label) for label, _ in elements(array.isel(step=slice(0, 1)))]
    where = [heat(ax, array["step"].values[thin(array.sizes["step"], MAX_COLUMNS)].tolist(), rows)]
    return page.add(f"{name}-{variable}", drawing, caption, numbers_table(own), where)


def square_figure(page: Page, name: str, data: xr.Dataset, variable: str, caption: str) -> Figure:
    """A heat map of all pairs of steps; the numbers behind it are each step against the last and the one before."""
    drawing, ax = plots.plot_similarity(data, variable)
    array = data[variable].transpose("step", "other_step")
    steps = array["step"].values
    columns = ["step", "with the last step", "with the step before"]
    rows = [
        Row([str(int(s)), number(float(array.values[i, -1])), number(float(array.values[i, i - 1]) if i else None)])
        for i, s in enumerate(steps)
    ]
    shown = steps[thin(len(steps), MAX_COLUMNS)]
    where = [heat(ax, shown.tolist(), [f"with step {int(s)}" for s in shown], square=True)]
    return page.add(name, drawing, caption, thinned(columns, rows), where)


def pairs_figure(page: Page, name: str, data: xr.Dataset) -> Figure:
    """A heat map of the composition of the pairs of heads that rise highest; their first and last value behind it."""
    drawing, ax = plots.plot_pairs(data)
    steps = data["step"].values[thin(data.sizes["step"], MAX_COLUMNS)]
    rows = [label.get_text() for label in ax.get_yticklabels()]
    caption = (
        f"{name}: how much more a head reads what an earlier one wrote (Q, K or V) than random weights would, for the "
        "pairs that rise highest. Chosen by their height, so their maxima lean upward."
    )
    where = heat(ax, steps.tolist(), rows)
    ends = np.ma.filled(np.ma.asarray(ax.images[0].get_array(), dtype=float), np.nan)[:, [0, -1]].tolist()
    table = [Row([label, *map(number, both)]) for label, both in zip(rows, ends, strict=True)]
    return page.add(f"{name}-pairs", drawing, caption, Table(["pair", "first", "last"], table), [where])


def feature_circuit_figure(page: Page, name: str, data: xr.Dataset) -> Figure:
    """The feature circuit of the last step; its nodes and scores behind it."""
    last = data.isel(step=-1)
    drawing, _ = plots.plot_feature_circuit(last)
    faithful = last["faithfulness"].sel(errors="ranked")
    shares = ", ".join(f"{int(k)} nodes {number(float(f), 2)}" for k, f in zip(last["count"], faithful, strict=True))
    caption = (
        f"{name}: the features that the answer needs at the last step, and what each adds by way of another; a square "
        f"is what a dictionary leaves over at a place. Faithfulness: {shares} (random nodes: "
        f"{number(float(last['faithfulness_random'].max()), 2)} at most)."
    )
    keys = ("node_site", "node_latent", "node_pos", "score")
    rows = []
    for site, latent, pos, score in zip(*(last[key].values for key in keys), strict=True):
        if site >= 0:
            node = str(int(latent)) if latent >= 0 else f"error @{int(pos)}"
            rows.append(Row([str(last["site"].values[int(site)]), node, number(float(score))]))
    return page.add(f"{name}-circuit", drawing, caption, thinned(["site", "node", "score"], rows))


def steering_figure(page: Page, name: str, data: xr.Dataset) -> Figure:
    """Slopes and side effect of the direction that steers most; all directions at the last step behind it."""
    drawing, _ = plots.plot_steering(data)
    last = data.isel(step=-1, strength=0)
    caption = (
        f"{name}: what a step along the direction adds to the answer, and how far it moves the predictions of other "
        "text, by strength in standard deviations of the states along it. A slope within the grey band is no more than "
        "a random direction's."
    )
    keys = ("slope", "slope_se", "slope_p", "kl", "quantile")
    columns = ["direction", "slope", "± SE", "p", "divergence", "quantile"]
    rows = [
        Row([str(each), *(number(float(last[key].values[i]), 3) for key in keys)])
        for i, each in enumerate(last["direction"].values.tolist())
    ]
    return page.add(f"{name}-steering", drawing, caption, thinned(columns, rows))


def directions_figure(page: Page, name: str, cosines: xr.Dataset) -> Figure:
    """Cosines of a concept's mean-difference direction to that of the last step, by layer."""
    mean = cosines.sel(estimator="mean", drop=True)
    drawing, ax = plots.plot_heads(mean, "cosine")
    most = float(mean["cosine_halves"].isel(step=-1).mean())
    caption = (
        f"{name}: cosine of the direction of each step to that of the last, by layer. Two halves of the pairs agree to "
        f"{number(most, 2)} at the last step, random directions to {number(float(mean['cosine_random'].mean()), 2)}."
    )
    steps = mean["step"].values
    rows = [Row([str(int(s)), *map(number, row)]) for s, row in zip(steps, mean["cosine"].values.tolist(), strict=True)]
    columns = ["step", *(f"layer {int(layer)}" for layer in mean["layer"].values)]
    labels = [f"layer={layer}" for layer in mean["layer"].values]
    where = [heat(ax, steps[thin(len(steps), MAX_COLUMNS)].tolist(), labels)]
    return page.add(f"{name}-directions", drawing, caption, thinned(columns, rows), where)


def essential_figure(page: Page, name: str, dynamics: xr.Dataset) -> Figure:
    """The path of the outputs in their first components (`essential_dynamics`)."""
    drawing, _ = plots.plot_essential(dynamics)
    share = ", ".join(f"{float(x):.0%}" for x in dynamics["explained"].values)
    cosines = zip(dynamics["cosine"].values, dynamics["cosine_p"].values, strict=True)
    cosine = ", ".join(f"{float(x):.2f} (p {number(float(p), 2)})" for x, p in cosines)
    caption = (
        f"{name}: essential dynamics of the outputs on fixed inputs, by checkpoint. Components explain {share} of the "
        f"variance; R² on the cosine that a random walk of as many checkpoints draws: {cosine}. The spacing of "
        "checkpoints shapes the path; a star would mark a turn that no random walk makes."
    )
    steps, path = dynamics["step"].values, dynamics["pc"].transpose("step", "component").values
    rows = [Row([str(int(s)), *(number(float(v)) for v in row)]) for s, row in zip(steps, path, strict=True)]
    columns = ["step", *(f"component {int(c)}" for c in dynamics["component"].values)]
    return page.add(f"{name}-essential", drawing, caption, thinned(columns, rows))


def components_figure(page: Page, name: str, derived: xr.Dataset) -> Figure:
    """A heat map of λ̂ by component, in the order of the layers; the last values beside random masks behind it."""
    drawing, ax = plots.plot_components(derived)
    groups = "; ".join(f"{i}: {', '.join(members)}" for i, members in groups_of(derived).items() if i >= 0)
    flat = ", ".join(groups_of(derived).get(-1, []))
    caption = (
        f"{name}: λ̂ of each component at each checkpoint, all other parameters at rest, beside random masks of equal "
        "size; colours are logarithmic, rejected estimates grey."
    )
    caption += f" Groups whose curves go together (r ≥ 0.9 between all members): {groups}." if groups else ""
    caption += f" No change beyond errors, or too few accepted: {flat}." if flat else ""
    last = derived.isel(step=-1)
    columns = ["component", "group", "parameters", "λ̂ at the last step", "above random", "verdict"]
    rows = [
        Row([
            str(last["component"].values[i]),
            str(int(last["group"].values[i])) if "group" in last and last["group"].values[i] >= 0 else "–",
            str(int(last["parameters"].values[i])),
            f"{number(float(last['llc'].values[i]))} ± {number(float(last['se'].values[i]), 2)}",
            f"{number(float(last['above_null'].values[i]))} ± {number(float(last['above_null_se'].values[i]), 2)}"
            if last["null"].values[i] >= 0
            else "–",
            str(last["verdict"].values[i]),
        ])
        for i in range(last.sizes["component"])
    ]  # fmt: skip
    shown = derived["step"].values[thin(derived.sizes["step"], MAX_COLUMNS)]
    where = [heat(ax, shown.tolist(), [label.get_text() for label in ax.get_yticklabels()])]
    return page.add(f"{name}-components", drawing, caption, Table(columns, rows), where)


def susceptibilities_figure(page: Page, name: str, data: xr.Dataset, components: xr.Dataset) -> Figure:
    """Tokens in the common components of susceptibilities; behind it the top tokens of each component of the model."""
    drawing, _ = plots.plot_susceptibilities(components)
    last = components.isel(step=-1)
    angles = ", ".join(
        f"{float(x):.0f}° (noise makes {float(y):.0f}°)" for x, y in zip(last["angle"], last["angle_null"], strict=True)
    )
    caption = (
        f"{name}: each token is a point in the space of components of the model, by how λ̂ of each answers to more of "
        f"it in the data; the axes are the principal components of all steps together. {float(last['noise']):.0%} of "
        f"the variance at the last step is noise of the chains; its own components are turned from these by {angles}. "
        "In the table: the tokens of largest |χ| at the last step, which lean outward because they were chosen so."
    )
    step = data.sel(step=int(last["step"]))
    rows = [
        Row([
            str(component),
            str(one["top_label"].values[i]).replace("\n", "⏎"),
            number(float(one["top_susceptibility"].values[i]), 2),
            number(float(one["top_susceptibility_se"].values[i]), 2),
        ])
        for component in step["component"].values
        for one in [step.sel(component=component)]
        for i in range(min(TOP_SHOWN, one.sizes["rank"]))
    ]  # fmt: skip
    table = Table(["component", "context ▸ token", "χ", "standard error"], rows)
    return page.add(f"{name}-susceptibilities", drawing, caption, table, opened=True)


def positions_figure(page: Page, name: str, data: xr.Dataset) -> Figure:
    """The loss at each position of a sequence, a line a checkpoint."""
    drawing, ax = plots.plot_position_loss(data)
    lines = ax.get_lines()
    positions = np.asarray(lines[0].get_xdata()).astype(int)
    values = np.array([line.get_ydata() for line in lines], dtype=float).T
    rows = [Row([str(pos), *(number(float(v)) for v in row)]) for pos, row in zip(positions, values, strict=True)]
    table = thinned(["position", *(str(line.get_label()) for line in lines)], rows)
    return page.add(f"{name}-positions", drawing, f"{name}: loss by position at up to six checkpoints.", table)
