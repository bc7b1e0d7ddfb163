"""`Densify`: what a monitor measures beside its schedule while an alarm is up, and the record of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from devmon.errors import DevmonError, StoreError
from devmon.monitoring.isolation import isolated
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch

if TYPE_CHECKING:
    from devmon.analysis.detection.alarms import Provisional

DENSER = 1.05  # while an alarm is up, a watch is due when the step is this many times the one it was last measured at


class Densify:
    """The alarms of a training (`devmon.analysis.provisional`), and the steps that they add to the watches' own.

    While an alarm is up every watch is due too at 1.05 times the step at which it was last measured: up to 47 points a
    decade, whatever its schedule. A watch's schedule, and so its identity, stays as it is. `attrs["alarms"]` of the
    trajectory lists all alarms, `attrs["densified"]` has for each watch the steps that only an alarm made due; they are
    written before the step is measured, so that no such point is ever taken for a scheduled one.

    Rank 0 looks; `up`, `last` and `latest` are the same on all ranks.
    """

    def __init__(self, watches: Iterable[Watch], strict: bool = False) -> None:
        self.watches = tuple(watches)
        self.strict = strict
        self.up = False
        self.last: dict[str, int] = {}  # watch to the step at which it was last due
        self.latest = -1  # the last step that was due to an alarm
        self._asked = -1  # the last step at which the monitor asked what is due
        self._known: Provisional | None = None
        self._warned = False

    def begin(self, trajectory: Trajectory | None, step: int) -> tuple[bool, dict[str, int]]:
        """What is known when training starts or resumes at `step`: `up` and `last`, for `adopt` on every rank.

        The alarms are looked for from the start of the run, as if training had never stopped.
        """
        self._known = None
        if trajectory is None:
            return False, {}
        densified = trajectory.attrs.get("densified", {})
        kept = {name: [s for s in steps if s <= step] for name, steps in densified.items()}
        if kept != densified:
            trajectory.record(densified=kept)
        names = [watch.name for watch in self.watches if watch.name in trajectory]
        last = {name: steps[-1] for name in names if (steps := trajectory.steps(name))}
        return self.look(trajectory) if last else False, last

    def adopt(self, up: bool, last: dict[str, int]) -> None:
        self.up, self.last, self.latest, self._asked = up, dict(last), -1, -1

    def dense(self, step: int) -> list[Watch]:
        """The watches that an alarm makes due at `step`, beside their schedule."""
        if not self.up:
            return []
        return [
            watch
            for watch in self.watches
            if step not in watch.steps and step >= DENSER * self.last.get(watch.name, 0) and step > 0
        ]

    def wants(self, step: int) -> bool:
        """Whether `step` is one that an alarm adds, asked before or after the monitor measured there."""
        return step == self.latest or (step != self._asked and bool(self.dense(step)))

    def due(self, step: int) -> list[Watch]:
        """The watches that are due at `step`, by schedule or by an alarm (with this step as theirs, for `observe`).

        Every rank asks once at each step.
        """
        dense, self._asked = self.dense(step), step
        found = [replace(watch, steps={step}) if watch in dense else watch for watch in self.watches]
        found = [watch for watch in found if step in watch.steps]
        if dense:
            self.latest = step
        self.last |= {watch.name: step for watch in found}
        return found

    def admit(self, trajectory: Trajectory | None, step: int, names: list[str]) -> list[str]:
        """Those of the due watches that may be measured: all, once it is recorded which of them are due to an alarm.

        Where that cannot be written, those are left out.
        """
        dense = {watch.name for watch in self.watches if step not in watch.steps} & set(names)
        if trajectory is None or not dense:
            return names
        try:
            known = trajectory.attrs.get("densified", {})
            trajectory.record(densified=known | {name: sorted({*known.get(name, []), step}) for name in dense})
        except (StoreError, OSError) as error:
            self._tell(error)
            return [name for name in names if name not in dense]
        return names

    def after(self, trajectory: Trajectory | None, step: int) -> bool:
        """Whether an alarm is up once `step` was measured."""
        return self.look(trajectory) if self._due_to_look(trajectory, step) else self.up

    def look(self, trajectory: Trajectory | None) -> bool:
        """Make the looks that are due, record the alarms, and say whether one is up."""
        if trajectory is None:
            return False
        from devmon.analysis.detection.alarms import provisional  # loads scipy: only where it is asked for

        try:
            with isolated():
                self._known = provisional(trajectory, before=self._known)
            alarms: list[dict[str, Any]] = [alarm.to_dict() for alarm in self._known.alarms]
            if alarms != trajectory.attrs.get("alarms", []):
                trajectory.record(alarms=alarms)
        except Exception as error:
            self._tell(error)
        return self._known is not None and bool(self._known.up)

    def _due_to_look(self, trajectory: Trajectory | None, step: int) -> bool:
        """Whether a watch has just reached the size of a look, or an alarm may end, at a scheduled step."""
        if trajectory is None or not any(step in watch.steps for watch in self.watches):
            return False
        if self.up:
            return True
        from devmon.analysis.detection.alarms import Looks

        sizes, densified = set(Looks().sizes), trajectory.attrs.get("densified", {})
        held = {watch.name: set(trajectory.steps(watch.name)) for watch in self.watches if watch.name in trajectory}
        return any(len(steps - set(densified.get(name, []))) in sizes for name, steps in held.items() if step in steps)

    def _tell(self, error: Exception) -> None:
        if self.strict:
            raise error
        if not self._warned:
            what = str(error) if isinstance(error, DevmonError) else f"{type(error).__name__}: {error}"
            warnings.warn(f"no alarms are raised ({what}); training goes on", stacklevel=3)
        self._warned = True
