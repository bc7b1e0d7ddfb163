"""Runs of earlier schemas: each function takes a place from its version to the next, and may be killed at any instant.

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
from typing import Any

import numpy as np
import xarray as xr

from devmon.errors import StoreError
from devmon.files import is_file, remove_empty
from devmon.store.place import Place
from devmon.store.rows import TEXT, encode
from devmon.store.stored import StoredWatch
from devmon.store.units import FileUnits


def migrate(place: Place) -> None:
    """Bring the run to the present schema."""
    with place.locked():
        while (version := place.attributes()["schema"]) < SCHEMA:  # else another process was first
            MIGRATIONS[version](place)
            done = {"to": version + 1, "devmon": importlib.metadata.version("devmon")}
            place.update(lambda attrs: attrs | {"schema": done["to"], "migrated": [*attrs.get("migrated", []), done]})  # noqa: B023


def _from_1(place: Place) -> None:
    """.npz rows become `.rows` units, and every group is written again, with a checksum in each chunk."""
    path = Path(place.path)  # there were no object stores

    # Folds that were killed, which schema 1 kept beside the units: the old group counts until the new one is in place.
    for old in path.glob("_units/*.old"):
        target = path / old.stem
        shutil.rmtree(old) if is_file(target / "zarr.json") else os.rename(old, target)
    for new in path.glob("_units/*.new"):
        shutil.rmtree(new)

    # Each row is appended once more as a unit; those that a killed conversion appended already come out the same.
    files = sorted(path.glob("_units/*/*.npz"))
    folders = {file.parent.name: file.parent for file in files}
    units = {name: FileUnits(folder, converting=True) for name, folder in folders.items()}
    for file in files:
        _append(units[file.parent.name], *_read_npz(file))

    # The files go last: by then their rows are in the groups, and on the disk.
    for name in place.names():
        StoredWatch(place, name, units.get(name)).fold(every=True)
    for file in files:
        file.unlink()
        remove_empty(file.parent)
    remove_empty(path / "_units")


def _append(units: FileUnits, header: dict[str, Any], row: xr.Dataset) -> None:
    units.refresh()
    if "failure" in header:
        units.append(header["step"], failure=header["failure"])
    else:
        layout, payload = encode(row)
        units.append(header["step"], layout, payload, weights=header["weights"], seconds=header["seconds"])


def _read_npz(path: Path) -> tuple[dict[str, Any], xr.Dataset]:
    """The header and the row of a file of schema 1, which holds arrays without pickles."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            header = json.loads(str(archive["header"]))
            variables = {}
            for name, spec in header["variables"].items():
                values = archive[spec["key"]]
                values = values.astype(object) if values.dtype.kind in TEXT else values
                variables[name] = xr.Variable(spec["dims"], values, spec["attrs"])
        coords = {name: variables.pop(name) for name in header["coords"]}
        return header, xr.Dataset(variables, coords, header["attrs"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{path} is no readable row of an earlier devmon ({error}): move this file away to go on; its step can be "
            "measured again"
        ) from error


MIGRATIONS: dict[int, Callable[[Place], None]] = {1: _from_1}
SCHEMA = max(MIGRATIONS) + 1
