"""What speaks for and against each transition: which series led, its type, the schedule, thresholded scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import xarray as xr

from devmon.analysis.derive.llc_loss import loss_of_llc
from devmon.analysis.detection.events import Event, meet
from devmon.analysis.detection.results import Detection
from devmon.analysis.run import RunData
from devmon.analysis.series import Series
from devmon.analysis.transitions.clusters import Transition
from devmon.analysis.transitions.mirage import Survival, mirage_guard, twins_of
from devmon.analysis.transitions.order import LeadLag, lead_lag
from devmon.analysis.transitions.phases import PhaseType, types_of
from devmon.analysis.transitions.schedule import Coincidence, ScheduleCheck, schedule_check, schedule_of
from devmon.analysis.transitions.stages import Change, Stage
from devmon.analysis.wording import measured, number, step
from devmon.errors import DataError

CONVINCING = 0.9  # probability from which an event is said to lead, and a crossing of free energies is told


@dataclass(frozen=True)
class Evidence:
    """What is known of one transition.

    - `first`, `second`, `lag`: its two earliest events and how far apart they are; `led` where that order is sure
    - `phase`: how loss and λ̂ change over it; None for a run without them
    - `passing`: the peaks and dips of λ̂ within it, which a change across it does not show
    - `kinks`: its events that meet a kink of the learning-rate schedule; None where no schedule is known
    - `survivals`: its events of thresholded scores, with what their continuous twins say
    """

    first: Event | None = None
    second: Event | None = None
    lag: LeadLag | None = None
    phase: PhaseType | None = None
    passing: tuple[Event, ...] = ()
    kinks: tuple[Coincidence, ...] | None = None
    survivals: tuple[Survival, ...] = ()

    @property
    def led(self) -> bool:
        """Whether the first of its events certainly came before the others."""
        if self.first is None or self.second is None or self.lag is None:
            return False
        return self.lag.first >= CONVINCING and self.first.resolved and self.second.resolved


def evidence(
    run: RunData,
    series: Sequence[Series],
    detection: Detection,
    changes: Sequence[Transition],
    parts: Sequence[Stage],
    estimates: Mapping[str, xr.Dataset] | None = None,
) -> list[Evidence]:
    """For every transition of the run, in order: what led what, Type A or B, and what argues against it.

    `changes` are the run's transitions, and `parts` its stages, of which each transition is one; `estimates` are those
    of its LLC watches (`devmon.analysis.llc`).
    """
    if not changes:
        return []
    lambda_hat = _first(series, "llc")
    types = _types(run, series, detection, parts, estimates or {})
    survivals = mirage_guard(detection, twins_of(run, detection.fits))
    checked = _schedule(run, series, [event for change in changes for event in change.events])
    rows = []
    for i, change in enumerate(changes):
        order = sorted(change.events, key=lambda event: event.step)[:2]
        first, second = (order[0], order[1]) if len(order) == 2 else (None, None)
        lag = lead_lag(detection.posterior(first), detection.posterior(second)) if first and second else None
        rows.append(
            Evidence(
                first,
                second,
                lag,
                None if types is None or lambda_hat is None else types[i],
                () if lambda_hat is None else _passing(change, lambda_hat, detection),
                None if checked is None else tuple(r for r in checked.rows if r.event in change.events and r.kinks),
                tuple(survival for survival in survivals if survival.event in change.events),
            )
        )
    return rows


def type_in_words(kind: PhaseType) -> str:
    """One sentence on Type A or B, with the probability and the two changes it rests on."""
    if kind.start == kind.end:
        return "Type A or B cannot be told: no two checkpoints are its own, another transition is too near."
    if kind.kind == "unresolved":
        return f"Type A or B cannot be told: {kind.note}."
    # both changes are told with the steps between which they are, once where these are the same
    steps = {change.steps for change in (kind.loss, kind.llc) if change is not None}
    start, end = steps.pop() if len(steps) == 1 else (kind.start, kind.end)
    loss, llc = (_change(change, (start, end)) for change in (kind.loss, kind.llc))
    changes = f"the loss {loss} and λ̂ {llc} over steps {step(start)}–{step(end)}"
    if kind.kind == "unsettled":
        best = max(kind.probabilities, key=lambda name: kind.probabilities[name])
        likely = "neither type" if best == "neither" else f"Type {best}"
        return (
            f"Not settled between Type A and B (most likely {likely}, {_chance(kind.probabilities[best])}): {changes}."
        )
    name = "Neither Type A nor Type B" if kind.kind == "neither" else f"Type {kind.kind}"
    sentence = f"{name} (probability {_chance(kind.probabilities[kind.kind])}): {changes}."
    n = kind.crossing
    if kind.kind == "A" and n is not None and n.probability >= CONVINCING:
        sentence += (
            f" The later phase has the lower free energy from a sample of about {number(n.n, 2)} on "
            f"[{number(n.interval[0], 2)}, {number(n.interval[1], 2)}]."
        )
    return sentence


def type_in_short(kind: PhaseType) -> str:
    """The type and its probability, for a cell of a table."""
    if kind.start == kind.end or kind.kind == "unresolved":  # as `type_in_words`
        return "–"
    return "not settled" if kind.kind == "unsettled" else f"{kind.kind} ({_chance(kind.probabilities[kind.kind])})"


def _passing(change: Transition, llc: Series, detection: Detection) -> tuple[Event, ...]:
    """The peaks and dips of λ̂ within a transition."""
    own = [event for event in detection.events if event.series == llc.name and event.sure]
    return tuple(event for event in own if event.kind in ("bump", "turn") and meet(event.interval, change.span))


def _types(
    run: RunData,
    series: Sequence[Series],
    detection: Detection,
    parts: Sequence[Stage],
    estimates: Mapping[str, xr.Dataset],
) -> list[PhaseType] | None:
    """The types of all transitions; None where the run has no loss, no LLC, or no finite loss.

    The loss is that of the LLC's own data where the traces hold it: λ̂ and the free energies are of these data.
    """
    loss, llc = _first(series, "loss"), _first(series, "llc")
    watch = "" if llc is None else llc.name.rpartition("/")[0]
    if watch in estimates and watch in run.names():
        loss = loss_of_llc(watch, run[watch], estimates[watch]) or loss
    if loss is None or llc is None:
        return None
    try:
        return types_of([part for part in parts if part.kind == "transition"], loss, llc, detection)
    except DataError:
        return None


def _first(series: Sequence[Series], what: str) -> Series | None:
    """The series `what/what` if there is one, else the first called …/what."""
    alike = [each for each in series if each.name.rpartition("/")[2] == what]
    return min(alike, key=lambda each: each.name != f"{what}/{what}", default=None)


def _schedule(run: RunData, series: Sequence[Series], events: Sequence[Event]) -> ScheduleCheck | None:
    schedule = schedule_of(run, series)
    steps = [int(s) for each in series for s in each.steps]
    if schedule is None or max(steps) <= min(steps):
        return None
    if isinstance(schedule, Series):
        events = [event for event in events if event.series != schedule.name]
    try:
        return schedule_check(events, schedule, min(steps), max(steps))
    except DataError:  # learning rates that cannot be read say nothing
        return None


def _chance(p: float) -> str:
    return "> 0.99" if p > 0.99 else number(p, 2)


def _change(change: Change | None, steps: tuple[float, float]) -> str:
    """Which way and by how much, and its own steps where they are not these."""
    if change is None:
        return "is not known"
    text = f"{'rises' if change.value > 0 else 'falls'} by {measured(abs(change.value), change.se)}"
    return text if change.steps == steps else f"{text} (steps {step(change.steps[0])}–{step(change.steps[1])})"
