"""`report(trajectory, path)`: what happened in a run and how sure that is, as one HTML, Markdown or JSON file.

`examine` (findings.py) makes everything that is said; `content_of` puts it in sections (sections.py) of words, tables
and figures (content.py); the ending of the path chooses how writers.py writes it. The HTML is one offline file with no
request to anywhere.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

from devmon.analysis.detection.detector import Detector
from devmon.analysis.reports.content import Content, curve_numbers
from devmon.analysis.reports.drawing import Page
from devmon.analysis.reports.findings import Findings, examine
from devmon.analysis.reports.sections import sections_of
from devmon.analysis.reports.tables import text_of
from devmon.analysis.reports.writers import WRITERS
from devmon.analysis.run import RunData, has_rows
from devmon.errors import DataError
from devmon.files import write_whole


def report(
    trajectory: RunData,
    path: str | os.PathLike[str],
    *,
    figures: str | os.PathLike[str] | None = None,
    detector: Detector | None = None,
    title: str | None = None,
) -> Path:
    """Write the report of a run to `path` and return that path; its ending says whether as .html, .md or .json.

    - `figures`: a folder for PNG copies; Markdown shows them, and by default has them in NAME-figures beside it
    - `detector`: searches the series, which are those of `series_of(trajectory)`
    - `title`: of the page, by default the run's own

    The file appears whole or not at all, and the same trajectory gives the same bytes. Raises DataError for another
    ending, and where a series is malformed.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise DataError(f"a report is written as {', '.join(WRITERS)}, got {path.name!r}")
    folder = Path(figures) if figures is not None else None
    if path.suffix == ".md" and folder is None:
        folder = path.with_name(f"{path.stem}-figures")
    content = content_of(examine(trajectory, detector), title=title, figures=folder)
    shown = None if folder is None else os.path.relpath(folder, path.parent).replace(os.sep, "/")
    write_whole(path, WRITERS[path.suffix](content, figures=shown).encode())
    return path


def content_of(findings: Findings, *, title: str | None = None, figures: Path | None = None, note: str = "") -> Content:
    """What a report says of a run; `figures` is a folder for PNG copies, and `note` stands beside the outcome."""
    attrs = findings.run.attrs
    return Content(
        title=title or str(attrs.get("title") or f"Training run {attrs.get('run_id', '')}".strip()),
        subtitle=_subtitle(findings),
        outcome=findings.detection.outcome,
        sections=sections_of(Page(figures), findings, note),
        series=[curve_numbers(series) for series in findings.series],
        events=[event.to_dict() for event in findings.events],
    )


def _subtitle(findings: Findings) -> str:
    """How much was measured, of which model and data, and the version that says so."""
    watches, attrs = findings.watches, findings.run.attrs
    steps = {int(step) for data in watches.values() if has_rows(data) for step in data["step"].values}
    parts = [f"{len(watches)} watch{'es' * (len(watches) != 1)}, {len(steps)} checkpoints"]
    if steps:
        parts[0] += f" from step {min(steps)} to {max(steps)}"
    parts += [f"{key}: {text_of(attrs[key], 120)}" for key in ("model", "data", "parameters") if key in attrs]
    return "; ".join([*parts, f"devmon {version('devmon')}"])
