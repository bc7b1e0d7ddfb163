"""Files that are lost, cut, changed or cannot be written: none is read as if it was whole, and nothing else is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from devmon import DevmonError, StoreError, Trajectory
from tests.support.store import WHO, flip, row, unit


def test_half_a_row_is_none_and_zeros_of_a_power_cut_are_none(path: Path) -> None:
    whole = unit(path).read_bytes()
    for data in (whole[:-1], whole[:-30], whole[:10], b"", whole + bytes(5000)):
        unit(path).write_bytes(data)
        held = Trajectory(path)["hurt"]["step"].values.tolist()
        assert held == [0, 5, *[7, 9][: max(0, 2 - (len(data) < len(whole)) - (len(data) <= 10))]], len(data)
    store = Trajectory(path)
    store.append("hurt", 9, row(9.0), weights="w9")
    store.fold()
    assert store["hurt"]["total"].values.tolist() == [0.0, 5.0, 7.0, 9.0]


def test_no_file_of_a_group_can_be_lost_cut_or_changed_unseen(tmp_path: Path) -> None:
    store = Trajectory(tmp_path / "run.zarr")
    store.declare("all", WHO)
    for step in (0, 1):  # zeros, NaN and False are fill values: Zarr alone would write no chunk of them
        store.append(
            "all",
            step,
            xr.Dataset(
                {
                    "zero": ("head", np.zeros(3)),
                    "nan": ((), np.nan),
                    "no": ((), np.bool_(False)),
                    "int": ((), np.int32(0)),
                    "text": ("head", np.array(["a", "", "c"], dtype=object)),
                },
                {"head": np.array(["x", "y", "z"], dtype=object), "layer": 0.0},
            ),
            weights=f"w{step}",
        )
    store.fold()
    right = store["all"]
    files = [file for file in (store.path / "all").rglob("*") if file.is_file() and file.parent.name != "all"]
    assert len(files) == 2 * len(right.variables)
    for file in files:
        data = file.read_bytes()
        changes = [None, b"", data[:-1], data[: len(data) // 2]]
        if file.name != "zarr.json":  # of metadata, a changed unit or label is not seen
            changes += [flip(at)(data) for at in range(len(data))]
        for change in changes:
            file.unlink() if change is None else file.write_bytes(change)
            with pytest.raises(StoreError, match=f"all.*{file.parent.relative_to(store.path / 'all').parts[0]}"):
                store._place.folded("all")
            file.write_bytes(data)
    xr.testing.assert_identical(Trajectory(store.path)["all"], right)


def test_a_lost_chunk_of_a_large_array_or_an_earlier_attempt_is_named(tmp_path: Path) -> None:
    store = Trajectory(tmp_path / "run.zarr")
    store.declare("trace", WHO)
    for step in (0, 1):
        store.append("trace", step, xr.Dataset({"loss": ("draw", np.zeros(2**22))}), weights=f"w{step}")
    store.supersede(after=0)
    store.append("trace", 1, xr.Dataset({"loss": ("draw", np.zeros(2**22))}), weights="w1")
    store.fold()
    chunks = sorted(file for file in store.path.glob("trace/loss/c/*/*"))
    assert len(chunks) > 10
    chunks[7].unlink()
    with pytest.raises(StoreError, match=rf"{chunks[7].relative_to(tmp_path)} is gone"):
        _ = store["trace"]
    assert store.steps("trace") == [0, 1]
    assert store.attempts()["_attempts/0/trace"]["step"].values.tolist() == [1]
    next(store.path.glob("_attempts/0/trace/loss/c/0/0")).unlink()
    with pytest.raises(StoreError, match="_attempts/0/trace/loss/c/0/0 is gone"):
        store.attempts()


def no_room(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["os.fsync", "os.rename", "os.replace", "open", "devmon.store.groups.write"])
def test_a_full_disk_is_told_and_costs_nothing_that_was_stored(
    path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        store = Trajectory(path)
        for name in ["devmon.files.open", "devmon.store.units.open"] if where == "open" else [where]:
            full.setattr(name, no_room, raising=False)
        calls: list[Callable[[], object]] = [store.fold]
        if where in ("os.fsync", "open"):
            calls.append(lambda: store.append("hurt", 11, row(11.0), weights="w11"))
        if where in ("os.fsync", "os.replace", "open"):
            calls.append(lambda: store.record(x=1))
        for call in calls:
            with pytest.raises(StoreError, match="No space left on device.*"):
                call()
    again = Trajectory(path)
    for name in ("fine", "hurt"):
        assert again[name]["total"].values.tolist() == [0.0, 5.0, 7.0, 9.0]
    again.append("hurt", 11, row(11.0), weights="w11")
    again.fold()
    assert again["hurt"]["step"].values.tolist() == [0, 5, 7, 9, 11]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("file", ["zarr.json", "hurt/zarr.json", "_units/hurt", ".lock", "."])
def test_no_permission_is_told(path: Path, file: str) -> None:
    (path / file).chmod(0)
    try:
        with pytest.raises(DevmonError, match="permission"):
            Trajectory(path).append("hurt", 11, row(), weights="w")
    finally:
        (path / file).chmod(0o700)
