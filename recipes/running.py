"""What the recipes share: a silent trainer that goes on from its last checkpoint, batches by step, a table to print."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from devmon import every
from devmon.callbacks import CheckpointSeries, latest
from devmon.recipes.language_model import Bar, quiet


class BatchOfStep(torch.utils.data.IterableDataset[Any]):
    """Batch number `step` is `draw(step)`, so that a resumed run sees what it would have seen."""

    def __init__(self, training: L.LightningModule, draw: Callable[[int], Any]) -> None:
        self.training, self.draw = training, draw

    def __iter__(self) -> Iterator[Any]:
        return map(self.draw, itertools.count(self.training.trainer.global_step))


def batches(training: L.LightningModule, draw: Callable[[int], Any]) -> torch.utils.data.DataLoader[Any]:
    """A data loader of `draw(step)` for the optimizer's steps from where the training stands."""
    return torch.utils.data.DataLoader(BatchOfStep(training, draw), batch_size=None)


def train(
    training: L.LightningModule, steps: int, watching: Sequence[L.Callback], folder: Path, console: Console,
    *, units: str, accelerator: str = "cpu",
) -> None:  # fmt: skip
    """Train for `steps` steps, watched, with a checkpoint in `folder` at every tenth; the same call goes on from the
    last one. `units` are those of the training loss."""
    quiet()
    saved = CheckpointSeries(folder / "checkpoints", every(max(1, steps // 10)))
    trainer = L.Trainer(
        max_steps=steps, accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*watching, saved, Bar(console, steps, units)],
    )  # fmt: skip
    trainer.fit(training, ckpt_path=latest(folder / "checkpoints"), weights_only=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Numbers to three digits, text as it is."""
    drawn = Table(*columns, title=title)
    for row in rows:
        drawn.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    return drawn
