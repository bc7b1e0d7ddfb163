"""Where training changed phase: events with an interval, a size and a p-value against a stated null.

>>> import numpy as np
>>> steps = np.unique(np.geomspace(1, 2000, 80).astype(int))
>>> score = 0.02 + 0.74 / (1 + np.exp(-(steps - 650) / 30))
>>> score = score + 0.01 * np.random.default_rng(1).standard_normal(len(steps))
>>> [event.kind for event in Detector().fit(steps, score).events()]
['jump']
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd

from devmon.analysis.derive.from_tables import read_table, series_of_table
from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Fit
from devmon.analysis.detection.results import Detection, provenance
from devmon.analysis.series import Series, checked
from devmon.errors import DataError


def detect(run: Any, detector: Detector | None = None) -> Detection:
    """Search all series of a run: a trajectory, one Series or a list of Series, a DataFrame or the path of a CSV file.

    Tables are read as `tables.series_of_table` says: a column `step` and one column a series, or one value a row.

    The q-values are Benjamini-Hochberg over the series searched, each with its smallest p-value (which already accounts
    for all that was sought in it); a further event of a series has the q-value of its own p-value in that family.
    """
    detector = Detector() if detector is None else detector
    all_series = _series(run)
    names = [series.name for series in all_series]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"two series are named {twice[0]!r}: give each its own name")
    found = detector.fit_all([_accepted(series) for series in all_series])
    fits = {series.name: _told(fit, series) for series, fit in zip(all_series, found, strict=True)}
    family = [min(p for tests in fit.p_values.values() for p in tests) for fit in fits.values() if fit.p_values]
    events = [replace(e, q_value=benjamini_hochberg(e.p_value, family)) for fit in fits.values() for e in fit.found]
    return Detection(fits, tuple(events), len(family), asdict(detector), provenance(run, all_series))


def benjamini_hochberg(p: float, family: Iterable[float]) -> float:
    """The smallest false-discovery rate at which p is among the discoveries of the family: the least t N / #(family
    <= t) over thresholds t >= p. A p that is none of the family's is that of a further event of a series.
    """
    ordered = np.sort(np.asarray(list(family)))
    thresholds = np.append(p, ordered[ordered > p])
    within = np.maximum(np.searchsorted(ordered, thresholds * (1 + 1e-12), side="right"), 1)
    return float(min(np.min(thresholds * len(ordered) / within), 1.0))


def _series(run: Any) -> list[Series]:
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
    from devmon.analysis.derive.watch_series import series_of

    return list(series_of(run))


def _accepted(series: Series) -> Series:
    """The series without the points that were rejected (all NaN where all were)."""
    values = np.array(series.values, dtype=np.float64)
    if series.rejected is None:
        return series
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


def _told(fit: Fit, series: Series) -> Fit:
    """The fit of a series with what else is known of it: rejected points."""
    refused = 0 if series.rejected is None else int(np.sum(series.rejected))
    return replace(fit, notes=(*fit.notes, f"{refused} of {len(series.values)} points rejected")) if refused else fit
