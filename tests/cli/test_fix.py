"""`devmon fix RUN --drop WATCH`: a watch that was measured wrongly leaves the run, and nothing else does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

from devmon import IdentityError, LoopMonitor, Snapshot, Trajectory, Watch, every
from devmon.cli.root import app


@dataclass(frozen=True)
class Scaled:
    scale: float

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        return xr.Dataset({"value": self.scale * snapshot.step})


def train(run: Path, scale: float, steps: range) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    watches = [Watch("scaled", Scaled(scale), every(1)), Watch("plain", Scaled(1.0), every(1))]
    with LoopMonitor(run, watches) as monitor:
        for step in steps:
            monitor.step(step, model)


def fix(*words: object) -> str:
    result = CliRunner().invoke(app, ["fix", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_a_watch_is_dropped_and_measured_anew_under_its_name(tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    train(run, 2.0, range(3))
    with pytest.raises(IdentityError, match=f"devmon fix {run} --drop scaled"):
        train(run, 3.0, range(2, 4))
    Trajectory(run).record(chosen={"scaled": {"step": 1}, "plain": {"step": 1}}, skipped={"scaled": [5]})
    assert fix(run, "--drop", "scaled") == "scaled: 3 rows set aside, the watch is dropped\n"

    # Nothing but the watch went, and none of its rows is lost.
    left = Trajectory(run)
    assert left.names() == ["plain"]
    assert left.steps("plain") == [0, 1, 2]
    assert (left.attrs["chosen"], left.attrs["skipped"]) == ({"plain": {"step": 1}}, {})
    (rows,) = left.attempts().values()
    assert rows["value"].values.tolist() == [0.0, 2.0, 4.0]

    train(run, 3.0, range(2, 4))
    assert Trajectory(run)["scaled"]["value"].values.tolist() == [6.0, 9.0]
    assert xr.open_zarr(run, group="scaled", consolidated=False)["step"].values.tolist() == [2, 3]


def test_a_name_that_is_none_is_told_before_anything_is_dropped(tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    train(run, 2.0, range(2))
    with pytest.raises(Exception, match=r"no watch 'sclaed': it holds plain, scaled"):
        fix(run, "--drop", "plain", "--drop", "sclaed")
    assert Trajectory(run).names() == ["plain", "scaled"]


def test_in_an_object_store() -> None:
    url = "memory://fix"
    store = Trajectory(url)
    store.declare("llc", {"instrument": "a.B", "fields": {}, "fingerprint": "0", "doc": ""})
    for step in range(2):
        store.append("llc", step, xr.Dataset({"value": float(step)}), weights=f"w{step}")
    fix(url, "--drop", "llc")
    left = Trajectory(url)
    assert left.names() == []
    assert [rows["value"].values.tolist() for rows in left.attempts().values()] == [[0.0, 1.0]]
