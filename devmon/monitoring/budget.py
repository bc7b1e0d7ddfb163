"""`Budget`: which due observations a monitor leaves out, so that it takes no more than a share of the wall time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import xarray as xr

from devmon.errors import DevmonError
from devmon.monitoring.companion import Companion


class Budget(Companion):
    """The account of a monitor that may take `share` of the time since training started (in this process).

    An observation is expected to cost what the last one of its watch did. It is left out if it would take the monitor
    above `share`, and its watch above an equal part of `share` too: a costly watch never silences the cheap ones. The
    first observation of every watch is always made, so the share is kept over the length of a run and not at its start.
    When training ends, what was left out is listed in the trajectory's `attrs["skipped"]` (watch to steps).

    >>> now = [0.0]
    >>> budget = Budget(0.1, ["llc"], clock=lambda: now[0])
    >>> budget.choose(0, ["llc"])
    ['llc']
    >>> now[0] = 9.0
    >>> budget.measured(0, "llc")
    >>> budget.after(0)
    >>> now[0] = 60.0
    >>> budget.choose(6, ["llc"])  # another 9 s: 18 of 69
    []
    >>> now[0] = 200.0
    >>> budget.choose(20, ["llc"]), budget.skipped
    (['llc'], {'llc': [6]})
    """

    def __init__(self, share: float, names: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        if not 0 < share <= 1:
            raise DevmonError(f"max_overhead is a share of the wall time above 0 and up to 1, got {share}")
        self.share = share
        self.clock = clock
        self._parts = max(1, len(tuple(names)))
        self.begin(0)

    def begin(self, step: int) -> None:
        self.started = self._entered = self._mark = self.clock()
        self.spent = 0.0  # seconds in the monitor, whatever for
        self.by_watch: defaultdict[str, float] = defaultdict(float)
        self.last: dict[str, float] = {}  # watch to seconds of its last observation
        self.skipped: dict[str, list[int]] = {}

    def choose(self, step: int, names: list[str]) -> list[str]:
        """Those of the due watches that can be paid for. From here to `after`, time counts as the monitor's."""
        self._entered = self._mark = self.clock()
        elapsed, planned, chosen = self._entered - self.started, self.spent, []
        for name in names:
            cost = self.last.get(name, 0.0)  # so that the first one always fits
            allowed = self.share * (elapsed + cost)
            if planned + cost <= allowed or self.by_watch[name] + cost <= allowed / self._parts:
                planned += cost
                chosen.append(name)
            else:
                self.skipped.setdefault(name, []).append(step)
        return chosen

    def measured(self, step: int, name: str, dataset: xr.Dataset | None = None) -> None:
        """The watch took the time since the last one, or since the monitor began."""
        now = self.clock()
        self.last[name] = now - self._mark
        self.by_watch[name] += now - self._mark
        self._mark = now

    def after(self, step: int) -> None:
        self.spent += self.clock() - self._entered

    def record(self) -> None:
        trajectory = self.monitor.trajectory
        if trajectory is None or not self.skipped:
            return
        skipped = dict(trajectory.attrs.get("skipped", {}))
        for name, steps in self.skipped.items():
            held = trajectory.steps(name) if name in trajectory else []
            skipped[name] = sorted({*skipped.get(name, []), *steps} - set(held))
        trajectory.record(skipped=skipped)
