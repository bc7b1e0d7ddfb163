"""Stores of earlier schemas: each function takes a trajectory from its version to the next, and may be killed at any instant.

1: rows in one .npz file a step, later in `.rows` files; groups of which a lost chunk was read as fill values.
2: groups whose every chunk is there (`devmon.store.groups`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from devmon.errors import StoreError
from devmon.files import is_file, remove_empty
from devmon.store.rows import TEXT, encode
from devmon.store.units import FileUnits

if TYPE_CHECKING:
    from devmon.store.trajectory import Trajectory


def migrate(trajectory: Trajectory) -> None:
    """Bring the store to the present schema."""
    place = trajectory._place
    with place.alone():
        while (version := trajectory.attrs["schema"]) < SCHEMA:  # else another process was first
            MIGRATIONS[version](trajectory)
            done = {"to": version + 1, "devmon": importlib.metadata.version("devmon")}
            place.update(lambda attrs: attrs | {"schema": done["to"], "migrated": [*attrs.get("migrated", []), done]})  # noqa: B023


def _from_1(trajectory: Trajectory) -> None:
    path = Path(trajectory.path)  # there were no object stores
    for old in path.glob("_units/*.old"):  # a fold that was killed
        target = path / old.stem
        shutil.rmtree(old) if is_file(target / "zarr.json") else os.rename(old, target)
    for new in path.glob("_units/*.new"):
        shutil.rmtree(new)
    files = sorted(path.glob("_units/*/*.npz"))
    for folder in {file.parent for file in files}:
        trajectory._units[folder.name] = FileUnits(folder, converting=True)
    for file in files:
        header, row = _read_npz(file)
        units = trajectory._units[file.parent.name]
        units.refresh()
        if "failure" in header:
            units.append(header["step"], failure=header["failure"])
        else:
            layout, payload = encode(row)
            units.append(header["step"], layout, payload, weights=header["weights"], seconds=header["seconds"])
    trajectory._fold(every=True)
    for file in files:  # their rows are in the groups, and on the disk
        file.unlink()
        remove_empty(file.parent)
    remove_empty(path / "_units")
    trajectory._units.clear()


def _read_npz(path: Path) -> tuple[dict[str, Any], xr.Dataset]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            header = json.loads(str(archive["header"]))
            found = {}
            for name, spec in header["variables"].items():
                values = archive[spec["key"]]
                values = values.astype(object) if values.dtype.kind in TEXT else values
                found[name] = xr.Variable(spec["dims"], values, spec["attrs"])
        coords = {name: found.pop(name) for name in header["coords"]}
        return header, xr.Dataset(found, coords, header["attrs"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{path} is no readable row of an earlier devmon ({error}): move this file away to go on; its step can be "
            "measured again"
        ) from error


MIGRATIONS: dict[int, Callable[[Trajectory], None]] = {1: _from_1}
SCHEMA = max(MIGRATIONS) + 1
