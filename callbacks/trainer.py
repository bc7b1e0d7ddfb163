"""`TrainerMonitor`: the monitor for the `Trainer` of transformers (`pip install "devmon[hf]"`)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from devmon.errors import DevmonError
from devmon.monitoring.loop import LoopMonitor
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch, unique_names


class TrainerMonitor(TrainerCallback):
    """Measure the model while a Hugging Face `Trainer` trains it: `Trainer(..., callbacks=[TrainerMonitor(run, watches)])`.

    What `devmon.monitoring.loop.loop.LoopMonitor` does, at the trainer's `global_step` (once under gradient accumulation), step 0
    and the step of a resumption included. Under data parallelism the first process measures, and the others wait for it
    at the next exchange of gradients. Sharded weights (FSDP, DeepSpeed ZeRO 3) are refused before training.

    The trainer tells no callback of an exception: rows are then left unfolded, and are read all the same.
    """

    def __init__(self, trajectory: str | os.PathLike[str] | Trajectory, watches: Iterable[Watch], *,
                 strict: bool = False) -> None:  # fmt: skip
        self.trajectory = trajectory
        self.watches = unique_names(watches)
        self.strict = strict
        self._monitor: LoopMonitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._monitor = None
        deepspeed = getattr(args, "hf_deepspeed_config", None)
        if getattr(args, "fsdp", None) or (deepspeed is not None and deepspeed.is_zero3()):
            raise DevmonError(
                "FSDP and DeepSpeed ZeRO 3 shard the weights over the ranks, and TrainerMonitor needs all of them on one: "
                "save whole checkpoints and measure those afterwards with devmon measure, or train with DDP"
            )
        if state.is_world_process_zero:
            self._monitor = LoopMonitor(self.trajectory, self.watches, strict=self.strict)
            self._monitor.step(state.global_step, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._monitor is not None:
            self._monitor.step(state.global_step, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._monitor is not None:
            self._monitor.close()
