"""The figures of a run: each is drawn by `plots`, kept as SVG, and comes with its caption and its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from devmon.analysis import plots
from devmon.analysis.derive.ladder import ladder
from devmon.analysis.derive.verdicts import FINITE_TIME, accepted
from devmon.analysis.detection.events import Event
from devmon.analysis.plots.events import in_order
from devmon.analysis.reports.content import Figure
from devmon.analysis.reports.drawing import Page, curves, rows_over_steps
from devmon.analysis.reports.findings import Findings
from devmon.analysis.reports.prose.answers import main_series
from devmon.analysis.reports.prose.words import Labels, called, naming
from devmon.analysis.reports.tables import numbers_table
from devmon.analysis.series import Series, run_level
from devmon.analysis.table import Row, Table, thinned
from devmon.analysis.transitions.clusters import Transition
from devmon.analysis.wording import interval_text, listed, number, step

PANELS = 6  # series in the overview and in one figure of a watch
MAX_LINES = 40  # rows of a forest plot
MAX_ORDERED = 16  # rows of the order within a transition


def overview(page: Page, findings: Findings) -> Figure:
    """The series that tell the run, one panel each, with their sure events."""
    chosen = key_series(findings.series, findings.events)
    sure = [event for event in findings.events if event.sure]
    what = f"{len(chosen)} series of the run on one axis of steps" if len(chosen) > 1 else "The series of the run"
    caption = f"{what}.{bands(chosen)}"
    if {event.series for event in sure} & {series.name for series in chosen}:
        caption += (
            " Shaded: the 90% interval of an event with q ≤ 0.05, in its own panel; thin lines mark the events of the "
            "other panels."
        )
    return stack(page, "overview", chosen, sure, caption, findings.labels)


def stack(
    page: Page, name: str, chosen: Sequence[Series], sure: Sequence[Event], caption: str, labels: Labels
) -> Figure:
    """Series one above the other, each panel with a switch."""
    titles = {each.name: called(labels, each.name) for each in chosen}
    # watches are measured at the same steps: their figures are drawn on the panels of one
    key = (len(chosen), *dict.fromkeys(np.asarray(each.steps).tobytes() for each in chosen))
    drawing, axes = page.panels[key] = plots.plot_overview(chosen, sure, titles=titles, again=page.panels.get(key))
    where = [curves(ax, [series]) for ax, series in zip(axes, chosen, strict=True)]
    parts = [(titles[series.name], [f"axes_{i}"]) for i, series in enumerate(chosen, 1)] if len(chosen) > 1 else []
    return page.add(name, drawing, caption, numbers_table(chosen), where, parts)


def key_series(series: Sequence[Series], events: Iterable[Event]) -> list[Series]:
    """The few series that tell the run: loss and LLC, then the first of each watch, those with sure events before."""
    sure = {event.series: event.step for event in reversed(list(events)) if event.sure}
    level = [each for each in series if run_level(each.name) and len(each.steps)] or list(series)
    seen: set[str] = set()
    ranked = []
    for i, each in enumerate(level):
        watch, _, variable = each.name.rpartition("/")
        basic = 0 if variable == "loss" else 1 if variable == "llc" else 2
        ranked.append((basic, watch in seen, each.name not in sure, i, each))
        seen.add(watch)
    chosen = sorted(ranked, key=lambda row: row[:4])[:PANELS]
    return [row[-1] for row in sorted(chosen, key=lambda row: (row[0], sure.get(row[-1].name, np.inf), row[3]))]


def timeline(page: Page, findings: Findings) -> Figure | None:
    """The sure events of the run's own series on one axis of steps, over its transitions."""
    events = [event for event in findings.detection.events if event.sure and run_level(event.series)]
    numbered = " Numbered strips: the transitions." if findings.transitions else ""
    if findings.main is not None and len(findings.transitions) > 1:
        numbered += f" The main one is number {findings.transitions.index(findings.main) + 1}."
    caption = f"Every event that stands in a series of the whole run (q ≤ 0.05), in the order of its step.{numbered}"
    grids = [series.steps for series in findings.series if run_level(series.name)]
    steps = np.concatenate(grids) if grids else None
    return _forest(page, "timeline", events, caption, findings.labels, findings.transitions, steps)


def forest(page: Page, events: Sequence[Event], labels: Labels) -> Figure | None:
    """All events of the page, where they are more than those of the timeline."""
    if all(event.sure and run_level(event.series) for event in events):
        return None
    return _forest(page, "events", events, "Each event at its estimate, with its 90% interval.", labels)


