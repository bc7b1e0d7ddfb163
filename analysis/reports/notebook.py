"""What a notebook shows of results: tables as HTML, everything in them escaped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from markupsafe import escape

from devmon.analysis.reports.content import Row, Table, thinned

if TYPE_CHECKING:
    from devmon.analysis.derive.watch_series import RunData
    from devmon.analysis.detection.events import Event
    from devmon.analysis.detection.results import Detection


def table_html(table: Table) -> str:
    """A plain table; weak rows are grey."""
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "".join(
        f"<tr{' style=opacity:.55' if row.weak else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row.cells)}</tr>"
        for row in table.rows
    )
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return (f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>" if table.rows else "") + note


def trajectory_html(run: RunData) -> str:
    """What a run holds: one row a watch, and its identity."""
    from devmon.analysis.reports.tables import measured_table, text_of

    attrs = run.attrs
    known = ", ".join(f"{key} {text_of(attrs[key], 60)}" for key in ("run_id", "seed", "created") if key in attrs)
    table = measured_table(run, {name: run[name] for name in run.names()})
    return f"<p><b>{escape(str(attrs.get('title', 'Trajectory')))}</b>: {escape(known)}</p>" + table_html(table)


def event_html(event: Event) -> str:
    """One event in words, with what its note says."""
    from devmon.analysis.reports.story import phrase

    note = "" if event.resolved else f" Not resolved in time{f': {event.note}' if event.note else ''}."
    return f"<p><b>{escape(event.kind)}</b>: {escape(phrase(event))}.{escape(note)}</p>"


def detection_html(detection: Detection) -> str:
    """The outcome, the events, and how many series have none."""
    from devmon.analysis.reports.story import headline
    from devmon.analysis.reports.tables import events_table
    from devmon.analysis.transitions.stages import run_level

    events = sorted(detection.events, key=lambda event: (not run_level(event.series), event.step, event.series))
    silent = len(detection.fits) - len({event.series for event in events})
    told = f"<p><b>{headline([], detection)}</b>: {len(detection.fits)} series, {detection.family} tests, {silent} series without an event</p>"
    return told + table_html(events_table(events, detection))


def llc_html(derived: xr.Dataset) -> str:
    """λ̂ with its error and health, one row a step; rejected estimates are grey."""
    from devmon.analysis.reports.story import number

    names = {"llc": "LLC", "se": "standard error", "ess": "ESS", "rhat": "R̂"}
    shown = [name for name in names if name in derived and derived[name].dims in ((), ("step",))]
    verdicts = np.atleast_1d(derived["verdict"].values).astype(str)
    steps = (
        np.atleast_1d(derived["step"].values) if "step" in derived.coords else np.full(len(verdicts), "–", dtype=object)
    )
    columns = [np.atleast_1d(derived[name].values) for name in shown]
    rows = [
        Row([str(steps[i]), *(number(float(column[i]), 4) for column in columns), verdict], verdict != "ok")
        for i, verdict in enumerate(verdicts)
    ]
    accepted = int((verdicts == "ok").sum())
    table = thinned(["step", *(names[name] for name in shown), "verdict"], rows)
    return f"<p><b>LLC</b>: {accepted} of {len(verdicts)} estimates accepted</p>" + table_html(table)
