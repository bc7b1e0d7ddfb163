"""`devmon measure`: the numbers of training from its checkpoints, what is skipped and said, what is tried again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr

from devmon import Snapshot, Trajectory, Watch, every
from devmon.checkpoints.series import Series
from devmon.offline.plan import Plan
from devmon.offline.study import Progress, Study
from tests.support.lightning_toys import Net, Norm
from tests.support.offline_toys import (
    SCRIPT,
    measure,
    rows,
    same,
    with_watches,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


def test_checkpoints_give_the_rows_of_training_and_again_gives_nothing_more(trained: Path, tmp_path: Path) -> None:
    command = (trained / "saved", "--into", tmp_path / "run.zarr", "--source", f"{trained / 'script.py'}:study")
    command = (*command, "--schedule")
    result = measure(*command)
    assert result.exit_code == 0, result.output
    assert "are measured at their own steps, as in training" in result.output
    assert "10 rows measured" in result.output
    online, offline = rows(trained / "online.zarr"), rows(tmp_path / "run.zarr")
    assert offline["norm"]["step"].values.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert offline["llc"]["step"].values.tolist() == [0, 6, 12]
    same({name: online[name].sel(step=dataset["step"]) for name, dataset in offline.items()}, offline)
    again = measure(*command)
    assert again.exit_code == 0
    assert "7 of 7 checkpoints chosen; 0 to measure" in again.output
    same(offline, rows(tmp_path / "run.zarr"))

    # Without the schedule of training all that is chosen is measured, and it says so.
    more = measure(*command[:-1], "--steps", "0-8")
    assert "are measured at all chosen checkpoints (--schedule keeps to their own steps)" in more.output
    assert "3 rows measured" in more.output
    assert Trajectory(tmp_path / "run.zarr", "r").steps("llc") == [0, 2, 4, 6, 8, 12]


def test_the_run_of_training_is_filled_up_and_only_what_is_missing_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {}
    exec(SCRIPT, names)
    series, run = Series.open(trained / "saved"), tmp_path / "run.zarr"
    plan = Plan(str(trained / "saved"), str(run), f"{trained / 'script.py'}:monitored", watch=("norm",))
    Study(replace(plan, steps="0,4,10-")).measure()
    loaded: list[int] = []
    read = Series.read
    monkeypatch.setattr(Series, "read", lambda self, step: (loaded.append(step), read(self, step))[1])
    events: list[Progress] = []
    Study(plan).measure(tell=events.append)
    assert loaded == [2, 6, 8]
    assert events == [Progress("measured", step, "norm") for step in (2, 6, 8)]
    assert Trajectory(run, "r").steps("norm") == series.steps


def test_a_dry_run_prints_steps_watches_and_cost_and_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    command = (trained / "saved", "--into", tmp_path / "run.zarr", "--source", f"{trained / 'script.py'}:study")
    result = measure(*command, "--steps", "0,6-10", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "steps: 0, 6, 8, 10" in result.output
    lines = {line.split()[0]: line.split() for line in result.output.splitlines() if line.strip()}
    assert lines["norm"][1] == "Norm"
    assert lines["norm"][-3:] == ["Norm", "4", "unknown"]
    assert lines["llc"][1] == "LLC"
    assert "4" in lines["llc"]
    assert not (tmp_path / "run.zarr").exists()
    assert measure(*command, "--steps", "0-4").exit_code == 0
    kept = sorted(path for path in (tmp_path / "run.zarr").rglob("*"))
    assert "steps: 6, 8, 10, 12" in measure(*command, "--dry-run").output
    assert kept == sorted(path for path in (tmp_path / "run.zarr").rglob("*"))


def damaged(trained: Path, folder: Path) -> Path:
    """The checkpoints of `trained`, and between them some that cannot be measured."""
    saved = folder / "saved"
    saved.mkdir()
    for path in (trained / "saved").iterdir():
        if path.suffix == ".ckpt":
            (saved / path.name).write_bytes(path.read_bytes())
    whole = (saved / "step-00000002.ckpt").read_bytes()
    (saved / "step-00000002.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": torch.nn.Linear(5, 3).state_dict()}, saved / "step-00000004.ckpt")
    state = Net().state_dict() | {"net.0.weight": torch.zeros(16, 6)}
    torch.save({"state_dict": state}, saved / "step-00000006.ckpt")
    return saved


def test_checkpoints_that_cannot_be_measured_are_named_and_the_rest_is(trained: Path, tmp_path: Path) -> None:
    saved, run = damaged(trained, tmp_path), tmp_path / "run.zarr"
    command = (saved, "--into", run, "--source", f"{trained / 'script.py'}:study", "--schedule")
    result = measure(*command)
    assert result.exit_code == 1
    for said in (
        "step 2 skipped", "step-00000002.ckpt cannot be read",
        "step 4 skipped (step-00000004.ckpt does not hold the weights of",
        "step 6 skipped (net.0.weight has shape (16, 6) in step-00000006.ckpt, (16, 5)",
        "6 rows measured, 3 checkpoints skipped",
    ):  # fmt: skip
        assert said in result.output, result.output
    trajectory = Trajectory(run, "r")
    assert trajectory.steps("norm") == [0, 8, 10, 12]
    assert list(trajectory.failures("norm")) == [2, 4, 6]
    assert list(trajectory.failures("llc")) == [6]
    assert "checkpoint skipped: " in trajectory.failures("norm")[2]
    for path in (trained / "saved").iterdir():  # restored: the next call measures them
        (saved / path.name).write_bytes(path.read_bytes())
    result = measure(*command)
    assert result.exit_code == 0, result.output
    same(rows(run), {k: v.sel(step=rows(run)[k]["step"]) for k, v in rows(trained / "online.zarr").items()})
    assert Trajectory(run, "r").steps("norm") == [0, 2, 4, 6, 8, 10, 12]
    assert Trajectory(run, "r").failures("norm") == {}


@dataclass(frozen=True)
class FailsAt:
    step: int

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        if snapshot.step == self.step and not Path(snapshot.model.again).exists():  # type: ignore[arg-type]
            raise RuntimeError("no luck")
        return Norm()(snapshot)


def test_an_instrument_that_fails_is_recorded_and_tried_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    model.again = str(tmp_path / "again")
    with_watches(monkeypatch, model, [Watch("fails", FailsAt(4), every(1)), Watch("norm", Norm(), every(1))])
    command = (trained / "saved", "--into", tmp_path / "run.zarr", "--source", "x.py:y")
    result = measure(*command)
    assert result.exit_code == 1
    assert "step 4 fails: failed (RuntimeError: no luck)" in result.output
    assert "13 rows measured, 1 measurements failed" in result.output
    assert Trajectory(tmp_path / "run.zarr", "r").failures("fails") == {4: "RuntimeError: no luck"}
    (tmp_path / "again").touch()
    result = measure(*command)
    assert (result.exit_code, "1 rows measured:" in result.output) == (0, True), result.output
    assert Trajectory(tmp_path / "run.zarr", "r").steps("fails") == [0, 2, 4, 6, 8, 10, 12]
