"""Folded rows: a Zarr v3 group that is written with every chunk of it, and read with a check that none is gone.

Zarr reads a chunk that does not exist as fill values. Here empty chunks are written too, and each with a checksum, so
that the metadata alone say which files there must be; the attribute `folded` holds the number of rows.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import xarray as xr
import zarr
from zarr.codecs import ZstdCodec
from zarr.errors import ZarrUserWarning

from devmon.errors import StoreError
from devmon.store.rows import TEXT, plain

Change = Callable[[dict[str, Any]], dict[str, Any]]  # of a group's attributes
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)  # what Zarr and xarray raise
ONE_CHUNK = 2**25  # bytes: a smaller array is one file; a larger one is cut by Zarr, so that a part can be read
LABELS = ["step", "weights", "seconds"]
REMEDY = "restore it from a copy, or move the watch's group out of the run and measure its steps again"


def write(store: Any, dataset: xr.Dataset, group: str | None = None) -> None:
    """Write rows as one group."""
    encoding: dict[str, dict[str, Any]] = {}
    for name, variable in dataset.variables.items():
        encoding[str(name)] = {"compressors": [ZstdCodec(level=0, checksum=True)]}
        if variable.ndim and variable.nbytes < ONE_CHUNK and variable.dtype.kind not in TEXT:
            encoding[str(name)]["chunks"] = tuple(max(1, size) for size in variable.shape)
    dataset.assign_attrs(plain(dataset.attrs), folded=dataset.sizes["step"]).to_zarr(
        store, group=group, mode="w", zarr_format=3, consolidated=False, encoding=encoding, write_empty_chunks=True
    )


def read(
    store: Any, where: str, holds: Callable[[str], bool], group: str | None = None, only: list[str] | None = None
) -> xr.Dataset:
    """The rows of a group, or the variables `only` of them.

    `holds(key)` says whether the file or object `key` of the group exists. Raises `StoreError` with the one that is
    gone or damaged; groups that have no `folded`, of a schema before 2, are read as they are.
    """
    try:
        with warnings.catch_warnings():  # of files that a fold is deleting: the caller reads again
            warnings.simplefilter("ignore", ZarrUserWarning)
            with xr.open_dataset(store, group=group, engine="zarr", consolidated=False, chunks=None) as dataset:
                rows = dataset.attrs.get("folded")
                expected = {*dataset.attrs.get("shape", ()), *LABELS} if only is None and rows is not None else only
                for name in expected or LABELS[:2]:
                    if name not in dataset.variables:
                        raise StoreError(f"{where} holds no {name} any more: {REMEDY}")
                wanted = dataset if only is None else dataset[only]
                if rows is not None:
                    _check(wanted, rows, where, holds)
                return wanted.load()
    except UNREADABLE as error:
        raise StoreError(f"{where}{_broken(store, group or '')} ({error}): {REMEDY}") from error


def attempts(
    names: Iterable[str], read_one: Callable[[str], xr.Dataset], attrs: Mapping[str, Any]
) -> dict[str, xr.Dataset]:
    """The groups `_attempts/NUMBER/NAME` of a run with these attributes.

    A resumption lists its attempt there when all is written. What a killed one left half written is passed over, since
    its rows are still in the run; a damaged group of a listed attempt raises `StoreError`.
    """
    listed = {str(entry.get("attempt")) for entry in attrs.get("attempts", [])}
    rows = {}
    for name in names:
        try:
            rows[name] = read_one(name)
        except StoreError:
            if name.split("/")[1] in listed:
                raise
    return rows


def node(attrs: Mapping[str, Any]) -> bytes:
    """The zarr.json of a group with these attributes."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": plain(dict(attrs))}, indent=1).encode()


def attributes(where: object, read_text: Callable[[], str | bytes]) -> dict[str, Any]:
    """The attributes in a group's zarr.json."""
    try:
        group = json.loads(read_text())
        if group["zarr_format"] != 3 or group["node_type"] != "group":
            raise ValueError("it is no Zarr v3 group")
        if not isinstance(group.setdefault("attributes", {}), dict):
            raise ValueError("its attributes are no mapping")
        return group["attributes"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{where} cannot be read ({error}): give the path of a trajectory, or restore it") from error


# -- private -----------------------------------------------------------------------------------------------------------


def _check(dataset: xr.Dataset, rows: int, where: str, holds: Callable[[str], bool]) -> None:
    if dataset.sizes["step"] != rows:
        raise StoreError(f"{where} holds {dataset.sizes['step']} rows, {rows} were written: {REMEDY}")
    for name, variable in dataset.variables.items():
        for key, _ in _files(variable.shape, variable.encoding.get("shards") or variable.encoding["chunks"]):
            if not holds(f"{name}/{key}"):
                raise StoreError(f"{where}/{name}/{key} is gone, and would be read as if nothing was there: {REMEDY}")


def _broken(store: Any, group: str) -> str:
    """The first file that cannot be read, as the end of its path."""
    with contextlib.suppress(*UNREADABLE):
        for name in [*zarr.open_group(store, path=group, mode="r").attrs.get("shape", ()), *LABELS]:  # type: ignore[misc]
            key = "zarr.json"
            try:
                array = zarr.open_array(store, path=f"{group}/{name}".strip("/"), mode="r")
                for key, region in _files(array.shape, array.shards or array.chunks):  # noqa: B007
                    _ = array[region]
            except UNREADABLE:
                return f"/{name}/{key} is damaged"
    return " cannot be read"


def _files(shape: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """The key of each file of an array, and the part of the array that it holds."""
    for at in itertools.product(*(range(-(-n // size)) for n, size in zip(shape, sizes, strict=True))):
        yield "/".join(["c", *map(str, at)]), tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, sizes, strict=True))
