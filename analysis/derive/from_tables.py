"""Tables from elsewhere as series: `series_of_table(frame)` for pandas, `read_table(path)` for CSV."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from devmon.analysis.derive.verdicts import accepted
from devmon.analysis.series import Series
from devmon.errors import DataError

ERROR_SUFFIX = "_se"  # column `loss_se` holds the standard errors of column `loss`
STEP_COLUMN = "step"


def series_of_table(table: pd.DataFrame, *, step: str = STEP_COLUMN) -> list[Series]:
    """Every series of a table with a column of steps, in one of two forms.

    Wide: each other numeric column is a series, and `x_se` the standard errors of `x`. Long: a column `value`, with the
    names in `series`, or in `watch` and `variable` as `devmon export` writes them; optional are `se`, `units` and
    `verdict` (a verdict other than "ok", "finite-time" or nothing marks a rejected point). Rows keep their order: the
    steps of each series must be sorted and distinct.
    """
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"expected a pandas DataFrame, got {type(table).__name__}")
    columns = [str(column) for column in table.columns]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise DataError(f"columns need names of their own, {', '.join(twice)} is there more than once: rename one")
    table = table.set_axis(columns, axis=1)
    if step not in columns:
        raise DataError(
            f"a table needs a column of steps named {step!r}, got {', '.join(columns) or 'none'}: rename it"
        )
    series = _long(table, step) if "value" in columns else _wide(table, step)
    if not series:
        raise DataError(f"the table holds no numbers beside {step!r}; its columns are {', '.join(columns)}")
    return series


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A CSV file, or a DataError that names it."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file {path}: give the path of a CSV file with a header")
    try:
        return pd.read_csv(path)
    except (ValueError, UnicodeDecodeError) as error:  # pandas' ParserError and EmptyDataError are ValueErrors
        raise DataError(
            f"{path} does not read as CSV ({str(error).strip()}): expected a header and comma-separated rows"
        ) from None


def numbers(table: pd.DataFrame, column: str, what: str = "") -> np.ndarray:
    """A column in float64; missing entries are NaN. Raises DataError on text."""
    if column not in table.columns:
        known = ", ".join(map(str, table.columns))
        raise DataError(f"no column {column!r}{f' for the {what}' if what else ''}; the table has {known}")
    try:
        return np.asarray(table[column].to_numpy(dtype=np.float64, na_value=np.nan))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"column {column!r} must hold numbers ({error}): give another column, or drop those rows"
        ) from None


def _wide(table: pd.DataFrame, step: str) -> list[Series]:
    steps = numbers(table, step)
    names = [c for c in table.columns if c != step and pd.api.types.is_numeric_dtype(table[c])]
    errors = {c for c in names if c.endswith(ERROR_SUFFIX) and c.removesuffix(ERROR_SUFFIX) in names}
    return [
        Series(c, steps, numbers(table, c), numbers(table, c + ERROR_SUFFIX) if c + ERROR_SUFFIX in errors else None)
        for c in names
        if c not in errors
    ]


def _long(table: pd.DataFrame, step: str) -> list[Series]:
    keys = [c for c in (("series",) if "series" in table.columns else ("watch", "variable")) if c in table.columns]
    groups: list[tuple[Any, pd.DataFrame]] = (
        list(table.groupby(keys, sort=False, dropna=False)) if keys else [(("value",), table)]
    )
    series = []
    for key, rows in groups:
        se = numbers(rows, "se") if "se" in rows.columns and rows["se"].notna().any() else None
        rejected = None
        if "verdict" in rows.columns:
            verdicts = rows["verdict"].fillna("").astype(str)
            rejected = ~accepted(verdicts) & (verdicts != "").to_numpy() if (verdicts != "").any() else None
        units = str(rows["units"].iloc[0]) if "units" in rows.columns and rows["units"].notna().any() else ""
        name = "/".join(map(str, key))
        series.append(
            Series(name, numbers(rows, step), numbers(rows, "value"), se, "" if units == "1" else units, rejected)
        )
    return series
