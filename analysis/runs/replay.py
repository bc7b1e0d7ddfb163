"""Replay of published curves from the user's own copy: what the detector finds in each seed, against published
boundaries.

A boundary counts as found where an event lies within a tolerance of it in step. The comparison with chance turns the
events of each seed around the circle of log step: a search that reports many events finds many boundaries by luck.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from devmon.analysis.derive.tables.log_files import read_table
from devmon.analysis.derive.tables.table_rows import series_of_rows
from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event, Fit
from devmon.analysis.series import Array
from devmon.analysis.transitions.agreement import SHIFTS
from devmon.errors import DataError

STEP_TOLERANCE = 0.10  # share of the step by which an event may be off
PICKLES = (".pkl", ".pickle")


@dataclass(frozen=True)
class Replay:
    """Every seed searched (`fits`), and one row of `table` for each seed and boundary, and for each event beside them.

    - columns of `table`: `seed`; `boundary` (None for an event that belongs to none); `found`; of the event given to
      the boundary (each to one at most) `kind`, `step`, the interval `low` to `high`, `p_value`, `off` = step /
      boundary - 1; and whether the boundary lies `inside` the interval
    - `hits` of `of` boundaries are found over all seeds, `further` events beside them
    - `expected`: how many turned events find; `p_value`: the share of turns with as many (None without boundaries or
      events)
    - `notes`: what was done to the rows, such as those that a resumption superseded
    """

    fits: Mapping[str, Fit]
    table: pd.DataFrame
    hits: int
    of: int
    further: int
    expected: float | None
    p_value: float | None
    provenance: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def to_text(self) -> str:
        """The table and a summary, for a terminal."""
        seeds = len(self.fits)
        outcomes = "; ".join(f"{name or 'all rows'}: {fit.outcome}" for name, fit in self.fits.items())
        lines = [f"{seeds} seed{'s' * (seeds != 1)}. {outcomes}", *self.notes]
        if len(self.table):
            shown = self.table.astype(object).where(self.table.notna(), "–")
            lines += [shown.to_string(index=False, float_format=lambda v: f"{v:.5g}")]
        if self.of:
            within = f"within {self.provenance['tolerance']:.0%} of the step"
            lines.append(f"{self.hits} of {self.of} boundaries found {within}; {self.further} events beside them")
        if self.p_value is not None:
            lines.append(f"events turned around the run find {self.expected:.2g} of them; p = {self.p_value:.3g}")
        return "\n".join(lines)


def replay(
    path: str | os.PathLike[str],
    *,
    step: str,
    value: str,
    seed: str | None = None,
    error: str | None = None,
    boundaries: Sequence[float] = (),
    where: Mapping[str, Any] | None = None,
    tolerance: float = STEP_TOLERANCE,
    detector: Detector | None = None,
    allow_pickle: bool = False,
) -> Replay:
    """Search each seed of a table in CSV (or a pickled DataFrame) and compare with published boundaries.

    `step`, `value`, `seed` and `error` (standard errors) name columns; `where` keeps the rows in which columns have the
    given values. Unpickling runs code that the file holds, so it must be allowed: do so for files that you trust.
    """
    if not 0 < tolerance < 1:
        raise DataError(f"tolerance is a share of the step between 0 and 1, got {tolerance}")
    bounds = np.asarray(boundaries, dtype=np.float64)
    if bounds.ndim != 1 or not np.all(np.isfinite(bounds) & (bounds > 0)):
        raise DataError(f"boundaries are steps above 0, got {list(boundaries)}")
    detector = Detector() if detector is None else detector
    table = _rows(read(path, allow_pickle=allow_pickle), where or {})
    fits, ends, rows = {}, {}, []
    groups, notes = _by_seed(table, seed)
    for name, rows_of_seed in groups:
        series = series_of_rows(rows_of_seed, step, value, error, name=f"seed {name}" if name else "")
        notes += [f"seed {name}: {note}" if name else note for note in series.notes]
        fits[name] = detector.fit_all([replace(series, name=name)])[0]
        ends[name] = float(series.steps[0]), float(series.steps[-1])
        rows += _compare(name, fits[name].events(), bounds, tolerance)
    compared = pd.DataFrame(
        rows, columns=["seed", "boundary", "found", "kind", "step", "low", "high", "p_value", "off", "inside"]
    )
    hits, of = int(compared["found"].sum()), len(bounds) * len(fits)
    further = int(compared["boundary"].isna().sum())
    expected, p = _by_chance(fits, ends, bounds, tolerance)
    columns = {"step": step, "value": value, "seed": seed, "error": error}
    provenance = {
        "file": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(), "columns": columns,
        "where": dict(where or {}), "tolerance": tolerance, "detector": asdict(detector), "devmon": version("devmon"),
    }  # fmt: skip
    return Replay(fits, compared, hits, of, further, expected, p, provenance, tuple(notes))


def read(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> pd.DataFrame:
    """A table from a CSV file, or from a pickled DataFrame where that is allowed."""
    if Path(path).suffix.lower() not in PICKLES:
        return read_table(path)
    if not allow_pickle:
        raise DataError(
            f"{path} is a pickle, and unpickling runs code that the file holds: allow it (allow_pickle=True, "
            "--allow-pickle) if you trust the file, or save it as CSV"
        )
    if not Path(path).is_file():
        raise DataError(f"no file {path}")
    try:
        table = pd.read_pickle(path)
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        IndexError,
        ValueError,
        TypeError,
    ) as problem:
        raise DataError(f"{path} does not unpickle here ({problem}): save it as CSV where it was made") from None
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"{path} holds a {type(table).__name__}, expected a pandas DataFrame")
    return table.reset_index() if any(name is not None for name in table.index.names) else table


def _rows(table: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    for column, wanted in where.items():
        if column not in table.columns:
            raise DataError(
                f"no column {column!r} to choose rows by; the table has {', '.join(map(str, table.columns))}"
            )
        kept = table[_is(table[column], str(wanted))]
        if kept.empty:
            known = ", ".join(map(str, table[column].unique()[:8]))
            raise DataError(f"no row has {column} = {wanted}; it holds {known}")
        table = kept
    return table


def _is(cells: Any, wanted: str) -> Any:
    """Which cells are this text, or this number however it is written."""
    number = pd.to_numeric(wanted, errors="coerce")
    same = cells.astype(str).str.strip() == wanted.strip()
    return same | (pd.to_numeric(cells, errors="coerce") == number)


def _by_seed(table: pd.DataFrame, seed: str | None) -> tuple[list[tuple[str, pd.DataFrame]], list[str]]:
    """The rows of each seed, and what is to be said of those without one."""
    if seed is None:
        return [("", table)], []
    if seed not in table.columns:
        raise DataError(f"no column {seed!r} for the seed; the table has {', '.join(map(str, table.columns))}")
    blank = int(table[seed].isna().sum())
    notes = [f"{blank} of {len(table)} rows have no {seed}: left out"] if blank else []
    groups = [(_name(name), rows) for name, rows in table.groupby(seed, sort=True)]
    if not groups:
        raise DataError(f"column {seed!r} is blank: name another that tells the runs apart, or none")
    return groups, notes


def _name(seed: Any) -> str:
    """The seed as it was written: a blank among integers makes them floats."""
    return f"{seed:.0f}" if isinstance(seed, float) and seed.is_integer() else str(seed)


def _compare(seed: str, events: list[Event], bounds: Array, tolerance: float) -> list[tuple[Any, ...]]:
    """One row a boundary with the event given to it, one a further event: events to boundaries so that they lie
    nearest."""
    apart = np.abs(np.log(np.maximum([[e.step for e in events]], 1e-9)) - np.log(bounds)[:, None])
    far = np.log1p(tolerance)
    given = dict(
        zip(*(part.tolist() for part in linear_sum_assignment(np.where(apart <= far, apart, 1e3 + apart))), strict=True)
    )
    rows: list[tuple[Any, ...]] = []
    taken = set()
    for b, bound in enumerate(bounds):
        j = given.get(b)
        if j is None or apart[b, j] > far:
            rows.append((seed, float(bound), False, *[None] * 7))
            continue
        event = events[j]
        taken.add(j)
        inside = bool(event.interval[0] <= bound <= event.interval[1])
        rows.append((seed, float(bound), True, *_told(event), event.step / bound - 1, inside))
    rows += [(seed, None, False, *_told(e), None, None) for j, e in enumerate(events) if j not in taken]
    return rows


def _told(event: Event) -> tuple[Any, ...]:
    return event.kind, event.step, *event.interval, event.p_value


def _by_chance(
    fits: Mapping[str, Fit], ends: Mapping[str, tuple[float, float]], bounds: Array, tolerance: float
) -> tuple[float | None, float | None]:
    """Mean number of boundaries near an event when each seed's events are turned, and the share of turns with as
    many."""
    if not len(bounds) or not any(fit.found for fit in fits.values()):
        return None, None
    generator = np.random.default_rng([0, 0x2E])
    observed, turned = 0, np.zeros(SHIFTS, dtype=np.int64)
    for name, fit in fits.items():
        first, last = np.log(np.array(ends[name]) + 1)
        at = np.log(np.array([event.step for event in fit.found]) + 1)
        turn = generator.uniform(0, last - first, (SHIFTS, 1))
        observed += int(_near(at[None], bounds, tolerance)[0])
        turned += _near(first + (at - first + turn) % (last - first), bounds, tolerance)
    return float(turned.mean()), (1 + int(np.sum(turned >= observed))) / (1 + SHIFTS)


def _near(places: Array, bounds: Array, tolerance: float) -> NDArray[np.int64]:
    """(n,) how many boundaries have an event within the tolerance, for events at log(step + 1) = places (n, events)."""
    logs = np.log(np.maximum(np.exp(places) - 1, 1e-9))
    apart = np.abs(logs[:, None, :] - np.log(bounds)[None, :, None])
    return np.asarray((apart <= np.log1p(tolerance)).any(2).sum(1), dtype=np.int64)
