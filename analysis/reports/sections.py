"""The sections of a run's report, each made from its `Findings`; one that the run has nothing for is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from devmon.analysis.detection.results import events_table
from devmon.analysis.reports.bibtex import bibtex
from devmon.analysis.reports.content import Block, Code, Columns, Fold, Heading, Items, Paragraph, Section, Terms
from devmon.analysis.reports.drawing import Page
from devmon.analysis.reports.figures import (
    calibration_figure,
    forest,
    ladder_figure,
    llc_figure,
    order_figure,
    overview,
    stages_figure,
    timeline,
)
from devmon.analysis.reports.findings import Findings
from devmon.analysis.reports.glossary import GLOSSARY, TOPICS, methods
from devmon.analysis.reports.prose.evidence import type_in_short
from devmon.analysis.reports.prose.story import tell
from devmon.analysis.reports.references import references
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

MINOR = 5  # smaller events that are told before a fold is opened
Maker = Callable[[Page, Findings], list[Section]]


def sections_of(page: Page, findings: Findings, note: str = "") -> list[Section]:
    """All sections in their order, what is read first unfolded; `note` stands beside the outcome."""
    return [*_story(page, findings, note), *(section for make in MAKERS for section in make(page, findings))]


def _story(page: Page, findings: Findings, note: str) -> list[Section]:
    """The first screen: what happened, the answers to what is asked next and one figure; then smaller events, what
    argues against it, and the order within the foremost transition."""
    story = tell(findings)
    blocks: list[Block] = [Paragraph(story.outcome, "outcome"), *([Paragraph(note, "note")] if note else [])]
    blocks.append(Paragraph(story.lead, "lead"))
    asked = Terms([(answer.question, answer.text) for answer in story.answers], "answers")
    drawn = stages_figure(page, findings)
    blocks.append(asked if drawn is None else Columns([asked], [drawn]))
    sections = [Section("story", "What happened", blocks)]
    if alarms := findings.run.attrs.get("alarms"):
        sections.append(Section("alarms", "Alarms raised during training", [alarms_table(alarms)]))
    if story.minor:
        shown = [Items(story.minor[:MINOR])]
        rest = (
            [Fold(f"{len(story.minor) - MINOR} more", [Items(story.minor[MINOR:])])] if len(story.minor) > MINOR else []
        )
        sections.append(Section("minor", "Smaller events", [*shown, *rest]))
    if (ordered := order_figure(page, findings)) is not None:
        sections.append(Section("order", "What came first", [ordered]))
    if story.against:
        sections.append(Section("against", "What argues against it", [Items(story.against)]))
    return sections


def _overview(page: Page, findings: Findings) -> list[Section]:
    """The key series with their events, and the transitions and events of the whole run."""
    if not findings.series:
        return []
    blocks: list[Block] = [overview(page, findings)]
    if findings.transitions:
        types = ["–" if each.phase is None else type_in_short(each.phase) for each in findings.evidence]
        blocks.append(transitions_table(findings.transitions, types, findings.labels))
    if (times := timeline(page, findings)) is not None:
        blocks.append(times)
    return [Section("overview", "Overview", blocks, folded=True)]


def _stages(page: Page, findings: Findings) -> list[Section]:
    table = stages_table(findings.series, findings.stages)
    return [] if table is None else [Section("stages", "Stages", [table], folded=True)]


def _events(page: Page, findings: Findings) -> list[Section]:
    drawn = forest(page, findings.events, findings.labels)
    blocks: list[Block] = [] if drawn is None else [drawn]
    blocks.append(events_table(findings.events, findings.detection.family))
    silent = silent_table(findings.detection)
    if silent.rows:
        blocks.append(Fold(f"Series without an event: {len(silent.rows)}", [silent], opened=not findings.events))
    return [Section("events", "Events", blocks, folded=True)]


def _llc(page: Page, findings: Findings) -> list[Section]:
    drawn: list[Block] = []
    for name, data in findings.estimates.items():
        drawn.append(llc_figure(page, name, data, findings.events))
        if "ladder_loss" in findings.watches[name]:
            drawn.append(ladder_figure(page, name, findings.watches[name]))
    return [Section("llc", "Local learning coefficient", drawn, folded=True)] if drawn else []


def _calibration(page: Page, findings: Findings) -> list[Section]:
    if not (stored := _trials(findings)):
        return []
    reasons, figure = calibration_figure(page, stored)
    return [Section("calibration", "Calibration of the LLC", [Paragraph(reasons), figure], folded=True)]


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
    topics = [Section(key, title, blocks[key], folded=True) for key, title, _ in TOPICS if key in blocks]
    if topics and "watches" not in blocks:
        return topics
    title = "Other watches" if topics else "Every watch"
    return [*topics, Section("watches", title, blocks.get("watches", []), folded=True)]


def _provenance(page: Page, findings: Findings) -> list[Section]:
    elsewhere = ["skipped", "alarms", *(["calibration"] if _trials(findings) else [])]
    blocks: list[Block] = [run_table({k: value for k, value in findings.run.attrs.items() if k not in elsewhere})]
    blocks.append(measured_table(findings.run))
    for name, data in findings.watches.items():
        if (fields := fields_table(data)) is not None:
            blocks.append(Fold(f"Configuration of {name}", [fields]))
    blocks.append(Fold("Settings of the detector", [pairs_table(findings.detection.settings)]))
    return [Section("provenance", "Provenance", blocks, folded=True)]


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
        ], folded=True)
    ]  # fmt: skip


# after the story, in the order of the page
MAKERS: tuple[Maker, ...] = (
    _overview,
    _stages,
    _events,
    _llc,
    _calibration,
    _watches,
    _provenance,
    _reading,
)
