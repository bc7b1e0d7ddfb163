"""`transitions(detection)`: events of several series that belong together, and which of these clusters is the main one.

A cluster is ranked by what it is made of. Each watch counts for the largest share of a series' range that surely
changes, so that its variables, heads and layers count once; the score is their sum: as many watches as would score so
by changing wholly, abruptly and resolved in time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from devmon.analysis.detection.events import Event, Fit, meet
from devmon.analysis.series import run_level
from devmon.analysis.transitions.schedule import is_rate
from devmon.analysis.wording import count, step

if TYPE_CHECKING:
    from devmon.analysis.detection.results import Detection

CHANGES = ("jump", "bump")  # kinds that may be abrupt; the others, turns and plateaus, need only be there

# What an event counts for is multiplied by it once for each weakness: not resolved, not abrupt, badly placed. Below one
# half, so that one weak event of a run's only watch is no main transition; nearer 0 weak events hardly count.
WEAK = 0.4
# The main transition scores at least this share of the number of watches that were searched: half of what was watched
# changes in it. Higher, and what all but one of three or four watches show is not enough.
HALF = 0.5
# But of many watches no more is asked than this many, for some watch what cannot change. In a language model without
# repeats three things learned early, within a factor of two in steps, come to 2.2; a transition of induction heads with
# the same watches comes to 4 and more.
ENOUGH = 3.0


@dataclass(frozen=True)
class Transition:
    """Events of several series that belong together.

    - `step`: the median of the abrupt events' estimates; `interval` spans their 90% intervals, `span` their t10 to t90.
      Events with a wide interval count for these only where all have one.
    - `events`: the abrupt events of the whole run's series, then what else changes in them at that place
    - `watches`: for each watch the share of a series' range, 0 to 1, that surely changes (the near end of the size's
      interval), less by WEAK for each weakness: the largest of its events. The range is that of the smoothed curve;
      where there is none it counts as changed wholly.
    - `main`: whether it is the run's main transition; the others are minor events
    """

    step: float
    interval: tuple[float, float]
    span: tuple[float, float]
    events: tuple[Event, ...]
    watches: Mapping[str, float] = field(default_factory=dict)
    main: bool = False

    @property
    def score(self) -> float:
        """The sum over its watches: as many as would score so by changing wholly, abruptly and resolved."""
        return float(sum(self.watches.values()))

    def to_dict(self) -> dict[str, Any]:
        """Its numbers for JSON; of the events their series, kind and step."""
        events = [{"series": event.series, "kind": event.kind, "step": event.step} for event in self.events]
        place = {"step": self.step, "interval": list(self.interval), "span": list(self.span)}
        return {"main": self.main, **place, "score": self.score, "watches": dict(self.watches), "events": events}


def transitions(detection: Detection, kinds: Collection[str] = ("jump",)) -> list[Transition]:
    """Clusters of sure run-level events of these `kinds`, in the order of their steps; at most one is `main`. Those of
    the learning rate are the schedule's, and in none.

    Jumps and bumps must be abrupt. Beginning with the best located event, another joins it when the 90% interval of
    each meets the extent of the other. The extent of a jump is its interval together with its t10-t90 span: two rises
    that go on at the same time are one transition even where their midpoints are told apart. Rises, falls and bumps
    that are not abrupt belong to a transition in the same way, but make none; of several, to that which scores highest
    without them.
    """
    sure = sorted(
        (e for e in detection.events if e.sure and run_level(e.series) and not is_rate(e.series)),
        key=lambda event: (np.log((event.interval[1] + 1) / (event.interval[0] + 1)), event.step, event.series),
    )
    left = [e for e in sure if e.kind in kinds and (e.abrupt or e.kind not in CHANGES)]
    beside = [e for e in sure if e.kind in CHANGES and e not in left] if set(kinds) & set(CHANGES) else []
    # the abrupt events alone, then what else belongs to each
    groups = []
    while left:
        members = [event for event in left if _together(left[0], event)]
        left = [event for event in left if event not in members]
        groups.append(members)
    groups.sort(key=lambda members: -sum(made_of(members, detection.fits).values()))
    clusters = []
    for members in groups:
        with_it = [event for event in beside if _together(members[0], event)]
        beside = [event for event in beside if event not in with_it]
        placed = [event for event in members if not event.wide] or members
        clusters.append(
            Transition(
                step=float(np.median([event.step for event in placed])),
                interval=(min(e.interval[0] for e in placed), max(e.interval[1] for e in placed)),
                span=(min(e.extent[0] for e in placed), max(e.extent[1] for e in placed)),
                events=(*members, *with_it),
                watches=made_of([*members, *with_it], detection.fits),
            )
        )
    return sorted(_ranked(clusters, detection.fits), key=lambda transition: transition.step)


def main_first(changes: Iterable[Transition]) -> list[Transition]:
    """The main transition, if there is one, then the minor events in the order of their steps."""
    return sorted(changes, key=lambda change: (not change.main, change.step))


def headline(changes: Iterable[Transition]) -> str:
    """In words the main transition and the minor events, and at which steps; nothing where there are none."""
    changes = list(changes)
    minor = [step(change.step) for change in changes if not change.main]
    where = f"{count(len(minor), 'minor event')}, at about {'step' if len(minor) == 1 else 'steps'} {', '.join(minor)}"
    main = next((change for change in changes if change.main), None)
    if main is None:
        return f"no main transition, but {where}" if minor else ""
    return f"one main transition, at about step {step(main.step)}" + (f", and {where}" if minor else "")


def watch_of(series: str) -> str:
    """The watch of a series `watch/variable[element]`; a series without one is its own."""
    name = series.partition("[")[0]
    return name.rpartition("/")[0] or name


def made_of(events: Iterable[Event], fits: Mapping[str, Fit]) -> dict[str, float]:
    """What each watch of these events counts for, the largest first."""
    watches: dict[str, float] = {}
    for event in events:
        watch = watch_of(event.series)
        watches[watch] = max(_counts(event, fits.get(event.series)), watches.get(watch, 0.0))
    return dict(sorted(watches.items(), key=lambda item: -item[1]))


def _counts(event: Event, fit: Fit | None) -> float:
    """The share of its series' range that an event surely changes, less by WEAK for each of its weaknesses."""
    low, high = event.size_interval
    sure = max(low, -high, 0.0)
    spread = 0.0 if fit is None or fit.trend is None else float(np.ptp(fit.trend.mean))
    share = min(sure / spread, 1.0) if spread else float(sure > 0)
    weaknesses = (not event.resolved) + (event.kind in CHANGES and not event.abrupt) + event.wide
    return share * WEAK**weaknesses


def _ranked(clusters: list[Transition], fits: Mapping[str, Fit]) -> list[Transition]:
    """The clusters, of which that with the highest score is the main one if it is high enough."""
    found = ("EVENTS", "NO EVENT")
    searched = {watch_of(name) for name, fit in fits.items() if fit.outcome in found and not is_rate(name)}
    best = max(clusters, key=lambda change: (change.score, len(change.events)), default=None)
    # to a tenth: a watch that changes by .95 of its range has changed
    if best is None or round(best.score, 1) < min(HALF * len(searched), ENOUGH):
        return clusters
    return [replace(change, main=True) if change is best else change for change in clusters]


def _together(a: Event, b: Event) -> bool:
    return meet(a.interval, b.extent) and meet(b.interval, a.extent)
