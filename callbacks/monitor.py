"""`Monitor`: the monitor for the trainer of Lightning."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, Unpack

import lightning as L

from devmon.callbacks.network import Model, network, refuse_sharded
from devmon.monitoring.densify import Densify
from devmon.monitoring.loop import LoopMonitor, MonitorOptions
from devmon.monitoring.mirror import Loggers
from devmon.monitoring.ranks import SINGLE, Ranks
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch


class Monitor(L.Callback):
    """Measure the model during training and keep everything in one trajectory.

    - `trajectory`: the path of the run's store, or an open `Trajectory`.
    - `watches`: what is measured, and at which optimizer steps; step 0 is the model before the first update.
    - `model`: what the instruments see. By default the LightningModule if it defines `forward`, else its only child;
      otherwise the name of an attribute (`"net"`), or a function of the LightningModule.
    - `log`: True sends the headline numbers of each observation to the trainer's loggers too, as
      `devmon/<watch>/<variable>` at the optimizer step; of an LLC its `llc`, `se` and `accepted` (1 or 0). Arrays are
      in the trajectory only. With `densify` alarms are sent too: how many are up as `devmon/alarms`, and each in words
      as an alert of Weights & Biases or a text of TensorBoard. Another logger, or a function of (values, step), may
      stand in their place.
    - `densify`: measure every watch more often while an alarm is up; a `CheckpointSeries` of the same trainer saves at
      those steps too.
    - `strict`, `max_overhead`, `live`, `clock`, `companions`: as of `devmon.LoopMonitor`, which does the work.

    Training is not touched: instruments work on a copy (not compiled, where the model is), and random states and
    switches are put back. Steps are counted once under gradient accumulation. When training resumes from step k, rows
    past k are set aside as an earlier attempt, once configuration and weights at k are found to be those stored.

    With `Trainer(fast_dev_run=True)` every watch is tried once, before the first batch, and nothing is written.

    Where several optimizers move `global_step` by more than 1 (a GAN), what is due in between is measured at the step
    reached next, and `trajectory.attrs["meant"]` says so.

    Under data parallelism every rank has this callback, with the same watches. Rank 0 holds the trajectory and
    measures; the work of instruments that can be divided (`devmon.snapshot.Divisible`: the chains of an `LLC`) is dealt
    to all ranks, with the same numbers up to rounding. What ends training ends it on every rank. The ranks talk over
    gloo, and only at steps at which something is due. Strategies that shard the weights are refused before training.
    """

    def __init__(
        self,
        trajectory: str | os.PathLike[str] | Trajectory,
        watches: Iterable[Watch],
        *,
        model: Model = None,
        log: Any = False,
        **options: Unpack[MonitorOptions],
    ) -> None:
        self.model = model
        self.loop = LoopMonitor(
            trajectory,
            watches,
            model=partial(network, model=model),
            log=Loggers(self._loggers) if log is True else log,
            ranks=None,
            **options,
        )
        self._trainer: L.Trainer | None = None
        self._ranks = SINGLE
        self._takes_part = False
        self._dry = False
        self._optimizer = options.get("optimizer")  # of the user, where the trainer's are not the ones
        self._started, self._batches = 0, 0  # the step at which this training began, and the batches since

    @property
    def watches(self) -> tuple[Watch, ...]:
        return self.loop.watches

    @property
    def path(self) -> str | os.PathLike[str]:
        return self.loop.path

    @property
    def trajectory(self) -> Trajectory | None:
        """Open on rank 0, from the start of training on."""
        return self.loop.trajectory

    @property
    def densify(self) -> Densify | None:
        return self.loop.densify

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_sharded(trainer.strategy)
        self._dry = bool(getattr(trainer, "fast_dev_run", False))
        if self._dry:  # nothing is kept of it: the watches are tried, and no store is made
            return
        self._trainer = trainer
        self._ranks = Ranks.of_training() if trainer.world_size > 1 else SINGLE
        # Ranks without torch.distributed (TPUs) cannot talk to each other: rank 0 measures, the others go without.
        self._takes_part = self._ranks.size > 1 or trainer.is_global_zero
        if self._takes_part:
            self._ranks.agree(network, pl_module, self.model)  # a misfit is refused before a store is made
            self.loop.open(self._ranks)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._takes_part:
            self.loop.optimizer = self._optimizer or trainer.optimizers
            self._started, self._batches = trainer.global_step, 0
            self.loop.step(trainer.global_step, pl_module)
        elif self._dry and trainer.is_global_zero:
            self.loop.attempt(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._batches += 1
        if self._takes_part:
            self.loop.step(trainer.global_step, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, batches = trainer.global_step, self._batches
        if self._takes_part and step == self._started and batches > trainer.accumulate_grad_batches:
            warnings.warn(
                f"Lightning counts no step: global_step is {step} after {batches} batches, so nothing "
                "more is measured. It counts what the optimizers of configure_optimizers do: step those that "
                "self.optimizers() gives, or use LoopMonitor and count yourself",
                stacklevel=2,
            )
            self._started = -1  # said once

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._takes_part:
            self._ranks.agree(self.loop.close)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._takes_part:
            self.loop.close(raising=False)  # what ended training is what should be raised

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._ranks.close()
        self._trainer, self._ranks, self._takes_part = None, SINGLE, False
        self.loop.optimizer = self._optimizer

    def _loggers(self) -> list[Any]:
        assert self._trainer is not None
        return self._trainer.loggers
