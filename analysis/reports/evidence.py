"""What speaks for and against each transition of a run: which series led, its type, the schedule, thresholded scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from devmon.analysis.detection.events import Event, lead_lag
from devmon.analysis.detection.results import Detection
from devmon.analysis.run import RunData
from devmon.analysis.series import Series
from devmon.analysis.transitions.mirage import MIRAGE, SURVIVES, Survival, mirage_guard, twins_of
from devmon.analysis.transitions.phases import PhaseType, phase_types
from devmon.analysis.transitions.schedule import ScheduleCheck, schedule_check, schedule_of
from devmon.analysis.transitions.stages import Change, Transition, transitions
from devmon.analysis.wording import number, step
from devmon.errors import DataError

SURE = 0.9  # probability from which one of two events is said to lead


@dataclass(frozen=True)
class Evidence:
    """Sentences about one transition, those that argue against it, and in a word or two whether it is of type A or B."""

    told: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    kind: str = "–"


def evidence(run: RunData, series: Sequence[Series], detection: Detection) -> list[Evidence]:
    """For every transition of the run, in order: what led what, Type A or B, and what argues against it."""
    found = transitions(detection.events)
    if not found:
        return []
    types = _types(series, detection)
    survivals = mirage_guard(detection, twins_of(run, detection.fits))
    checked = _schedule(run, series, [event for one in found for event in one.events])
    rows = []
    for i, one in enumerate(found):
        told = _led(one, detection) + ([] if types is None else [type_in_words(types[i])])
        told += [f"{s.event.series} jumps with its continuous twin {s.twin}." for s in _of(survivals, one, SURVIVES)]
        rows.append(
            Evidence(told, _against(one, survivals, checked), "–" if types is None else type_in_short(types[i]))
        )
    return rows


def type_in_words(kind: PhaseType) -> str:
    """One sentence on Type A or B, with the probability and the two changes it rests on."""
    if kind.start == kind.end:
        return "Type A or B cannot be told: no two checkpoints are its own, another transition is too near."
    if kind.kind == "unresolved":
        return f"Type A or B cannot be told: {kind.note}."
    changes = f"over steps {step(kind.start)}–{step(kind.end)} the loss changes by {_change(kind.loss)}, λ̂ by {_change(kind.llc)}"
    if kind.kind == "unsettled":
        odds = ", ".join(f"{name} {number(p, 2) if p >= 0.01 else '< 0.01'}" for name, p in kind.probabilities.items())
        return f"Type A or B is not settled (probabilities: {odds}): {changes}."
    name = "Neither Type A nor Type B" if kind.kind == "neither" else f"Type {kind.kind}"
    p = kind.probabilities[kind.kind]
    told = f"{name} (probability {'> 0.99' if p > 0.99 else number(p, 2)}): {changes}."
    n = kind.crossing
    if kind.kind == "A" and n is not None and n.probability >= SURE:
        told += (
            f" The later phase has the lower free energy from a sample of about {number(n.n)} on "
            f"[{number(n.interval[0])}, {number(n.interval[1])}]."
        )
    return told


def type_in_short(kind: PhaseType) -> str:
    if kind.kind not in ("A", "B", "neither"):
        return "not settled" if kind.kind == "unsettled" else "–"
    return f"{kind.kind} ({number(kind.probabilities[kind.kind], 2)})"


def _led(one: Transition, detection: Detection) -> list[str]:
    order = sorted(one.events, key=lambda event: event.step)
    if len(order) < 2:
        return []
    first, second = order[0], order[1]
    lag = lead_lag(detection.posterior(first), detection.posterior(second))
    if lag.first >= SURE and first.resolved and second.resolved:
        chance = "> 0.99" if lag.first > 0.99 else number(lag.first, 2)
        return [f"Within it {first.series} led, {step(lag.lag)} steps before {second.series} (probability {chance})."]
    return [f"Within it no series certainly led (earliest: {first.series}, then {second.series})."]


def _types(series: Sequence[Series], detection: Detection) -> list[PhaseType] | None:
    """The types of all transitions; None where the run has no loss, no LLC, or no finite loss."""
    loss, llc = _first(series, "loss"), _first(series, "llc")
    if loss is None or llc is None:
        return None
    try:
        return phase_types(series, detection, loss=loss, llc=llc)
    except DataError:
        return None


def _first(series: Sequence[Series], what: str) -> str | None:
    """The series `what/what` if there is one, else the first called …/what."""
    names = [one.name for one in series if one.name.rpartition("/")[2] == what]
    return f"{what}/{what}" if f"{what}/{what}" in names else names[0] if names else None


def _schedule(run: RunData, series: Sequence[Series], events: Sequence[Event]) -> ScheduleCheck | None:
    schedule = schedule_of(run, series)
    steps = [int(s) for one in series for s in one.steps]
    if schedule is None or max(steps) <= min(steps):
        return None
    if isinstance(schedule, Series):
        events = [event for event in events if event.series != schedule.name]
    try:
        return schedule_check(events, schedule, min(steps), max(steps))
    except DataError:  # learning rates that cannot be read say nothing
        return None


def _against(one: Transition, survivals: Sequence[Survival], checked: ScheduleCheck | None) -> list[str]:
    said = []
    rows = [row for row in checked.rows if row.event in one.events and row.kinks] if checked is not None else []
    if rows:
        most = max(rows, key=lambda row: -row.chance)
        share = f"{len(rows)} of its {len(one.events)} jumps" if len(one.events) > 1 else "its jump"
        said.append(f"{share} {most.note}.")
    said += [f"{s.event.series} jumps only as a thresholded score: {s.note}." for s in _of(survivals, one, MIRAGE)]
    blurred = [event for event in one.events if not event.resolved]
    if blurred:
        note = blurred[0].note or "too few checkpoints"
        share = f"{len(blurred)} of its {len(one.events)} jumps" if len(one.events) > 1 else "its jump"
        verb = "is" if len(blurred) == 1 else "are"
        said.append(f"{share} {verb} not resolved in time ({blurred[0].series}: {note}).")
    return said


def _of(survivals: Sequence[Survival], one: Transition, verdict: str) -> list[Survival]:
    return [s for s in survivals if s.verdict == verdict and s.event in one.events]


def _change(change: Change | None) -> str:
    if change is None:
        return "–"
    text = ("+" if change.value > 0 else "") + number(change.value)
    return text if change.se is None else f"{text} ± {number(change.se, 2)}"
