"""A run in an object store (the extra `cloud`): a `devmon.store.place.Place`, where each method is described.

There is no rename and no lock. Each object is put whole, and two conditional puts keep writers apart:

    _units/llc/000000000012.rows       one row, put only where there is none: of two writers the second is told
    llc/zarr.json                      the group's attributes, put only over the version that was read; its `fold` names
    _folds/llc/000003-5f1d…/           the group that holds the folded rows: one put of llc/zarr.json publishes it

Plain xarray reads the group that `fold` names: `xr.open_zarr(ObjectStore(store), group=..., consolidated=False)`. A
fold that is killed, or was overtaken, leaves a group that nothing names, which the next fold deletes.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from typing import Any

import xarray as xr

from devmon.errors import StoreError
from devmon.store import groups
from devmon.store.bucket import Bucket
from devmon.store.groups import Change
from devmon.store.object_units import ObjectUnits
from devmon.store.units import Units
from devmon.watch import NAME


class Objects:
    """The objects in `bucket`."""

    locks = False

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.path = bucket.path

    @classmethod
    def at(cls, path: Any) -> Objects:
        """For a URL, a store of obstore, or Zarr's `ObjectStore` around one."""
        return cls(Bucket.at(path))

    def exists(self) -> bool:
        return self.version("") is not None

    def create(self) -> None:
        if any(True for _ in self.bucket.keys("")) and not self.exists():
            raise StoreError(f"{self.path} holds objects and is no trajectory: give another prefix")

    def locked(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def attributes(self, name: str = "") -> dict[str, Any]:
        return self._attributes(name)[0]

    def update(self, change: Change, name: str = "") -> dict[str, Any]:
        while True:
            old, version = self._attributes(name) if self.version(name) is not None else ({}, None)
            new = change(old)
            if new == old or self._publish(name, new, version):
                return new

    def names(self) -> list[str]:
        folders = self.bucket.folders()
        return sorted(name for name in folders if NAME.fullmatch(name) and self.version(name) is not None)

    def version(self, name: str) -> str | None:
        try:
            return self.bucket.version(_node(name))
        except FileNotFoundError:
            return None

    def units(self, name: str) -> Units:
        return ObjectUnits(self.bucket, name)

    def folded(self, name: str, only: list[str] | None = None) -> xr.Dataset | None:
        if self.version(name) is None:
            return None
        attrs = self.attributes(name)
        group = attrs.get("fold", name)  # the latter: a copy that `devmon.store.compact` wrote
        return self._read(group, only) if attrs.get("folded") else None

    def replace(self, name: str, rows: xr.Dataset, since: Any) -> bool:
        attrs, version = self._attributes(name)
        if version != since:
            return False

        # A new group, of which no reader knows until the attributes name it.
        number = int(attrs.get("fold_number", 0)) + 1
        new = dict(rows.attrs) | {"fold_number": number}
        group = f"_folds/{name}/{number:06d}-{uuid.uuid4().hex[:12]}"
        if rows.sizes["step"]:
            self._write(group, rows)
            new |= {"fold": group, "folded": rows.sizes["step"]}
        if not self._publish(name, new, since):
            return False

        # The earlier groups go: a fold that began from an earlier version cannot publish any more.
        for key in self.bucket.keys(f"_folds/{name}"):
            if key.count("/") > 2 and int(key.split("/")[2].split("-")[0]) <= number and not key.startswith(group):
                self.bucket.delete([key])
        return True

    def remove(self, name: str) -> None:
        self.bucket.delete([_node(name)])

    def recover(self) -> None:
        """Nothing can be half done."""

    def next_attempt(self) -> int:
        numbers = [key.split("/")[1] for key in self.bucket.keys("_attempts")]
        return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1

    def set_aside(self, attempt: int, name: str, rows: xr.Dataset) -> None:
        self._write(f"_attempts/{attempt}/{name}", rows)

    def attempts(self) -> dict[str, xr.Dataset]:
        keys = self.bucket.keys("_attempts")
        names = sorted({"/".join(key.split("/")[:3]) for key in keys if key.count("/") > 3})
        return groups.attempts(names, self._read, self.attributes())

    def write_copy(self, write: Callable[[Any], object], attrs: dict[str, Any]) -> None:
        self.create()
        with self.bucket.reported("write"):
            write(self.bucket.zarr())
        self.bucket.put(_node(""), groups.node(attrs), "overwrite")

    # -- private -----------------------------------------------------------------------------------------------------

    def _attributes(self, name: str) -> tuple[dict[str, Any], str]:
        """The attributes, and the version of the object that holds them."""
        try:
            data, version = self.bucket.get(_node(name))
        except FileNotFoundError as error:
            raise StoreError(f"{self.path}/{_node(name)} is gone: restore it from a copy") from error
        return groups.attributes(f"{self.path}/{_node(name)}", lambda: data), version

    def _publish(self, name: str, attrs: dict[str, Any], since: str | None) -> bool:
        return self.bucket.put(_node(name), groups.node(attrs), "create" if since is None else {"e_tag": since})

    def _write(self, group: str, rows: xr.Dataset) -> None:
        with self.bucket.reported("write", group):
            groups.write(self.bucket.zarr(), rows, group)

    def _read(self, group: str, only: list[str] | None = None) -> xr.Dataset:
        keys = set(self.bucket.keys(group))
        with self.bucket.reported("read", group):
            store = self.bucket.zarr(read_only=True)
            return groups.read(store, f"{self.path}/{group}", lambda key: f"{group}/{key}" in keys, group, only)


def _node(name: str) -> str:
    """The key of the object that holds the attributes of a watch, or of the run."""
    return f"{name}/zarr.json" if name else "zarr.json"
