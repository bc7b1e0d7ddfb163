"""A `Monitor` with one watch, in one line: `LLCMonitor`, `InductionMonitor`, `RepresentationMonitor`."""

from __future__ import annotations

import os
from collections.abc import Container
from typing import Any

from devmon.callbacks.monitor import Monitor
from devmon.instruments import LLC, InductionHeads, LinearProbe
from devmon.monitoring.loop import MonitorOptions
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch, written

OPTIONS = {"model", "log", *MonitorOptions.__annotations__}  # of `Monitor`; what else is given is the instrument's


class LLCMonitor(Monitor):
    """`LLCMonitor("run.zarr", tokens, steps=every(500))`: a `Monitor` that watches `llc`.

    What is neither `steps` nor an option of `Monitor` goes to `devmon.instruments.LLC`; lr and gamma are chosen as
    training goes where they are not given.
    """

    def __init__(
        self,
        trajectory: str | os.PathLike[str] | Trajectory,
        *args: Any,
        steps: Container[int] | str = "every(500)",
        **settings: Any,
    ) -> None:
        options = _options(settings)
        super().__init__(trajectory, [Watch("llc", LLC(*args, **settings), written(steps))], **options)


class InductionMonitor(Monitor):
    """`InductionMonitor("run.zarr", vocab_size=5000, steps=every(100))`: a `Monitor` that watches `induction`.

    What is neither `steps` nor an option of `Monitor` goes to `devmon.instruments.InductionHeads`.
    """

    def __init__(
        self,
        trajectory: str | os.PathLike[str] | Trajectory,
        *args: Any,
        steps: Container[int] | str = "every(100)",
        **settings: Any,
    ) -> None:
        options = _options(settings)
        super().__init__(trajectory, [Watch("induction", InductionHeads(*args, **settings), written(steps))], **options)


class RepresentationMonitor(Monitor):
    """`RepresentationMonitor("run.zarr", tokens, labels, steps=every(500))`: a `Monitor` that watches `probe`.

    What is neither `steps` nor an option of `Monitor` goes to `devmon.instruments.LinearProbe`.
    """

    def __init__(
        self,
        trajectory: str | os.PathLike[str] | Trajectory,
        *args: Any,
        steps: Container[int] | str = "every(500)",
        **settings: Any,
    ) -> None:
        options = _options(settings)
        super().__init__(trajectory, [Watch("probe", LinearProbe(*args, **settings), written(steps))], **options)


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """The options of `Monitor`, taken out of the settings."""
    return {key: settings.pop(key) for key in OPTIONS & settings.keys()}
