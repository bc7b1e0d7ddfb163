"""A unit: one observation (one watch at one step) in one immutable file, committed by a rename.

A unit is a NumPy `.npz` archive without pickles: the arrays, and a JSON header with dimensions, attributes, the step and
who was measured. It exists whole or not at all, so a kill at any instant loses nothing that was committed.
"""

from __future__ import annotations

import io
import json
import os
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from devmon.errors import StoreError

TEXT = "OUST"  # kinds of NumPy dtype that hold text


def unit_path(folder: Path, step: int) -> Path:
    """Where the unit of `step` lies in a watch's folder of units."""
    return folder / f"{step:012d}.npz"


def write_unit(path: Path, dataset: xr.Dataset, **header: Any) -> None:
    """Commit a dataset (no `step` dimension) under `path`, with JSON-able `header` entries."""
    arrays, names = {}, {}
    for i, (name, variable) in enumerate(dataset.variables.items()):
        values = np.asarray(variable.values)
        arrays[f"a{i}"] = values.astype(str) if values.dtype.kind in TEXT else values
        names[str(name)] = {"key": f"a{i}", "dims": list(map(str, variable.dims)), "attrs": plain(variable.attrs)}
    header |= {"variables": names, "coords": list(map(str, dataset.coords)), "attrs": plain(dataset.attrs)}
    buffer = io.BytesIO()
    np.savez(buffer, header=np.array(json.dumps(header)), **arrays)  # type: ignore[arg-type]
    commit(path, buffer.getvalue())


def read_unit(path: Path) -> tuple[xr.Dataset, dict[str, Any]]:
    """The dataset and the header of a unit; `StoreError` where the file is not one."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            header = json.loads(str(archive["header"]))
            found = {
                name: xr.Variable(spec["dims"], _as_object(archive[spec["key"]]), spec["attrs"])
                for name, spec in header["variables"].items()
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{path} is not a readable unit of a trajectory ({error}): move this file away to go on; its step "
            "can be measured again"
        ) from error
    coords = {name: found.pop(name) for name in header["coords"]}
    return xr.Dataset(found, coords, header["attrs"]), header


def commit(path: Path, data: bytes) -> None:
    """Write `data` aside, flush it to the disk, and rename it to `path` in one step."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StoreError(
            f"cannot write {path} ({error.strerror or error}): what is stored so far is intact; make room or give "
            "write permission, then run again"
        ) from error


def plain(attrs: Any) -> Any:
    """Attributes as JSON: NumPy scalars and arrays become Python values."""
    if isinstance(attrs, dict):
        return {str(key): plain(value) for key, value in attrs.items()}
    if isinstance(attrs, list | tuple):
        return [plain(item) for item in attrs]
    if isinstance(attrs, np.ndarray | np.generic):
        return attrs.tolist()
    return attrs if attrs is None or isinstance(attrs, bool | int | float | str) else str(attrs)


def _as_object(values: np.ndarray) -> np.ndarray:
    return values.astype(object) if values.dtype.kind in TEXT else values
