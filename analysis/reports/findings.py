"""`examine(run)`: all that the analysis says of a run, made once; story, tables, figures and pages read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import xarray as xr

from devmon.analysis.derive.components import component_llc, is_component_llc
from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.watch_series import is_llc, series_of_watch
from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event
from devmon.analysis.detection.results import Detection
from devmon.analysis.detection.search import detect
from devmon.analysis.reports.prose.evidence import Evidence, evidence
from devmon.analysis.reports.prose.words import Labels, labels_of
from devmon.analysis.run import ReadOnce, RunData, has_rows
from devmon.analysis.series import Series, run_level
from devmon.analysis.transitions.clusters import Transition, transitions
from devmon.analysis.transitions.order import Lag, lags, reference_event
from devmon.analysis.transitions.stages import Stage, stages_between


@dataclass(frozen=True)
class Findings:
    """What the analysis says of a run.

    - `run`: its watches, each read from the store once
    - `series`: every series of it; `detection`: the search of them, or of some of them
    - `events`: in the order of a report, those of the whole run first, then by step
    - `estimates`: of each LLC watch that has rows, λ̂ with its error and verdict (`devmon.analysis.llc`)
    - `components`: of each watch of components, their λ̂ (`devmon.analysis.component_llc`)
    - `transitions`, `stages`: the run cut at its abrupt jumps, in the order of steps
    - `reference`, `lags`: the jump that other events are compared with, and how far behind it they came
    - `evidence`: what speaks for and against each transition, in their order
    - `labels`: what a reader calls each series
    """

    run: ReadOnce
    series: Sequence[Series]
    detection: Detection
    events: Sequence[Event]
    estimates: Mapping[str, xr.Dataset]
    transitions: Sequence[Transition]
    stages: Sequence[Stage]
    reference: Event | None
    lags: Sequence[Lag]
    evidence: Sequence[Evidence]
    labels: Labels = field(default_factory=dict)
    components: Mapping[str, xr.Dataset] = field(default_factory=dict)

    @property
    def main(self) -> Transition | None:
        """The main transition, where there is one."""
        return next((change for change in self.transitions if change.main), None)

    @cached_property
    def by_watch(self) -> dict[str, list[Series]]:
        """The series of every watch, by its name."""
        names = self.run.names()
        return {name: [each for each in self.series if each.name.startswith(f"{name}/")] for name in names}

    @property
    def foremost(self) -> Transition | None:
        """The transition that a report opens with: the main one, else the one that scores highest."""
        return self.main or max(self.transitions, key=lambda change: change.score, default=None)

    @property
    def watches(self) -> dict[str, xr.Dataset]:
        """The rows of every watch, by its name."""
        return {name: self.run[name] for name in self.run.names()}

    @property
    def verdicts(self) -> dict[str, np.ndarray]:
        """The verdict on the estimate at every step, by LLC watch."""
        return {name: np.asarray(data["verdict"].values).astype(str) for name, data in self.estimates.items()}

    @property
    def control(self) -> bool:
        """Whether the run is marked as one in which no transition is expected."""
        return bool(self.run.attrs.get("control"))


def examine(run: RunData, detector: Detector | None = None, detection: Detection | None = None) -> Findings:
    """Derive the series of a run, search them, and gather what their events say together.

    `detection` is that of `series_of(run)`, or of some of these series, where it is known already; else `detector`
    searches. Raises DataError where a series or the traces of an LLC are malformed.
    """
    held = ReadOnce(run)
    watches = {name: held[name] for name in held.names() if has_rows(held[name])}
    estimates = {name: llc(data) for name, data in watches.items() if is_llc(data)}
    components = {name: component_llc(data) for name, data in watches.items() if is_component_llc(data)}
    known = estimates | components
    series = [each for name, data in watches.items() for each in series_of_watch(name, data, estimate=known.get(name))]
    detection = detect(series, detector) if detection is None else detection
    return replace(findings_of(held, series, detection, estimates), components=components)


def findings_of(
    run: ReadOnce, series: Sequence[Series], detection: Detection, estimates: Mapping[str, xr.Dataset] | None = None
) -> Findings:
    """What the events of a searched run say together."""
    changes = transitions(detection)
    parts = stages_between(series, changes)
    # within the main transition, where there is one, else among all
    reference = reference_event(next((change.events for change in changes if change.main), detection.events))
    return Findings(
        run=run,
        series=series,
        detection=detection,
        events=sorted(detection.events, key=lambda event: (not run_level(event.series), event.step, event.series)),
        estimates=estimates or {},
        transitions=changes,
        stages=parts,
        reference=reference,
        lags=lags(detection, reference),
        evidence=evidence(run, series, detection, changes, parts, estimates),
        labels=labels_of(run, series),
    )
