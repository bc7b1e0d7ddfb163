"""Whatever a caller has as the series in it, and what these are known by."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd

from devmon.analysis.derive.tables.from_tables import series_of_table
from devmon.analysis.derive.tables.log_files import read_table
from devmon.analysis.series import Series, checked
from devmon.errors import DataError


def series_in(run: Any) -> list[Series]:
    """Every series of a trajectory, a table or the path of one, of a list of Series, or the one given.

    Raises DataError for anything else.
    """
    if isinstance(run, Series):
        return [run]
    if isinstance(run, pd.DataFrame):
        return series_of_table(run)
    if isinstance(run, str | os.PathLike):
        return series_of_table(read_table(run))
    if isinstance(run, list | tuple):
        others = sorted({type(item).__name__ for item in run if not isinstance(item, Series)})
        if others:
            raise DataError(
                f"expected a list of Series, got {', '.join(others)}: Series(name, steps, values) makes one"
            )
        return list(run)
    if not (hasattr(run, "names") and hasattr(run, "attrs")):
        raise DataError(
            f"detect takes a Trajectory, Series, a DataFrame or the path of a CSV file, got {type(run).__name__}; "
            "Detector().fit(steps, values) takes plain arrays"
        )
    from devmon.analysis.derive.watch_series import series_of  # loads xarray

    return list(series_of(run))


def accepted(series: Series) -> Series:
    """The series without the points that were rejected (all NaN where all were)."""
    if series.rejected is None:
        return series
    values = np.array(series.values, dtype=np.float64)
    refused = np.asarray(series.rejected, dtype=bool)
    if refused.shape != values.shape:
        raise DataError(
            f"series {series.name!r}: rejected and values need one length, got {refused.shape} and {values.shape}"
        )
    values[refused] = np.nan
    checked(series.steps, values, series.se, series.name)
    if refused.all():
        return replace(series, values=values, rejected=None)
    return replace(series.where(~refused), rejected=None)


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
