"""`Monitor`: a Lightning callback whose whole work is a call of `devmon.observe` when the step changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable
from typing import Any

import lightning as L
import torch

from devmon.distributed import ALONE, Ranks
from devmon.errors import DevmonError
from devmon.instruments import LLC, InductionHeads, LinearProbe
from devmon.observing import observe
from devmon.trajectory import Trajectory
from devmon.watch import Watch, every, unique_names

Model = str | Callable[[L.LightningModule], torch.nn.Module] | None
SHARDED = {"FSDPStrategy", "XLAFSDPStrategy", "ModelParallelStrategy"}


class Monitor(L.Callback):
    """Measure the model during training and keep everything in one trajectory.

    - `trajectory`: the path of the run's store, or an open `Trajectory`.
    - `watches`: what is measured, and at which optimizer steps; step 0 is the model before the first update.
    - `model`: what the instruments see. By default the LightningModule if it defines `forward`, else its only child;
      otherwise the name of an attribute (`"net"`), or a function of the LightningModule.
    - `strict`: let any failure of an instrument end training. By default it is recorded, warned of, and training goes
      on; an instrument that does not fit the model raises either way, at its first step.

    Training is not touched: instruments work on a copy, and random states and switches are put back. Steps are counted
    once under gradient accumulation. When training resumes from step k, rows past k are set aside as an earlier attempt.

    Under data parallelism every rank has this callback, with the same watches. Rank 0 holds the trajectory and measures;
    the work of instruments that can be divided (`devmon.snapshot.Divisible`: the chains of an `LLC`) is dealt to all
    ranks, with the same numbers up to rounding. What ends training ends it on every rank. The ranks talk over gloo,
    and only at steps at which something is due. Strategies that shard the weights are refused before training.
    """

    def __init__(self, trajectory: str | os.PathLike[str] | Trajectory, watches: Iterable[Watch], *,
                 model: Model = None, strict: bool = False) -> None:  # fmt: skip
        self.trajectory = trajectory if isinstance(trajectory, Trajectory) else None
        self.path = trajectory.path if isinstance(trajectory, Trajectory) else trajectory
        self.watches = unique_names(watches)
        self.model = model
        self.strict = strict
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
        self._ranks.agree(self._supersede, trainer.global_step)
        self._seen = -1
        self._observe(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._observe(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ranks.agree(self._fold)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._ranks.close()
        self._ranks = ALONE

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._fold()

    def _observe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self._seen or (self.trajectory is None and self._ranks.size == 1):
            return  # the latter: ranks without torch.distributed (TPUs), of which rank 0 measures
        self._seen = step
        model = network(pl_module, self.model)
        observe(step, model, self.watches, self.trajectory, strict=self.strict, ranks=self._ranks)

    def _supersede(self, step: int) -> None:
        if self.trajectory is not None:
            self.trajectory.supersede(after=step)

    def _fold(self) -> None:
        if self.trajectory is not None:
            self.trajectory.fold()


class LLCMonitor(Monitor):
    """A `Monitor` with one watch, `llc`: `LLCMonitor("run.zarr", tokens, steps=every(500), nbeta=30, gamma=300, lr=1e-4)`.

    Everything but `trajectory`, `steps`, `model` and `strict` goes to `devmon.instruments.LLC`.
    """

    def __init__(self, trajectory: str | os.PathLike[str] | Trajectory, *args: Any, steps: Container[int] = every(500),
                 model: Model = None, strict: bool = False, **settings: Any) -> None:  # fmt: skip
        super().__init__(trajectory, [Watch("llc", LLC(*args, **settings), steps)], model=model, strict=strict)


class InductionMonitor(Monitor):
    """A `Monitor` with one watch, `induction`: `InductionMonitor("run.zarr", vocab_size=5000, steps=every(100))`.

    Everything but `trajectory`, `steps`, `model` and `strict` goes to `devmon.instruments.InductionHeads`.
    """

    def __init__(self, trajectory: str | os.PathLike[str] | Trajectory, *args: Any, steps: Container[int] = every(100),
                 model: Model = None, strict: bool = False, **settings: Any) -> None:  # fmt: skip
        watch = Watch("induction", InductionHeads(*args, **settings), steps)
        super().__init__(trajectory, [watch], model=model, strict=strict)


class RepresentationMonitor(Monitor):
    """A `Monitor` with one watch, `probe`: `RepresentationMonitor("run.zarr", tokens, labels, steps=every(500))`.

    Everything but `trajectory`, `steps`, `model` and `strict` goes to `devmon.instruments.LinearProbe`.
    """

    def __init__(self, trajectory: str | os.PathLike[str] | Trajectory, *args: Any, steps: Container[int] = every(500),
                 model: Model = None, strict: bool = False, **settings: Any) -> None:  # fmt: skip
        super().__init__(
            trajectory, [Watch("probe", LinearProbe(*args, **settings), steps)], model=model, strict=strict
        )


def refuse_sharded(strategy: object) -> None:
    """Raise `DevmonError` for a strategy under which no rank holds the whole model."""
    names = {kind.__name__ for kind in type(strategy).__mro__}
    if names & SHARDED or ("DeepSpeedStrategy" in names and getattr(strategy, "zero_stage_3", False)):
        raise DevmonError(
            f"{type(strategy).__name__} shards the weights over the ranks, and Monitor needs all of them on one: save "
            "whole checkpoints (CheckpointSeries, with the strategy set to a full state dict) and measure those "
            "afterwards with devmon.observe, or train with strategy='ddp'"
        )


def network(pl_module: L.LightningModule, model: Model = None) -> torch.nn.Module:
    """The module that instruments see (the argument `model` of `Monitor`)."""
    if callable(model):
        return model(pl_module)
    if isinstance(model, str):
        try:
            return pl_module.get_submodule(model)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise DevmonError(f"{type(pl_module).__name__} has no submodule {model!r}; it has {names}") from None
    if type(pl_module).forward is not L.LightningModule.forward:
        return pl_module
    children = [child for child in pl_module.children() if next(child.parameters(), None) is not None]
    if len(children) == 1:
        return children[0]
    raise DevmonError(
        f"{type(pl_module).__name__} defines no forward and has {len(children)} submodules with parameters: tell which "
        "one to measure, as in Monitor(..., model='net')"
    )
