"""What speaks for and against each transition: which series led, its type, the schedule, thresholded scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import xarray as xr

from devmon.analysis.derive.llc_loss import loss_of_llc
from devmon.analysis.detection.events import Event, meet
from devmon.analysis.detection.results import Detection
from devmon.analysis.run import RunData
from devmon.analysis.series import Series
from devmon.analysis.transitions.clusters import Transition
from devmon.analysis.transitions.mirage import MIRAGE, SURVIVES, Survival, mirage_guard, twins_of
from devmon.analysis.transitions.order import lead_lag
from devmon.analysis.transitions.phases import PhaseType, types_of
from devmon.analysis.transitions.schedule import ScheduleCheck, schedule_check, schedule_of
from devmon.analysis.transitions.stages import Change, Stage
from devmon.analysis.wording import listed, number, step
from devmon.errors import DataError

CONVINCING = 0.9  # probability from which an event is said to lead, and a crossing of free energies is told


@dataclass(frozen=True)
class Evidence:
    """Sentences about one transition, those that argue against it, and in a word or two if it is of type A or B."""

    sentences: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    kind: str = "–"


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
        own = [survival for survival in survivals if survival.event in change.events]
        sentences = _led(change, detection)
        if types is not None and lambda_hat is not None:
            sentences += [type_in_words(types[i]), *_passing(change, lambda_hat, detection)]
        sentences += [
            f"{s.event.series} jumps with its continuous twin {s.twin}." for s in own if s.verdict == SURVIVES
        ]
        kind = "–" if types is None else type_in_short(types[i])
        rows.append(Evidence(sentences, _against(change, own, checked), kind))
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
    changes = f"over steps {step(start)}–{step(end)} the loss changes by {loss}, λ̂ by {llc}"
    if kind.kind == "unsettled":
        odds = ", ".join(f"{name} {number(p, 2) if p >= 0.01 else '< 0.01'}" for name, p in kind.probabilities.items())
        return f"Type A or B is not settled (probabilities: {odds}): {changes}."
    name = "Neither Type A nor Type B" if kind.kind == "neither" else f"Type {kind.kind}"
    sentence = f"{name} (probability {_chance(kind.probabilities[kind.kind])}): {changes}."
    n = kind.crossing
    if kind.kind == "A" and n is not None and n.probability >= CONVINCING:
        sentence += (
            f" The later phase has the lower free energy from a sample of about {number(n.n)} on "
            f"[{number(n.interval[0])}, {number(n.interval[1])}]."
        )
    return sentence


def type_in_short(kind: PhaseType) -> str:
    """The type and its probability, for a cell of a table."""
    if kind.start == kind.end or kind.kind == "unresolved":  # as `type_in_words`
        return "–"
    return "not settled" if kind.kind == "unsettled" else f"{kind.kind} ({_chance(kind.probabilities[kind.kind])})"


def _led(change: Transition, detection: Detection) -> list[str]:
    """Which series led within a transition, where its first two events are resolved and their order is sure."""
    order = sorted(change.events, key=lambda event: event.step)
    if len(order) < 2:
        return []
    first, second = order[0], order[1]
    lag = lead_lag(detection.posterior(first), detection.posterior(second))
    if lag.first >= CONVINCING and first.resolved and second.resolved:
        how = f"{step(lag.lag)} steps before {second.series} (probability {_chance(lag.first)})"
        return [f"Within it {first.series} led, {how}."]
    return [f"Within it no series certainly led (earliest: {first.series}, then {second.series})."]


def _passing(change: Transition, llc: Series, detection: Detection) -> list[str]:
    """The peaks and dips of λ̂ within a transition, which a change across it does not show."""
    own = [event for event in detection.events if event.series == llc.name and event.sure]
    inside = [event for event in own if event.kind in ("bump", "turn") and meet(event.interval, change.span)]
    return [f"Within it {listed(map(Event.in_words, inside))}."] if inside else []


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


def _against(change: Transition, survivals: Sequence[Survival], checked: ScheduleCheck | None) -> list[str]:
    """Events at a kink of the schedule, of a thresholded score alone, and those not resolved in time."""
    said = []
    rows = [row for row in checked.rows if row.event in change.events and row.kinks] if checked is not None else []
    if rows:
        said.append(f"{_of_its_events(rows, change)} {min(rows, key=lambda row: row.chance).note}.")
    said += [f"{s.event.series} jumps only as a thresholded score: {s.note}." for s in survivals if s.verdict == MIRAGE]
    if blurred := [event for event in change.events if not event.resolved]:
        note = f"{blurred[0].series}: {blurred[0].note or 'too few checkpoints'}"
        verb = "is" if len(blurred) == 1 else "are"
        said.append(f"{_of_its_events(blurred, change)} {verb} not resolved in time ({note}).")
    return said


def _of_its_events(some: Sequence[object], change: Transition) -> str:
    return f"{len(some)} of its {len(change.events)} events" if len(change.events) > 1 else "its jump"


def _chance(p: float) -> str:
    return "> 0.99" if p > 0.99 else number(p, 2)


def _change(change: Change | None, steps: tuple[float, float]) -> str:
    """A change with its error, and its own steps where they are not these."""
    if change is None:
        return "–"
    text = ("+" if change.value > 0 else "") + number(change.value)
    text += "" if change.se is None else f" ± {number(change.se, 2)}"
    return text if change.steps == steps else f"{text} (steps {step(change.steps[0])}–{step(change.steps[1])})"
