"""The tables of a report: stages, events, the numbers behind a figure, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from devmon.analysis.detection.results import Detection
from devmon.analysis.reports.prose.run_words import skipped
from devmon.analysis.reports.prose.words import Labels, called
from devmon.analysis.run import ReadOnce, has_rows
from devmon.analysis.series import Series, run_level
from devmon.analysis.table import Row, Table, thinned
from devmon.analysis.transitions.clusters import Transition
from devmon.analysis.transitions.stages import Stage
from devmon.analysis.wording import interval_text, number, step


def transitions_table(changes: Sequence[Transition], kinds: Sequence[str], labels: Labels) -> Table:
    """The run at a glance: a row a transition, the main one first, with its type A or B in a word (`kinds`)."""
    rows = []
    numbered = list(enumerate(zip(changes, kinds, strict=True), 1))
    for i, (change, kind) in sorted(numbered, key=lambda row: not row[1][0].main):
        order = sorted(change.events, key=lambda event: (event.p_value, event.q_value or 0, event.step))
        moved = [
            f"{called(labels, event.series)} {'↑' if event.size > 0 else '↓'} {number(abs(event.size))}"
            for event in order
        ]
        more = f" and {len(order) - 4} more" if len(order) > 4 else ""
        sharp = sum(event.resolved for event in order)
        place = f"{step(change.step)} {interval_text(change.interval, step)}"
        span = f"{step(change.span[0])}–{step(change.span[1])}"
        chance = number(min(event.p_value if event.q_value is None else event.q_value for event in order), 2)
        sharp_of = f"{sharp} of {len(order)}"
        rank = f"{i}: {'main' if change.main else 'minor'}"
        cells = [rank, place, span, number(change.score, 2), chance, sharp_of, kind, ", ".join(moved[:4]) + more]
        rows.append(Row(cells, weak=not change.main))
    columns = ["transition", "step\n[90% of its jumps]", "10% to 90%\nof the change", "score\n(watches)", "smallest q"]
    columns.append("events\nresolved")
    return Table([*columns, "type", "what changes"], rows, "", "glance")


def stages_table(series: Sequence[Series], parts: Sequence[Stage]) -> Table | None:
    """How much each run-level series changed in each stage and transition; None where nothing did."""
    if not any(part.changes for part in parts):
        return None
    counts = {"stage": 0, "transition": 0}
    columns = ["change of"]
    for part in parts:
        counts[part.kind] += 1
        main = " (main)" if part.transition is not None and part.transition.main else ""
        columns.append(f"{part.kind} {counts[part.kind]}{main}\nsteps {part.start}–{part.end}")
    rows = []
    for each in series:
        if run_level(each.name):
            name = f"{each.name} [{each.units}]" if each.units else each.name
            rows.append(Row([name, *(_change(part.changes.get(each.name), part.start, part.end) for part in parts)]))
    note = (
        "Change from the first to the last accepted checkpoint of each part, ± standard error where the instrument "
        "gives one (in brackets the steps, where they are not those of the part). A transition spans the 10% to 90% of "
        "abrupt jumps with q ≤ 0.05 that go on at the same time. "
    )
    if counts["transition"] == 0:
        note += "No transition: the run is one stage."
    return Table(columns, rows, note)


def _change(change: Any, start: int, end: int) -> str:
    if change is None:
        return "–"
    text = ("+" if change.value > 0 else "") + number(change.value)
    text += f" ± {number(change.se, 2)}" if change.se is not None and np.isfinite(change.se) else ""
    return text if change.steps == (start, end) else f"{text} ({change.steps[0]}–{change.steps[1]})"


def alarms_table(alarms: Sequence[Mapping[str, Any]]) -> Table:
    """What the monitor raised while the run went on: entries with series, kind, step, low, high, raised_at, status."""
    rows = []
    for alarm in alarms:
        place = f"{step(alarm['step'])} [{step(alarm['low'])}, {step(alarm['high'])}]"
        up = alarm["status"] == "up"
        status = "provisional" if up else str(alarm["status"])
        cells = [str(alarm["series"]), str(alarm["kind"]), place, step(alarm["raised_at"]), status]
        rows.append(Row(cells, weak=not up))
    note = (
        "An alarm is provisional: it was raised on the checkpoints up to that step and may be withdrawn as more come. "
        "The events of this report are searched in the whole run."
    )
    return Table(["series", "kind", "step [low, high]", "raised at", "status"], rows, note, "long")


def silent_table(detection: Detection) -> Table:
    """The series without an event: their outcome, their smallest p-value and what the search noted."""
    eventful = {event.series for event in detection.events}
    rows = []
    for name, fit in detection.fits.items():
        if name not in eventful:
            least = min((p for kind in fit.p_values.values() for p in kind), default=None)
            rows.append(Row([name, fit.outcome, number(least), "; ".join(fit.notes)]))
    return Table(["series", "outcome", "smallest p", "notes"], rows, "", "long")


def numbers_table(series: Sequence[Series]) -> Table | None:
    """The values behind a figure: one row a step, one column a series."""
    if not series:
        return None
    steps = sorted({int(s) for each in series for s in each.steps})
    maps = [dict(zip(map(int, each.steps), map(float, each.values), strict=True)) for each in series]
    rows = [Row([str(s), *(number(values.get(s), 4) for values in maps)]) for s in steps]
    return thinned(["step", *(each.name for each in series)], rows)


def run_table(attrs: Mapping[str, Any]) -> Table:
    """The provenance of a run, what it is known by first."""
    known = ("run_id", "created", "seed", "control", "device", "threads", "command", "versions", "schema")
    order = [key for key in known if key in attrs] + sorted(key for key in attrs if key not in known)
    return pairs_table({name: value for key in order for name, value in _each(key, attrs[key]).items()})


def _each(key: str, value: Any) -> dict[str, Any]:
    """A list of several records, such as the plans of a run that was measured twice, is a row a record."""
    if isinstance(value, list) and len(value) > 1 and all(isinstance(record, Mapping) for record in value):
        return {f"{key} {n} of {len(value)}": record for n, record in enumerate(value, 1)}
    return {key: value}


def pairs_table(values: Mapping[str, Any]) -> Table:
    """Names and values, a row each."""
    return Table(["", ""], [Row([str(key), text_of(value)]) for key, value in values.items()], "", "text")


def text_of(value: Any, limit: int = 600) -> str:
    """A setting or attribute as text of at most `limit` characters, nested ones written out."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {text_of(item)}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(map(text_of, value))
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def measured_table(run: ReadOnce) -> Table:
    """What each watch holds: its instrument, its checkpoints, what failed and what it took."""
    rows = []
    for name in run.names():
        data, failed = run[name], run.failed(name)
        steps = data["step"].values.tolist() if has_rows(data) else []
        seconds = float(np.nansum(data["seconds"].values)) if steps and "seconds" in data.coords else None
        span = f"{steps[0]}–{steps[-1]}" if steps else "–"
        kind = str(data.attrs.get("instrument", "–")).rpartition(".")[2]
        known = [name, kind, str(data.attrs.get("fingerprint", "–")), str(len(steps)), span]
        rows.append(Row([*known, "–" if failed is None else str(failed), number(seconds)]))
    left_out = skipped(run.attrs)
    note = f"Left out to keep max_overhead: {left_out}." if left_out else ""
    return Table(["watch", "instrument", "fingerprint", "checkpoints", "steps", "failed", "seconds"], rows, note)


def fields_table(data: xr.Dataset) -> Table | None:
    """The configuration of a watch's instrument, where it was stored."""
    fields = data.attrs.get("fields")
    return pairs_table(fields) if isinstance(fields, Mapping) and fields else None
