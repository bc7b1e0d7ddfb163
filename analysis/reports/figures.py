"""The figures of a report: each is drawn by `plots`, kept as SVG, and comes with its caption and its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from devmon.analysis import plots
from devmon.analysis.derive.watch_series import elements
from devmon.analysis.detection.events import Event
from devmon.analysis.detection.results import Detection
from devmon.analysis.plots.events import in_order
from devmon.analysis.plots.heatmaps import short
from devmon.analysis.plots.style import MAX_COLUMNS, thin
from devmon.analysis.reports.content import Figure
from devmon.analysis.reports.drawing import Page, curves, heat, rows_over_steps
from devmon.analysis.reports.tables import numbers_table
from devmon.analysis.series import Series, run_level
from devmon.analysis.table import Row, Table, thinned
from devmon.analysis.transitions.order import Lag, lags, main_event
from devmon.analysis.transitions.stages import Transition, transitions
from devmon.analysis.wording import interval_text, number, step

PANELS = 6  # series in the overview and in one figure of a watch
MAX_LINES = 40  # rows of a forest plot


def overview(page: Page, series: Sequence[Series], events: Sequence[Event]) -> Figure:
    chosen = key_series(series, events)
    sure = [event for event in events if event.sure]
    caption = (
        f"{len(chosen)} series of the run on one axis of steps.{bands(chosen)}"
        if len(chosen) > 1
        else f"The series of the run.{bands(chosen)}"
    )
    if any(event.series == one.name for event in sure for one in chosen):
        caption += (
            " Shaded: the 90% interval of an event with q ≤ 0.05, in its own panel; thin lines mark the events of the "
            "other panels."
        )
    return stack(page, "overview", chosen, sure, caption)


def stack(page: Page, name: str, chosen: Sequence[Series], sure: Sequence[Event], caption: str) -> Figure:
    """Series one above the other, each panel with a switch."""
    drawing, axes = plots.plot_overview(chosen, sure)
    where = [curves(ax, [one]) for ax, one in zip(axes, chosen, strict=True)]
    parts = [(one.name, [f"axes_{i}"]) for i, one in enumerate(chosen, 1)] if len(chosen) > 1 else []
    return page.add(name, drawing, caption, numbers_table(chosen), where, parts)


def key_series(series: Sequence[Series], events: Iterable[Event]) -> list[Series]:
    """The few series that tell the run: loss and LLC, then the first of each watch, those with sure events before."""
    sure = {event.series: event.step for event in reversed(list(events)) if event.sure}
    level = [one for one in series if run_level(one.name) and len(one.steps)] or list(series)
    seen: set[str] = set()
    ranked = []
    for i, one in enumerate(level):
        watch, _, variable = one.name.rpartition("/")
        basic = 0 if variable == "loss" else 1 if variable == "llc" else 2
        ranked.append((basic, watch in seen, one.name not in sure, i, one))
        seen.add(watch)
    chosen = sorted(ranked, key=lambda row: row[:4])[:PANELS]
    return [row[-1] for row in sorted(chosen, key=lambda row: (row[0], sure.get(row[-1].name, np.inf), row[3]))]


def timeline(page: Page, detection: Detection, series: Sequence[Series]) -> Figure | None:
    """The sure events of the run's own series on one axis of steps, over its transitions."""
    events = [event for event in detection.events if event.sure and run_level(event.series)]
    found = transitions(detection.events)
    numbered = " Numbered strips: the transitions." if found else ""
    caption = f"Every event that stands in a series of the whole run (q ≤ 0.05), in the order of its step.{numbered}"
    grids = [one.steps for one in series if run_level(one.name)]
    return _forest(page, "timeline", events, caption, found, np.concatenate(grids) if grids else None)


def forest(page: Page, events: Sequence[Event]) -> Figure | None:
    """All events of the page, where they are more than those of the timeline."""
    if all(event.sure and run_level(event.series) for event in events):
        return None
    return _forest(page, "events", events, "Each event at its estimate, with its 90% interval.")


def _forest(
    page: Page, name: str, events: Sequence[Event], caption: str, found: Sequence[Transition] = (), steps: Any = None
) -> Figure | None:
    if not events:
        return None
    shown = events[:MAX_LINES]
    if len(events) > MAX_LINES:
        caption += f" The first {MAX_LINES} of {len(events)}; all are in the table."
    drawing, ax = plots.plot_events(shown, found, steps=steps)
    words = list(map(Event.in_words, in_order(shown)))
    table = Table(["event"], [Row([each]) for each in words], "", "long")
    return page.add(name, drawing, caption, table, [rows_over_steps(ax, words)])


def positions_figure(page: Page, name: str, data: xr.Dataset) -> Figure:
    drawing, ax = plots.plot_position_loss(data)
    lines = ax.get_lines()
    places = np.asarray(lines[0].get_xdata()).astype(int)
    values = np.array([line.get_ydata() for line in lines], dtype=float).T
    rows = [Row([str(place), *(number(float(v)) for v in row)]) for place, row in zip(places, values, strict=True)]
    table = thinned(["position", *(str(line.get_label()) for line in lines)], rows)
    return page.add(f"{name}-positions", drawing, f"{name}: loss by position at up to six checkpoints.", table)


def lead_lag_figure(page: Page, detection: Detection) -> Figure | None:
    rows, main = lags(detection), main_event(detection.events)
    if main is None or not rows:
        return None
    shown = rows[:MAX_LINES]
    named = [(f"{row.event.series} ({row.event.kind})", row.steps, row.interval, row.settled) for row in shown]
    drawing, _ = plots.plot_lead_lag(named, f"the jump of {main.series}")
    caption = (
        f"Lag of every event with q ≤ 0.05 behind the jump of {main.series} at step {step(main.step)}, in steps, with "
        "90% intervals: the difference of two location posteriors, taken as independent."
    )
    columns = ["event", "lag in steps [90%]", "P(before)", "order"]
    note = "The order is settled where the interval leaves out 0 and both events are resolved in time."
    table = Table(columns, [Row(_lag_cells(row), not row.settled) for row in shown], note)
    return page.add("lead-lag", drawing, caption, table, opened=True)


