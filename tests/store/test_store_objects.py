"""Trajectories in an object store: the same meaning as in a folder, without rename and lock."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import xarray as xr
import zarr
from obstore.store import LocalStore, MemoryStore
from typer.testing import CliRunner
from zarr.storage import ObjectStore

from devmon import IdentityError, StoreError, Trajectory
from devmon.cli.root import app
from devmon.store.bucket import Bucket
from devmon.store.compact import compact
from devmon.store.object_units import ObjectUnits
from devmon.store.objects import Objects

WHO = {"instrument": "a.B", "fields": {"nbeta": "30"}, "fingerprint": "0", "doc": "Measures."}


def row(value: float, n: int = 2) -> xr.Dataset:
    return xr.Dataset(
        {"score": ("head", np.full(n, float(value)), {"units": "nats"}), "word": ((), np.array("ok", dtype=object))},
        {"head": np.array([f"L{i}" for i in range(n)], dtype=object)},
    )


def fill(store: Trajectory, name: str, steps: list[int]) -> None:
    for step in steps:
        store.append(name, step, row(step), weights=f"w{step}", seconds=0.5)


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def store(memory: MemoryStore) -> Trajectory:
    found = Trajectory(memory, seed=3, settings={"width": 64})
    for name in ("llc", "llc2"):  # of which one is the beginning of the other
        found.declare(name, WHO)
    return found


def keys(store: Trajectory, prefix: str = "") -> list[str]:
    assert isinstance(store._place, Objects)
    return list(store._place.bucket.keys(prefix))


def scores(store: Trajectory, name: str = "llc") -> list[float]:
    return store[name]["score"].values[:, 0].tolist()


def test_a_folder_and_an_object_store_hold_the_same(store: Trajectory, memory: MemoryStore, tmp_path: Path) -> None:
    folder = Trajectory(tmp_path / "run.zarr", seed=3, settings={"width": 64})
    for name in ("llc", "llc2"):
        folder.declare(name, WHO)
    acts: list[Callable[[Trajectory], object]] = [
        lambda t: fill(t, "llc", [20, 0, 10]),
        lambda t: fill(t, "llc2", [5]),
        lambda t: t.fail("llc", 15, "NaN"),
        lambda t: t.fold(),
        lambda t: fill(t, "llc", [10, 30]),
        lambda t: t.fail("llc2", 7, "no"),
        lambda t: t.supersede(after=10),
        lambda t: t.append("llc", 20, row(-1), weights="again", seconds=0.0),
        lambda t: t.fold(),
        lambda t: t.supersede(after=2),
        lambda t: t.record(title="a run"),
    ]
    for act in acts:
        for one in (store, folder):
            act(one)
        for again in (store, Trajectory(memory, "r"), Trajectory(ObjectStore(memory), seed=3)):
            assert list(again) == list(folder)
            for name in again:
                xr.testing.assert_identical(again[name], folder[name])
                assert again.steps(name) == folder.steps(name)
                assert again.failures(name) == folder.failures(name)
            assert again.attempts().keys() == folder.attempts().keys()
            for group, rows in again.attempts().items():
                xr.testing.assert_equal(rows, folder.attempts()[group])
    assert [a["rows"] for a in store.attrs["attempts"]] == [{"llc": [20, 30]}, {"llc": [10, 20], "llc2": [5]}]
    for wrong in (
        lambda t: Trajectory(memory, seed=4),
        lambda t: t.declare("llc", WHO | {"fingerprint": "1"}),
        lambda t: t.append("llc", 0, row(0), weights="x"),
        lambda t: t.append("llc", 1, row(0, 3), weights="x"),
    ):
        with pytest.raises(IdentityError):
            wrong(store)


def test_plain_xarray_reads_the_group_that_fold_names(store: Trajectory, memory: MemoryStore) -> None:
    fill(store, "llc", [0, 5])
    store.fold()
    group = zarr.open_group(ObjectStore(memory), path="llc", mode="r").attrs["fold"]
    with xr.open_zarr(ObjectStore(memory), group=str(group), consolidated=False, chunks=None) as dataset:
        assert dataset["score"].values[:, 0].tolist() == [0.0, 5.0]
        assert dataset["score"].attrs["units"] == "nats"


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [*range(1, 12), 15, 20, 25, 30, 35, 40, 45, 50, 55, 60])
def test_a_kill_between_any_two_requests_loses_nothing(store: Trajectory, memory: MemoryStore, at: int) -> None:
    fill(store, "llc", [0, 5])
    store.fold()
    fill(store, "llc", [7])
    fill(store, "llc2", [1])
    acknowledged, calls = [0, 5, 7], 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **words: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= at:
                raise Killed
            return real(*args, **words)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "put", counted(Bucket.put))
        patch.setattr(obstore, "delete", counted(obstore.delete))
        patch.setattr(ObjectStore, "set", counted(ObjectStore.set))
        try:
            fill(store, "llc", [9])
            acknowledged.append(9)
            store.fold()
            store.supersede(after=7)
            acknowledged.remove(9)
        except Killed:
            pass
    again = Trajectory(memory)
    assert set(again.steps("llc")) - {9} == set(acknowledged) - {9}
    assert 9 not in acknowledged or 9 in again.steps("llc") or at > 40
    again.supersede(after=7)
    fill(again, "llc", [8])
    again.fold()
    assert scores(again) == [0.0, 5.0, 7.0, 8.0]
    assert scores(again, "llc2") == [1.0]
    assert {key.split("/")[2] for key in keys(again, "_folds/llc")} - {"zarr.json"} == {
        again._place.attributes("llc")["fold"].split("/")[2]
    }  # what a killed fold left is gone
    assert not keys(again, "_units")


def test_of_two_writers_of_a_step_the_second_is_told(store: Trajectory, memory: MemoryStore) -> None:
    """Both have looked before either writes."""
    other, real = Trajectory(memory), ObjectUnits.append

    def race(weights: str, between: Callable[[], object]) -> None:
        def late(*args: Any, **words: Any) -> None:
            patch.undo()
            fill(other, "llc", [4])
            between()
            real(*args, **words)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ObjectUnits, "append", late)
            store.append("llc", 4, row(-4), weights=weights)

    for between in (lambda: None, other.fold):  # the first row is still a unit, or folded and gone from the units
        race("w4", between)
        assert scores(store) == scores(Trajectory(memory)) == [4.0]
        store.supersede(after=0)
        with pytest.raises(IdentityError, match="step 4 for weights w4, these are other"):
            race("other", between)
        assert scores(store) == scores(Trajectory(memory)) == [4.0]
        store.fold()
        assert scores(store) == [4.0]
        store.supersede(after=0)


def test_a_fold_that_was_overtaken_begins_anew(store: Trajectory, memory: MemoryStore) -> None:
    other, write, keys, replace = Trajectory(memory), Objects._write, Bucket.keys, Objects.replace

    def overtake(step: int) -> None:
        patch.undo()
        fill(other, "llc", [step])
        other.fold()

    def slow_write(*args: Any) -> None:  # the other is done before this one publishes
        write(*args)
        overtake(1)

    def slow_keys(bucket: Bucket, prefix: str) -> Any:  # and before this one, which has published, deletes what is old
        if prefix == "_folds/llc":
            overtake(3)
        return keys(bucket, prefix)

    def slow_replace(*args: Any) -> bool:  # before this one writes what it has read
        overtake(5)
        return replace(*args)

    fill(store, "llc", [0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objects, "_write", slow_write)
        store.fold()
    assert scores(store) == scores(other) == scores(Trajectory(memory)) == [0.0, 1.0]
    fill(store, "llc", [2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "keys", slow_keys)
        store.fold()
    assert scores(store) == scores(other) == scores(Trajectory(memory)) == [0.0, 1.0, 2.0, 3.0]
    fill(store, "llc", [4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objects, "replace", slow_replace)
        store.fold()
    assert scores(store) == scores(other) == scores(Trajectory(memory)) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_several_writers_lose_no_row_and_a_reader_sees_all_that_was(memory: MemoryStore) -> None:
    errors: list[BaseException] = []

    def write(first: int) -> None:
        try:
            mine = Trajectory(memory)
            mine.declare("llc", WHO)
            for i in range(8):
                fill(mine, "llc", [first + 4 * i])
                if i % 3 == 2:
                    mine.fold()
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    Trajectory(memory)
    for writer in writers:
        writer.start()
    seen: set[int] = set()
    while any(writer.is_alive() for writer in writers):
        reader = Trajectory(memory, "r")
        if "llc" in reader:
            now = set(reader["llc"]["step"].values.tolist())
            assert now >= seen
            seen = now
    for writer in writers:
        writer.join()
    assert not errors, errors
    assert scores(Trajectory(memory)) == [float(step) for step in range(32)]
    assert Trajectory(memory)["llc"]["weights"].values.tolist() == [f"w{step}" for step in range(32)]


def test_what_is_lost_or_damaged_is_named(store: Trajectory, memory: MemoryStore) -> None:
    fill(store, "llc", [0])
    store.fold()
    fill(store, "llc2", [3])
    (chunk,) = (key for key in keys(store, "_folds/llc") if "score/c" in key)
    data = bytes(obstore.get(memory, chunk).bytes())
    obstore.delete(memory, chunk)
    with pytest.raises(StoreError, match=f"{chunk} is gone"):
        _ = Trajectory(memory)["llc"]
    obstore.put(memory, chunk, data[:-3])
    with pytest.raises(StoreError, match=f"{chunk} is damaged"):
        _ = Trajectory(memory)["llc"]
    (unit,) = keys(store, "_units/llc2")
    data = bytes(obstore.get(memory, unit).bytes())
    for bad, said in [
        (data[:-9], "is cut off"),
        (b"?" + data[1:], "no record of devmon"),
        (data[:-1] + b"?", "wrong checksum"),
    ]:
        obstore.put(memory, unit, bad)
        with pytest.raises(StoreError, match=said):
            _ = Trajectory(memory)["llc2"]


def test_a_finished_run_is_copied_to_an_object_store(tmp_path: Path, memory: MemoryStore) -> None:
    run = Trajectory(tmp_path / "run.zarr", seed=3)
    run.declare("llc", WHO)
    fill(run, "llc", [0, 5, 9])
    run.fail("llc", 7, "no")
    run.supersede(after=5)
    url = f"memory://{tmp_path.name}"
    done = CliRunner().invoke(app, ["compact", str(run.path), "-o", url], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "run" in CliRunner().invoke(app, ["show", url], catch_exceptions=False).output
    copy = Trajectory(url)
    assert copy.attrs == run.attrs
    xr.testing.assert_identical(copy["llc"], run["llc"])
    assert copy.attempts()["_attempts/0/llc"]["step"].values.tolist() == [9]
    fill(copy, "llc", [6])  # and it goes on
    copy.fold()
    assert scores(copy) == [0.0, 5.0, 6.0]
    obstore.put(memory, "thesis.tex", b"...")
    with pytest.raises(StoreError, match="holds objects"):
        compact(run, memory)
    obstore.delete(memory, "thesis.tex")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "put", lambda *_: 1 / 0)  # killed before the last object
        with pytest.raises(ZeroDivisionError):
            compact(run, memory)
    with pytest.raises(StoreError, match="no trajectory of devmon"):
        Trajectory(memory, "r")


def test_what_cannot_be_is_refused(tmp_path: Path, memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="there is no trajectory"):
        Trajectory(memory, "r")
    assert not list(obstore.list(memory))
    obstore.put(memory, "thesis.tex", b"...")
    with pytest.raises(StoreError, match="holds objects and is no trajectory"):
        Trajectory(memory)
    for odd in (zarr.storage.MemoryStore(), 5, "nothing://x/y"):
        with pytest.raises(StoreError, match="give a folder, a URL"):
            Trajectory(odd)
    store = Trajectory(LocalStore(tmp_path))
    with pytest.raises(StoreError, match="no conditional puts"):
        store.record(x=1)
    monkeypatch.setitem(sys.modules, "obstore", None)
    for name in ("objects", "object_units", "bucket"):
        monkeypatch.delitem(sys.modules, f"devmon.store.{name}")
    with pytest.raises(StoreError, match=r'pip install "devmon\[cloud\]"'):
        Trajectory("s3://bucket/run.zarr")
