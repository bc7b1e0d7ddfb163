"""Stores of earlier schemas are converted, those of later ones refused with what to install."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from devmon import IdentityError, StoreError, Trajectory
from devmon.cli.root import app
from devmon.store.migrations import SCHEMA

WHO = {"instrument": "a.B", "fields": {"nbeta": "30"}, "fingerprint": "0", "doc": "Measures."}


def node(path: Path, attrs: dict[str, Any]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attrs}))


def row(value: float) -> xr.Dataset:
    return xr.Dataset(
        {"score": ("head", np.full(2, value), {"units": "nats"}), "verdict": ((), np.array("ok", dtype=object))},
        {"head": np.array(["L0H0", "L1H0"], dtype=object)},
        {"headline": ["score"]},
    )


def npz(path: Path, dataset: xr.Dataset, **header: Any) -> None:
    """A row as schema 1 wrote it at first: one archive without pickles."""
    arrays, names = {}, {}
    for i, (name, variable) in enumerate(dataset.variables.items()):
        values = np.asarray(variable.values)
        arrays[f"a{i}"] = values.astype(str) if values.dtype.kind in "OUST" else values
        names[str(name)] = {"key": f"a{i}", "dims": list(variable.dims), "attrs": dict(variable.attrs)}
    header |= {"variables": names, "coords": list(map(str, dataset.coords)), "attrs": dict(dataset.attrs)}
    buffer = io.BytesIO()
    np.savez(buffer, header=np.array(json.dumps(header)), **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run of schema 1: steps 0 and 5 folded, 7 and a failure at 9 in .npz files, another watch half folded."""
    path = tmp_path / "run.zarr"
    node(
        path,
        {
            "schema": 1,
            "run_id": "abc",
            "seed": 3,
            "created": "2026-01-01T00:00:00+00:00",
            "settings": {},
            "versions": {"devmon": "0.1.0"},
        },
    )
    shape = {"score": "float64 (head=2)", "verdict": "text ()", "head": "text (head=2) ['L0H0', 'L1H0']"}
    folded = xr.concat([row(0.0), row(5.0)], "step", data_vars="all").assign_coords(
        step=[0, 5], weights=("step", np.array(["w0", "w5"], dtype=object)), seconds=("step", [0.5, 0.5])
    )
    attrs = WHO | {"shape": shape, "headline": ["score"], "failures": {"3": "NaN"}}
    folded.assign_attrs(attrs).to_zarr(path / "heads", zarr_format=3, consolidated=False)
    assert len(list(path.glob("heads/score/c/*/*"))) == 1
    npz(path / "_units/heads/000000000007.npz", row(7.0), step=7, weights="w7", seconds=0.25)
    npz(path / "_units/heads/000000000009.npz", xr.Dataset(), step=9, failure="RuntimeError: no")
    node(path / "_units" / "tails.old", WHO | {"shape": {}})
    node(path / "_units" / "tails.new", WHO | {"shape": {}})
    return path


def right(store: Trajectory) -> None:
    assert store.names() == ["heads", "tails"]
    assert store["heads"]["step"].values.tolist() == store.steps("heads") == [0, 5, 7]
    assert store["heads"]["score"].values.tolist() == [[0.0, 0.0], [5.0, 5.0], [7.0, 7.0]]
    assert store["heads"]["weights"].values.tolist() == ["w0", "w5", "w7"]
    assert store["heads"]["seconds"].values.tolist() == [0.5, 0.5, 0.25]
    assert store["heads"]["head"].values.tolist() == ["L0H0", "L1H0"]
    assert store["heads"]["score"].attrs == {"units": "nats"}
    assert store.failures("heads") == {3: "NaN", 9: "RuntimeError: no"}
    assert (store.attrs["schema"], store.attrs["run_id"], store.seed) == (SCHEMA, "abc", 3)


def test_an_old_run_is_converted_when_it_is_opened_for_writing(old: Path) -> None:
    with pytest.raises(StoreError, match="devmon compact RUN"):
        _ = Trajectory(old, "r")["heads"]
    assert CliRunner().invoke(app, ["compact", str(old)], catch_exceptions=False).exit_code == 0
    right(Trajectory(old, "r"))
    assert not (old / "_units").exists()
    (chunk,) = old.glob("heads/score/c/*/*")
    chunk.unlink()
    with pytest.raises(StoreError, match="heads/score/c/0/0 is gone"):  # which schema 1 did not see
        _ = Trajectory(old, "r")["heads"]


def test_an_old_run_goes_on(old: Path) -> None:
    store = Trajectory(old, seed=3)
    right(store)
    store.declare("heads", WHO)
    store.append("heads", 7, row(7.0), weights="w7")
    with pytest.raises(IdentityError, match="for weights w7"):
        store.append("heads", 7, row(7.0), weights="other")
    store.append("heads", 9, row(9.0), weights="w9")
    assert Trajectory(old)["heads"]["score"].values[:, 0].tolist() == [0.0, 5.0, 7.0, 9.0]
    assert store.failures("heads") == {3: "NaN"}


def test_folded_rows_of_an_old_run_are_read_through(old: Path) -> None:
    shutil.rmtree(old / "_units")
    before = sorted(old.rglob("*"))
    assert Trajectory(old, "r")["heads"]["score"].values[:, 0].tolist() == [0.0, 5.0]
    assert sorted(old.rglob("*")) == before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(1, 13))
def test_a_conversion_that_is_killed_is_done_again(old: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **words: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            return real(*args, **words)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", counted(os.rename))
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        for name in ("unlink", "rmdir"):
            real = counted(getattr(Path, name))
            patch.setattr(Path, name, lambda path, *words, real=real, **more: real(path, *words, **more))
        with pytest.raises(Killed):
            Trajectory(old)
    right(Trajectory(old))


def test_damage_of_an_old_row_is_named_and_nothing_is_converted(old: Path) -> None:
    file = old / "_units/heads/000000000007.npz"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(StoreError, match=r"000000000007\.npz is no readable row of an earlier devmon"):
        Trajectory(old)
    file.unlink()
    assert Trajectory(old).steps("heads") == [0, 5]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"schema": SCHEMA + 1}, "install devmon >= 0.1.0"),
        ({"schema": 0}, "has schema 0"),
        ({"schema": SCHEMA + 1, "migrated": [{"to": SCHEMA + 1, "devmon": "7.8"}]}, "install devmon >= 7.8"),
    ],
)
def test_a_run_of_another_devmon_is_refused_with_what_to_install(old: Path, change: dict[str, Any], said: str) -> None:
    file = old / "zarr.json"
    file.write_text(json.dumps((found := json.loads(file.read_text())) | {"attributes": found["attributes"] | change}))
    before = file.read_bytes()
    for mode in ("r", "a"):
        with pytest.raises(StoreError, match=said):
            Trajectory(old, mode)  # type: ignore[arg-type]
    assert file.read_bytes() == before
