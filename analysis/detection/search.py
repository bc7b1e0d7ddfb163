"""Where training changed phase: events with an interval, a size and a p-value against a stated null.

>>> import numpy as np
>>> steps = np.unique(np.geomspace(1, 2000, 80).astype(int))
>>> score = 0.02 + 0.74 / (1 + np.exp(-(steps - 650) / 30))
>>> score = score + 0.01 * np.random.default_rng(1).standard_normal(len(steps))
>>> [event.kind for event in Detector().fit(steps, score).events()]
['jump']
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from devmon.analysis.derive.from_anything import provenance, series_in
from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.results import Detection
from devmon.errors import DataError


def detect(run: Any, detector: Detector | None = None) -> Detection:
    """Search all series of a run: a trajectory, one Series or a list of Series, a DataFrame or the path of a CSV file.

    Tables are read as `series_of_table` says: a column `step` and one column a series, or one value a row.

    The q-values are Benjamini-Hochberg over the series searched, each with its smallest p-value (which already accounts
    for all that was sought in it); a further event of a series has the q-value of its own p-value in that family.
    """
    detector = Detector() if detector is None else detector
    all_series = series_in(run)
    names = [series.name for series in all_series]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"two series are named {twice[0]!r}: give each its own name")
    fits = {fit.series: fit for fit in detector.fit_all(all_series)}
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
