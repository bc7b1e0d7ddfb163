from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from devmon import IdentityError, StoreError, Trajectory

WHO = {"instrument": "a.B", "fields": {"nbeta": "30"}, "fingerprint": "0", "doc": "Measures."}


def row(value: float = 1.0, heads: tuple[str, ...] = ("L0H0", "L1H0")) -> xr.Dataset:
    return xr.Dataset(
        {
            "score": ("head", np.full(len(heads), value), {"units": "nats"}),
            "total": ((), np.float64(value)),
            "verdict": ((), np.array("ok", dtype=object)),
        },
        coords={"head": np.array(heads, dtype=object)},
        attrs={"headline": ["total"]},
    )


@pytest.fixture
def store(tmp_path: Path) -> Trajectory:
    trajectory = Trajectory(tmp_path / "run.zarr", seed=3, settings={"width": 64}, title="a run")
    trajectory.declare("heads", WHO)
    return trajectory


def fill(store: Trajectory, steps: list[int]) -> None:
    for step in steps:
        store.append("heads", step, row(float(step)), weights=f"w{step}", seconds=0.5)


def test_rows_come_back_sorted_by_step_with_labels_units_and_errors(store: Trajectory) -> None:
    fill(store, [100, 0, 20])
    for _ in range(2):  # the same from units and from the folded group
        dataset = Trajectory(store.path, "r")["heads"]
        assert dataset["step"].values.tolist() == [0, 20, 100]
        assert dataset["score"].dims == ("step", "head")
        np.testing.assert_array_equal(dataset["score"].sel(step=100, head="L1H0"), 100.0)
        assert dataset["score"].attrs["units"] == "nats"
        assert dataset["weights"].values.tolist() == ["w0", "w20", "w100"]
        assert dataset["verdict"].values.tolist() == ["ok"] * 3
        assert dataset.attrs["headline"] == ["total"]
        assert dataset.attrs["fields"] == {"nbeta": "30"}
        assert store.steps("heads") == [0, 20, 100]
        store.fold()


def test_plain_xarray_reads_a_folded_store(store: Trajectory) -> None:
    fill(store, [0, 5])
    store.fold()
    fill(store, [7])
    store.fold()
    with xr.open_zarr(store.path, group="heads", consolidated=False, chunks=None) as dataset:
        assert dataset["total"].values.tolist() == [0.0, 5.0, 7.0]
    assert not (store.path / "_units").exists()


def test_a_held_step_is_left_as_it_is_and_other_weights_are_refused(store: Trajectory) -> None:
    fill(store, [5])
    for _ in range(2):
        store.append("heads", 5, row(77.0), weights="w5")
        assert store["heads"]["total"].values.tolist() == [5.0]
        with pytest.raises(IdentityError, match="step 5 for weights w5, these are other"):
            store.append("heads", 5, row(77.0), weights="other")
        store.fold()


@pytest.mark.parametrize(
    "other",
    [
        row(heads=("L1H0", "L0H0")),
        row(heads=("L0H0",)),
        row().drop_vars("total"),
        row().assign(score=row()["score"].astype("float32")),
        row().rename(head="layer"),
    ],
)
def test_another_form_is_refused(store: Trajectory, other: xr.Dataset) -> None:
    fill(store, [0])
    with pytest.raises(IdentityError, match="differs in form"):
        store.append("heads", 1, other, weights="w")
    assert store.steps("heads") == [0]


def test_another_configuration_is_refused_with_what_differs(store: Trajectory) -> None:
    with pytest.raises(IdentityError, match="nbeta: stored 30, now 31"):
        store.declare("heads", WHO | {"fields": {"nbeta": "31"}, "fingerprint": "1"})
    with pytest.raises(IdentityError, match="width: stored 64, now 32"):
        Trajectory(store.path, settings={"width": 32})
    with pytest.raises(IdentityError, match="seed: stored 3, now 4"):
        Trajectory(store.path, seed=4)
    assert Trajectory(store.path).attrs["run_id"] == store.attrs["run_id"]


