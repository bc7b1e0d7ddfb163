"""`CheckpointSeries`: Lightning checkpoints at an arbitrary set of steps, step 0 included."""

from __future__ import annotations

import os
from collections.abc import Container
from pathlib import Path
from typing import Any

import lightning as L

from devmon.checkpoints.folder import checkpoints
from devmon.errors import StoreError
from devmon.monitoring.densify import Densify


class CheckpointSeries(L.Callback):
    """Save `folder/step-00000100.ckpt` at every optimizer step that answers `step in steps`.

    The files are ordinary Lightning checkpoints: `trainer.fit(..., ckpt_path=latest(folder))` resumes from one. When
    training starts or resumes at step k, files past k move to `folder/superseded/`. Beside a `Monitor(densify=True)` it
    saves too at the steps that an alarm adds.

    Raises `StoreError` before training where the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], steps: Container[int]) -> None:
        self.folder = Path(folder)
        self.steps = steps
        self._seen = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / ".writable").touch()
                (self.folder / ".writable").unlink()
            except OSError as error:
                raise StoreError(
                    f"cannot write checkpoints to {self.folder} ({error.strerror or error}): give a folder that can be "
                    "written"
                ) from error

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            for step, path in checkpoints(self.folder).items():
                if step > trainer.global_step:
                    (self.folder / "superseded").mkdir(exist_ok=True)
                    os.replace(path, self.folder / "superseded" / path.name)
        self._seen = -1
        self._save(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        if step not in self.steps and not _alarmed(trainer, step):
            return
        path = self.folder / f"step-{step:08d}.ckpt"
        if not trainer.strategy.broadcast(path.exists()):  # rank 0's answer: all save, or none
            trainer.save_checkpoint(path)


def _alarmed(trainer: L.Trainer, step: int) -> bool:
    """Whether an alarm of one of the trainer's monitors makes `step` due."""
    companions = (getattr(callback, "densify", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return any(isinstance(companion, Densify) and companion.wants(step) for companion in companions)
