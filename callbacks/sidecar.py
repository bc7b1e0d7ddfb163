"""`Sidecar`: measure a training whose weights are sharded, in a process of its own, while the training goes on."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from subprocess import Popen
from types import TracebackType
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist

from devmon.errors import DevmonError
from devmon.monitoring.passed import last_due
from devmon.store.trajectory import Trajectory

# Of the environment of a rank: a process that measures takes part in no training.
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
LINES = 5  # of its output that a warning repeats


def full_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole weights in main memory on rank 0, {} on the others, of FSDP, tensor parallel and DDP modules and of
    engines of DeepSpeed: all ranks call it. Of ZeRO 3 they are those that its forward passes use, in their precision.

    Raises DevmonError for a module whose weights ZeRO 3 holds in parts, in the place of its engine.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        gather = getattr(model, "_zero3_consolidated_16bit_state_dict", None)
        if gather is None:
            raise DevmonError(
                f"Sidecar: DeepSpeed holds {type(model).__name__} in parts, which its engine alone can gather: give "
                "what deepspeed.initialize returned (a Trainer's is found)"
            )
        return gather() or {}  # None on the other ranks
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))


class Sidecar(L.Callback):
    """Whole checkpoints of a sharded training at `steps`, which `devmon measure` measures beside it:

        with Sidecar("runs/mine", "train.py:study", every(500)) as sidecar:
            sidecar.step(0, model)
            for step, batch in enumerate(data, 1):
                ...  # one update of the optimizer
                sidecar.step(step, model)

    or among the callbacks of a Lightning `Trainer`. Every rank makes one and gives it every step. At a due step the
    ranks gather the weights (`full_state`, of ZeRO 3 too; `gather(model)` is another way), and rank 0 writes
    `folder/checkpoints/step-….pt`.
    One process at a time then runs `devmon measure folder/checkpoints --into folder/trajectory.zarr --source source`,
    with further `options` (("--device", "cuda:7")); its output is in `folder/sidecar.log`. It measures all checkpoints
    that the run lacks, so a training that is faster is caught up with; closing waits for it.

    Training is not touched: the weights are read, and nothing random is drawn. Its cost is in the trajectory's
    `attrs["sidecar"]`: seconds to gather and to write, and bytes, of each step. `source` gives the bare model, not
    sharded, and the watches, as for `devmon measure`. What fails to be measured is warned of at the end, and does not
    end training.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        source: str,
        steps: Container[int],
        *,
        gather: Callable[[Any], dict[str, torch.Tensor]] = full_state,
        options: Sequence[str] = (),
    ) -> None:
        self.folder, self.source, self.steps = Path(folder), source, steps
        self.gather, self.options = gather, tuple(options)
        self.costs: dict[str, dict[str, float]] = {}
        self._seen: int | None = None
        self._process: Popen[bytes] | None = None
        self._failed = 0  # the exit code of the last process that ended: it tries again what failed before
        self._behind = False  # whether there are checkpoints that no process was started for

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def step(self, step: int, model: torch.nn.Module) -> None:
        """Save what is due at `step`, and see to it that it is measured. Every rank calls it at the same steps."""
        before = step - 1 if self._seen is None else self._seen
        self._seen = step
        if step > before and last_due(before, step, self.steps) is not None:
            started = time.perf_counter()
            state = self.gather(model)
            gathered = time.perf_counter() - started
            if self.rank == 0:
                self._save(step, state, gathered)
        if self.rank == 0:
            self._start()

    def close(self) -> None:
        """Wait until all checkpoints are measured, and record what gathering took. Rank 0; others return at once."""
        if self.rank or self._seen is None:
            return
        while self._process is not None or self._behind:
            if self._process is not None:
                self._process.wait()
            self._start()
        Trajectory(self.folder / "trajectory.zarr").record(sidecar=self.costs)
        if self._failed:
            said = (self.folder / "sidecar.log").read_text().strip().splitlines()[-LINES:]
            warnings.warn(f"not all checkpoints of {self.folder} were measured: {' | '.join(said)}", stacklevel=2)

    def _save(self, step: int, state: dict[str, torch.Tensor], gathered: float) -> None:
        started = time.perf_counter()
        checkpoints = self.folder / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        target = checkpoints / f"step-{step:08d}.pt"
        part = checkpoints / f".{target.name}.part"
        torch.save(state, part)
        os.replace(part, target)  # whoever lists the folder sees whole checkpoints only
        self.costs[str(step)] = {
            "gather_seconds": gathered,
            "write_seconds": time.perf_counter() - started,
            "bytes": float(target.stat().st_size),
        }
        self._behind = True

    def _start(self) -> None:
        """Begin to measure what is new, unless a process still measures what is older."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            self._process, self._failed = None, code
        if not self._behind:
            return
        self._behind = False
        where, into = self.folder / "checkpoints", self.folder / "trajectory.zarr"
        command = [sys.executable, "-m", "devmon.cli", "measure", str(where), "--into", str(into)]
        alone = {key: value for key, value in os.environ.items() if key not in OF_RANKS and "TORCHELASTIC" not in key}
        with open(self.folder / "sidecar.log", "ab") as log:
            self._process = Popen([*command, "--source", self.source, *self.options], stdout=log, stderr=log, env=alone)

    def __enter__(self) -> Sidecar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- Lightning ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and getattr(trainer, "fast_dev_run", False):
            raise DevmonError("Sidecar keeps what fast_dev_run leaves out: take it from the callbacks there")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step(trainer.global_step, _wrapped(trainer, pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.step(trainer.global_step, _wrapped(trainer, pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.close()


def _wrapped(trainer: L.Trainer, pl_module: L.LightningModule) -> torch.nn.Module:
    model = trainer.strategy.model
    return pl_module if model is None else model