def test_resuming_sets_later_rows_aside(store: Trajectory) -> None:
    fill(store, [0, 10, 20])
    store.fail("heads", 15, "NaN")
    assert store.supersede(after=10) == 1
    assert store.steps("heads") == [0, 10]
    assert store.failures("heads") == {}
    store.append("heads", 20, row(-1.0), weights="again")
    assert store["heads"]["total"].values.tolist() == [0.0, 10.0, -1.0]
    with xr.open_zarr(store.path, group="_attempts/0/heads", consolidated=False, chunks=None) as earlier:
        assert earlier["total"].values.tolist() == [20.0]
    assert store.attrs["attempts"][0]["rows"] == {"heads": [20]}
    assert store.supersede(after=20) == 0


def test_everything_superseded_starts_afresh(store: Trajectory) -> None:
    fill(store, [10, 20])
    store.supersede(after=0)
    assert store.steps("heads") == []
    fill(store, [10])
    assert store.steps("heads") == [10]


def test_failures_are_kept_and_a_later_success_replaces_them(store: Trajectory) -> None:
    store.fail("heads", 3, "RuntimeError: no")
    fill(store, [0])
    for _ in range(2):
        assert store.failures("heads") == {3: "RuntimeError: no"}
        assert store.steps("heads") == [0]
        assert not store.holds("heads", 3)
        store.fold()
    fill(store, [3])
    store.fold()
    assert store.failures("heads") == {}
    assert store.steps("heads") == [0, 3]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(1, 8))
def test_a_kill_at_any_rename_or_delete_of_a_fold_loses_nothing(
    store: Trajectory, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, [0, 5])
    store.fold()
    fill(store, [7, 9])
    calls = 0

    def counted(name: str, module: object) -> None:
        real = getattr(module, name)

        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    import shutil

    with monkeypatch.context():
        counted("rename", os)
        counted("replace", os)
        counted("rmtree", shutil)
        counted("unlink", Path)
        try:
            store.fold()
            store.fold()
        except Killed:
            pass
        monkeypatch.undo()
    again = Trajectory(store.path)
    assert again["heads"]["total"].values.tolist() == [0.0, 5.0, 7.0, 9.0]
    again.fold()
    assert again["heads"]["total"].values.tolist() == [0.0, 5.0, 7.0, 9.0]
    assert again.names() == ["heads"]


def test_foreign_and_broken_paths_are_named(tmp_path: Path, store: Trajectory) -> None:
    with pytest.raises(StoreError, match="there is no trajectory"):
        Trajectory(tmp_path / "nothing.zarr", "r")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("…")
    with pytest.raises(StoreError, match="is no trajectory"):
        Trajectory(tmp_path / "full")
    xr.Dataset({"a": ("x", [1.0])}).to_zarr(tmp_path / "other.zarr", zarr_format=3, consolidated=False)
    with pytest.raises(StoreError, match="no trajectory of devmon"):
        Trajectory(tmp_path / "other.zarr")
    node = json.loads((store.path / "zarr.json").read_text())
    node["attributes"]["schema"] = 99
    (store.path / "zarr.json").write_text(json.dumps(node))
    with pytest.raises(StoreError, match="install devmon"):
        Trajectory(store.path)
    (store.path / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        Trajectory(store.path)


def test_half_a_row_at_the_end_is_no_row_and_damage_before_it_is_named(store: Trajectory) -> None:
    fill(store, [0, 1, 2])
    (path,) = store.path.glob("_units/heads/*.rows")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])  # as a kill leaves it
    again = Trajectory(store.path)
    assert again["heads"]["total"].values.tolist() == [0.0, 1.0]
    fill(again, [2])
    assert again["heads"]["total"].values.tolist() == [0.0, 1.0, 2.0]
    path.write_bytes(whole[:200] + b"?" + whole[201:])
    with pytest.raises(StoreError, match=rf"{path.name} is damaged at byte"):
        _ = Trajectory(store.path)["heads"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make"):
        Trajectory(tmp_path / "file" / "run.zarr")
