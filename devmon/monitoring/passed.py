"""`Passed`: due steps at which the loop never stood, measured at the next one that it reached."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from devmon.monitoring.companion import Companion
from devmon.watch import Watch


class Passed(Companion):
    """Two optimizers move a trainer's step by 2, and a plain loop may call `step` now and then only: what was due in
    between is measured once, at the step reached, and its row bears that step. The trajectory's `attrs["meant"]` has
    for each watch the steps reached in place of another, with the last one that was due.
    """

    def __init__(self) -> None:
        self._last: int | None = None
        self.meant: dict[str, dict[str, int]] = {}  # watch to step reached to step meant

    def begin(self, step: int) -> None:
        self._last = step - 1
        trajectory = self.monitor.trajectory
        held = {} if trajectory is None else trajectory.attrs.get("meant", {})
        self.meant = {name: {at: s for at, s in steps.items() if int(at) <= step} for name, steps in held.items()}
        if trajectory is not None and self.meant != held:  # rows past `step` are superseded
            trajectory.record(meant=self.meant)

    def due(self, step: int, watches: list[Watch]) -> list[Watch]:
        assert self._last is not None
        scheduled, due = {watch.name: watch for watch in watches}, []
        for watch in self.monitor.watches:
            late = last_due(self._last, step, watch.steps)
            if watch.name in scheduled:
                due.append(scheduled[watch.name])
            elif late is not None:
                due.append(replace(watch, steps={step}))
                self.meant.setdefault(watch.name, {})[str(step)] = late
        self._last = step
        return due

    def record(self) -> None:
        trajectory = self.monitor.trajectory
        if trajectory is not None and self.meant != trajectory.attrs.get("meant", {}):
            trajectory.record(meant=self.meant)


def last_due(before: int, step: int, steps: Container[int]) -> int | None:
    """The last of the steps after `before` and up to `step` that is due; None where none is."""
    return next((s for s in range(step, before, -1) if s in steps), None)
