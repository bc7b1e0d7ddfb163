"""A monitor that nobody closes leaves a store that plain xarray opens, with all rows."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import torch
import xarray as xr

from devmon import LoopMonitor, Watch, every
from tests.support.lightning_toys import Norm

SCRIPT = """
import torch
from devmon import LoopMonitor, Watch, every
from devmon.instruments import WeightStatistics
net = torch.nn.Linear(3, 3)
monitor = LoopMonitor("run.zarr", [Watch("weights", WeightStatistics(), every(1))])
for step in range(3):
    monitor.step(step, net)
"""


def held(run: Path, watch: str) -> list[int]:
    return xr.open_zarr(run, group=watch, consolidated=False)["step"].values.tolist()


def test_rows_are_folded_when_the_process_ends(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, check=True)
    assert held(tmp_path / "run.zarr", "weights") == [0, 1, 2]


def test_rows_are_folded_when_the_monitor_goes_and_once_alone(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    monitor = LoopMonitor(tmp_path / "run.zarr", [Watch("norm", Norm(), every(1))])
    monitor.step(0, net)
    del monitor
    gc.collect()
    assert held(tmp_path / "run.zarr", "norm") == [0]
    closed = LoopMonitor(tmp_path / "run.zarr", [Watch("norm", Norm(), every(1))])
    closed.step(0, net)
    closed.step(1, net)
    closed.close()
    assert held(tmp_path / "run.zarr", "norm") == [0, 1]
    assert not closed._unclosed.alive
