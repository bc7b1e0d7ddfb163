"""What a comparison of runs says: events matched across them, which series came first, what differs in settings."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from devmon.analysis import plots
from devmon.analysis.derive.watch_series import series_of
from devmon.analysis.reports.content import Block, Content, Figure, Paragraph, Prose, Section, curve_numbers
from devmon.analysis.reports.drawing import Page, curves
from devmon.analysis.reports.figures import PANELS, key_series
from devmon.analysis.reports.prose.seeds import labels_together, together
from devmon.analysis.reports.prose.words import Labels
from devmon.analysis.reports.tables import numbers_table, text_of
from devmon.analysis.run import RunData
from devmon.analysis.runs.compare import NOT_ENOUGH, Matched, RunsComparison
from devmon.analysis.series import Series, run_level
from devmon.analysis.table import Row, Table
from devmon.analysis.wording import interval_text, number, step

OF_ITS_OWN = ("run_id", "created", "skipped", "title", "calibration")  # attributes that differ without meaning
MAX_ORDERED = 4  # series whose order is tested, each with each
MAX_SHOWN = 40  # matched events in the figure


def runs_content(runs: Mapping[str, RunData], comparison: RunsComparison) -> Content:
    """The report of `compare_runs(runs)`: one page, in the form that a run's own report has."""
    page = Page(None)
    story: list[Block] = [
        Paragraph(comparison.outcome.upper(), "outcome"),
        Prose([summary(comparison, labels_together(runs))]),
    ]
    sections = [Section("story", "What happened", story)]
    blocks: list[Block] = []
    if comparison.matched:
        drawing, _ = plots.plot_matched(comparison.matched[:MAX_SHOWN])
        caption = "Every event with q ≤ 0.05 of a single run, with those of other runs at the same place; bars: 90%."
        blocks.append(page.add("matched", drawing, caption))
    sections.append(Section("matched", "Events matched across runs", [*blocks, matched_table(comparison)]))
    order = order_table(comparison)
    if order.rows:
        sections.append(Section("order", "What came first", [order]))
    series = {run: [each for each in series_of(data) if run_level(each.name)] for run, data in runs.items()}
    if any(series.values()):
        sections.append(Section("curves", "The same series of every run", [_curves(page, series)]))
    sections.append(Section("differs", "What differs in configuration", [differences(runs)]))
    named = [curve_numbers(each) | {"name": f"{run}: {each.name}"} for run, own in series.items() for each in own]
    events = [event.to_dict() | {"run": run} for run, d in comparison.detections.items() for event in d.events]
    return Content(f"{len(runs)} runs compared", ", ".join(runs), comparison.outcome, sections, named, events)


def summary(comparison: RunsComparison, labels: Labels | None = None) -> str:
    """What happens in the runs, in sentences with the names of `labels`, and how many events in how many runs."""
    n = len(comparison.detections)
    if comparison.outcome == NOT_ENOUGH:
        return f"{n} run: events are matched across two or more."
    if not comparison.matched:
        return f"NO EVENT in any of {n} runs. This is a result: what changed, changed smoothly."
    shared = [match for match in comparison.matched if len(match.events) > 1]
    everywhere = sum(len(match.events) == n for match in shared)
    counts = (
        f"{len(comparison.matched)} different events in {n} runs; {len(shared)} of them in two or more, {everywhere} "
        "in all. Each run was searched alone and no curves were averaged."
    )
    return " ".join([*together(comparison, labels or {}), counts])


def matched_table(comparison: RunsComparison) -> Table:
    """One row a matched event: in how many runs, where, and how likely by chance."""
    columns = ["series", "event", "runs", "median step", "interval", "coverage", "spread\n(decades)", "p", "q", "in"]
    rows = []
    for match in comparison.matched:
        place = [step(match.step), interval_text(match.interval, step)]
        numbers = [number(v, 2) for v in (match.coverage or None, match.spread, match.p_value, match.q_value)]
        cells = [
            match.series,
            match.word,
            f"{len(match.events)} of {match.of}",
            *place,
            *numbers,
            ", ".join(match.events),
        ]
        rows.append(Row(cells, weak=len(match.events) == 1))
    note = (
        "interval: order statistics that hold the median over all such runs with the probability in coverage. p: "
        "circular shifts of the runs' events that bring as many runs together. Grey: found in one run, with its own "
        "90% interval."
    )
    return Table(columns, rows, note if rows else summary(comparison), "long")


def order_table(comparison: RunsComparison) -> Table:
    """Sign tests of the jumps found in most runs, each with each."""
    best: dict[str, Matched] = {}
    for match in comparison.matched:
        if match.kind == "jump" and len(match.events) > 1 and run_level(match.series):
            best.setdefault(match.series, match)
    rows = []
    for a, b in combinations(list(best.values())[:MAX_ORDERED], 2):
        test = comparison.lead_lag(a, b)
        if not test.lags:
            continue
        said = {"a first": f"{a.series} first", "b first": f"{b.series} first"}.get(test.outcome, test.outcome)
        lag = f"{step(test.lag)} {interval_text(test.interval, step)}"
        counts = f"{test.a_first} : {test.b_first}" + (f" ({test.ties} ties)" if test.ties else "")
        rows.append(Row([f"{a.series} before {b.series}", counts, lag, number(test.p_value, 2), said]))
    note = "Two-sided exact sign test over runs. Lag: median of the second event's step minus the first one's."
    return Table(["pair", "before : after", "lag in steps", "p", "outcome"], rows, note, "long")


def differences(runs: Mapping[str, RunData]) -> Table:
    """Attributes and instrument settings that are not the same in all runs; "–" where a run has none."""
    flat = {name: _flat(run) for name, run in runs.items()}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    rows = []
    for key in keys:
        values = [settings.get(key, "–") for settings in flat.values()]
        if len(set(values)) > 1:
            rows.append(Row([key, *values]))
    note = "All recorded settings are the same in all runs." if not rows else ""
    return Table(["setting", *runs], rows, note)


def _flat(run: RunData) -> dict[str, str]:
    """The attributes of a run, and of each watch its instrument and settings, as names with dots and text."""
    flat: dict[str, str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = text_of(value, 80)

    add("", {key: value for key, value in run.attrs.items() if key not in OF_ITS_OWN})
    for name in run.names():
        data = run[name]
        add(name, {"instrument": data.attrs.get("instrument", "–"), **dict(data.attrs.get("fields") or {})})
        add(f"{name}.checkpoints", data.sizes.get("step", 0))
    return flat


def _curves(page: Page, series: Mapping[str, list[Series]]) -> Figure:
    """The key series of the run that has most of them, each with the curve of every run."""
    first = max(series.values(), key=len)
    names = [each.name for each in key_series(first, [])][:PANELS]
    shown = {run: [each for each in own if each.name in names and len(each.steps)] for run, own in series.items()}
    drawing, axes = plots.plot_runs(shown)
    where, drawn = [], []
    for ax in axes:
        name = ax.get_title(loc="left")
        alike = [(run, each) for run, own in shown.items() for each in own if each.name == name]
        lines = [Series(f"{run}: {name}", each.steps, each.values) for run, each in alike]
        where.append(curves(ax, lines))
        drawn += lines
    parts = [(run, [f"run-{i}-{k}" for k in range(len(axes))]) for i, run in enumerate(shown)]
    steps = np.unique(np.concatenate([each.steps for own in shown.values() for each in own]))
    caption = f"One colour a run; {len(steps)} different checkpoints between steps {steps[0]} and {steps[-1]}."
    return page.add("runs", drawing, caption, numbers_table(drawn), where, parts)
