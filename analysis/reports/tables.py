"""The tables of a report: stages, events, the numbers behind a figure, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from devmon.analysis.detection.results import Detection
from devmon.analysis.reports.run_words import skipped
from devmon.analysis.run import RunData
from devmon.analysis.series import Series, run_level
from devmon.analysis.table import Row, Table, thinned
from devmon.analysis.transitions.stages import Transition, stages
from devmon.analysis.wording import interval_text, number, step


def transitions_table(found: Sequence[Transition], kinds: Sequence[str]) -> Table:
    """The run at a glance: one row a transition, with its type A or B in a word (`kinds`)."""
    rows = []
    for i, (one, kind) in enumerate(zip(found, kinds, strict=True), 1):
        order = sorted(one.events, key=lambda event: (event.p_value, event.q_value or 0, event.step))
        changed = [f"{event.series} {'↑' if event.size > 0 else '↓'} {number(abs(event.size))}" for event in order]
        more = f" and {len(order) - 4} more" if len(order) > 4 else ""
        sharp = sum(event.resolved for event in order)
        cells = [
            str(i),
            f"{step(one.step)} {interval_text(one.interval, step)}",
            f"{step(one.span[0])}–{step(one.span[1])}",
        ]
        chance = number(min(event.p_value if event.q_value is None else event.q_value for event in order), 2)
        rows.append(Row([*cells, chance, f"{sharp} of {len(order)}", kind, ", ".join(changed[:4]) + more]))
    columns = ["transition", "step\n[90% of its jumps]", "10% to 90%\nof the change", "smallest q", "jumps\nresolved", "type", "what changes"]  # fmt: skip
    return Table(columns, rows, "", "glance")


def stages_table(series: Sequence[Series], detection: Detection) -> Table | None:
    parts = stages(series, detection)
    if not any(part.changes for part in parts):
        return None
    counts = {"stage": 0, "transition": 0}
    columns = ["change of"]
    for part in parts:
        counts[part.kind] += 1
        columns.append(f"{part.kind} {counts[part.kind]}\nsteps {part.start}–{part.end}")
    rows = []
    for one in series:
        if run_level(one.name):
            name = f"{one.name} [{one.units}]" if one.units else one.name
            rows.append(Row([name, *(_change(part.changes.get(one.name), part.start, part.end) for part in parts)]))
    note = (
        "Change from the first to the last accepted checkpoint of each part, ± standard error where the instrument "
        "gives one (in brackets the steps, where they are not those of the part). A transition spans the 10% to 90% of jumps "
        "with q ≤ 0.05 that go on at the same time. "
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
        told = "provisional" if up else str(alarm["status"])
        rows.append(Row([str(alarm["series"]), str(alarm["kind"]), place, step(alarm["raised_at"]), told], weak=not up))
    note = (
        "An alarm is provisional: it was raised on the checkpoints up to that step and may be withdrawn as more come. The "
        "events of this report are searched in the whole run."
    )
    return Table(["series", "kind", "step [low, high]", "raised at", "status"], rows, note, "long")


def silent_table(detection: Detection) -> Table:
    found = {event.series for event in detection.events}
    rows = []
    for name, fit in detection.fits.items():
        if name not in found:
            least = min((p for kind in fit.p_values.values() for p in kind), default=None)
            rows.append(Row([name, fit.outcome, number(least), "; ".join(fit.notes)]))
    return Table(["series", "outcome", "smallest p", "notes"], rows, "", "long")


def numbers_table(series: Sequence[Series]) -> Table | None:
    """The values behind a figure: one row a step, one column a series."""
    if not series:
        return None
    steps = sorted({int(s) for one in series for s in one.steps})
    maps = [dict(zip(map(int, one.steps), map(float, one.values), strict=True)) for one in series]
    rows = [Row([str(s), *(number(values.get(s), 4) for values in maps)]) for s in steps]
    return thinned(["step", *(one.name for one in series)], rows)


def run_table(attrs: Mapping[str, Any]) -> Table:
    known = ("run_id", "created", "seed", "control", "device", "threads", "command", "versions", "schema")
    order = [key for key in known if key in attrs] + sorted(key for key in attrs if key not in known)
    return pairs_table({name: value for key in order for name, value in _each(key, attrs[key]).items()})


def _each(key: str, value: Any) -> dict[str, Any]:
    """A list of several records, such as the plans of a run that was measured twice, is a row a record."""
    if isinstance(value, list) and len(value) > 1 and all(isinstance(one, Mapping) for one in value):
        return {f"{key} {n} of {len(value)}": one for n, one in enumerate(value, 1)}
    return {key: value}


def pairs_table(values: Mapping[str, Any]) -> Table:
    return Table(["", ""], [Row([str(key), text_of(value)]) for key, value in values.items()], "", "text")


def text_of(value: Any, limit: int = 600) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {text_of(item)}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(map(text_of, value))
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def measured_table(trajectory: RunData, datasets: Mapping[str, xr.Dataset]) -> Table:
    rows = []
    for name, data in datasets.items():
        steps = data["step"].values.tolist() if has_rows(data) else []
        seconds = float(np.nansum(data["seconds"].values)) if steps and "seconds" in data.coords else None
        span = f"{steps[0]}–{steps[-1]}" if steps else "–"
        failed = str(len(trajectory.failures(name))) if hasattr(trajectory, "failures") else "–"
        kind = str(data.attrs.get("instrument", "–")).rpartition(".")[2]
        rows.append(
            Row([name, kind, str(data.attrs.get("fingerprint", "–")), str(len(steps)), span, failed, number(seconds)])
        )
    left_out = skipped(trajectory.attrs)
    note = f"Left out to keep max_overhead: {left_out}." if left_out else ""
    return Table(["watch", "instrument", "fingerprint", "checkpoints", "steps", "failed", "seconds"], rows, note)


def fields_table(data: xr.Dataset) -> Table | None:
    fields = data.attrs.get("fields")
    return pairs_table(fields) if isinstance(fields, Mapping) and fields else None


def has_rows(data: xr.Dataset) -> bool:
    return data.sizes.get("step", 0) > 0
