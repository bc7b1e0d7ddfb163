"""`report(trajectory, path)`: what happened in a run and how sure that is, as one HTML, Markdown or JSON file.

`content_of` gathers what is said (`content.py`), from words (`story.py`, `evidence.py`), tables and figures; the ending
of the path chooses how `report_pages.py` writes it. The HTML is one offline file with no request to anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.watch_series import is_llc, series_of
from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event
from devmon.analysis.detection.results import Detection, events_table
from devmon.analysis.detection.search import detect
from devmon.analysis.reports.bibtex import bibtex
from devmon.analysis.reports.content import Block, Code, Content, Fold, Heading, Items, Section, Story, Terms, Text
from devmon.analysis.reports.drawing import Page, rounded
from devmon.analysis.reports.evidence import evidence
from devmon.analysis.reports.figures import (
    calibration_figure,
    forest,
    key_series,
    lead_lag_figure,
    llc_figure,
    overview,
    timeline,
)
from devmon.analysis.reports.glossary import GLOSSARY, TOPICS, methods
from devmon.analysis.reports.references import references
from devmon.analysis.reports.story import tell
from devmon.analysis.reports.tables import (
    alarms_table,
    fields_table,
    has_rows,
    measured_table,
    pairs_table,
    run_table,
    silent_table,
    stages_table,
    text_of,
    transitions_table,
)
from devmon.analysis.reports.watches import topic_of, watch_blocks
from devmon.analysis.reports.writers import WRITERS
from devmon.analysis.run import ReadOnce, RunData
from devmon.analysis.series import Series, run_level
from devmon.analysis.transitions.stages import transitions
from devmon.errors import DataError
from devmon.files import write_whole

__all__ = ["content_of", "key_series", "report"]


def report(
    trajectory: RunData,
    path: str | os.PathLike[str],
    *,
    figures: str | os.PathLike[str] | None = None,
    detector: Detector | None = None,
    title: str | None = None,
) -> Path:
    """Write the report of a run to `path` and return that path; its ending says whether as .html, .md or .json.

    `figures` is a folder for PNG copies; Markdown shows them, and by default has them in NAME-figures beside it. The
    series are those of `series_of(trajectory)`, searched by `detector`. The file appears whole or not at all, and the same trajectory gives the same bytes. Raises DataError
    for another ending, and where a series is malformed.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise DataError(f"a report is written as {', '.join(WRITERS)}, got {path.name!r}")
    folder = Path(figures) if figures is not None else None
    if path.suffix == ".md" and folder is None:
        folder = path.with_name(f"{path.stem}-figures")
    content = content_of(trajectory, detector=detector, title=title, figures=folder)
    shown = None if folder is None else os.path.relpath(folder, path.parent).replace(os.sep, "/")
    write_whole(path, WRITERS[path.suffix](content, figures=shown).encode())
    return path


def content_of(
    trajectory: RunData,
    *,
    detector: Detector | None = None,
    title: str | None = None,
    figures: Path | None = None,
    detection: Detection | None = None,
    note: str = "",
) -> Content:
    """What a report of the run says; sections that the run has nothing for are left out.

    `detection` is that of `series_of(trajectory)`, where it is known already, or of some of them; `note` is told beside the outcome.
    """
    page, attrs, run = Page(figures), dict(trajectory.attrs), ReadOnce(trajectory)
    series = series_of(run)
    detection = detect(series, detector) if detection is None else detection
    datasets = {name: run[name] for name in run.names()}
    derived = {name: llc(data) for name, data in datasets.items() if has_rows(data) and is_llc(data)}
    verdicts = {name: np.asarray(data["verdict"].values).astype(str) for name, data in derived.items()}
    events = sorted(detection.events, key=lambda e: (not run_level(e.series), e.step, e.series))
    found = evidence(run, series, detection)
    story = tell(series, detection, verdicts, control=bool(attrs.get("control")), beside=[one.told for one in found])
    said = [f"Transition {i}: {words}" for i, one in enumerate(found, 1) for words in one.against] + story.against
    alarms = attrs.pop("alarms", [])
    stored = attrs.pop("calibration") if "trials" in attrs.get("calibration", ()) else None

    told: list[Block] = [Text(story.outcome, "outcome"), *([Text(note, "note")] if note else [])]
    first = 1 + bool(attrs.get("control"))
    told.append(Text(" ".join(story.happened[:first]), "lead"))
    if changes := transitions(detection.events):
        told.append(transitions_table(changes, [one.kind for one in found]))
    if (times := timeline(page, detection, series)) is not None:
        told.append(times)
    if alarms:
        told += [Heading("Alarms raised during training"), alarms_table(alarms)]
    told += [Story(story.happened[first:])] if story.happened[first:] else []
    told += [Heading("What argues against it, and what is missing"), Items(said)] if said else []
    sections = [Section("story", "What happened", told)]
    if series:
        sections.append(Section("overview", "Overview", [overview(page, series, events)]))
    if (table := stages_table(series, detection)) is not None:
        sections.append(Section("stages", "Stages", [table]))
    sections.append(Section("events", "Events", _events(page, events, detection)))
    if (order := lead_lag_figure(page, detection)) is not None:
        sections.append(Section("order", "What came first", [order]))
    if derived:
        drawn: list[Block] = [llc_figure(page, name, data, events) for name, data in derived.items()]
        sections.append(Section("llc", "Local learning coefficient", drawn))
    if stored is not None:
        reasons, figure = calibration_figure(page, stored)
        sections.append(Section("calibration", "Calibration of the LLC", [Text(reasons), figure]))
    sections += _watches(page, datasets, series, events)
    sections.append(Section("provenance", "Provenance", _provenance(trajectory, datasets, detection, attrs)))
    sections.append(Section("reading", "How to read this", _reading(datasets, detection)))
    return Content(
        title=title or str(attrs.get("title") or f"Training run {attrs.get('run_id', '')}".strip()),
        subtitle=_subtitle(datasets, attrs),
        outcome=story.outcome,
        sections=sections,
        series=[numbers_of_series(one) for one in series],
        events=[event.to_dict() for event in events],
    )