def _forest(
    page: Page,
    name: str,
    events: Sequence[Event],
    caption: str,
    labels: Labels,
    changes: Sequence[Transition] = (),
    steps: Any = None,
) -> Figure | None:
    if not events:
        return None
    shown = events[:MAX_LINES]
    if len(events) > MAX_LINES:
        caption += f" The first {MAX_LINES} of {len(events)}; all are in the table."
    titles = {event.series: called(labels, event.series) for event in shown}
    drawing, ax = plots.plot_events(shown, changes, steps=steps, titles=titles)
    words = list(map(Event.in_words, in_order(shown)))
    table = Table(["event"], [Row([each]) for each in words], "", "long")
    return page.add(name, drawing, caption, table, [rows_over_steps(ax, words)])


def stages_figure(page: Page, findings: Findings) -> Figure | None:
    """Loss, λ̂ and the series that names the foremost transition, over the stages of the run; None without a series."""
    chosen, change = main_series(findings), findings.foremost
    if not chosen:
        return None
    rows = [(titled(findings, each), each) for each in chosen]
    parts, stage = [], 0
    for part in findings.stages:
        stage += part.kind == "stage"
        words = "" if part.transition is None else naming(part.transition.events, findings.labels)[1]
        own = part.transition is not None
        name = ((words or "transition") if part.transition is change else "") if own else f"stage {stage}"
        parts.append((name, float(part.start), float(part.end), own))
    at = None if change is None else (change.step, change.interval)
    drawing, axes = plots.plot_stages(rows, parts if change is not None else [], at)
    caption = f"{listed(called(findings.labels, each.name) for each in chosen)} over steps.{bands(chosen)}"
    if change is not None:
        caption += " Grey: transitions, from 10% to 90% of their change; orange: the step, with its 90% interval."
    where = [curves(ax, [series]) for ax, series in zip(axes, chosen, strict=True)]
    return page.add("stages", drawing, caption, numbers_table(chosen), where)


def titled(findings: Findings, series: Series) -> str:
    """What a panel is called: the series and its unit."""
    name = called(findings.labels, series.name)
    return f"{name} [{series.units}]" if series.units else name


def order_figure(page: Page, findings: Findings) -> Figure | None:
    """Which series of the foremost transition changed first; None where it has but one."""
    change = findings.foremost
    if change is None or len(change.events) < 2:
        return None
    shown = sorted(change.events, key=lambda event: event.step)[:MAX_ORDERED]
    rows = [(f"{called(findings.labels, event.series)} ({event.word})", event) for event in shown]
    drawing, ax = plots.plot_order(rows, change.span)
    caption = (
        f"The changes of the transition at step {step(change.step)} by their half-way points, on the scale of its own "
        "width: line from onset (10%) to end (90%), thick the 90% interval of half-way."
    )
    if more := len(change.events) - len(shown):
        caption += f" The first {len(shown)}; {more} more are among the events."
    lags = {id(lag.event): lag for lag in findings.lags}
    cells = []
    for label, event in rows:
        onset, end = ("–", "–") if event.span is None else map(step, event.span)
        lag = lags.get(id(event))
        behind = "the reference" if event is findings.reference else "–"
        if lag is not None:
            behind = f"{step(lag.steps)} {interval_text(lag.interval, step)}"
        weak = lag is not None and not lag.settled
        cells.append(
            Row([label, onset, f"{step(event.step)} {interval_text(event.interval, step)}", end, behind], weak)
        )
    columns = ["", "onset", "half-way [90%]", "end", "steps behind\nthe reference [90%]"]
    note = "Grey: the order against the reference is not settled (the interval holds 0, or an event is not resolved)."
    return page.add("order", drawing, caption, Table(columns, cells, note), [rows_over_steps(ax, [r for r, _ in rows])])


