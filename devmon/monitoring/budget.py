"""`Budget`: which due observations a monitor leaves out, so that it takes no more than a share of the wall time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class Budget:
    """The account of a monitor that may take `share` of the time since training started (in this process).

    An observation is expected to cost what the last one of its watch did. It is left out if it would take the monitor
    above `share`, and its watch above an equal part of `share` too: a costly watch never silences the cheap ones. The
    first observation of every watch is always made, so the share is kept over the length of a run and not at its start.

    >>> now = [0.0]
    >>> budget = Budget(0.1, ["llc"], lambda: now[0])
    >>> with budget.at_work():
    ...     now[0] = 9.0
    ...     budget.measured("llc")
    >>> now[0] = 60.0
    >>> budget.choose(["llc"], step=6)  # another 9 s: 18 of 69
    []
    >>> now[0] = 200.0
    >>> budget.choose(["llc"], step=20), budget.skipped
    (['llc'], {'llc': [6]})
    """

    def __init__(self, share: float, names: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.share = share
        self.clock = clock
        self.started = clock()
        self.spent = 0.0  # seconds in the monitor, whatever for
        self.by_watch: defaultdict[str, float] = defaultdict(float)
        self.last: dict[str, float] = {}  # watch to seconds of its last observation
        self.skipped: dict[str, list[int]] = {}
        self._parts = max(1, len(tuple(names)))
        self._mark = self.started

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The monitor works inside: the time counts."""
        entered = self._mark = self.clock()
        try:
            yield
        finally:
            self.spent += self.clock() - entered

    def choose(self, names: Iterable[str], step: int) -> list[str]:
        """Those of the due watches that can be paid for; the others are noted in `skipped`."""
        elapsed, planned, chosen = self.clock() - self.started, self.spent, []
        for name in names:
            cost = self.last.get(name, 0.0)  # so that the first one always fits
            allowed = self.share * (elapsed + cost)
            if planned + cost <= allowed or self.by_watch[name] + cost <= allowed / self._parts:
                planned += cost
                chosen.append(name)
            else:
                self.skipped.setdefault(name, []).append(step)
        return chosen

    def measured(self, name: str) -> None:
        """The watch has just been measured: since the last one, or since the monitor began."""
        now = self.clock()
        self.last[name] = now - self._mark
        self.by_watch[name] += now - self._mark
        self._mark = now
