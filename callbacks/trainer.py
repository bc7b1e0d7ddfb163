"""`TrainerMonitor`: the monitor for the `Trainer` of transformers (`pip install "devmon[hf]"`)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from typing import Any, Unpack

from transformers import Trainer, TrainerCallback

from devmon.errors import DevmonError
from devmon.monitoring.loop import LoopMonitor, MonitorOptions, Part
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch


class TrainerMonitor(TrainerCallback):
    """`Trainer(..., callbacks=[TrainerMonitor(run, watches)])`: measure while a Hugging Face `Trainer` trains.

    What `devmon.LoopMonitor` does, with all its options, at the trainer's `global_step` (once under gradient
    accumulation), step 0 and the step of a resumption included. A trainer does not tell its callbacks where it reports
    to: `trainer.add_callback(TrainerMonitor(run, watches, log=trainer))` sends the headline numbers there.

    Under data parallelism the first process measures, and the others wait for it at the next exchange of gradients.
    Sharded weights (FSDP, DeepSpeed ZeRO 3) are refused before training.

    The trainer tells no callback of an exception: rows are then left unfolded, and are read all the same; what
    `max_overhead` left out is then not listed.
    """

    def __init__(
        self,
        trajectory: str | os.PathLike[str] | Trajectory,
        watches: Iterable[Watch],
        *,
        model: Part = None,
        log: Any = None,
        **options: Unpack[MonitorOptions],
    ) -> None:
        if log is True:
            raise DevmonError(
                "a trainer does not tell its callbacks where it reports to: hand the trainer over, as in "
                "trainer.add_callback(TrainerMonitor(..., log=trainer)), or a logger, or a function of (values, step)"
            )
        log = partial(_report, log) if isinstance(log, Trainer) else log
        self.loop = LoopMonitor(trajectory, watches, model=model, log=log, ranks=None, **options)
        self._takes_part = False
        self._optimizer = options.get("optimizer")  # of the user, where the trainer's is not the one

    @property
    def watches(self) -> tuple[Watch, ...]:
        return self.loop.watches

    @property
    def trajectory(self) -> Trajectory | None:
        """Open in the first process, from the start of training on."""
        return self.loop.trajectory

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        deepspeed = getattr(args, "hf_deepspeed_config", None)
        if getattr(args, "fsdp", None) or (deepspeed is not None and deepspeed.is_zero3()):
            raise DevmonError(
                "FSDP and DeepSpeed ZeRO 3 shard the weights over the ranks, and TrainerMonitor needs all of them on "
                "one: call devmon.callbacks.Sidecar's step in on_step_end of a callback of yours, or save whole "
                "checkpoints and measure those afterwards with devmon measure, or train with DDP"
            )
        self._takes_part = state.is_world_process_zero
        if self._takes_part:
            self.loop.open()
            self.loop.optimizer = self._optimizer or optimizer
            self.loop.step(state.global_step, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._takes_part:
            self.loop.step(state.global_step, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._takes_part:
            self.loop.close()
            self.loop.optimizer = self._optimizer


def _report(trainer: Trainer, values: dict[str, float], step: int) -> None:
    """Log as the trainer does, at its own step."""
    asked = trainer.control.should_log  # `log` takes it back, and the trainer's own numbers of this step would be lost
    trainer.log(dict(values))
    trainer.control.should_log = asked
