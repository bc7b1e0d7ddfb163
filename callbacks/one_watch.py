"""A `Monitor` with one watch, in one line: `LLCMonitor`, `InductionMonitor`, `RepresentationMonitor`."""

from __future__ import annotations

import os
from collections.abc import Container
from typing import Any

from devmon.callbacks.monitor import Monitor
from devmon.instruments import LLC, InductionHeads, LinearProbe
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch, every

OPTIONS = {
    "model",
    "strict",
    "log",
    "max_overhead",
    "densify",
    "live",
    "clock",
}  # of Monitor, which its one-line forms hand on


class LLCMonitor(Monitor):
    """A `Monitor` with one watch, `llc`: `LLCMonitor("run.zarr", tokens, steps=every(500), nbeta=30, gamma=300, lr=1e-4)`.

    What is neither `steps` nor an option of `Monitor` goes to `devmon.instruments.LLC`.
    """

    def __init__(self, trajectory: str | os.PathLike[str] | Trajectory, *args: Any, steps: Container[int] = every(500),
                 **settings: Any) -> None:  # fmt: skip
        options = {key: settings.pop(key) for key in OPTIONS & settings.keys()}
        super().__init__(trajectory, [Watch("llc", LLC(*args, **settings), steps)], **options)


class InductionMonitor(Monitor):
    """A `Monitor` with one watch, `induction`: `InductionMonitor("run.zarr", vocab_size=5000, steps=every(100))`.

    What is neither `steps` nor an option of `Monitor` goes to `devmon.instruments.InductionHeads`.
    """

    def __init__(self, trajectory: str | os.PathLike[str] | Trajectory, *args: Any, steps: Container[int] = every(100),
                 **settings: Any) -> None:  # fmt: skip
        options = {key: settings.pop(key) for key in OPTIONS & settings.keys()}
        super().__init__(trajectory, [Watch("induction", InductionHeads(*args, **settings), steps)], **options)


class RepresentationMonitor(Monitor):
    """A `Monitor` with one watch, `probe`: `RepresentationMonitor("run.zarr", tokens, labels, steps=every(500))`.

    What is neither `steps` nor an option of `Monitor` goes to `devmon.instruments.LinearProbe`.
    """

    def __init__(self, trajectory: str | os.PathLike[str] | Trajectory, *args: Any, steps: Container[int] = every(500),
                 **settings: Any) -> None:  # fmt: skip
        options = {key: settings.pop(key) for key in OPTIONS & settings.keys()}
        super().__init__(trajectory, [Watch("probe", LinearProbe(*args, **settings), steps)], **options)
