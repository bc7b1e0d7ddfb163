"""The sections of a run's report, each made from its `Findings`; one that the run has nothing for is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from devmon.analysis.detection.results import events_table
from devmon.analysis.reports.bibtex import bibtex
from devmon.analysis.reports.content import Block, Code, Fold, Heading, Items, Paragraph, Prose, Section, Terms
from devmon.analysis.reports.drawing import Page
from devmon.analysis.reports.figures import (
    calibration_figure,
    forest,
    ladder_figure,
    lead_lag_figure,
    llc_figure,
    overview,
    timeline,
)
from devmon.analysis.reports.findings import Findings
from devmon.analysis.reports.glossary import GLOSSARY, TOPICS, methods
from devmon.analysis.reports.references import references
from devmon.analysis.reports.story import tell
from devmon.analysis.reports.tables import (
    alarms_table,
    fields_table,
    measured_table,
    pairs_table,
    run_table,
    silent_table,
    stages_table,
    transitions_table,
)
from devmon.analysis.reports.watches import panels_each, topic_of, watch_blocks

Maker = Callable[[Page, Findings], list[Section]]


def sections_of(page: Page, findings: Findings, note: str = "") -> list[Section]:
    """All sections in their order; `note` stands beside the outcome."""
    return [_story(page, findings, note), *(section for make in MAKERS for section in make(page, findings))]


def _story(page: Page, findings: Findings, note: str) -> Section:
    """The outcome, the lead sentence, the transitions at a glance, then the story and what argues against it."""
    story, attrs = tell(findings), findings.run.attrs
    first = 2 if findings.control else 1
    blocks: list[Block] = [Paragraph(story.outcome, "outcome"), *([Paragraph(note, "note")] if note else [])]
    blocks.append(Paragraph(" ".join(story.happened[:first]), "lead"))
    if findings.transitions:
        blocks.append(transitions_table(findings.transitions, [evidence.kind for evidence in findings.evidence]))
    if (times := timeline(page, findings)) is not None:
        blocks.append(times)
    if alarms := attrs.get("alarms"):
        blocks += [Heading("Alarms raised during training"), alarms_table(alarms)]
    if story.happened[first:]:
        blocks.append(Prose(story.happened[first:]))
    against = [f"Transition {i}: {words}" for i, each in enumerate(findings.evidence, 1) for words in each.against]
    if against + story.against:
        blocks += [Heading("What argues against it, and what is missing"), Items(against + story.against)]
    return Section("story", "What happened", blocks)


def _overview(page: Page, findings: Findings) -> list[Section]:
    return [Section("overview", "Overview", [overview(page, findings)])] if findings.series else []


def _stages(page: Page, findings: Findings) -> list[Section]:
    table = stages_table(findings.series, findings.stages)
    return [] if table is None else [Section("stages", "Stages", [table])]


def _events(page: Page, findings: Findings) -> list[Section]:
    drawn = forest(page, findings.events)
    blocks: list[Block] = [] if drawn is None else [drawn]
    blocks.append(events_table(findings.events, findings.detection.family))
    silent = silent_table(findings.detection)
    if silent.rows:
        blocks.append(Fold(f"Series without an event: {len(silent.rows)}", [silent], opened=not findings.events))
    return [Section("events", "Events", blocks)]


def _order(page: Page, findings: Findings) -> list[Section]:
    figure = lead_lag_figure(page, findings)
    return [] if figure is None else [Section("order", "What came first", [figure])]


def _llc(page: Page, findings: Findings) -> list[Section]:
    drawn: list[Block] = []
    for name, data in findings.estimates.items():
        drawn.append(llc_figure(page, name, data, findings.events))
        if "ladder_loss" in findings.watches[name]:
            drawn.append(ladder_figure(page, name, findings.watches[name]))
    return [Section("llc", "Local learning coefficient", drawn)] if drawn else []


def _calibration(page: Page, findings: Findings) -> list[Section]:
    if not (stored := _trials(findings)):
        return []
    reasons, figure = calibration_figure(page, stored)
    return [Section("calibration", "Calibration of the LLC", [Paragraph(reasons), figure])]


def _trials(findings: Findings) -> dict[str, Any]:
    """What `devmon calibrate` stored, if its trials are there."""
    stored = findings.run.attrs.get("calibration", {})
    return dict(stored) if "trials" in stored else {}


def _watches(page: Page, findings: Findings) -> list[Section]:
    """One section a topic, those of `TOPICS` first; "Every watch" (or "Other watches") holds what has none."""
    blocks: dict[str, list[Block]] = {}
    most = panels_each(findings)
    for name, data in findings.watches.items():
        blocks.setdefault(topic_of(data), []).extend(watch_blocks(page, findings, name, most))
    topics = [Section(key, title, blocks[key]) for key, title, _ in TOPICS if key in blocks]
    if topics and "watches" not in blocks:
        return topics
    return [*topics, Section("watches", "Other watches" if topics else "Every watch", blocks.get("watches", []))]


def _provenance(page: Page, findings: Findings) -> list[Section]:
    elsewhere = ["skipped", "alarms", *(["calibration"] if _trials(findings) else [])]
    blocks: list[Block] = [run_table({k: value for k, value in findings.run.attrs.items() if k not in elsewhere})]
    blocks.append(measured_table(findings.run))
    for name, data in findings.watches.items():
        if (fields := fields_table(data)) is not None:
            blocks.append(Fold(f"Configuration of {name}", [fields]))
    blocks.append(Fold("Settings of the detector", [pairs_table(findings.detection.settings)]))
    return [Section("provenance", "Provenance", blocks)]


def _reading(page: Page, findings: Findings) -> list[Section]:
    cited = references(str(data.attrs.get("instrument", "")) for data in findings.watches.values())
    return [
        Section("reading", "How to read this", [
            Terms(list(GLOSSARY)),
            Heading("Methods"),
            Terms(methods({name: data.attrs for name, data in findings.watches.items()}, findings.detection)),
            Heading("References"),
            Items(cited),
            Fold("BibTeX", [Code(bibtex(cited), "references.bib")]),
        ])
    ]  # fmt: skip


# after the story, in the order of the page
MAKERS: tuple[Maker, ...] = (
    _overview,
    _stages,
    _events,
    _order,
    _llc,
    _calibration,
    _watches,
    _provenance,
    _reading,
)
