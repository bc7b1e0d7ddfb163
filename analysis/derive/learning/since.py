"""A series less its first value: what training has added to what an untrained model scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from devmon.analysis.series import Series
from devmon.errors import DataError


def since_first(series: Series) -> Series:
    """The series minus its value at its first good step: of a probe, trained minus initialised.

    A probe reads much of an untrained network (tokens alone give .7 of a grammar's labels), so its accuracy is a
    number of the probe, and the difference one of the training. Errors are paired where the series has replicates: what
    the same items share at both steps cancels; else the two are taken as independent. 0, with an error of 0, at the
    first step. Raises DataError for a series without a good value.
    """
    good = np.flatnonzero(series.good)
    if not len(good):
        raise DataError(f"since_first: series {series.name!r} has no good value")
    first, values = good[0], np.asarray(series.values, np.float64)
    replicates = series.replicates
    se = series.se
    if replicates is not None:
        replicates = np.asarray(replicates, np.float64) - np.asarray(replicates, np.float64)[:, [first]]
        se = replicates.std(0, ddof=1) / np.sqrt(len(replicates))
    elif se is not None:
        se = np.hypot(se, np.asarray(se)[first])
        se[first] = 0.0
    name = f"{series.name} since step {int(series.steps[first])}"
    return replace(series, name=name, values=values - values[first], se=se, replicates=replicates)
