"""`Monitor`: a Lightning callback whose whole work is a call of `devmon.observe` when the step changes."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
import xarray as xr

from devmon.callbacks.network import Model, network, refuse_sharded
from devmon.errors import DevmonError, StoreError
from devmon.live.background import LivePage
from devmon.monitoring.budget import Budget
from devmon.monitoring.densify import Densify
from devmon.monitoring.isolation import isolated
from devmon.monitoring.loop import resume
from devmon.monitoring.observe import observe
from devmon.monitoring.ranks import ALONE, Ranks
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch, unique_names


class Monitor(L.Callback):
    """Measure the model during training and keep everything in one trajectory.

    - `trajectory`: the path of the run's store, or an open `Trajectory`.
    - `watches`: what is measured, and at which optimizer steps; step 0 is the model before the first update.
    - `model`: what the instruments see. By default the LightningModule if it defines `forward`, else its only child;
      otherwise the name of an attribute (`"net"`), or a function of the LightningModule.
    - `strict`: let any failure end training. By default an instrument that fails, or a row that cannot be written
      (a full disk, a lost mount), is warned of once a watch, recorded with its reason in `Trajectory.failures` (as soon
      as that can be written again), and training goes on without that row. Refused either way: a store that cannot be
      opened before the first step, an instrument that does not fit the model, a store that holds another run.
    - `log`: send the headline numbers of each observation to the trainer's loggers too, as `devmon/<watch>/<variable>`
      at the optimizer step; of an LLC its `llc`, `se` and `accepted` (1 or 0). Arrays are in the trajectory only.
    - `max_overhead`: the share of the wall time, such as 0.1, that the monitor may take. Due observations that would
      exceed it are left out and listed in the trajectory's `attrs["skipped"]` (when training ends, also by an
      exception). Step 0 and the first observation of each watch are always made; `Budget` has the rule. `clock` tells
      the seconds.
    - `densify`: look for events while training goes on, and measure every watch more often while an alarm is up (see
      `Densify`); a `CheckpointSeries` of the same trainer saves at those steps too. A look takes about as long as
      `devmon.analysis.detection.results.search` of the run's scalars and maxima; each of those is looked at 24 times at most.
    - `live`: an .html file that is made again while training goes on, by a process of its own (`LivePage`); open it in a
      browser and it loads itself again. Its events and alarms are provisional. When training ends, the last one is made.

    Training is not touched: instruments work on a copy (not compiled, where the model is), and random states and
    switches are put back. Steps are counted once under gradient accumulation. When training resumes from step k, rows
    past k are set aside as an earlier attempt, once configuration and weights at k are found to be those stored.

    Under data parallelism every rank has this callback, with the same watches. Rank 0 holds the trajectory and measures;
    the work of instruments that can be divided (`devmon.snapshot.Divisible`: the chains of an `LLC`) is dealt to all
    ranks, with the same numbers up to rounding. What ends training ends it on every rank. The ranks talk over gloo,
    and only at steps at which something is due. Strategies that shard the weights are refused before training.
    """

    def __init__(self, trajectory: str | os.PathLike[str] | Trajectory, watches: Iterable[Watch], *,
                 model: Model = None, strict: bool = False, log: bool = False, max_overhead: float | None = None,
                 live: str | os.PathLike[str] | None = None, densify: bool = False,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        if max_overhead is not None and not 0 < max_overhead <= 1:
            raise DevmonError(f"max_overhead is a share of the wall time above 0 and up to 1, got {max_overhead}")
        self.trajectory = trajectory if isinstance(trajectory, Trajectory) else None
        self.path = trajectory.path if isinstance(trajectory, Trajectory) else trajectory
        self.watches = unique_names(watches)
        self.model = model
        self.strict = strict
        self.log_numbers = log  # Lightning overwrites `log` of a callback
        self.max_overhead = max_overhead
        self.live = None if live is None else LivePage(live)
        self.clock = clock
        self.densify = Densify(self.watches, strict) if densify else None
        self._budget: Budget | None = None
        self._failures: dict[str, dict[int, str]] = {}
        self._unlogged: set[str] = set()
        self._seen = -1
        self._ranks = ALONE

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_sharded(trainer.strategy)
            self._ranks = Ranks.of_training() if trainer.world_size > 1 else ALONE
            self._ranks.agree(self._open, pl_module, trainer.is_global_zero)

    def _open(self, pl_module: L.LightningModule, first: bool) -> None:
        network(pl_module, self.model)  # a misfit is told before anything is trained
        if not first:
            self.trajectory = None
        elif self.trajectory is None:
            self.trajectory = Trajectory(self.path)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ranks.agree(self._begin, trainer.global_step, network(pl_module, self.model))
        self._failures = {}
        self._budget = None
        if self.max_overhead is not None:
            self._budget = Budget(self.max_overhead, [watch.name for watch in self.watches], self.clock)
        self._seen = -1
        if self.densify is not None:
            self.densify.adopt(*self._ranks.first(self.densify.begin, self.trajectory, trainer.global_step))
        self._observe(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._observe(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ranks.agree(self._end)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._ranks.close()
        self._ranks = ALONE

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end(raising=False)  # what ended training is what should be raised

    def _begin(self, step: int, model: torch.nn.Module) -> None:
        """Refuse another configuration or another run first, then set aside what a resumption supersedes."""
        if self.trajectory is None:
            return
        resume(self.trajectory, self.watches, step, model)
        skipped = self.trajectory.attrs.get("skipped", {})
        kept = {name: [s for s in steps if s <= step] for name, steps in skipped.items()}
        if kept != skipped:
            self.trajectory.record(skipped=kept)

    def _observe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self._seen or (self.trajectory is None and self._ranks.size == 1):
            return  # the latter: ranks without torch.distributed (TPUs), of which rank 0 measures
        self._seen = step
        due = [watch for watch in self.watches if step in watch.steps]
        if self.densify is not None:
            due = self.densify.due(step)
        if not due:
            return

        def each(name: str, dataset: xr.Dataset | None) -> None:
            if self._budget is not None:
                self._budget.measured(name)
            if self.log_numbers and dataset is not None:
                self._log(trainer, name, step, dataset)

        with self._budget.at_work() if self._budget is not None else nullcontext():
            if self._budget is not None:
                chosen = self._ranks.first(self._budget.choose, [watch.name for watch in due], step)
                due = [watch for watch in due if watch.name in chosen]
            if self.densify is not None:
                named = self._ranks.first(self.densify.admit, self.trajectory, step, [watch.name for watch in due])
                due = [watch for watch in due if watch.name in named]
            observe(step, network(pl_module, self.model), due, self.trajectory, strict=self.strict,
                    ranks=self._ranks, each=each, failures=self._failures)  # fmt: skip
            if self.densify is not None:
                self.densify.up = self._ranks.first(self.densify.after, self.trajectory, step)
        if self.live is not None and self.trajectory is not None:
            self.live.update(self.trajectory.path)

    def _log(self, trainer: L.Trainer, name: str, step: int, dataset: xr.Dataset) -> None:
        from devmon.analysis.derive.watch_series import numbers_of  # loads scipy: only where it is asked for

        try:
            with isolated():  # loggers may draw random names
                values = {f"devmon/{name}/{variable}": value for variable, value in numbers_of(dataset).items()}
                for logger in trainer.loggers if values else ():
                    logger.log_metrics(values, step=step)
        except Exception as error:
            if self.strict:
                raise
            if name not in self._unlogged:
                warnings.warn(f"{name} was measured at step {step} but not logged ({type(error).__name__}: {error}); "
                              "training goes on", stacklevel=2)  # fmt: skip
            self._unlogged.add(name)

    def _end(self, raising: bool = True) -> None:
        """Write what is still to be written, and fold. Units that cannot be folded stay, and are read all the same."""
        if self.trajectory is None:
            return
        try:
            self._record()
            self.trajectory.fold()
        except Exception as error:
            if raising and (self.strict or not isinstance(error, StoreError | OSError)):
                raise
            warnings.warn(f"{self.path} was not tidied up at the end ({error}); no row in it is lost", stacklevel=2)
        finally:
            if self.live is not None:
                self.live.close(self.trajectory.path)

    def _record(self) -> None:
        """The failures that could not be written when they happened, and what was left out to save time."""
        assert self.trajectory is not None
        for name in [watch.name for watch in self.watches if watch.name in self.trajectory]:
            written = {*self.trajectory.failures(name), *self.trajectory.steps(name)}
            for step, reason in self._failures.get(name, {}).items():
                if step not in written:
                    self.trajectory.fail(name, step, reason)
        if self._budget is not None and self._budget.skipped:
            skipped = dict(self.trajectory.attrs.get("skipped", {}))
            for name, steps in self._budget.skipped.items():
                held = self.trajectory.steps(name) if name in self.trajectory else []
                skipped[name] = sorted({*skipped.get(name, []), *steps} - set(held))
            self.trajectory.record(skipped=skipped)
