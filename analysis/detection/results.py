"""What a search of many series returns: `Detection`, as events, a table or JSON, with where the numbers came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd

from devmon.analysis.detection.events import Event, Fit
from devmon.analysis.series import Array, Series, run_level
from devmon.analysis.table import Row, Table, table_html
from devmon.analysis.wording import interval_text, number, step

COLUMNS = (
    "kind", "series", "step", "low", "high", "size", "size_low", "size_high", "width", "span_low", "span_high",
    "p_value", "q_value", "p_abrupt", "abrupt", "resolved", "outcome", "note",
)  # fmt: skip


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
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def to_json(self) -> str:
        """Events, outcomes, settings and provenance as JSON text, null where a number is not known."""
        outcomes = {
            name: {
                "outcome": fit.outcome,
                "notes": list(fit.notes),
                "smallest": fit.smallest,
                "noise": None if fit.noise is None else fit.noise.source,
            }
            for name, fit in self.fits.items()
        }
        body = {"family": self.family, "settings": dict(self.settings), "provenance": dict(self.provenance)}
        events = [event.to_dict() for event in self.events]
        return json.dumps({**body, "series": outcomes, "events": events}, indent=1, allow_nan=False)

    def _repr_html_(self) -> str:
        """The outcome, the events, and how many series have none."""
        events = sorted(self.events, key=lambda event: (not run_level(event.series), event.step, event.series))
        silent = len(self.fits) - len({event.series for event in events})
        searched = f"{len(self.fits)} series, {self.family} tests, {silent} series without an event"
        return f"<p><b>{self.outcome}</b>: {searched}</p>" + table_html(events_table(events, self.family))


def events_table(events: Sequence[Event], family: int) -> Table:
    """One row an event; those that do not stand among `family` tests are weak."""
    columns = [
        "series",
        "event",
        "step [90%]",
        "size [90%]",
        "width\n(decades)",
        "p",
        f"q\n(of {family})",
        "resolved",
    ]
    rows = []
    for event in events:
        place = f"{step(event.step)} {interval_text(event.interval, step)}"
        size = f"{number(event.size)} {interval_text(event.size_interval, number)}"
        resolved = "yes" if event.resolved else f"no: {event.note}" if event.note else "no"
        chance = [number(event.p_value, 2), number(event.q_value, 2)]
        cells = [event.series, event.word, place, size, number(event.width, 2), *chance, resolved]
        rows.append(Row(cells, weak=not event.sure))
    note = "Grey: q > 0.05, does not stand among all tests." if any(row.weak for row in rows) else ""
    return Table(columns, rows, note if rows else "No event in any series; each one's outcome is listed here.", "long")


def provenance(run: Any, searched: Iterable[Series]) -> dict[str, Any]:
    """The versions, the identity of the run (or the name of the file) and that of every series."""
    attrs = getattr(run, "attrs", None)
    known = {key: attrs[key] for key in ("run_id", "seed", "created") if key in attrs} if attrs else {}
    source = {"file": os.path.basename(run)} if isinstance(run, str | os.PathLike) else {}
    versions = {name: version(name) for name in ("devmon", "numpy", "scipy")}
    return {"versions": versions, "run": {**known, **source}, "series": {s.name: _identity(s) for s in searched}}


def _identity(series: Series) -> dict[str, Any]:
    steps = np.asarray(series.steps, dtype=np.float64)
    digest = hashlib.sha256()
    for part in (series.steps, series.values, series.se, series.rejected, series.replicates):
        digest.update(b"none" if part is None else np.ascontiguousarray(part, dtype=np.float64).tobytes())
    ends = [float(steps[0]), float(steps[-1])] if len(steps) else []
    rejected = 0 if series.rejected is None else int(np.sum(series.rejected))
    return {"points": len(steps), "steps": ends, "units": series.units, "se": series.se is not None,
            "rejected": rejected, "sha256": digest.hexdigest()}  # fmt: skip


def _row(event: Event) -> dict[str, Any]:
    row = event.to_dict()
    for name, prefix in (("interval", ""), ("size_interval", "size_"), ("span", "span_")):
        row[prefix + "low"], row[prefix + "high"] = row.pop(name) or (None, None)
    return row
