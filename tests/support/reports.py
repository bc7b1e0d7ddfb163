"""Events, searches and runs of known content, and a reader of pages: for the tests of stages, story and report."""

from __future__ import annotations

import html.parser
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from devmon.analysis.derive.watch_series import series_of
from devmon.analysis.detection.events import Event, Fit, Trend
from devmon.analysis.detection.results import Detection
from devmon.analysis.reports.content import Content, Figure, Panel
from devmon.analysis.reports.findings import Findings, examine, findings_of
from devmon.analysis.reports.prose.story import tell
from devmon.analysis.reports.report import content_of
from devmon.analysis.run import ReadOnce
from devmon.analysis.series import Series
from tests.support.synthetic import Run, induction_run, watch

TEN = np.arange(0, 100, 10)


def jump(series: str, step: float, *, half: float = 5.0, span: float = 50.0, q: float = 0.01, **more: Any) -> Event:
    found = Event("jump", step, (step - half, step + half), 1.0, (0.9, 1.1), 0.1, (step - span, step + span), 0.005, q,
                  True, "", series, p_abrupt=0.001, abrupt=True)  # fmt: skip
    return replace(found, **more)


def detection(
    *events: Event, outcomes: dict[str, str] | None = None, ranges: Mapping[str, float] | None = None
) -> Detection:
    """A search that found these events; `ranges` are those of the smoothed curves, of series that have one."""
    fits: dict[str, Fit] = {}
    for event in events:
        draws = np.linspace(*event.interval, 50)
        known = fits.get(event.series, Fit("EVENTS", series=event.series))
        locations = (*known.locations, (event, draws))
        fits[event.series] = replace(known, found=(*known.found, event), locations=locations)
    fits |= {name: Fit(outcome, series=name) for name, outcome in (outcomes or {}).items()}
    for name, spread in (ranges or {}).items():
        line = spread * np.linspace(0, 1, len(TEN))
        fits[name] = replace(fits[name], trend=Trend(TEN.astype(float), line, line, line))
    return Detection(fits, events, 40, {"n_null": 199, "level": 0.9})


LONG = np.array([0, *np.unique(np.geomspace(1, 1000, 23).astype(int))])


def findings(
    series: list[Series], searched: Detection, run: Run | None = None, verdicts: Mapping[str, Any] | None = None
) -> Findings:
    """What the events of a search say together; `verdicts` are those of LLC watches at each step."""
    estimates = {
        name: xr.Dataset({"verdict": ("step", np.asarray(v)), "llc": ("step", np.ones(len(v)))})
        for name, v in (verdicts or {}).items()
    }
    return findings_of(ReadOnce(run or Run({})), series, searched, estimates)


def told(
    *events: Event, outcomes: dict[str, str] | None = None, verdicts: Any = None, control: bool = False
) -> tuple[str, str, str]:
    """The outcome of such a run, what happened, and what argues against it."""
    names = {event.series for event in events} | set(outcomes or {})
    series = [Series(name, np.arange(0, 1000, 10), np.arange(100.0)) for name in sorted(names)]
    run = Run({}, {"control": control})
    story = tell(findings(series, detection(*events, outcomes=outcomes), run, verdicts))
    answered = (f"{answer.question}: {answer.text}" for answer in story.answers)
    return story.outcome, " ".join([story.lead, *answered, *story.minor]), " ".join(story.against)


class Reader(html.parser.HTMLParser):
    """Collects what a browser would load, all ids, and the balance of tags."""

    VOID = ("meta", "img", "br", "link", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def small_run(**more: Any) -> Run:
    """The induction run with the watches that matter, few enough to be searched in seconds."""
    run = induction_run(**more)
    keep = {"loss": run["loss"].assign_attrs(headline=["loss"]), "llc": run["llc"]}
    return Run(keep | {"induction": run["induction"].isel(layer=[1], head=[0, 2])}, run.attrs)


def sketches(steps: np.ndarray = LONG) -> xr.Dataset:
    """A representation that is one thing before step 100 and another after it, and outputs that follow a bend."""
    rng = np.random.default_rng(0)
    early, late = rng.standard_normal((2, 2, 32, 6))
    late[1] = early[1]  # layer 1 never changes
    states = np.array([early if s < 100 else late for s in steps]) + 0.01 * rng.standard_normal((len(steps), 2, 32, 6))
    line = np.linspace(-1, 1, len(steps))
    path = np.stack([line, np.abs(line)], 1) @ rng.standard_normal((2, 128)) + 0.001 * rng.standard_normal(
        (len(steps), 128)
    )
    variables = {"sketch": (("step", "layer", "item", "feature"), states),
                 "outputs": (("step", "item", "output"), path.reshape(-1, 32, 4)), "spread": line}  # fmt: skip
    return watch(steps, variables, ["spread"], "Sketch")


def circuits(steps: np.ndarray = LONG) -> xr.Dataset:
    edges = np.array([np.arange(4) + (0 if s < 100 else 2) for s in steps])
    data = watch(steps, {"edge_id": (("step", "edge"), edges), "area": np.ones(len(steps))}, ["area"], "Circuit")
    data.attrs["edges"] = 100
    return data


def content(run: Run, *events: Any, outcomes: dict[str, str] | None = None) -> Content:
    """What the report of a run says in which these events were found, and none in any other series."""
    known = {event.series for event in events} | set(outcomes or {})
    more = {one.name: "NO EVENT" for one in series_of(run) if one.name not in known}
    return content_of(examine(run, detection=detection(*events, outcomes=(outcomes or {}) | more)))


def place(panel: Panel, step: float) -> float:
    """Where the page's script puts a step: linear up to the threshold, which has the width of 0.35 / 0.9 decades."""

    def along(x: float) -> float:
        return (
            0.35 / 0.9 * x / panel.threshold if x <= panel.threshold else 0.35 / 0.9 + math.log10(x / panel.threshold)
        )

    low, high = map(along, panel.limits)
    return panel.box[0] + (along(step) - low) / (high - low) * (panel.box[2] - panel.box[0])


def figures(said: Content) -> dict[str, Figure]:
    return {one.name: one for section in said.sections for one in section.blocks if isinstance(one, Figure)}
