"""When a curve passes a level for good, and errors of what is read off curves by groups of items."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def last_passage(steps: Array, ahead: Array) -> tuple[Array, NDArray[np.int64], NDArray[np.int64]]:
    """The step (item,) after which `ahead` (step, item) is never above 0, where it is 0 or less at the last step.

    Interpolated in log step. Also the numbers of the rows about all passages: the last before the first and the first
    after the last. Meaningless for items that are never above 0, or are so at the end.

    >>> steps, ahead = np.array([0, 9, 99, 999]), np.array([[3.0], [1.0], [-1.0], [-1.0]])
    >>> last_passage(steps, ahead)[0].round(2)
    array([30.62])
    """
    time, item = np.log10(np.asarray(steps) + 1.0), np.arange(ahead.shape[1])
    before = np.maximum(len(time) - 2 - (ahead[-2::-1] > 0).argmax(0), 0)
    first = np.maximum((ahead <= 0).argmax(0) - 1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.clip(ahead[before, item] / (ahead[before, item] - ahead[before + 1, item]), 0, 1)
    return 10 ** (time[before] + part * (time[before + 1] - time[before])) - 1, first, before + 1


def jackknifed(of: Callable[[Array], Array], groups: Array) -> tuple[Array, Array]:
    """A function of a mean, and its standard error from the means of R fixed groups, (replicate, …): leaving out each
    in turn, se² = (R - 1)/R Σ (without - their mean)²."""
    number, whole = len(groups), groups.mean(0)
    value = np.asarray(of(whole), np.float64)
    without = np.stack([of((number * whole - group) / (number - 1)) for group in groups])
    return value, np.sqrt((number - 1) * without.var(0))
