"""Files of logs as the tools of this field write them: CSV and its kin, JSON lines, the history of a Trainer."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from devmon.errors import DataError

SEPARATORS = (",", ";", "\t")
DECIMAL_COMMA = r"^\s*([-+]?\d*),(\d+(?:[eE][-+]?\d+)?)\s*$"
# What counts the optimizer's updates, by the first of these that a log has: plain logs and Lightning's CSVLogger,
# Lightning through Weights & Biases, older loops; `_step` of Weights & Biases counts calls of its own.
STEP_NAMES = ("step", "global_step", "trainer/global_step", "iteration", "iter", "_step")
# Columns that tell the time, and measure nothing of the model.
CLOCKS = ("epoch", "wall time", "_timestamp")
PACES = ("_runtime", "_per_second")  # ends of what a Trainer says of the machine


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A log as a table, a column for each name: rows with a header separated by commas, semicolons (with decimal commas
    too) or tabs; JSON lines; or JSON, a list of rows or what holds one as `log_history` (`trainer_state.json`).

    Lines at the start that begin with # are left out, as are the smallest and largest values of each step that Weights
    & Biases exports beside a column. Raises DataError, which names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file {path}: give the path of a log, as CSV with a header or as JSON")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"{path} does not read as text ({error}): give a log, as CSV with a header or as JSON"
        ) from None
    table = _of_json(text, path) if text.lstrip()[:1] in ("{", "[") else _of_csv(text, path)
    table.columns = [str(column).strip() for column in table.columns]
    ends = [c for c in table.columns if c.endswith(("__MIN", "__MAX")) and c[: -len("__MIN")] in table.columns]
    return table.drop(columns=ends)


def step_column(columns: Iterable[str]) -> str | None:
    """The column of steps, in letters of either case, or None."""
    lower = {column.lower(): column for column in columns}
    return next((lower[name] for name in STEP_NAMES if name in lower), None)


def tells_time(column: str) -> bool:
    """Whether a column counts or times the rows, and is no series of its own."""
    return column.lower() in (*STEP_NAMES, *CLOCKS) or column.lower().endswith(PACES)


def _of_csv(text: str, path: Path) -> pd.DataFrame:
    lines = text.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), 0)
    separator = max(SEPARATORS, key=lines[start].count) if lines else ","
    try:
        table = pd.read_csv(io.StringIO("".join(lines[start:])), sep=separator, skipinitialspace=True, index_col=False)
    except ValueError as error:  # pandas' ParserError and EmptyDataError are ValueErrors
        raise DataError(
            f"{path} does not read as CSV ({str(error).strip()}): expected a header and rows separated by commas, "
            "semicolons or tabs"
        ) from None
    if separator == ";":
        for column in table.columns:
            if table[column].dtype.kind not in "iufb":
                table[column] = table[column].str.replace(DECIMAL_COMMA, r"\1.\2", regex=True)
    return table


def _of_json(text: str, path: Path) -> pd.DataFrame:
    try:
        try:
            held = json.loads(text)
        except ValueError:  # one row a line, of which a process that died may have left the last unfinished
            lines = [line for line in text.splitlines() if line.strip()]
            held = [json.loads(line) for line in lines[:-1]]
            with suppress(ValueError):
                held.append(json.loads(lines[-1]))
    except ValueError as error:
        raise DataError(f"{path} does not read as JSON or as lines of JSON ({error}): write one row a line") from None
    if isinstance(held, dict):
        held = held.get("log_history", [held])
    if not isinstance(held, list) or not held or not all(isinstance(row, dict) for row in held):
        raise DataError(f"{path} holds no rows: expected a list of objects, log_history, or an object a line")
    # what is nested (settings, histograms) is no number
    rows: list[dict[str, Any]] = [
        {key: cell for key, cell in row.items() if not isinstance(cell, dict | list)} for row in held
    ]
    return pd.DataFrame(rows)
