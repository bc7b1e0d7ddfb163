"""Small Lightning trainings that the callback tests share, and a disk that is full for some of their steps."""

from __future__ import annotations

import errno
import logging
import random
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr

from devmon import Snapshot, StoreError, Trajectory

for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class Net(L.LightningModule):
    """Everything that a careless monitor would disturb: dropout, running statistics, Adam, Python and NumPy noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(5, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(16, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x + self.noise()), y)

    def noise(self) -> float:
        return 0.01 * random.random() + 0.01 * float(np.random.rand())  # noqa: NPY002

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def loader(batches: int = 24) -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * batches, 5, generator=generator)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
    return torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)


def train(
    callbacks: list[L.Callback], *, resume: Any = None, steps: int = 12, accumulate: int = 1,
    make: Callable[[], Any] = Net, logger: Any = False, seed: int = 7, **options: Any,
) -> Any:  # fmt: skip
    L.seed_everything(seed, verbose=False)
    module = make()
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, accumulate_grad_batches=accumulate, **options,
    )  # fmt: skip
    trainer.fit(module, loader(), ckpt_path=resume, weights_only=True if resume else None)
    return module


@dataclass(frozen=True)
class Norm:
    """The norm of all weights: exact, cheap, different at every step."""

    scale: float = 1.0

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        total = sum(float((p.detach().double() ** 2).sum()) for p in snapshot.model.parameters())
        return xr.Dataset({"norm": ((), self.scale * total**0.5)})


@dataclass(frozen=True)
class Careless:
    """Trains, reseeds, changes switches, hooks, modes and its model's weights: all of it must stay without effect."""

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = snapshot.model.train()
        torch.set_grad_enabled(True)
        model.register_forward_hook(lambda *_: None)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        x = torch.randn(16, 5)
        torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        model(x).sum().backward()
        optimizer.step()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        torch.set_float32_matmul_precision("medium")
        torch.set_anomaly_enabled(True)
        torch.set_default_device("meta")
        torch.set_num_threads(2)
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.cudnn.deterministic = not torch.backends.cudnn.deterministic
        np.seterr(all="raise")
        matplotlib.use("svg")
        return xr.Dataset({"x": ((), float(x.sum()))})


class Disk(L.Callback):
    """Full from `full` on and free again from `free` on (optimizer steps done when the next one starts).

    Full means that the store's methods refuse; with `limit`, that the system lets this process write to no file.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full: int = 2, free: int = 10**9, limit: bool = False) -> None:
        self.full, self.free, self.limit, self.refused = full, free, limit, 0
        self.allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.is_full = False
        for method in ("append", "fail", "record", "fold"):
            monkeypatch.setattr(Trajectory, method, self.refusing(getattr(Trajectory, method)))

    def refusing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if not self.is_full:
                return method(*args, **kwargs)
            self.refused += 1
            if self.limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, self.allowed[1]))
                try:
                    return method(*args, **kwargs)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, self.allowed)
            raise StoreError("cannot write (No space left on device)") from OSError(
                errno.ENOSPC, "No space left on device"
            )

        return refuse

    def at(self, step: int) -> None:
        self.is_full = self.full <= step < self.free

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.at(trainer.global_step)
