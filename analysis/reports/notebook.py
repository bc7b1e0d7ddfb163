"""What a notebook shows of a trajectory: what it holds, everything escaped. Results show themselves."""

from __future__ import annotations

from markupsafe import escape

from devmon.analysis.reports.tables import measured_table, text_of
from devmon.analysis.run import ReadOnce, RunData
from devmon.analysis.table import table_html


def trajectory_html(run: RunData) -> str:
    """What a run holds: one row a watch, and its identity."""
    attrs = run.attrs
    known = ", ".join(f"{key} {text_of(attrs[key], 60)}" for key in ("run_id", "seed", "created") if key in attrs)
    table = measured_table(ReadOnce(run))
    return f"<p><b>{escape(str(attrs.get('title', 'Trajectory')))}</b>: {escape(known)}</p>" + table_html(table)
