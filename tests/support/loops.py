"""A small training in each kind of loop: Lightning's trainer, Fabric, the Trainer of transformers, a plain loop."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import xarray as xr
from lightning.pytorch.loggers import Logger

from devmon import LoopMonitor, Snapshot, Watch
from devmon.callbacks import FabricMonitor, Monitor
from tests.support.lightning_toys import Norm
from tests.support.lightning_toys import train as train_by_lightning

LOOPS = ("lightning", "fabric", "trainer", "plain")


class Toy(torch.nn.Module):
    """Dropout, running statistics, and noise of Python and NumPy. Its loss stands where transformers' Trainer looks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(5, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(16, 3),
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        noise = 0.01 * random.random() + 0.01 * float(np.random.rand())  # noqa: NPY002
        out = self.net(x + noise)
        return out if labels is None else {"loss": torch.nn.functional.cross_entropy(out, labels), "logits": out}


def seeded() -> Toy:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    return Toy()


def after() -> tuple[Any, ...]:
    """What the random states give next."""
    return random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Recorder(Logger):
    """Keeps what it is told; draws random numbers, as loggers do for their file names."""

    name = version = "recorder"

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.broken = broken

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        ours = {key: value for key, value in metrics.items() if key.startswith("devmon/")}
        if ours:
            torch.rand(1), np.random.rand()  # noqa: NPY002
            if self.broken:
                raise ConnectionError("no network")
            assert step is not None
            self.rows.append((step, ours))


@dataclass(frozen=True)
class FailsAt:
    steps: tuple[int, ...]
    error: type[Exception] = RuntimeError

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        if snapshot.step in self.steps:
            raise self.error(f"no luck at {snapshot.step}")
        return Norm()(snapshot)


def messages(warned: pytest.WarningsRecorder) -> list[str]:
    """The beginnings of the monitor's own warnings."""
    texts = [str(warning.message).split(" (")[0] for warning in warned]
    return [text for text in texts if any(words in text for words in ("failed at", "not logged", "not tidied"))]


def train(
    monitor: LoopMonitor | None,
    model: Toy,
    steps: range = range(1, 13),
    accumulate: int = 1,
    before: Callable[[int], None] = lambda step: None,
) -> Toy:
    """A plain loop; `before` is called with the steps done when the next one starts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    if monitor is not None:
        monitor.step(steps[0] - 1, model)
    for step in steps:
        before(step - 1)
        for _ in range(accumulate):
            x = torch.randn(8, 5)
            (model(x, (x[:, 0] > 0).long())["loss"] / accumulate).backward()
            if monitor is not None:
                monitor.step(step - 1, model)  # between updates: the step that was seen
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step(step, model)
    return model


def trainer(folder: Path, callbacks: list[Any], **options: Any) -> Any:
    """A Trainer of transformers with the same model."""
    import transformers

    x = torch.randn(96, 5, generator=torch.Generator().manual_seed(1))
    data = [{"x": row, "labels": int(row[0] > 0)} for row in x]
    settings = {"max_steps": 8, "save_strategy": "no", "logging_strategy": "no"} | options
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, learning_rate=0.02, report_to=[], disable_tqdm=True, use_cpu=True,
        seed=7, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    return transformers.Trainer(seeded(), args, train_dataset=data, callbacks=callbacks)


def fit(
    loop: str,
    run: Path | None,
    watches: list[Watch],
    *,
    steps: int = 12,
    before: Callable[[int], None] = lambda step: None,
    logger: Recorder | None = None,
    **options: Any,
) -> torch.nn.Module:
    """The model trained by this kind of loop, measured into `run` (None: without a monitor).

    `before` is called with the steps done when the next one starts. `logger` stands where the loop has its loggers.
    """
    return {"lightning": _lightning, "fabric": _fabric, "trainer": _trainer, "plain": _plain}[loop](
        run, watches, steps, before, logger, options
    )


def _lightning(run: Any, watches: Any, steps: int, before: Any, logger: Any, options: dict[str, Any]) -> Any:
    class Before(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            before(trainer.global_step)

    monitors = [] if run is None else [Monitor(run, watches, log=logger is not None, **options)]
    return train_by_lightning([Before(), *monitors], steps=steps, logger=logger or False)


def _fabric(run: Any, watches: Any, steps: int, before: Any, logger: Any, options: dict[str, Any]) -> Any:
    fabric = L.Fabric(accelerator="cpu", devices=1, loggers=[] if logger is None else [logger])
    net = seeded()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.02))

    def loop(monitor: FabricMonitor | None) -> Toy:
        for step in range(steps + 1):
            if step:
                before(step - 1)
                x = torch.randn(8, 5)
                fabric.backward(model(x, (x[:, 0] > 0).long())["loss"])
                optimizer.step()
                optimizer.zero_grad()
            if monitor is not None:
                monitor.step(step, model)
        return net

    if run is None:
        return loop(None)
    with FabricMonitor(fabric, run, watches, log=logger is not None, **options) as monitor:
        return loop(monitor)


def _trainer(run: Any, watches: Any, steps: int, before: Any, logger: Any, options: dict[str, Any]) -> Any:
    from transformers import TrainerCallback

    from devmon.callbacks import TrainerMonitor

    class Before(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            before(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logger is not None:
                logger.log_metrics(logs, step=state.global_step)

    with tempfile.TemporaryDirectory() as folder:
        training = trainer(Path(folder), [Before()], max_steps=steps)
        if run is not None:
            training.add_callback(TrainerMonitor(run, watches, log=None if logger is None else training, **options))
        training.train()
    return training.model


def _plain(run: Any, watches: Any, steps: int, before: Any, logger: Any, options: dict[str, Any]) -> Any:
    if run is None:
        return train(None, seeded(), range(1, steps + 1), before=before)
    with LoopMonitor(run, watches, log=logger, **options) as monitor:
        return train(monitor, seeded(), range(1, steps + 1), before=before)