def _lag_cells(row: Lag) -> list[str]:
    order = ("before" if row.steps < 0 else "after") if row.settled else "not settled"
    name = f"{row.event.series} ({row.event.kind} at {step(row.event.step)})"
    return [name, f"{step(row.steps)} {interval_text(row.interval, step)}", number(row.first), order]


def llc_figure(page: Page, name: str, derived: xr.Dataset, events: Sequence[Event]) -> Figure:
    own = [event for event in events if event.series == f"{name}/llc" and event.sure]
    drawing, ax = plots.plot_llc(derived, own)
    verdicts = np.asarray(derived["verdict"].values).astype(str)
    caption = (
        f"{name}: λ̂ at {len(verdicts)} checkpoints, {int((verdicts == 'ok').sum())} accepted. Band: ±1.64 standard "
        "errors. Hollow: a rejected estimate, by its verdict; drawn at the edge where it is off the scale, never used."
    )
    columns = ["step", "LLC", "standard error", "ESS", "R̂", "verdict"]
    rows = []
    for i, verdict in enumerate(verdicts):
        values = (float(derived[key].values[i]) if key in derived else None for key in ("llc", "se", "ess", "rhat"))
        rows.append(
            Row([str(int(derived["step"].values[i])), *(number(v, 4) for v in values), verdict], verdict != "ok")
        )
    one = Series(f"{name}/llc", np.asarray(derived["step"].values), np.asarray(derived["llc"].values, dtype=float))
    return page.add(f"{name}-llc", drawing, caption, thinned(columns, rows), [curves(ax, [one])])


def calibration_figure(page: Page, stored: Mapping[str, Any]) -> tuple[str, Figure]:
    """The reasons and the figure of what `devmon calibrate` stored."""
    table, settings = stored["trials"], stored["settings"]
    trials = xr.Dataset({name: ("trial", _array(values)) for name, values in table.items()}, attrs=settings)
    drawing, _ = plots.plot_calibration(trials)
    steps = " and ".join(f"{step} ({name})" for name, step in stored["steps"].items())
    caption = (
        f"λ̂ of the trials at step {steps}. Bars: ±1.64 standard errors. Hollow: a rejected trial, at the edge where it is "
        "off the scale. Faint: the first of two trials of the same settings. Dotted: the chosen lr and gamma."
    )
    names = {"model": "checkpoint", "llc": "LLC", "se": "standard error", "ess": "ESS", "rhat": "R̂"}
    columns = [
        name for name in ("model", "lr", "gamma", "llc", "se", "ess", "rhat", "temperature", "verdict") if name in table
    ]
    models = list(stored["steps"])
    rows = []
    for model, *values, verdict in zip(*(table[name] for name in columns), strict=True):
        rows.append(Row([models[int(model)], *(number(value, 4) for value in values), verdict], verdict != "ok"))
    data = Table([names.get(name, name) for name in columns], rows)
    return str(stored["reasons"]), page.add("calibration", drawing, caption, data)


def layers_figure(page: Page, name: str, data: xr.Dataset, variable: str, own: Sequence[Series]) -> Figure:
    drawing, ax = plots.plot_layers(data, variable)
    each = [one for one in own if "[" in one.name]
    parts = [
        (f"layer {layer}", [f"layer-{i}", f"layer-{i}-band", f"layer-{i}-control"])
        for i, layer in enumerate(data["layer"].values if "layer" in data.coords else range(data.sizes["layer"]))
    ]
    caption = f"{name}: {variable} of each layer.{bands(own)}"
    where = [curves(ax, each)] if each else []
    return page.add(f"{name}-{variable}", drawing, caption, numbers_table(own), where, parts if len(parts) > 1 else [])


def heads_figure(page: Page, name: str, data: xr.Dataset, variable: str, own: Sequence[Series]) -> Figure:
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


def essential_figure(page: Page, name: str, found: xr.Dataset) -> Figure:
    drawing, _ = plots.plot_essential(found)
    share = ", ".join(f"{float(x):.0%}" for x in found["explained"].values)
    cosine = ", ".join(f"{float(x):.2f} (p {number(float(p), 2)})"
                       for x, p in zip(found["cosine"].values, found["cosine_p"].values, strict=True))  # fmt: skip
    caption = (
        f"{name}: essential dynamics of the outputs on fixed inputs, by checkpoint. Components explain {share} of the "
        f"variance; R² on the cosine that a random walk of as many checkpoints draws: {cosine}. The spacing of "
        "checkpoints shapes the path; a star would mark a turn that no random walk makes."
    )
    steps, path = found["step"].values, found["pc"].transpose("step", "component").values
    rows = [Row([str(int(s)), *(number(float(v)) for v in row)]) for s, row in zip(steps, path, strict=True)]
    columns = ["step", *(f"component {int(c)}" for c in found["component"].values)]
    return page.add(f"{name}-essential", drawing, caption, thinned(columns, rows))


def _array(values: Sequence[Any]) -> np.ndarray:
    """A column as JSON keeps it: text, or numbers with null for NaN and infinity."""
    return np.array(values) if all(isinstance(value, str) for value in values) else np.array(values, dtype=float)


def bands(series: Sequence[Series]) -> str:
    return " Bands: ±1.64 standard errors." if any(one.se is not None for one in series) else ""