def llc_figure(page: Page, name: str, estimates: xr.Dataset, events: Sequence[Event]) -> Figure:
    """λ̂ of one watch with its errors and verdicts (`estimates` as `llc` gives them)."""
    own = [event for event in events if event.series == f"{name}/llc" and event.sure]
    drawing, ax = plots.plot_llc(estimates, own)
    verdicts = np.asarray(estimates["verdict"].values).astype(str)
    caption = (
        f"{name}: λ̂ at {len(verdicts)} checkpoints, {int(accepted(verdicts).sum())} accepted. Band: ±1.64 standard "
        "errors. Hollow: a rejected estimate, by its verdict; drawn at the edge where it is off the scale, never used."
    )
    if finite := int((verdicts == FINITE_TIME).sum()):
        caption += f" {finite} are finite-time λ̂ of their settings: their changes can be compared, they are no level."
    columns = ["step", "LLC", "standard error", "ESS", "R̂", "verdict"]
    rows = []
    for i, verdict in enumerate(verdicts):
        cells = (float(estimates[key].values[i]) if key in estimates else None for key in ("llc", "se", "ess", "rhat"))
        rows.append(
            Row([str(int(estimates["step"].values[i])), *(number(v, 4) for v in cells), verdict], not accepted(verdict))
        )
    steps, values = np.asarray(estimates["step"].values), np.asarray(estimates["llc"].values, dtype=float)
    where = [curves(ax, [Series(f"{name}/llc", steps, values)])]
    return page.add(f"{name}-llc", drawing, caption, thinned(columns, rows), where)


def ladder_figure(page: Page, name: str, traces: xr.Dataset) -> Figure:
    """λ̂ of one watch at each nbeta of its ladder, at the last step; the table has every step."""
    rungs = ladder(traces)
    last = rungs.isel(step=-1)
    drawing, ax = plots.plot_ladder(last)
    caption = (
        f"{name}: λ̂ by nbeta at step {int(last['step'])}: {last['limit'].item()}. Bars: ±1.64 standard errors, for the "
        "most part common to all nbeta. Band: λ by the slope of the mean loss in 1 / nbeta, which needs no loss at w*."
    )
    words = {"wbic_slope": "λ by slope", "offset": "valley's loss − L(w*)", "trend": "trend an e-fold"}
    columns = ["step", "limit", *(f"{text} (± se)" for text in words.values()), "multiplicity"]
    rows = []
    for i, at in enumerate(rungs["step"].values):
        cells = [f"{number(float(rungs[k][i]), 3)} ± {number(float(rungs[f'{k}_se'][i]), 2)}" for k in words]
        told = rungs["multiplicity"].values[i]
        multiplicity = number(float(told), 1) if np.isfinite(told) else "not told"
        rows.append(Row([str(int(at)), str(rungs["limit"].values[i]), *cells, multiplicity], False))
    where = [curves(ax, [Series(f"{name}/llc by nbeta", last["nbeta"].values, last["llc"].values)])]
    return page.add(f"{name}-ladder", drawing, caption, thinned(columns, rows), where)


def calibration_figure(page: Page, stored: Mapping[str, Any]) -> tuple[str, Figure]:
    """The reasons and the figure of what `devmon calibrate` stored."""
    table, settings = stored["trials"], stored["settings"]
    trials = xr.Dataset({name: ("trial", _array(values)) for name, values in table.items()}, attrs=settings)
    drawing, _ = plots.plot_calibration(trials, stored.get("fits", []))
    steps = " and ".join(f"{step} ({name})" for name, step in stored["steps"].items())
    caption = (
        f"λ̂ of the trials at step {steps}. Bars: ±1.64 standard errors. Hollow: a rejected trial, at the edge where "
        "it is off the scale. Faint: the first of two trials of the same settings. Dotted: the chosen lr and gamma. "
        "Dashed: the fit of λ̂ in gamma."
    )
    names = {"model": "checkpoint", "llc": "LLC", "se": "standard error", "ess": "ESS", "rhat": "R̂"}
    columns = [
        name for name in ("model", "lr", "gamma", "llc", "se", "ess", "rhat", "temperature", "verdict") if name in table
    ]
    models = list(stored["steps"])
    rows = []
    for model, *values, verdict in zip(*(table[name] for name in columns), strict=True):
        rows.append(Row([models[int(model)], *(number(value, 4) for value in values), verdict], not accepted(verdict)))
    data = Table([names.get(name, name) for name in columns], rows)
    return str(stored["reasons"]), page.add("calibration", drawing, caption, data)


def _array(values: Sequence[Any]) -> np.ndarray:
    """A column as JSON keeps it: text, or numbers with null for NaN and infinity."""
    return np.array(values) if all(isinstance(value, str) for value in values) else np.array(values, dtype=float)


def bands(series: Sequence[Series]) -> str:
    """What a caption says of the bands around curves, where there are any."""
    return " Bands: ±1.64 standard errors." if any(each.se is not None for each in series) else ""
