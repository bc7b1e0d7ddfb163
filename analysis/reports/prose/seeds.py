"""What several runs say together, in sentences: what happens in all of them, when, and in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from devmon.analysis.derive.watch_series import series_of
from devmon.analysis.reports.prose.words import Labels, called, labels_of, naming, sentence
from devmon.analysis.run import ReadOnce, RunData
from devmon.analysis.runs.compare import NOT_ENOUGH, Matched, RunsComparison
from devmon.analysis.series import run_level
from devmon.analysis.transitions.clusters import Transition, transitions
from devmon.analysis.wording import count, listed, number, step

CLAUSES = 3  # changes told with the transition, others that all runs share, and orders
LEAST = 6  # runs of one order of two events at which a sign test can have p ≤ 0.05: 2 · 0.5⁶ = 0.03


def together(comparison: RunsComparison, labels: Labels) -> list[str]:
    """The sentences, of a comparison of two runs or more that have events."""
    runs = list(comparison.detections)
    mains = {
        run: main
        for run, found in comparison.detections.items()
        if (main := next((change for change in transitions(found) if change.main), None)) is not None
    }
    shared = [match for match in comparison.matched if len(match.events) > 1 and run_level(match.series)]
    within = [match for match in shared if _within(match, mains)]
    parts = [_lead(runs, mains, within, labels)]
    rest = [match for match in shared if len(match.events) == len(runs) and match not in within]
    if rest:
        words = [f"{_words(match, labels)} near step {step(match.step)}" for match in rest]
        parts.append(f"All of them show too: {listed(words[:CLAUSES])}{_more(len(words) - CLAUSES)}")
    parts.append(_order(comparison, within or shared, labels))
    return [sentence(part) for part in parts if part]


def labels_together(runs: Mapping[str, RunData]) -> Labels:
    """What a reader calls the series of all runs."""
    labels: dict[str, object] = {}
    for run in runs.values():
        held = ReadOnce(run)
        labels |= labels_of(held, series_of(held))
    return labels  # type: ignore[return-value]


def _lead(runs: Sequence[str], mains: Mapping[str, Transition], within: Sequence[Matched], labels: Labels) -> str:
    """The transition that runs share, and where; that they share none where it is so."""
    if len(mains) < 2:
        return f"no two of the {len(runs)} runs have a transition of the whole run"
    found = [naming(change.events, labels) for change in mains.values()]
    named = Counter((event.series, words) for event, words in found if event is not None)
    series, words = named.most_common(1)[0][0] if named else ("", "")
    what = f"the model {words}" if words else "several series change together"
    steps = np.array([change.step for change in mains.values()])
    where = f"in the median at step {step(float(np.median(steps)))}, from {step(steps.min())} to {step(steps.max())}"
    jumps = [match for match in within if match.kind == "jump"]
    clauses = [_words(match, labels) for match in sorted(jumps, key=lambda match: match.series != series)]
    with_it = f": {listed(clauses[:CLAUSES])}" if clauses else ""
    return f"in {len(mains)} of {len(runs)} runs {what}, {where}{with_it}"


def _within(match: Matched, mains: Mapping[str, Transition]) -> bool:
    """Whether the match is part of the main transition in at least two of its runs."""
    held = [any(event is other for other in mains[run].events) for run, event in match.events.items() if run in mains]
    return sum(held) > 1


def _words(match: Matched, labels: Labels) -> str:
    """A matched event as a clause, with its median size over runs."""
    name, events = called(labels, match.series), match.events.values()
    if match.kind != "jump":
        return f"a {match.word} of {name}"
    unit = labels[match.series].unit if match.series in labels else ""
    size = number(abs(float(np.median([event.size for event in events]))), 2)
    return f"{name} {'rises' if match.sign > 0 else 'falls'} by {size} {unit}".rstrip()


def _order(comparison: RunsComparison, matches: Sequence[Matched], labels: Labels) -> str:
    """Which of the jumps of a transition come first, by sign tests over runs."""
    jumps = [match for match in matches if match.kind == "jump"][: CLAUSES + 1]
    settled, tested = [], 0
    for a, b in combinations(jumps, 2):
        test = comparison.lead_lag(a, b)
        tested += bool(test.lags) and test.outcome != NOT_ENOUGH
        if test.outcome in ("a first", "b first"):
            first, second = (a, b) if test.outcome == "a first" else (b, a)
            times = max(test.a_first, test.b_first)
            told = f"{called(labels, first.series)} before {called(labels, second.series)} ({times} of {len(test.lags)}"
            settled.append(f"{told}, by {step(abs(test.lag))} steps)")
    if settled:
        return f"what comes first: {listed(settled[:CLAUSES])}{_more(len(settled) - CLAUSES)}"
    if len(jumps) < 2:
        return ""
    if not tested:
        few = count(len(comparison.detections), "run")
        return f"what comes first cannot be told from {few}: {LEAST} that agree are the fewest"
    return "no order of its changes holds over runs"


def _more(n: int) -> str:
    return f" and {n} more" if n > 0 else ""
