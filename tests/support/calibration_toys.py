"""A linear regression whose LLC is calibrated: the script, its checkpoints, made-up trials, and an answer at once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import xarray as xr

from devmon import Trajectory
from devmon.sampling import Calibration, Settings

SCRIPT = """
import lightning as L
import torch

from devmon.instruments import LLC
from devmon.sampling import regression_loss


class Regression(L.LightningModule):
    def __init__(self, inputs=4):
        super().__init__()
        self.net = torch.nn.Linear(inputs, 1, bias=False)


def data():
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    return x, x @ torch.arange(4.0)[:, None]


def instrument(**more):
    given = dict(nbeta=100, chains=2, draws=60, burn_in=20, batch_size=64, sampler="baoab") | more
    return LLC(data(), regression_loss, **given)


def made():
    return Regression(), instrument()


def bare():
    return torch.nn.Linear(4, 1, bias=False), instrument()


def wider():
    return Regression(5), instrument()


def deeper():
    return torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False), torch.nn.Linear(1, 1)), instrument()


def kernel():
    from devmon.sampling import SGLD

    return Regression(), instrument(sampler=SGLD(1e-3, 100, 1.0))


def restricted():
    return Regression(), instrument(mask={"weight": torch.tensor([[True, True, False, False]])}, nbeta=None)


def reversed_pair():
    return instrument(), Regression()


def needy(inputs):
    return Regression(inputs), instrument()


if __name__ == "__main__":
    raise SystemExit("it trained")
"""


WEIGHTS = {0: [9.0, 9, 9, 9], 10: [0.1, 1, 2, 3], 20: [0.0, 1.01, 2, 3], 30: [0.0, 1, 2.01, 3], 40: [0.0, 1, 2, 3]}


class Module(L.LightningModule):
    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1, bias=False)
        self.net.weight.data = torch.tensor([weights])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script, a run and its checkpoints as Lightning writes them; step 0 is far from the minimum."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "script.py").write_text(SCRIPT)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    for step, weights in WEIGHTS.items():
        trainer.strategy.connect(Module(weights))
        trainer.save_checkpoint(folder / "run" / "checkpoints" / f"step-{step:08d}.ckpt")
    Trajectory(folder / "run" / "trajectory.zarr", title="T")
    return folder


def trials(rows: list[dict[str, Any]] | None = None, lr: float = 1e-3, gamma: float = 10.0) -> xr.Dataset:
    """Made-up trials: an lr sweep at gamma 10 and a gamma sweep at lr 1e-3, for two checkpoints."""
    if rows is None:
        rows = [
            {"model": m, "lr": rate, "gamma": 10.0, "llc": 2.0 + m + 100 * rate}
            for m in (0, 1)
            for rate in (1e-2, 3e-3, 1e-3)
        ]
        rows += [{"model": m, "lr": 1e-3, "gamma": g, "llc": 2.1 + m} for m in (0, 1) for g in (100.0, 1.0)]
    full = [{"se": 0.1, "ess": 50.0, "rhat": 1.0, "temperature": 1.0, "verdict": "ok"} | row for row in rows]
    columns = {name: ("trial", np.array([row[name] for row in full])) for name in full[0]}
    return xr.Dataset(columns, attrs={"lr": lr, "gamma": gamma, "nbeta": 100.0, "reasons": "because"})


def answer(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[Any]:
    """Let the calibration answer at once, and keep what it was asked."""
    asked: list[Any] = []

    def found(models: Any, loss: Any, data: Any, start: Settings, **options: Any) -> Calibration:
        asked.append((models, loss, data, start, options))
        chosen = {"lr": 1e-3, "gamma": 10.0, "nbeta": start.nbeta or 66.7512345, "steps_per_draw": 3} | changes
        of_models = trials()
        of_models["llc"][0] = math.nan
        of_models = of_models.isel(trial=of_models["model"].values < len(models))
        return Calibration(replace(start, **chosen), of_models, "because", True, 0.01)

    monkeypatch.setattr("devmon.offline.calibrate.calibrate", found)
    return asked
