"""Tables from elsewhere as series: `series_of_table(frame)`; `log_files.read_table(path)` reads them from files."""

from __future__ import annotations

from typing import Any

import pandas as pd

from devmon.analysis.derive.tables.log_files import step_column, tells_time
from devmon.analysis.derive.tables.table_rows import is_numeric, series_of_rows
from devmon.analysis.derive.verdicts import accepted
from devmon.analysis.series import Series
from devmon.errors import DataError

ERROR_SUFFIX = "_se"  # column `loss_se` holds the standard errors of column `loss`


def series_of_table(table: pd.DataFrame, *, step: str | None = None) -> list[Series]:
    """Every series of a table with a column of steps (None: the first of `log_files.STEP_NAMES`), in one of two forms.

    Wide: each other numeric column is a series, and `x_se` the standard errors of `x`. Long: a column `value`, with the
    names in `series`, or in `watch` and `variable` as `devmon export` writes them; optional are `se`, `units` and
    `verdict` (a verdict other than "ok", "finite-time" or nothing marks a rejected point). Rows may be in any order,
    several may share a step where one of them has a value, and of a run that was resumed the last attempt counts
    (`series_of_rows`).
    """
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"expected a pandas DataFrame, got {type(table).__name__}")
    columns = [str(column) for column in table.columns]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise DataError(f"columns need names of their own, {', '.join(twice)} is there more than once: rename one")
    table = table.set_axis(columns, axis=1)
    step = step_column(columns) or "step" if step is None else step
    if step not in columns:
        raise DataError(
            f"a table needs a column of steps named {step!r}, got {_few(columns)}: rename it, or "
            "`devmon replay FILE --step COLUMN --value COLUMN`"
        )
    series = _long(table, step) if "value" in columns else _wide(table, step)
    if not series:
        raise DataError(f"the table holds no numbers beside {step!r}; its columns are {_few(columns)}")
    return series


def _few(columns: list[str]) -> str:
    shown = [column if len(column) < 40 else f"{column[:40]}…" for column in columns[:8]]
    return ", ".join([*shown, *(["…"] if len(columns) > 8 else [])]) or "none"


def _wide(table: pd.DataFrame, step: str) -> list[Series]:
    names = [c for c in table.columns if c != step and not tells_time(c) and is_numeric(table, c)]
    errors = {c for c in names if c.endswith(ERROR_SUFFIX) and c.removesuffix(ERROR_SUFFIX) in names}
    return [
        series_of_rows(table, step, c, c + ERROR_SUFFIX if c + ERROR_SUFFIX in errors else None, name=c)
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
        error = "se" if "se" in rows.columns and rows["se"].notna().any() else None
        rejected = None
        if "verdict" in rows.columns:
            verdicts = rows["verdict"].fillna("").astype(str)
            rejected = ~accepted(verdicts) & (verdicts != "").to_numpy() if (verdicts != "").any() else None
        units = str(rows["units"].iloc[0]) if "units" in rows.columns and rows["units"].notna().any() else ""
        name, units = "/".join(map(str, key)), "" if units == "1" else units
        series.append(series_of_rows(rows, step, "value", error, name=name, units=units, rejected=rejected))
    return series
