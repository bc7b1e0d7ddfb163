"""What a search of many series returns: `Detection`, as events, a table or JSON, with where the numbers came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from devmon.analysis.detection.events import Event, Fit
from devmon.analysis.series import Array, run_level
from devmon.analysis.table import Row, Table, table_html
from devmon.analysis.wording import interval_text, number, step


@dataclass(frozen=True)
class Detection:
    """Every series of a run, searched. `family` is the number of tests the q-values account for.

    `provenance` says which versions searched which data: the run's identity where it has one, and for each series its
    points, steps, units, whether it came with standard errors, and a SHA-256 of steps, values, errors and rejections.
    """

    fits: Mapping[str, Fit]
    events: tuple[Event, ...]
    family: int
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """One outcome for the run: EVENTS if any event is sure, else that of the series that say the most."""
        if any(event.sure for event in self.events):
            return "EVENTS"
        outcomes = {fit.outcome for fit in self.fits.values()}
        if outcomes & {"EVENTS", "NO EVENT"}:  # events that do not stand after correction are none
            return "NO EVENT"
        return "SAMPLER REJECTED" if outcomes == {"SAMPLER REJECTED"} else "UNRESOLVED"

    def posterior(self, event: Event) -> tuple[Array, Array]:
        """Location posterior of one of the events."""
        return self.fits[event.series].posterior(event)

    def to_frame(self) -> pd.DataFrame:
        """One row an event; a series without one has a row with its outcome, and no kind.

        `low` and `high` are the ends of the interval of `step`; those of the other pairs are `size_low`, `span_low`, …
        """
        rows: list[dict[str, Any]] = []
        for name, fit in self.fits.items():
            mine = [event for event in self.events if event.series == name]
            rows += [{"outcome": fit.outcome} | _row(event) for event in mine]
            if not mine:
                rows.append({"series": name, "outcome": fit.outcome, "note": "; ".join(fit.notes)})
        place, chance = "kind series step low high size size_low size_high width span_low span_high", "p_value q_value"
        columns = f"{place} {chance} p_abrupt abrupt resolved outcome note".split()
        return pd.DataFrame(rows, columns=columns)

    def to_json(self) -> str:
        """Events, outcomes, settings and provenance as JSON text, null where a number is not known."""
        outcomes = {
            name: {"outcome": fit.outcome, "notes": list(fit.notes), "smallest": fit.smallest,
                   "noise": None if fit.noise is None else fit.noise.source}
            for name, fit in self.fits.items()
        }  # fmt: skip
        body = {"family": self.family, "settings": dict(self.settings), "provenance": dict(self.provenance)}
        events = [event.to_dict() for event in self.events]
        return json.dumps({**body, "series": outcomes, "events": events}, indent=1, allow_nan=False)

    def _repr_html_(self) -> str:
        """The outcome, the events, and how many series have none."""
        events = sorted(self.events, key=lambda event: (not run_level(event.series), event.step, event.series))
        silent = set(self.fits) - {event.series for event in events}
        searched = f"{len(self.fits)} series, {self.family} tests, {len(silent)} series without an event"
        return f"<p><b>{self.outcome}</b>: {searched}</p>" + table_html(events_table(events, self.family))


def events_table(events: Sequence[Event], family: int) -> Table:
    """One row an event; those that do not stand among `family` tests are weak."""
    places = ["series", "event", "step [90%]", "size [90%]", "width\n(decades)"]
    rows = []
    for event in events:
        place = f"{step(event.step)} {interval_text(event.interval, step)}"
        size = f"{number(event.size)} {interval_text(event.size_interval, number)}"
        resolved = "yes" if event.resolved else f"no: {event.note}" if event.note else "no"
        chance = [number(event.p_value, 2), number(event.q_value, 2)]
        cells = [event.series, event.word, place, size, number(event.width, 2), *chance, resolved]
        rows.append(Row(cells, weak=not event.sure))
    note = "Grey: q > 0.05, does not stand among all tests." if any(row.weak for row in rows) else ""
    columns = [*places, "p", f"q\n(of {family})", "resolved"]
    return Table(columns, rows, note if rows else "No event in any series; each one's outcome is listed here.", "long")


def _row(event: Event) -> dict[str, Any]:
    row = event.to_dict()
    for name, prefix in (("interval", ""), ("size_interval", "size_"), ("span", "span_")):
        row[prefix + "low"], row[prefix + "high"] = row.pop(name) or (None, None)
    return row
