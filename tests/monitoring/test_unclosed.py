"""A monitor that nobody closes leaves a store that plain xarray opens, with all rows."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import torch
import xarray as xr

from devmon import LoopMonitor, Watch, every
from devmon.monitoring import unclosed
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


def test_a_monitor_that_is_closed_is_folded_once_and_one_that_is_collected_never_there(tmp_path: Path) -> None:
    """Nothing is written while objects are collected: that may be within another write, which would wait for itself."""
    net = torch.nn.Linear(2, 2)
    before = len(unclosed._unclosed)
    monitor = LoopMonitor(tmp_path / "run.zarr", [Watch("norm", Norm(), every(1))])
    monitor.step(0, net)
    assert len(unclosed._unclosed) == before + 1
    del monitor
    gc.collect()
    assert len(unclosed._unclosed) == before + 1  # at the end of the process
    closed = LoopMonitor(tmp_path / "other.zarr", [Watch("norm", Norm(), every(1))])
    closed.step(0, net)
    closed.step(1, net)
    closed.close()
    assert held(tmp_path / "other.zarr", "norm") == [0, 1]
    assert len(unclosed._unclosed) == before + 1
