"""`Failures`: what failed in this process, kept until the trajectory holds it."""

from __future__ import annotations

from devmon.monitoring.companion import Companion


class Failures(Companion):
    """`reasons` (watch to step to reason), to which `devmon.observe` adds; it warns of every watch in it once only.

    A failure that could not be written when it happened (a full disk) is written when training ends.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, dict[int, str]] = {}

    def begin(self, step: int) -> None:
        self.reasons.clear()

    def record(self) -> None:
        trajectory = self.monitor.trajectory
        assert trajectory is not None
        for name in [name for name in self.reasons if name in trajectory]:
            settled = {*trajectory.failures(name), *trajectory.steps(name)}
            for step in sorted(self.reasons[name].keys() - settled):
                trajectory.fail(name, step, self.reasons[name][step])
