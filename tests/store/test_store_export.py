"""`devmon compact` and `devmon export`: the same numbers in other forms."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from typer.testing import CliRunner

from devmon import StoreError, Trajectory
from devmon.cli.root import app
from devmon.store.compact import compact
from devmon.store.export import KINDS, export, table

WHO = {"instrument": "a.B", "fields": {"nbeta": "30"}, "fingerprint": "0", "doc": "Measures."}


@pytest.fixture
def run(tmp_path: Path) -> Trajectory:
    store = Trajectory(tmp_path / "run.zarr", seed=3, title="a run")
    store.declare("heads", WHO)
    store.declare("trace", WHO)
    for step in (0, 5, 7):
        labels = np.array(["L0H0", "L1H0"], dtype=object)
        store.append(
            "heads",
            step,
            xr.Dataset(
                {
                    "score": ("head", np.full(2, float(step)), {"units": "nats"}),
                    "loss": ((), step + 0.25, {"units": "nats"}),
                    "loss_se": ((), 0.5),
                    "count": ((), np.int64(step)),
                    "verdict": ((), np.array("ok", dtype=object)),
                    "converged": ((), np.bool_(step > 0)),
                },
                {"head": labels},
            ),
            weights=f"w{step}",
        )
        loss = np.random.default_rng(step).standard_normal((4, 50, 2000), dtype=np.float32)
        store.append("trace", step, xr.Dataset({"loss": (("chain", "draw", "example"), loss)}), weights=f"w{step}")
    store.supersede(after=5)
    return store


def command(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    return done.exit_code, done.output


def test_a_copy_holds_the_same_and_is_read_by_plain_xarray(run: Trajectory, tmp_path: Path) -> None:
    copy = tmp_path / "copy.zarr"
    assert command("compact", run.path, "-o", copy)[0] == 0
    again = Trajectory(copy, "r")
    assert again.attrs == run.attrs
    for name in run:
        xr.testing.assert_identical(again[name], run[name])
        with xr.open_zarr(copy, group=name) as dataset:  # consolidated: a warning would be an error
            xr.testing.assert_equal(dataset.load(), run[name])
    with xr.open_zarr(copy, group="_attempts/0/heads") as earlier:
        assert earlier["loss"].values.tolist() == [7.25]
    size = [sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in (run.path, copy)]
    assert size[1] < 1.02 * size[0]
    assert sum(f.is_file() for f in copy.rglob("*")) < 70
    with pytest.raises(StoreError, match=r"copy\.zarr exists"):
        compact(run, copy)


def test_a_large_array_is_cut_into_chunks_and_kept_in_one_shard(run: Trajectory, tmp_path: Path) -> None:
    import zarr

    compact(run, tmp_path / "copy.zarr")
    array = zarr.open_array(tmp_path / "copy.zarr" / "trace" / "loss", mode="r")
    assert array.shards is not None
    assert np.prod(array.chunks) * 4 <= 2**20
    assert sum(f.is_file() for f in (tmp_path / "copy.zarr" / "trace" / "loss").rglob("*")) == 2


def test_a_lost_or_changed_file_of_a_copy_is_named(run: Trajectory, tmp_path: Path) -> None:
    compact(run, tmp_path / "copy.zarr")
    (shard,) = (file for file in (tmp_path / "copy.zarr" / "trace" / "loss" / "c").rglob("*") if file.is_file())
    data = shard.read_bytes()
    for change in (None, data[: len(data) // 2], data[:5000] + b"?" + data[5001:]):
        shard.unlink() if change is None else shard.write_bytes(change)
        with pytest.raises(StoreError, match=f"{shard.relative_to(tmp_path)} is {'damaged' if change else 'gone'}"):
            _ = Trajectory(tmp_path / "copy.zarr", "r")["trace"]


def test_compact_in_place_folds(run: Trajectory) -> None:
    run.append(
        "trace", 9, run["trace"].isel(step=0, drop=True).drop_vars(["weights", "seconds"], errors="ignore"), weights="w"
    )
    before = run["trace"]
    assert (run.path / "_units").exists()
    assert command("compact", run.path)[0] == 0
    assert not (run.path / "_units").exists()
    xr.testing.assert_identical(Trajectory(run.path)["trace"], before)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_long_table_of_the_scalars(run: Trajectory, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"run{suffix}"
    assert command("export", run.path, "-o", out)[0] == 0
    frame = pd.read_csv(out) if suffix == ".csv" else pd.read_parquet(out)
    assert list(frame) == ["watch", "variable", "step", "value", "se", "units", "verdict"]
    assert set(frame["variable"]) == {"loss", "count", "converged"}  # no errors, no text, no arrays
    loss = frame[frame["variable"] == "loss"]
    assert loss["step"].tolist() == [0, 5]
    assert loss["value"].tolist() == [0.25, 5.25]
    assert loss["se"].tolist() == [0.5, 0.5]
    assert set(loss["units"]) == {"nats"}
    assert frame[frame["variable"] == "count"]["se"].isna().all()


def test_the_llc_of_traces_is_in_the_table_with_error_and_verdict() -> None:
    from devmon.analysis import llc

    rng = np.random.default_rng(0)
    loss = 1.0 + 0.01 * rng.standard_normal((2, 4, 300))
    dataset = xr.Dataset(
        {
            "loss": (("step", "chain", "draw"), loss),
            "baseline": 0.9 * xr.ones_like(xr.DataArray(loss, dims=("step", "chain", "draw"))),
        },
        {"step": [0, 5]},
        attrs={"kind": "llc", "nbeta": 30.0},
    )
    frame, derived = table({"llc": dataset}), llc(dataset)
    np.testing.assert_array_equal(frame[frame["variable"] == "llc"]["value"], derived["llc"])
    np.testing.assert_array_equal(frame[frame["variable"] == "llc"]["se"], derived["se"])
    assert frame[frame["variable"] == "llc"]["verdict"].tolist() == derived["verdict"].values.tolist()


def test_netcdf_through_scipy_holds_one_watch(run: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("h5netcdf", "netCDF4") else real(n))
    out = tmp_path / "heads.nc"
    export(run, out, watch="heads")
    with xr.open_dataset(out, engine="scipy") as dataset:
        assert dataset["loss"].values.tolist() == [0.25, 5.25]
        assert dataset["head"].values.tolist() == ["L0H0", "L1H0"]
        assert dataset["score"].attrs["units"] == "nats"
        assert '"nbeta"' in dataset.attrs["fields"]
        assert run.attrs["run_id"] in dataset.attrs["run"]
    with pytest.raises(StoreError, match=r'pip install "devmon\[netcdf\]", or take one watch'):
        export(run, tmp_path / "all.nc")
    assert not (tmp_path / "all.nc").exists()


def test_netcdf_holds_one_group_a_watch(run: Trajectory, tmp_path: Path) -> None:
    run.append(
        "heads",
        9,
        run["heads"].isel(step=0, drop=True).drop_vars(["weights", "seconds"], errors="ignore"),
        weights="w9",
    )
    out = tmp_path / "all.nc"
    assert command("export", run.path, "-o", out)[0] == 0
    for name in run:
        with xr.open_dataset(out, group=name, engine="h5netcdf") as found:
            right = run[name]
            assert found.sizes == right.sizes
            for variable in right.variables:
                values = right[variable].values
                np.testing.assert_array_equal(
                    found[variable].values, values.astype("i1") if values.dtype == bool else values
                )
                assert found[variable].attrs.get("units") == right[variable].attrs.get("units")
            assert json.loads(found.attrs["fields"]) == {"nbeta": "30"}
            assert json.loads(found.attrs["run"])["run_id"] == run.attrs["run_id"]
    export(run, tmp_path / "one.nc", watch="heads")
    with xr.open_dataset(tmp_path / "one.nc", engine="h5netcdf") as found:
        assert found["loss"].values.tolist() == [0.25, 5.25, 0.25]
    with pytest.raises(StoreError, match="holds no watch yet"):
        export(Trajectory(tmp_path / "empty.zarr"), tmp_path / "empty.nc")


def test_zarr_is_the_copy_and_what_cannot_be_is_told(
    run: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Trajectory(export(run, tmp_path / "x.zarr"), "r").steps("heads") == [0, 5]
    for words, said in [
        ({"out": tmp_path / "x.xlsx"}, "ends in .nc, .parquet, .csv, .zarr, got 'x.xlsx'"),
        ({"out": tmp_path / "x.csv", "watch": "tails"}, "holds no watch 'tails'; it holds heads, trace"),
        ({"out": tmp_path / "y.zarr", "watch": "heads"}, "--watch does not go with .zarr"),
    ]:
        with pytest.raises(StoreError) as error:
            export(run, **words)  # type: ignore[arg-type]
        assert said in str(error.value)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "pyarrow" else real(n))
    with pytest.raises(StoreError, match="needs pyarrow"):
        export(run, tmp_path / "x.parquet")


@pytest.mark.parametrize("suffix", [".csv", ".zarr"])
def test_a_full_disk_leaves_no_half_file(
    run: Trajectory, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StoreError, match="No space left on device"):
        export(run, tmp_path / f"x{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == ["run.zarr"]
    assert suffix in KINDS


def test_an_empty_run_gives_an_empty_table(tmp_path: Path) -> None:
    store = Trajectory(tmp_path / "run.zarr")
    store.declare("heads", WHO)
    assert len(table(store)) == 0
    export(store, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text().startswith("watch,variable,step")


def test_the_bench_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/store.py", "--quick", "--json", str(tmp_path / "x.json")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
