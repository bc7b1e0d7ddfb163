"""`FabricMonitor`: the monitor for a training loop of Lightning Fabric."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import cast

import lightning as L
import torch
from lightning.fabric import is_wrapped

from devmon.callbacks.network import refuse_sharded
from devmon.monitoring.loop import LoopMonitor
from devmon.monitoring.ranks import ALONE, Ranks
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch


class FabricMonitor(LoopMonitor):
    """A `LoopMonitor` on every process of a `lightning.Fabric`:

        with FabricMonitor(fabric, "runs/my-run.zarr", watches) as monitor:
            monitor.step(0, model)
            for step, batch in enumerate(data, 1):
                ...  # fabric.backward(loss), and one update of the optimizer
                monitor.step(step, model)

    `model` is what `fabric.setup` returned, or the module in it. Under data parallelism every process makes one, with the
    same watches, after `fabric.launch()`, and calls `step`: rank 0 holds the trajectory and measures, the chains of an LLC
    are dealt to all, and what ends training ends it on every rank. Strategies that shard the weights are refused.
    """

    def __init__(self, fabric: L.Fabric, trajectory: str | os.PathLike[str] | Trajectory, watches: Iterable[Watch], *,
                 strict: bool = False) -> None:  # fmt: skip
        refuse_sharded(fabric.strategy)
        ranks = Ranks.of_training() if fabric.world_size > 1 else ALONE
        super().__init__(trajectory, watches, strict=strict, ranks=ranks)

    def step(self, step: int, model: torch.nn.Module) -> None:
        """Measure what is due at `step`. Raises DevmonError for a step before the last one."""
        super().step(step, cast(torch.nn.Module, model.module) if is_wrapped(model) else model)

    def close(self) -> None:
        super().close()
        self._ranks.close()
        self._ranks = ALONE
