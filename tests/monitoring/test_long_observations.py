"""A monitor that holds training up says so once, and what takes the time."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import xarray as xr

from devmon import LoopMonitor, Snapshot, Watch, every
from tests.support.lightning_toys import Norm
from tests.support.loops import seeded, train


@dataclass(frozen=True)
class Takes:
    """An instrument that takes seconds of a clock of its own."""

    seconds: float

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        NOW[0] += self.seconds
        return Norm()(snapshot)


NOW = [0.0]


def said(path: Path, *seconds: float, share: float | None = None) -> list[str]:
    watches = [Watch(f"watch{i}", Takes(each), every(5)) for i, each in enumerate(seconds)]
    monitor = LoopMonitor(path, watches, max_overhead=share, clock=lambda: NOW[0])
    with warnings.catch_warnings(record=True) as heard, monitor:
        warnings.simplefilter("always")
        monitor.step(0, model := seeded())
        train(monitor, model, range(1, 11))
    return [str(each.message) for each in heard if "observation at step" in str(each.message)]


def test_an_observation_of_a_minute_is_told_once_with_what_took_it(tmp_path: Path) -> None:
    (words,) = said(tmp_path / "a.zarr", 50.0, 130.0)
    assert words.startswith("the observation at step 0 took 3.0 minutes (watch1 2.2 minutes, watch0 50 seconds), and")
    assert "devmon cost" in words
    assert "max_overhead" in words


@pytest.mark.parametrize(("seconds", "share"), [(59.0, None), (600.0, 0.5)])
def test_nothing_is_said_of_short_ones_nor_under_a_budget(seconds: float, share: float | None, tmp_path: Path) -> None:
    assert said(tmp_path / "a.zarr", seconds, share=share) == []
