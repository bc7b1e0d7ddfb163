"""The two places of a run offer what is asked of them, and a watch is read and written without the run around it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from devmon import IdentityError, StoreError, Trajectory
from devmon.store.disk import Disk
from devmon.store.objects import Objects
from devmon.store.place import Place, place, store_path
from devmon.store.stored import StoredWatch
from tests.support.store import WHO, row

ASKED = [name for name in vars(Place) if not name.startswith("_")]


def test_a_place_is_chosen_by_what_names_it(tmp_path: Path) -> None:
    assert isinstance(place(tmp_path), Disk)
    assert isinstance(place(str(tmp_path)), Disk)
    assert isinstance(place("memory://chosen"), Objects)
    assert isinstance(place(MemoryStore()), Objects)


@pytest.mark.parametrize("kind", [Disk, Objects])
def test_a_place_has_every_method_with_the_same_parameters(kind: type, tmp_path: Path) -> None:
    here = Disk(tmp_path) if kind is Disk else Objects.at(MemoryStore())
    for name in ASKED:
        asked = inspect.getattr_static(Place, name)
        assert hasattr(here, name), name
        if not isinstance(asked, property):
            wanted, given = (list(inspect.signature(f).parameters.values())[1:] for f in (asked, getattr(kind, name)))
            assert [(p.name, p.default) for p in given] == [(p.name, p.default) for p in wanted], name
    assert len(ASKED) > 12


def test_the_store_of_a_run_is_named_by_its_folder_or_by_itself(tmp_path: Path) -> None:
    assert store_path(tmp_path) == str(tmp_path)
    (tmp_path / "trajectory.zarr").mkdir()
    assert store_path(tmp_path) == store_path(str(tmp_path)) == str(tmp_path / "trajectory.zarr")
    assert store_path(tmp_path / "trajectory.zarr") == str(tmp_path / "trajectory.zarr")
    assert store_path("s3://bucket/run.zarr") == "s3://bucket/run.zarr"


@pytest.mark.parametrize("at", ["folder", "objects"])
def test_a_watch_alone_holds_what_the_run_shows(tmp_path: Path, at: str) -> None:
    here = place(tmp_path / "run.zarr" if at == "folder" else f"memory://{tmp_path.name}")
    run = Trajectory(here.path)
    watch, other = (StoredWatch(place(here.path), "llc") for _ in range(2))
    with pytest.raises(StoreError, match="declare it first"):
        watch.append(0, row(0.0), "w0", 0.5)
    watch.declare(WHO)
    other.declare(WHO)
    with pytest.raises(IdentityError, match="nbeta: stored 30, now 31"):
        other.declare(WHO | {"fields": {"nbeta": "31"}, "fingerprint": "1"})
    for step in (10, 0, 20):
        watch.append(step, row(step), f"w{step}", 0.5)
    watch.fail(5, "NaN")
    with here.locked():
        watch.fold()
    assert other.steps() == run.steps("llc") == [0, 10, 20]
    assert other.failures() == run.failures("llc") == {5: "NaN"}
    with here.locked():
        assert other.supersede(after=10, attempt=0) == [20]
        assert other.supersede(after=10, attempt=1) == []
    assert watch.read()["total"].values.tolist() == run["llc"]["total"].values.tolist() == [0.0, 10.0]
    assert here.attempts()["_attempts/0/llc"]["total"].values.tolist() == [20.0]
