"""A run in other forms: netCDF, Parquet, CSV, a copy as a plain Zarr store. Needs no torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from devmon.errors import StoreError
from devmon.files import aside, refuse_existing
from devmon.store.compact import compact
from devmon.store.rows import TEXT, as_text, plain
from devmon.store.trajectory import Trajectory

COLUMNS = ["watch", "variable", "step", "value", "se", "units", "verdict"]
INSTALL = 'pip install "devmon[netcdf]"'
KINDS = (".nc", ".parquet", ".csv", ".zarr")


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
    refuse_existing(out)
    if out.suffix == ".nc":
        return _netcdf(trajectory, names, out, watch)
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise StoreError("Parquet needs pyarrow: pip install pyarrow, or give a name that ends in .csv")
    frame = table(trajectory, names)
    with aside(out) as path:
        if out.suffix == ".csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path, engine="pyarrow", index=False)
    return out


def table(trajectory: Mapping[str, xr.Dataset], names: list[str] | None = None) -> pd.DataFrame:
    """The numbers that have no dimension but step, one a line: watch, variable, step, value, se, units, verdict.

    `se` is the variable `<variable>_se` of the same watch, or empty; such a variable is no line of its own. Traces of
    an LLC give the derived `llc` with its error, and `verdict` says whether the sampler's checks accepted it.
    """
    from devmon.analysis.derive.llc import llc
    from devmon.analysis.derive.watch_series import is_llc

    tables = []
    for name in trajectory if names is None else names:
        dataset = trajectory[name]
        if dataset.sizes["step"] == 0:
            continue
        # Numbers without another dimension, each with its error where the watch has one.
        numbers = {str(v): array for v, array in dataset.data_vars.items() if _scalar(array)}
        errors = {v: numbers.get(f"{v}_se") for v in numbers}
        numbers = {v: array for v, array in numbers.items() if not (v.endswith("_se") and v[:-3] in numbers)}

        # An LLC is stored as traces: the number is made of them here, as in a report.
        verdicts: dict[str, Any] = {}
        if is_llc(dataset):
            derived = llc(dataset)
            numbers["llc"], errors["llc"] = derived["llc"], derived["se"]
            verdicts["llc"] = as_text(derived["verdict"].values)

        for variable, array in numbers.items():
            se = errors[variable]
            columns = {
                "watch": name,
                "variable": variable,
                "step": dataset["step"].values,
                "value": array.values.astype(float),
                "se": np.nan if se is None else se.values.astype(float),
                "units": str(array.attrs.get("units", "")),
                "verdict": verdicts.get(variable, ""),
            }
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


# -- private -----------------------------------------------------------------------------------------------------------


def _scalar(array: xr.DataArray) -> bool:
    return array.dims == ("step",) and array.dtype.kind in "fiub"


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
    with aside(out) as path:
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
