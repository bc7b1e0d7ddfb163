"""`Companion`: what goes along with a monitor (a budget, a logger, a live page) and may have a say at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xarray as xr

from devmon.watch import Watch

if TYPE_CHECKING:
    from devmon.monitoring.loop import LoopMonitor


class Companion:
    """The hooks that a `LoopMonitor` calls; each may be left as it is.

    Companions are nested as context managers are: the first one is asked first, and its `after` comes last.

    - `begin(step)`: training starts or resumes at `step`; superseded rows are set aside already. Every rank.
    - `due(step, watches)`: the watches that are due at `step`; it may add some. Every rank must answer alike, without
      asking the others: ranks only talk where there is something to measure.
    - `choose(step, names)`: those of the due watches that are measured. Rank 0.
    - `measured(step, name, dataset)`: the watch has its row, or None where it failed. Rank 0.
    - `after(step)`: all that was chosen is measured. Every rank.
    - `record()`: training is over; write into the trajectory what only the end knows. Rank 0.
    - `close()`: all rows are folded. Rank 0.
    """

    monitor: LoopMonitor  # set by the monitor that takes it along; its `trajectory` is None on the other ranks

    def begin(self, step: int) -> None: ...

    def due(self, step: int, watches: list[Watch]) -> list[Watch]:
        return watches

    def choose(self, step: int, names: list[str]) -> list[str]:
        return names

    def measured(self, step: int, name: str, dataset: xr.Dataset | None) -> None: ...

    def after(self, step: int) -> None: ...

    def record(self) -> None: ...

    def close(self) -> None: ...
