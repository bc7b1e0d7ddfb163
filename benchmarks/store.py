"""What the store costs: an append at every step, the files, reading, a large trace; beside raw Zarr and xarray.

    python benchmarks/store.py [--quick] [--steps 10000] [--peer-steps 40] [--json PATH]

Targets: an append of 200 series ≤ 1 ms in the mean and ≤ 50 ms at worst, ≤ 100 files after 10 000 steps and a fold, ≤
0.3 s to read them. Times of a busy machine say little: the JSON holds the load average before and after.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from devmon.store.trajectory import Trajectory

SERIES = 200
WHO = {"instrument": "benchmarks.Row", "fields": {}, "fingerprint": "0", "doc": "A row."}


def packed(step: int) -> xr.Dataset:
    names = np.array([f"series{i}" for i in range(SERIES)], dtype=object)
    return xr.Dataset({"value": ("series", np.arange(SERIES) + float(step), {"units": "nats"})}, {"series": names})


def variables(step: int) -> xr.Dataset:
    return xr.Dataset({f"series{i}": ((), np.float64(step + i), {"units": "nats"}) for i in range(SERIES)})


def trace(size: int, step: int) -> xr.Dataset:
    """`size` bytes of losses of (chain, draw, example)."""
    values = np.random.default_rng(step).standard_normal((4, 100, max(1, size // 1600)), dtype=np.float32)
    return xr.Dataset({"loss": (("chain", "draw", "example"), values, {"units": "nats"})})


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def files(path: Path) -> int:
    return sum(found.is_file() for found in path.rglob("*"))


def summary(seconds: list[float]) -> dict[str, float]:
    ms = np.array(seconds) * 1e3
    worst = {"worst_ms": round(float(ms.max()), 2), "p999_ms": round(float(np.quantile(ms, 0.999)), 2)}
    return {"steps": len(ms), "mean_ms": round(float(ms.mean()), 3)} | worst


def devmon_store(folder: Path, make: Callable[[int], xr.Dataset], steps: int) -> dict[str, Any]:
    store = Trajectory(folder / f"{make.__name__}.zarr")
    store.declare("row", WHO)
    rows = (make(step) for step in range(steps))
    found = summary(
        [
            timed(lambda s=s, row=row: store.append("row", s, row, weights="w", seconds=0.0))  # type: ignore[misc]
            for s, row in enumerate(rows)
        ]
    )
    opened = Trajectory(store.path, "r")
    unfolded = {"files_unfolded": files(store.path), "read_unfolded_s": round(timed(lambda: opened["row"]), 3)}
    fold = timed(store.fold)
    read = min(timed(lambda: Trajectory(store.path, "r")["row"]) for _ in range(3))
    plain = min(timed(lambda: xr.open_zarr(store.path, group="row", consolidated=False).load()) for _ in range(3))
    after = timed(lambda: store.append("row", steps, make(steps), weights="w", seconds=0.0))
    return (
        found
        | unfolded
        | {
            "fold_s": round(fold, 3),
            "files": files(store.path) - 1,
            "read_s": round(read, 3),
            "read_xarray_s": round(plain, 3),
            "first_append_after_fold_ms": round(after * 1e3, 2),
        }
    )


def raw_zarr(folder: Path, steps: int) -> dict[str, Any]:
    """One array a series, each appended to at each step."""
    group = zarr.open_group(folder / "raw.zarr", mode="w", zarr_format=3)
    arrays = [group.create_array(f"series{i}", shape=(0,), chunks=(1000,), dtype="f8") for i in range(SERIES)]

    def append(step: int) -> None:
        for i, array in enumerate(arrays):
            array.append(np.array([step + float(i)]))

    found = summary([timed(lambda s=s: append(s)) for s in range(steps)])  # type: ignore[misc]
    return found | {"files": files(folder / "raw.zarr")}


def xarray_append(folder: Path, make: Callable[[int], xr.Dataset], steps: int) -> dict[str, Any]:
    path = folder / f"xarray-{make.__name__}.zarr"

    def append(step: int) -> None:
        row = make(step).expand_dims(step=[step])
        if step:
            row.to_zarr(path, append_dim="step", zarr_format=3, consolidated=False)
        else:
            row.to_zarr(path, mode="w", zarr_format=3, consolidated=False)

    found = summary([timed(lambda s=s: append(s)) for s in range(steps)])  # type: ignore[misc]
    return found | {"files": files(path)}


def large(folder: Path, size: int, repeats: int = 3) -> dict[str, Any]:
    """One trace through the store and the same bytes to a plain file, in turn, both flushed; the best of each."""
    store = Trajectory(folder / "trace.zarr")
    store.declare("llc", WHO)
    plain, ours, total = [], [], 0
    for step in range(repeats):
        row = trace(size, step)
        data = row["loss"].values.tobytes()
        total = len(data)

        def write(data: bytes = data, step: int = step) -> None:
            with open(folder / f"plain{step}", "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

        plain.append(timed(write))
        ours.append(timed(lambda: store.append("llc", step, row, weights=f"w{step}", seconds=9.0)))  # noqa: B023
        time.sleep(0.0 if size < 2**24 else 1.1)  # each append flushes, as after a second of measuring
    back = timed(lambda: Trajectory(store.path, "r")["llc"])
    fold = timed(store.fold)
    mb = total / 1e6
    return {
        "mb": round(mb, 1),
        "disk_mb_per_s": round(mb / min(plain), 1),
        "append_mb_per_s": round(mb / min(ours), 1),
        "share_of_disk": round(min(plain) / min(ours), 2),
        "read_all_s": round(back, 2),
        "fold_all_s": round(fold, 2),
        "traces": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--peer-steps", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="20 series, 100 steps, 2 of the peers, 1 MB")
    parser.add_argument("--folder", type=Path, help="where to write (the disk that is measured)")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    global SERIES
    SERIES = 20 if asked.quick else SERIES
    steps, peers, size = (100, 2, 10**6) if asked.quick else (asked.steps, asked.peer_steps, 10**8)
    load = [round(os.getloadavg()[0], 2)]
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        gc.collect()
        result: dict[str, Any] = {
            "packed": devmon_store(folder, packed, steps),
            "variables": devmon_store(folder, variables, max(100, steps // 10)),
            "raw_zarr": raw_zarr(folder, peers),
            "xarray_packed": xarray_append(folder, packed, peers),
            "xarray_variables": xarray_append(folder, variables, max(2, peers // 4)),
            "trace": large(folder, size),
        }
    load.append(round(os.getloadavg()[0], 2))
    p = result["packed"]
    result["targets_met"] = {
        "mean_ms <= 1": p["mean_ms"] <= 1,
        "worst_ms <= 50": p["worst_ms"] <= 50,
        "files <= 100": p["files"] <= 100,
        "read_s <= 0.3": p["read_s"] <= 0.3,
    }
    versions = {name: importlib.metadata.version(name) for name in ("zarr", "xarray", "numpy")}
    busy = max(load) > 0.5 + 1  # this job alone is a load of 1
    result |= {
        "series": SERIES,
        "quick": asked.quick,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "load": load,
        "busy_machine": busy,
        "versions": versions,
    }
    print(json.dumps(result, indent=1))
    if asked.json is not None:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
