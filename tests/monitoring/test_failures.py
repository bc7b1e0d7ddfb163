"""Failing instruments and a full disk: warned of once, recorded as soon as that can be written, training untouched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from devmon import InstrumentError, LoopMonitor, StoreError, Trajectory, Watch, every
from devmon.callbacks import CheckpointSeries, Monitor, latest
from tests.support.lightning_toys import Disk, Norm, train
from tests.support.loops import LOOPS, FailsAt, fit, messages, same, seeded

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


def test_failures_are_warned_of_once_a_process_and_a_resumption_measures_again(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    saved = CheckpointSeries(tmp_path / "saved", {4})
    watches = [Watch("fails", FailsAt((2, 3, 5)), every(1)), Watch("fails-too", FailsAt((3,)), every(1))]
    with pytest.warns(UserWarning, match="failed at step") as warned:
        train([Monitor(path, watches), saved], steps=6)
    assert messages(warned) == ["fails failed at step 2", "fails-too failed at step 3"]
    watches = [Watch("fails", FailsAt((2, 3, 5)), every(1)), Watch("fails-too", FailsAt((3,)), every(1))]
    with pytest.warns(UserWarning, match="fails failed at step 5") as warned:
        train([Monitor(path, watches)], steps=8, resume=latest(tmp_path / "saved"))
    assert messages(warned) == ["fails failed at step 5"]
    store = Trajectory(path, "r")
    assert store.failures("fails") == {step: f"RuntimeError: no luck at {step}" for step in (2, 3, 5)}
    assert store.steps("fails") == [0, 1, 4, 6, 7, 8]
    assert store.steps("fails-too") == [0, 1, 2, 4, 5, 6, 7, 8]


def test_an_instrument_that_returns_no_dataset_is_told_so(tmp_path: Path) -> None:
    with (
        pytest.raises(InstrumentError, match=r"returns an xarray\.Dataset, this one returned float"),
        LoopMonitor(tmp_path / "run.zarr", [Watch("x", lambda snapshot: 3.0, every(1))]) as monitor,
    ):
        monitor.step(0, torch.nn.Linear(2, 2))


WATCHES = [Watch("norm", Norm(), every(1)), Watch("twice", Norm(2.0), every(2))]


@pytest.mark.parametrize(("loop", "limit"), [*((loop, False) for loop in LOOPS), ("lightning", True)])
def test_a_full_disk_is_warned_of_once_a_watch_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str, limit: bool
) -> None:
    disk = Disk(monkeypatch, full=3, free=7, limit=limit)
    with pytest.warns(UserWarning, match=r"cannot write.*(No space left on device|File too large)") as warned:
        module = fit(loop, tmp_path / "run.zarr", WATCHES, before=disk.at)
    assert messages(warned) == ["norm failed at step 4", "twice failed at step 4"]
    assert disk.refused >= 6
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("norm") == [0, 1, 2, 3, 8, 9, 10, 11, 12]
    assert store.steps("twice") == [0, 2, 8, 10, 12]
    assert sorted(store.failures("norm")) == [4, 5, 6, 7]  # written when that could be written again
    assert sorted(store.failures("twice")) == [4, 6]
    assert all("StoreError: cannot write" in reason for reason in store.failures("norm").values())
    assert same(module, fit(loop, None, []))


def test_a_disk_that_stays_full_leaves_what_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, full=3)
    with pytest.warns(UserWarning, match="No space left on device") as warned:
        module = train([disk, Monitor(tmp_path / "run.zarr", WATCHES, max_overhead=0.9, clock=lambda: 0.0)])
    norm, twice, end = messages(warned)
    assert (norm, twice) == ("norm failed at step 4", "twice failed at step 4")
    assert end.endswith("was not tidied up at the end")
    disk.is_full = False
    store = Trajectory(tmp_path / "run.zarr")
    assert store.steps("norm") == [0, 1, 2, 3]
    store.fold()
    assert store.steps("twice") == [0, 2]
    assert same(module, train([]))


def test_a_full_disk_ends_a_strict_training_and_the_committed_rows_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, full=3)
    with (
        pytest.warns(UserWarning, match="not tidied up"),
        pytest.raises(StoreError, match="cannot write"),
    ):
        train([disk, Monitor(tmp_path / "run.zarr", WATCHES, strict=True)])
    assert Trajectory(tmp_path / "run.zarr", "r").steps("norm") == [0, 1, 2, 3]


def test_an_exception_of_training_is_raised_as_it_is_although_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 5:
                raise ValueError("the training's own")

    with pytest.warns(UserWarning, match="not tidied up"), pytest.raises(ValueError, match="the training's own"):
        train([Disk(monkeypatch, full=4), Monitor(tmp_path / "run.zarr", [Watch("norm", Norm(), {0, 2})]), Fails()])


def test_a_store_that_is_taken_away_does_not_end_training(tmp_path: Path) -> None:
    class TakenAway(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3 and (tmp_path / "run.zarr").is_dir():
                os.rename(tmp_path / "run.zarr", tmp_path / "elsewhere")
                (tmp_path / "run.zarr").write_text("")  # so that it is not made anew

    with pytest.warns(UserWarning, match="failed at step 4|not tidied") as warned:
        module = train([TakenAway(), Monitor(tmp_path / "run.zarr", WATCHES)])
    assert messages(warned)[:2] == ["norm failed at step 4", "twice failed at step 4"]
    assert Trajectory(tmp_path / "elsewhere", "r").steps("norm") == [0, 1, 2, 3]
    assert same(module, train([]))


def test_a_strict_loop_raises_at_its_end_what_it_could_not_write_but_not_over_what_ended_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, full=0)
    monitor = LoopMonitor(tmp_path / "run.zarr", [Watch("norm", Norm(), {0})], strict=True)
    monitor.step(0, seeded())
    disk.at(1)
    with pytest.raises(StoreError, match="cannot write"), monitor:
        pass
    text = "not tidied up"
    with pytest.warns(UserWarning, match=text), pytest.raises(ValueError, match="the loop's own"), monitor:
        raise ValueError("the loop's own")
