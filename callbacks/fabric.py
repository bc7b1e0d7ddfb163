"""`FabricMonitor`: the monitor for a training loop of Lightning Fabric."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Unpack, cast

import lightning as L
import torch
from lightning.fabric import is_wrapped

from devmon.callbacks.network import refuse_sharded
from devmon.monitoring.loop import LoopMonitor, MonitorOptions, Part
from devmon.monitoring.mirror import Loggers
from devmon.monitoring.ranks import SINGLE, Ranks
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch


class FabricMonitor(LoopMonitor):
    """A `LoopMonitor` on every process of a `lightning.Fabric`:

        with FabricMonitor(fabric, "runs/my-run.zarr", watches) as monitor:
            monitor.step(0, model)
            for step, batch in enumerate(data, 1):
                ...  # fabric.backward(loss), and one update of the optimizer
                monitor.step(step, model)

    The model of a step is what `fabric.setup` returned, or the module in it. `log=True` sends to Fabric's loggers; the
    other options are those of `LoopMonitor`.

    Under data parallelism every process makes one, with the same watches, after `fabric.launch()`, and calls `step`:
    rank 0 holds the trajectory and measures, the chains of an LLC are dealt to all, and what ends training ends it on
    every rank. Strategies that shard the weights are refused.
    """

    def __init__(
        self,
        fabric: L.Fabric,
        trajectory: str | os.PathLike[str] | Trajectory,
        watches: Iterable[Watch],
        *,
        model: Part = None,
        log: Any = None,
        **options: Unpack[MonitorOptions],
    ) -> None:
        refuse_sharded(fabric.strategy)
        log = Loggers(lambda: fabric.loggers) if log is True else log
        ranks = Ranks.of_training() if fabric.world_size > 1 else SINGLE
        super().__init__(trajectory, watches, model=model, log=log, ranks=ranks, **options)

    def network(self, model: torch.nn.Module) -> torch.nn.Module:
        return super().network(cast(torch.nn.Module, model.module) if is_wrapped(model) else model)

    def close(self, *, raising: bool = True) -> None:
        try:
            super().close(raising=raising)
        finally:
            self.ranks.close()
            self.ranks = SINGLE
