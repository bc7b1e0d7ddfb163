"""What a recipe shows while it trains: one line of progress, and none of Lightning's notes."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar(L.Callback):
    """Progress in one line: step, the training loss, time left; as lines of text where the output is no terminal."""

    def __init__(self, console: Console, total: int, units: str = "nats") -> None:
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeElapsedColumn()
        self.progress = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)
        self.task = self.progress.add_task("training", total=total, loss="")
        self.console, self.total, self.units = console, total, units

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.console.is_terminal:
            self.progress.start()
        self.progress.update(self.task, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        step, loss = trainer.global_step, f"loss {float(outputs['loss']):.2f} {self.units}"
        self.progress.update(self.task, completed=step, loss=loss)
        if not self.console.is_terminal and step % max(1, self.total // 20) == 0:
            self.console.print(f"step {step}/{self.total}, {loss}", highlight=False)

    def on_train_end(self, *_: Any) -> None:
        self.progress.stop()

    def on_exception(self, *_: Any) -> None:
        self.progress.stop()


def quiet() -> None:
    """Lightning's notes on hardware, data loaders and litlogger say nothing about this run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
