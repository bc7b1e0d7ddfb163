"""One measured quantity over training, `Series(name, steps, values, se)`: the input of the detector and the plots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devmon.errors import DataError

Array = NDArray[np.float64]
SAME = 1e-6  # share of the largest value below which replicates are the same: they are stored in float32


@dataclass(frozen=True)
class Series:
    """A named number at each measured step.

    `steps` (n,) optimizer steps; `values` (n,) in `units`; `se` (n,) the standard error of each value, or None;
    `rejected` (n,) true where the instrument's own health check refused the value, or None. `smallest` is the smallest
    change of interest, in `units`: nothing below it is an event. `replicates` (R, n) is the same quantity on R fixed
    groups of items, or by R chains, the same at every step: what its changes over steps vary by from one to the next is
    their error. `notes` say what was done to the rows that it was read from.
    """

    name: str
    steps: NDArray[Any]
    values: NDArray[Any]
    se: NDArray[Any] | None = None
    units: str = ""
    rejected: NDArray[Any] | None = None
    smallest: float = 0.0
    replicates: NDArray[Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> NDArray[np.bool_]:
        """(n,) true where the value is finite and was not rejected."""
        finite = np.isfinite(np.asarray(self.values, dtype=np.float64))
        return finite if self.rejected is None else finite & ~np.asarray(self.rejected, dtype=bool)

    def where(self, chosen: NDArray[np.bool_]) -> Series:
        """The series at some of its points."""
        se, rejected = (None if part is None else np.asarray(part)[chosen] for part in (self.se, self.rejected))
        steps, values = np.asarray(self.steps)[chosen], np.asarray(self.values)[chosen]
        replicates = None if self.replicates is None else np.asarray(self.replicates)[:, chosen]
        return replace(self, steps=steps, values=values, se=se, rejected=rejected, replicates=replicates)


def checked(steps: Any, values: Any, se: Any = None, name: str = "") -> tuple[Array, Array, Array | None]:
    """The arrays in float64 with missing (NaN) points dropped.

    Raises DataError on steps that are negative, unsorted or repeated, on infinite values, on a negative standard error
    and on arrays of unequal length. A point whose standard error is NaN is dropped like one whose value is.
    """
    label = f"series {name!r}: " if name else ""
    t, y = _vector(steps, "steps", label), _vector(values, "values", label)
    s = None if se is None else _vector(se, "se", label)
    for other, what in ((y, "values"), (s, "se")):
        if other is not None and len(other) != len(t):
            raise DataError(f"{label}steps and {what} need one length, got {len(t)} and {len(other)}")
    if not np.all(np.isfinite(t)) or np.any(t < 0):
        raise DataError(f"{label}steps count from 0, got {_some(t[~np.isfinite(t) | (t < 0)])}: drop or renumber them")
    for bad, what in ((np.diff(t) < 0, "sorted"), (np.diff(t) == 0, "distinct")):
        if np.any(bad):
            at = int(np.argmax(bad))
            hint = "sort steps, values and se together" if what == "sorted" else "keep one value a step"
            raise DataError(f"{label}steps must be {what}, got {t[at]:g} then {t[at + 1]:g}: {hint}")
    if np.any(np.isinf(y)):
        where = _some(t[np.isinf(y)])
        raise DataError(f"{label}values must be finite or NaN (missing), got infinity at step {where}: set it to NaN")
    if s is not None and (np.any(s < 0) or np.any(np.isinf(s))):
        where = _some(t[(s < 0) | np.isinf(s)])
        raise DataError(f"{label}se must be finite and at least 0, it is not at step {where}: set the value to NaN")
    keep = np.isfinite(y) if s is None else np.isfinite(y) & np.isfinite(s)
    return t[keep], y[keep], None if s is None else s[keep]


def checked_replicates(series: Series, kept: Array, notes: list[str]) -> Array | None:
    """(R, n) replicates at the steps `kept`; DataError unless there are two or more, finite, one value a step.

    None, with a note, where they differ by nothing but levels: they would say that there is no noise at all."""
    if series.replicates is None:
        return None
    label = f"series {series.name!r}: " if series.name else ""
    steps = np.asarray(series.steps, dtype=np.float64)
    array = np.asarray(series.replicates, dtype=np.float64)
    if array.ndim != 2 or len(array) < 2 or array.shape[1] != len(steps):
        raise DataError(f"{label}replicates have shape (R >= 2, {len(steps)}), got {array.shape}")
    array = array[:, np.isin(steps, kept)]
    if not np.all(np.isfinite(array)):
        raise DataError(f"{label}replicates must be finite where the value is: set the value to NaN")
    apart = array - array.mean(0)
    if array.size and np.ptp(apart, axis=1).max() <= SAME * np.abs(array).max():
        notes.append("the replicates differ at no step: taken as not given")
        return None
    return array


def run_level(name: str) -> bool:
    """Whether a series speaks for the run: a scalar or the maximum of an array, not one of the array's elements."""
    return "[" not in name


def floored(se: Array | None, notes: list[str]) -> Array | None:
    """Standard errors kept at or above a tenth of their median, so that no point counts as exact."""
    if se is None or not np.any(se > 0):
        if se is not None:
            notes.append("every se is 0: taken as not given")
        return None
    floor = 0.1 * float(np.median(se[se > 0]))
    if np.any(se < floor):
        notes.append(f"{int(np.sum(se < floor))} standard errors raised to {floor:.3g}, a tenth of their median")
    return np.maximum(se, floor)


def _vector(data: Any, what: str, label: str) -> Array:
    try:
        if np.iscomplexobj(data):
            raise TypeError("complex values")
        array = np.asarray(data, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{label}{what} must be numbers, got {type(data).__name__} ({error})") from None
    if array.ndim != 1:
        raise DataError(f"{label}{what} must have one dimension, got shape {array.shape}")
    return array


def _some(steps: Array) -> str:
    return ", ".join(f"{step:g}" for step in steps[:3]) + (", …" if len(steps) > 3 else "")
