"""`Densify`: what a monitor measures beside its schedule while an alarm is up, and the record of it."""

from __future__ import annotations

import warnings
from collections.abc import Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from devmon.errors import DevmonError, StoreError
from devmon.monitoring.companion import Companion
from devmon.monitoring.isolation import isolated
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch

if TYPE_CHECKING:
    from devmon.analysis.transitions.alarms import Alarm, Provisional

# Ratio of steps. While an alarm is up, a watch is due once the step is this many times the one it was last measured at:
# ln(10) / ln(1.05) = 47 points a decade. Nearer to 1, the added points cost more and place an event more finely.
DENSER = 1.05


class Densify(Companion):
    """The alarms of a training (`devmon.analysis.provisional`), and the steps that they add to the watches' own.

    While an alarm is up every watch is due too at 1.05 times the step at which it was last measured: up to 47 points a
    decade, whatever its schedule. A watch's schedule, and so its identity, stays as it is. `attrs["alarms"]` of the
    trajectory lists all alarms, `attrs["densified"]` has for each watch the steps that only an alarm made due; they are
    written before the step is measured, so that no such point is ever taken for a scheduled one.

    Rank 0 looks; `up`, `last` and `latest` are the same on all ranks.
    """

    def __init__(self) -> None:
        self.up = False  # whether an alarm is
        self.last: dict[str, int] = {}  # watch to the step at which it was last due
        self.latest = -1  # the last step that was due to an alarm
        self._asked = -1  # the last step at which the monitor asked what is due
        self._scheduled: Set[str] = frozenset()  # the watches that were due there by schedule
        self._provisional: Provisional | None = None
        self._warned = False

    def begin(self, step: int) -> None:
        """The alarms are looked for from the start of the run, as if training had never stopped."""
        self._provisional = None
        self.up, self.last = self.monitor.ranks.first(self._resume)
        self.latest = self._asked = -1

    def due(self, step: int, watches: list[Watch]) -> list[Watch]:
        """Those due by schedule, and those due by an alarm (with this step as theirs, for `observe`)."""
        scheduled = {watch.name: watch for watch in watches}
        added = {watch.name for watch in self._added(step)} - scheduled.keys()
        self._asked, self._scheduled = step, scheduled.keys()
        if added:
            self.latest = step
        due = [
            replace(watch, steps={step}) if watch.name in added else scheduled[watch.name]
            for watch in self.monitor.watches
            if watch.name in added or watch.name in scheduled
        ]
        self.last |= {watch.name: step for watch in due}
        return due

    def choose(self, step: int, names: list[str]) -> list[str]:
        """All, once it is recorded which are due to an alarm. Where that cannot be written, those are left out."""
        added = {watch.name for watch in self.monitor.watches if step not in watch.steps} & set(names)
        added -= self._scheduled  # of a step that was passed over
        if not added:
            return names
        try:
            densified = self._trajectory.attrs.get("densified", {})
            steps = {name: sorted({*densified.get(name, []), step}) for name in added}
            self._trajectory.record(densified=densified | steps)
        except (StoreError, OSError) as error:
            self._warn(error)
            return [name for name in names if name not in added]
        return names

    def after(self, step: int) -> None:
        self.up = self.monitor.ranks.first(lambda: self._look() if self._due_to_look(step) else self.up)

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """What the last look says of every alarm of the run; on rank 0, the others have none."""
        return () if self._provisional is None else tuple(self._provisional.alarms)

    def wants(self, step: int) -> bool:
        """Whether `step` is one that an alarm adds, asked before or after the monitor measured there."""
        return step == self.latest or (step != self._asked and bool(self._added(step)))

    @property
    def _trajectory(self) -> Trajectory:
        """On rank 0."""
        assert self.monitor.trajectory is not None
        return self.monitor.trajectory

    def _added(self, step: int) -> list[Watch]:
        """The watches that an alarm makes due at `step`, beside their schedule."""
        if not self.up or step <= 0:
            return []
        return [
            watch
            for watch in self.monitor.watches
            if step not in watch.steps and step >= DENSER * self.last.get(watch.name, 0)
        ]

    def _resume(self) -> tuple[bool, dict[str, int]]:
        """`up` and `last`, from the rows of the run."""
        held = {name: self._trajectory.steps(name) for name in self._names()}
        last = {name: steps[-1] for name, steps in held.items() if steps}
        return self._look() if last else False, last

    def _look(self) -> bool:
        """Make the looks that are due, record the alarms, and say whether one is up."""
        from devmon.analysis.transitions.alarms import provisional  # loads scipy: only where it is asked for

        try:
            with isolated():
                self._provisional = provisional(self._trajectory, before=self._provisional)
            alarms: list[dict[str, Any]] = [alarm.to_dict() for alarm in self._provisional.alarms]
            if alarms != self._trajectory.attrs.get("alarms", []):
                self._trajectory.record(alarms=alarms)
        except Exception as error:
            self._warn(error)
        return self._provisional is not None and bool(self._provisional.up)

    def _due_to_look(self, step: int) -> bool:
        """Whether a watch has just reached the size of a look, or an alarm may end, at a scheduled step."""
        if not self._scheduled:
            return False
        if self.up:
            return True
        from devmon.analysis.transitions.alarms import Looks

        sizes, densified = set(Looks().sizes), self._trajectory.attrs.get("densified", {})
        held = {name: set(self._trajectory.steps(name)) for name in self._names()}
        return any(len(steps - set(densified.get(name, []))) in sizes for name, steps in held.items() if step in steps)

    def _names(self) -> list[str]:
        return [watch.name for watch in self.monitor.watches if watch.name in self._trajectory]

    def _warn(self, error: Exception) -> None:
        if self.monitor.strict:
            raise error
        if not self._warned:
            reason = str(error) if isinstance(error, DevmonError) else f"{type(error).__name__}: {error}"
            warnings.warn(f"no alarms are raised ({reason}); training goes on", stacklevel=3)
        self._warned = True
