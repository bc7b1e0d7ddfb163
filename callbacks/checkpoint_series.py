"""`CheckpointSeries`: Lightning checkpoints at an arbitrary set of steps, step 0 included."""

from __future__ import annotations

import os
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any

import lightning as L
import torch

from devmon.checkpoints.folder import checkpoints
from devmon.checkpoints.weights import load
from devmon.errors import DataError, StoreError
from devmon.monitoring.densify import Densify
from devmon.monitoring.passed import last_due
from devmon.watch import written


class CheckpointSeries(L.Callback):
    """Save `folder/step-00000100.ckpt` at every optimizer step that answers `step in steps`.

    The files are ordinary Lightning checkpoints: `trainer.fit(..., ckpt_path=latest(folder))` resumes from one. When
    training starts or resumes at step k, files past k move to `folder/superseded/`, and that of step k too where it
    holds other weights: it is another run's, which a warning says. A step that is due while `global_step` moves by more
    than 1 (two optimizers) is saved at the next one reached. Beside a `Monitor(densify=True)` it saves too at the steps
    that an alarm adds. With `Trainer(fast_dev_run=True)` nothing is saved or moved.

    In a file of settings `steps` may be text, such as `"log_spaced(20, 2000)"`.

    Raises `StoreError` before training where the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], steps: Container[int] | str) -> None:
        self.folder = Path(folder)
        self.steps = written(steps)
        self._seen = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
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
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        start = trainer.global_step
        own: dict[str, Any] = {}
        if trainer.strategy.broadcast(self._path(start).exists()):  # every rank takes part in gathering the weights
            own = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            self._supersede(start, own)
        self._seen = trainer.global_step - 1
        self._save(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer)

    def _supersede(self, start: int, own: dict[str, Any]) -> None:
        """Move aside what this training, which starts at `start` from the weights `own`, will save anew. No file that
        was set aside is lost."""
        files = checkpoints(self.folder)
        later = [path for step, path in files.items() if step > start]
        if start in files and not _holds(files[start], own, unreadable=start > 0):
            warnings.warn(
                f"{files[start]} is of another run, for it does not hold the weights that this training starts from: "
                f"it and later ones move to {self.folder / 'superseded'}. Give each run its own folder",
                stacklevel=2,
            )
            later.append(files[start])
        for path in later:
            aside = self.folder / "superseded"
            aside.mkdir(exist_ok=True)
            names = [path.name, *(f"{path.stem}.{n}{path.suffix}" for n in range(1, len(list(aside.iterdir())) + 1))]
            os.replace(path, next(aside / name for name in names if not (aside / name).exists()))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.ckpt"

    def _save(self, trainer: L.Trainer) -> None:
        step, before = trainer.global_step, self._seen
        if step == before:
            return
        self._seen = step
        if last_due(before, step, self.steps) is None and not _alarmed(trainer, step):
            return
        path = self._path(step)
        if not trainer.strategy.broadcast(path.exists()):  # rank 0's answer: all save, or none
            trainer.save_checkpoint(path, weights_only=False)  # said, so that Lightning says nothing


def _holds(path: Path, own: dict[str, Any], unreadable: bool) -> bool:
    """Whether a checkpoint has these weights, as its own or beside their average; `unreadable` where it cannot be
    told."""
    try:
        content = load(path)
    except DataError:
        return unreadable
    return any(_equal(own, content.get(key)) for key in ("state_dict", "current_model_state"))


def _equal(own: dict[str, Any], stored: Any) -> bool:
    return (
        isinstance(stored, dict)
        and own.keys() == stored.keys()
        and all(torch.equal(value.cpu(), stored[key]) for key, value in own.items() if isinstance(value, torch.Tensor))
    )


def _alarmed(trainer: L.Trainer, step: int) -> bool:
    """Whether an alarm of one of the trainer's monitors makes `step` due."""
    companions = (getattr(callback, "densify", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return any(isinstance(companion, Densify) and companion.wants(step) for companion in companions)
