"""Events in the words of a talk: what a series is called, which way it went, by how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import xarray as xr

from devmon.analysis.detection.events import Event
from devmon.analysis.labels import Label, distinct, label_of
from devmon.analysis.run import ReadOnce
from devmon.analysis.series import Series
from devmon.analysis.wording import measured, number, step

Z90 = 1.645  # half-width of a 90% interval, in standard errors
Labels = Mapping[str, Label]


def labels_of(run: ReadOnce, series: Iterable[Series]) -> dict[str, Label]:
    """What each series of a run is called."""
    names = run.names()
    labels = {}
    for each in series:
        watch, _, rest = each.name.partition("/")
        variable, _, element = rest.partition("[")
        whole = variable.removesuffix(" max")
        part = element.rstrip("]") if element else "max" if whole != variable else ""
        data = run[watch] if watch in names else xr.Dataset()
        labels[each.name] = label_of(watch if rest else "", data, whole or watch, part)
    return distinct(labels)


def called(labels: Labels, name: str) -> str:
    """The short name of a series; its key where it has none."""
    return labels[name].short if name in labels else name


def error_of(event: Event) -> float:
    """The standard error of an event's size."""
    return (event.size_interval[1] - event.size_interval[0]) / 2 / Z90


def amount(event: Event, labels: Labels, digits: int | None = None) -> str:
    """The size of an event with its unit, to `digits`, or to those that its error carries."""
    unit = labels[event.series].unit if event.series in labels else ""
    size = abs(event.size)
    words = measured(size, error_of(event), error=False) if digits is None else number(size, digits)
    return f"{words} {unit}".rstrip()


def clause(event: Event, labels: Labels, digits: int | None = None) -> str:
    """What a series does in an event: "gain on repeats rises by 4.5 nats per token"."""
    name = called(labels, event.series)
    if event.kind == "jump":
        return f"{name} {'rises' if event.size > 0 else 'falls'} by {amount(event, labels, digits)}"
    size = f" of {amount(event, labels, digits)}" if event.kind == "bump" else ""
    return f"{name} has a {event.word}{size}"


def placed(event: Event, labels: Labels) -> str:
    """The clause with its step and interval."""
    return f"{clause(event, labels)} at step {at(event)}"


def at(event: Event) -> str:
    """The step of an event with its 90% interval."""
    return f"{step(event.step)} [{step(event.interval[0])}, {step(event.interval[1])}]"


def joined(events: Sequence[Event], labels: Labels) -> str:
    """Clauses in a row, sizes to two digits; the verb is told once for neighbours that go the same way ("a rises by 1
    and b by 2")."""
    parts, last = [], ""
    for event in events:
        words = clause(event, labels, 2)
        verb = " rises by " if event.size > 0 else " falls by "
        if event.kind == "jump" and verb == last:
            words = words.replace(verb, " by ", 1)
        last = verb if event.kind == "jump" else ""
        parts.append(words)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def share(event: Event, series: Mapping[str, Series]) -> float:
    """The size of an event as a share of the range of its series."""
    values = np.zeros(0) if event.series not in series else np.asarray(series[event.series].values, dtype=float)
    spread = float(np.ptp(values[np.isfinite(values)])) if len(values) else 0.0
    return abs(event.size) / spread if spread else 0.0


def naming(events: Iterable[Event], labels: Labels) -> tuple[Event | None, str]:
    """The event that names a transition, and what the model does in it ("learns induction"); None and "" where none
    of them has a name."""
    found: list[tuple[int, bool, float, Event, str]] = []
    for event in events:
        label = labels.get(event.series)
        words = "" if label is None else label.rises if event.size > 0 else label.falls
        if label is not None and words and event.kind == "jump":
            found.append((label.rank, not event.abrupt, event.p_value, event, words))
    if not found:
        return None, ""
    _, _, _, event, words = min(found, key=lambda row: row[:3])
    return event, words


def sentence(words: str) -> str:
    """With a capital, unless it begins with a symbol, and a full stop."""
    first = words[:1].upper() if words[:1].isascii() else words[:1]
    return f"{first}{words[1:]}."


def chance(p: float) -> str:
    """A small probability, once: to one digit, or that it is below 0.0001."""
    return "below 0.0001" if p < 1e-4 else number(p, 1)
