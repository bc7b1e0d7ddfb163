"""Rows of a log as people have them: what is missing, in which order, and which of two rows of one step counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from devmon.analysis.series import Array, Series
from devmon.errors import DataError

# Rows that an attempt of a run has on average, where a log goes back in step because the run was resumed: with fewer
# the rows are in no order at all. Rows in random order have two.
ROWS_OF_ATTEMPT = 3


def numbers(table: pd.DataFrame, column: str, what: str = "", notes: list[str] | None = None) -> Array:
    """A column in float64; what is blank, infinite or no number ("-") is NaN, and all but blanks go to the `notes`.

    Raises DataError where there is no such column, and where most of it is text.
    """
    if column not in table.columns:
        known = ", ".join(map(str, table.columns))
        raise DataError(f"no column {column!r}{f' for the {what}' if what else ''}; the table has {known}")
    cells = table[column]
    values, text = _parsed(cells)
    if text.any() and text.sum() >= np.isfinite(values).sum():
        raise DataError(
            f"column {column!r} must hold numbers, got {cells[text].iloc[0]!r}: give another column, or drop those rows"
        )
    odd = text | np.isinf(values)
    if odd.any() and notes is not None:
        few = ", ".join(str(cell) for cell in dict.fromkeys(cells[odd].astype(str)))[:40]
        notes.append(f"{odd.sum()} of {len(cells)} cells of {column!r} are no finite numbers ({few}): taken as missing")
    return np.where(odd, np.nan, values)


def is_numeric(table: pd.DataFrame, column: str) -> bool:
    """Whether a column holds more numbers than text."""
    values, text = _parsed(table[column])
    return bool(pd.api.types.is_numeric_dtype(table[column]) or np.isfinite(values).sum() > text.sum())


def series_of_rows(
    table: pd.DataFrame, step: str, value: str, error: str | None = None, *, name: str, units: str = "",
    rejected: NDArray[np.bool_] | None = None, smallest: float = 0.0,
) -> Series:  # fmt: skip
    """One series of the rows, in whatever order they are; `rejected` (rows,) as of a Series.

    Of several rows of one step the one with a value counts (a log has a row for the training and a row for the
    validation). Where the log goes back in step and overlaps, because the run was resumed, the last attempt counts;
    `notes` of the series say so. Raises DataError where a step has two values.
    """
    notes: list[str] = []
    steps = numbers(table, step, "steps", notes)
    values = numbers(table, value, "values", notes)
    errors = None if error is None else numbers(table, error, "standard errors", notes)
    if blank := int(np.isnan(steps).sum()):
        notes.append(f"{blank} of {len(steps)} rows have no step: left out")
    # the attempts are in the order of the file; then the rows are put in order, and those without a value give way
    kept = last_attempt(steps, notes) & ~np.isnan(steps)
    order = np.flatnonzero(kept)[np.argsort(steps[kept], kind="stable")]
    steps, values = steps[order], values[order]
    first = np.append(True, np.diff(steps) != 0)[: len(steps)]
    group = np.cumsum(first) - 1
    chosen = np.flatnonzero(first)
    there = np.flatnonzero(~np.isnan(values))
    places, which = np.unique(group[there], return_index=True)
    chosen[places] = there[which]
    twice = there[values[there] != values[chosen[group[there]]]]
    if len(twice):
        raise DataError(
            f"{name or 'the table'} has more than one row for step {steps[twice[0]]:g}: `devmon replay FILE "
            "--seed COLUMN` searches runs apart, `--where COLUMN=VALUE` chooses rows"
        )
    at = order[chosen]
    return Series(
        name, steps[chosen], values[chosen], None if errors is None else errors[at], units,
        None if rejected is None else rejected[at], smallest, notes=tuple(notes),
    )  # fmt: skip


def last_attempt(steps: Array, notes: list[str]) -> NDArray[np.bool_]:
    """(rows,) false for the rows that a resumption supersedes: those at and past the step that the log goes back to.

    A log that goes back to its beginning, or at every other row, holds something else: several seeds, or no order.
    """
    kept = np.ones(len(steps), dtype=bool)
    rows = np.flatnonzero(~np.isnan(steps))
    back = rows[1:][np.diff(steps[rows]) < 0]
    if not len(back) or (len(back) + 1) * ROWS_OF_ATTEMPT > len(rows) or (steps[back] <= steps[rows[0]]).any():
        return kept
    for row in back:
        kept[:row] &= ~(steps[:row] >= steps[row])
    went = ", ".join(f"{steps[row]:g}" for row in back[:4])
    notes.append(f"the log goes back to step {went}: the last attempt counts, {(~kept).sum()} earlier rows do not")
    return kept


def _parsed(cells: Any) -> tuple[Array, NDArray[np.bool_]]:
    """A column in float64, NaN where it is no number, and where it is text."""
    if pd.api.types.is_numeric_dtype(cells) and not pd.api.types.is_complex_dtype(cells):
        return np.asarray(cells.to_numpy(dtype=np.float64, na_value=np.nan)), np.zeros(len(cells), dtype=bool)
    stripped = cells.astype("string").str.strip()
    values = np.asarray(pd.to_numeric(stripped, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan))
    blank = (stripped.isna() | (stripped.str.lower().isin(["", "nan", "none", "null"]))).to_numpy(dtype=bool)
    return values, np.isnan(values) & ~blank
