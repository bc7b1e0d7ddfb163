"""A small copy of a run: consolidated, sharded and compressed, for archives and for reading over a network."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from zarr.codecs import BloscCodec, Crc32cCodec

from devmon.store.migrations import SCHEMA
from devmon.store.place import place
from devmon.store.rows import TEXT, plain
from devmon.store.trajectory import Trajectory

CHUNK, SHARD = 2**20, 2**27  # bytes before compression: what is read at once, what is one file


def compact(trajectory: Trajectory, copy: Path | Any) -> Path | Any:
    """Write a consolidated, sharded, compressed copy, which `xr.open_zarr(copy, group=...)` and devmon open.

    `copy` is a new folder, or an object store as `Trajectory` takes it: there the last object makes it a trajectory.
    StoreError where it holds something, or cannot be written.
    """
    place(copy).write_copy(lambda store: _write_all(trajectory, store), trajectory.attrs | {"schema": SCHEMA})
    return copy


# -- private -----------------------------------------------------------------------------------------------------------


def _write_all(trajectory: Trajectory, store: Any) -> None:
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
            # Zarr takes shards of whole chunks only.
            shards = zip(_split(variable.shape, variable.dtype.itemsize, SHARD), chunks, strict=True)
            encoding[str(name)]["shards"] = tuple(-(-shard // chunk) * chunk for shard, chunk in shards)
    clean = dataset.assign_attrs(plain(dataset.attrs), folded=dataset.sizes["step"])  # as in `groups.write`
    for array in clean.variables.values():
        array.encoding = {}  # of the run it was read from
    with _quiet():
        clean.to_zarr(
            store, group=group, mode="w", zarr_format=3, consolidated=True, encoding=encoding, write_empty_chunks=True
        )


def _split(shape: tuple[int, ...], itemsize: int, size: int) -> tuple[int, ...]:
    """Chunks of about `size` bytes: the first dimensions are cut first."""
    chunks = [max(1, length) for length in shape]
    for i in range(len(chunks)):
        rest = itemsize * int(np.prod(chunks[i + 1 :], dtype=int))
        chunks[i] = max(1, min(chunks[i], size // max(1, rest)))
    return tuple(chunks)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Zarr warns that other readers may not know consolidated metadata; they then read the rest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata.*")
        yield
