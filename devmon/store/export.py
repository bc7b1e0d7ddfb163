"""A run in other forms: a small copy, netCDF, Parquet, CSV, a plain Zarr store. Needs no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from devmon.errors import StoreError
from devmon.files import cannot_write
from devmon.store.disk import Disk
from devmon.store.rows import TEXT, as_text, plain
from devmon.store.trajectory import SCHEMA, Trajectory, place

CHUNK, SHARD = 2**20, 2**27  # bytes: what is read at once, what is one file
COLUMNS = ["watch", "variable", "step", "value", "se", "units", "verdict"]
INSTALL = 'pip install "devmon[netcdf]"'
KINDS = (".nc", ".parquet", ".csv", ".zarr")


def compact(trajectory: Trajectory, copy: Path | Any) -> Path | Any:
    """Write a consolidated, sharded, compressed copy, which `xr.open_zarr(copy, group=...)` and devmon open.

    `copy` is a new folder, or an object store as `Trajectory` takes it: there the last object makes it a trajectory.
    """
    attrs = trajectory.attrs | {"schema": SCHEMA}
    target = place(copy)
    if isinstance(target, Disk):
        with _aside(target.path) as path:
            zarr.create_group(path, zarr_format=3, attributes=attrs)
            _copy(trajectory, path)
    else:
        target.begin()
        target.copy(lambda store: _copy(trajectory, store), attrs)
    return copy


def export(trajectory: Trajectory, out: Path, *, watch: str | None = None) -> Path:
    """Write `out` in the form that its suffix names: .nc, .parquet, .csv or .zarr; `watch` takes one watch alone.

    .csv and .parquet hold the scalars as a long table (`table`); .nc one group a watch, or with `watch` its dataset at
    the root; .zarr is `compact`'s copy.
    """
    if out.suffix not in KINDS:
        raise StoreError(f"-o takes a name that ends in {', '.join(KINDS)}, got {out.name!r}")
    if watch is not None and watch not in trajectory:
        raise StoreError(f"{trajectory.path} holds no watch {watch!r}; it holds {', '.join(trajectory) or 'none'}")
    names = list(trajectory) if watch is None else [watch]
    if out.suffix == ".zarr":
        if watch is not None:
            raise StoreError("--watch does not go with .zarr: the copy holds one group a watch")
        return compact(trajectory, out)
    if out.suffix == ".nc":
        return _netcdf(trajectory, names, out, watch)
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise StoreError("Parquet needs pyarrow: pip install pyarrow, or give a name that ends in .csv")
    frame = table(trajectory, names)
    with _aside(out) as path:
        if out.suffix == ".csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path, engine="pyarrow", index=False)
    return out


def table(trajectory: Mapping[str, xr.Dataset], names: list[str] | None = None) -> pd.DataFrame:
    """The numbers that have no dimension but step, one a line: watch, variable, step, value, se, units, verdict.

    `se` is the variable `<variable>_se` of the same watch, or empty; such a variable is no line of its own. Traces of an
    LLC give the derived `llc` with its error, and `verdict` says whether the sampler's checks accepted it.
    """
    from devmon.analysis import llc
    from devmon.analysis.derive.watch_series import is_llc

    found = []
    for name in trajectory if names is None else names:
        dataset = trajectory[name]
        if dataset.sizes["step"] == 0:
            continue
        numbers = {str(v): array for v, array in dataset.data_vars.items() if _scalar(array)}
        errors = {v: numbers.get(f"{v}_se") for v in numbers}
        numbers = {v: array for v, array in numbers.items() if not (v.endswith("_se") and v[:-3] in numbers)}
        verdicts: dict[str, Any] = {}
        if is_llc(dataset):
            derived = llc(dataset)
            numbers["llc"], errors["llc"] = derived["llc"], derived["se"]
            verdicts["llc"] = as_text(derived["verdict"].values)
        for variable, array in numbers.items():
            se = errors[variable]
            found.append(pd.DataFrame({
                "watch": name, "variable": variable, "step": dataset["step"].values, "value": array.values.astype(float),
                "se": np.nan if se is None else se.values.astype(float), "units": str(array.attrs.get("units", "")),
                "verdict": verdicts.get(variable, ""),
            }))  # fmt: skip
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=COLUMNS)


# -- private -----------------------------------------------------------------------------------------------------------


def _scalar(array: xr.DataArray) -> bool:
    return array.dims == ("step",) and array.dtype.kind in "fiub"


def _copy(trajectory: Trajectory, store: Any) -> None:
    for name, dataset in trajectory.items():
        failures = {str(step): why for step, why in trajectory.failures(name).items()}
        _write(store, name, dataset.assign_attrs(failures=failures) if failures else dataset)
    for group, dataset in trajectory.attempts().items():
        _write(store, group, dataset)


def _write(store: Any, group: str, dataset: xr.Dataset) -> None:
    encoding: dict[str, dict[str, Any]] = {}
    for name, variable in dataset.variables.items():
        if variable.dtype.kind in TEXT or variable.ndim == 0:
            continue
        chunks = _split(variable.shape, variable.dtype.itemsize, CHUNK)
        encoding[str(name)] = {"chunks": chunks, "compressors": [BloscCodec(cname="zstd", clevel=5), Crc32cCodec()]}
        if chunks != tuple(max(1, size) for size in variable.shape):
            rows = _split(variable.shape, variable.dtype.itemsize, SHARD)
            encoding[str(name)]["shards"] = tuple(
                -(-row // chunk) * chunk for row, chunk in zip(rows, chunks, strict=True)
            )
    clean = dataset.assign_attrs(plain(dataset.attrs), folded=dataset.sizes["step"])  # as in `groups.write`
    for array in clean.variables.values():
        array.encoding = {}
    with _quiet():
        clean.to_zarr(store, group=group, mode="w", zarr_format=3, consolidated=True, encoding=encoding,
                      write_empty_chunks=True)  # fmt: skip


def _split(shape: tuple[int, ...], itemsize: int, size: int) -> tuple[int, ...]:
    """Chunks of about `size` bytes: the first dimensions are cut first."""
    chunks = [max(1, length) for length in shape]
    for i in range(len(chunks)):
        rest = itemsize * int(np.prod(chunks[i + 1 :], dtype=int))
        chunks[i] = max(1, min(chunks[i], size // max(1, rest)))
    return tuple(chunks)


def _netcdf(trajectory: Trajectory, names: list[str], out: Path, watch: str | None) -> Path:
    engines = [name for name in ("h5netcdf", "netCDF4") if importlib.util.find_spec(name)]
    if not names:
        raise StoreError(f"{trajectory.path} holds no watch yet, so there is nothing to write as netCDF")
    if not engines and len(names) != 1:
        raise StoreError(
            f"several watches in one .nc need h5netcdf or netCDF4: {INSTALL}, or take one watch with --watch "
            f"({', '.join(names)})"
        )
    engine = {"h5netcdf": "h5netcdf", "netCDF4": "netcdf4"}[engines[0]] if engines else "scipy"
    with _aside(out) as path:
        for i, name in enumerate(names):
            dataset = _simple(trajectory[name].assign_attrs(run=json.dumps(trajectory.attrs)))
            group = None if watch is not None or not engines else name
            try:
                dataset.to_netcdf(path, mode="a" if i else "w", engine=engine, group=group)  # type: ignore[call-overload]
            except (ValueError, TypeError) as error:
                raise StoreError(
                    f"{name!r} cannot be netCDF through {engine} ({error}): {INSTALL}, or give a name that "
                    "ends in .zarr"
                ) from error
    return out


def _simple(dataset: xr.Dataset) -> xr.Dataset:
    """Attributes as text and numbers, text as `str`, truth values as 0 and 1: what every netCDF engine can hold."""
    dataset = dataset.copy()
    for name, variable in dataset.variables.items():
        if variable.dtype.kind in TEXT:
            dataset[name] = (variable.dims, as_text(variable.values), variable.attrs)
        elif variable.dtype.kind == "b":
            dataset[name] = (variable.dims, variable.values.astype("i1"), variable.attrs)
    for attrs in (dataset.attrs, *(variable.attrs for variable in dataset.variables.values())):
        for key, value in attrs.items():
            if not isinstance(value, str | int | float) or isinstance(value, bool):
                attrs[key] = json.dumps(plain(value))
    return dataset


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A path beside `out` that takes its place once it is written; `out` must not be a folder that exists."""
    if out.is_dir() or out.is_symlink():
        raise StoreError(f"{out} exists: give the name of a new file or folder")
    aside = out.with_name(f".{out.stem}.{uuid.uuid4().hex[:8]}{out.suffix}")
    remove: Callable[[], object] = lambda: shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)  # noqa: E731
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove()
        raise StoreError(cannot_write(out, error)) from error
    except BaseException:
        with contextlib.suppress(OSError):
            remove()
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Zarr warns that other readers may not know consolidated metadata; they then read the rest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata.*")
        yield