def _events(page: Page, events: Sequence[Event], detection: Detection) -> list[Block]:
    drawn = forest(page, events)
    blocks: list[Block] = [] if drawn is None else [drawn]
    blocks.append(events_table(events, detection.family))
    silent = silent_table(detection)
    if silent.rows:
        blocks.append(Fold(f"Series without an event: {len(silent.rows)}", [silent], opened=not events))
    return blocks


def _watches(
    page: Page, datasets: Mapping[str, xr.Dataset], series: Sequence[Series], events: Sequence[Event]
) -> list[Section]:
    """One section a topic, those of `TOPICS` first; "Every watch" (or "Other watches") holds what has none."""
    blocks: dict[str, list[Block]] = {}
    for name, data in datasets.items():
        blocks.setdefault(topic_of(data), []).extend(watch_blocks(page, name, data, series, events))
    found = [Section(key, title, blocks[key]) for key, title, _ in TOPICS if key in blocks]
    rest = blocks.get("watches", [])
    return (
        [*found, Section("watches", "Other watches" if found else "Every watch", rest)] if rest or not found else found
    )


def _provenance(
    trajectory: RunData, datasets: Mapping[str, xr.Dataset], detection: Detection, attrs: Mapping[str, Any]
) -> list[Block]:
    blocks: list[Block] = [run_table({key: value for key, value in attrs.items() if key != "skipped"})]
    blocks.append(measured_table(trajectory, datasets))
    for name, data in datasets.items():
        if (fields := fields_table(data)) is not None:
            blocks.append(Fold(f"Configuration of {name}", [fields]))
    blocks.append(Fold("Settings of the detector", [pairs_table(detection.settings)]))
    return blocks


def _reading(datasets: Mapping[str, xr.Dataset], detection: Detection) -> list[Block]:
    cited = references(str(data.attrs.get("instrument", "")) for data in datasets.values())
    return [
        Terms(list(GLOSSARY)),
        Heading("Methods"),
        Terms(methods({name: data.attrs for name, data in datasets.items()}, detection)),
        Heading("References"),
        Items(cited),
        Fold("BibTeX", [Code(bibtex(cited), "references.bib")]),
    ]


def _subtitle(datasets: Mapping[str, xr.Dataset], attrs: Mapping[str, Any]) -> str:
    steps = [int(s) for data in datasets.values() if has_rows(data) for s in data["step"].values]
    parts = [f"{len(datasets)} watch{'es' * (len(datasets) != 1)}, {len(set(steps))} checkpoints"]
    if steps:
        parts[0] += f" from step {min(steps)} to {max(steps)}"
    parts += [
        f"{key.replace('_', ' ')}: {text_of(attrs[key], 120)}"
        for key in ("model", "data", "parameters")
        if key in attrs
    ]
    return "; ".join([*parts, f"devmon {version('devmon')}"])


def numbers_of_series(one: Series) -> dict[str, Any]:
    """A series to five digits, null where a value is missing or infinite."""
    se = None if one.se is None else [rounded(float(v), 3) for v in one.se]
    rejected = [] if one.rejected is None else np.flatnonzero(one.rejected).tolist()
    values = [rounded(float(v), 5) for v in one.values]
    steps = [int(s) for s in one.steps]
    return {"name": one.name, "units": one.units, "steps": steps, "values": values, "se": se, "rejected": rejected}
