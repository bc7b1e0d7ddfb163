"""`LongObservations`: says once what an observation takes, where it holds training up for long."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import xarray as xr

from devmon.monitoring.companion import Companion

LONG = 60.0  # seconds of an observation, from which on a person who waits for training wonders what it does
NAMED = 3  # watches named, those that took longest first


class LongObservations(Companion):
    """Warns after the first observation of at least a minute: which watches took it, and how to bound it.

    >>> now, told = [0.0], LongObservations(clock=lambda: now[0])
    >>> told.choose(0, ["loss", "llc"])
    ['loss', 'llc']
    >>> now[0] = 2.0
    >>> told.measured(0, "loss")
    >>> now[0] = 400.0
    >>> told.measured(0, "llc")
    >>> told.words(0)
    'the observation at step 0 took 6.7 minutes (llc 6.6 minutes, loss 2 seconds), and later ones take about as long'
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.took: dict[str, float] = {}
        self.told = False

    def choose(self, step: int, names: list[str]) -> list[str]:
        self.took, self._mark = {}, self.clock()
        return names

    def measured(self, step: int, name: str, dataset: xr.Dataset | None = None) -> None:
        now = self.clock()
        self.took[name], self._mark = now - self._mark, now

    def after(self, step: int) -> None:
        if self.told or sum(self.took.values()) < LONG:
            return
        self.told = True
        warnings.warn(
            f"{self.words(step)}. `devmon cost` tells beforehand what watches cost; max_overhead=0.1 leaves out "
            "observations that would take more than a tenth of the time; fewer steps of a watch, or smaller settings, "
            "cost less",
            stacklevel=2,
        )

    def words(self, step: int) -> str:
        longest = sorted(self.took.items(), key=lambda pair: -pair[1])[:NAMED]
        named = ", ".join(f"{name} {_said(seconds)}" for name, seconds in longest)
        whole = _said(sum(self.took.values()))
        return f"the observation at step {step} took {whole} ({named}), and later ones take about as long"


def _said(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < LONG else f"{seconds / 60:.1f} minutes"
