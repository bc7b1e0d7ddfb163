"""A trajectory in an object store (S3, GCS, Azure, memory; the extra `cloud`): what `devmon.store.disk` is in a folder.

There is no rename and no lock. Each object is put whole, and two conditional puts keep writers apart:

    _units/llc/000000000012.rows       one row, put only where there is none: of two writers the second is told
    llc/zarr.json                      the group's attributes, put only over the version that was read; its `fold` names
    _folds/llc/000003-5f1d…/           the group that holds the folded rows: one put of llc/zarr.json publishes it

Plain xarray reads the group that `fold` names: `xr.open_zarr(ObjectStore(store), group=..., consolidated=False)`. A fold that
is killed, or was overtaken, leaves a group that nothing names, which the next fold deletes.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xarray as xr

from devmon.errors import StoreError
from devmon.store import groups
from devmon.store.rows import Chain, Entry, record, scan
from devmon.store.units import Units
from devmon.watch import NAME

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError, PreconditionError
    from zarr.storage import ObjectStore
except ImportError as error:
    raise StoreError('object stores need obstore: pip install "devmon[cloud]"') from error

TOGETHER = 16  # requests at a time
MEMORY: dict[str, Any] = {}  # of this process, by name
Change = Callable[[dict[str, Any]], dict[str, Any]]


class Objects:
    """The objects under `store`'s prefix; `path` is how it is named to the user."""

    locks = False  # what was read may be old at once: what is written says what it replaces

    def __init__(self, store: Any, path: str) -> None:
        self.store = store
        self.path = path

    @classmethod
    def at(cls, path: Any) -> Objects:
        """For a URL, a store of obstore, or Zarr's `ObjectStore` around one."""
        if isinstance(path, ObjectStore):
            path = path.store
        if isinstance(path, str) and path.startswith("memory://"):
            return cls(MEMORY.setdefault(path, obstore.store.MemoryStore()), path)
        try:
            store = obstore.store.from_url(path) if isinstance(path, str) else path
            if type(store).__module__ != "obstore.store":
                raise TypeError("it is none of obstore's stores")
        except (BaseError, TypeError, ValueError) as error:
            raise StoreError(
                f"cannot open {path} ({_first(error)}): give a folder, a URL such as s3://bucket/run.zarr, or a store of "
                "obstore (obstore.store.S3Store(...))"
            ) from error
        return cls(store, path if isinstance(path, str) else repr(path))

    def made(self) -> bool:
        return self.version("") is not None

    def begin(self) -> None:
        if any(True for _ in self.keys("")) and not self.made():
            raise StoreError(f"{self.path} holds objects and is no trajectory: give another prefix")

    def alone(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def attributes(self, name: str = "") -> dict[str, Any]:
        return self._node(name)[0]

    def update(self, change: Change, name: str = "") -> dict[str, Any]:
        """Change the attributes of a watch's group or of the run; again, where another writer was first."""
        while True:
            old, tag = self._node(name) if self.version(name) is not None else ({}, None)
            new = change(old)
            if new == old or self._publish(name, new, tag):
                return new

    def names(self) -> list[str]:
        with _told(self.path, "list"):
            found = [path.rstrip("/") for path in obstore.list_with_delimiter(self.store)["common_prefixes"]]
        return sorted(name for name in found if NAME.fullmatch(name) and self.version(name) is not None)

    def version(self, name: str) -> str | None:
        try:
            with _told(self.path, "read"):
                return obstore.head(self.store, _join(name, "zarr.json"))["e_tag"]
        except FileNotFoundError:
            return None

    def units(self, name: str) -> Units:
        return ObjectUnits(self, name)

    def folded(self, name: str, only: list[str] | None = None) -> xr.Dataset | None:
        if self.version(name) is None:
            return None
        attrs = self.attributes(name)
        group = attrs.get("fold", name)  # the latter: a copy that `devmon.store.export.compact` wrote
        return self._read(group, only) if attrs.get("folded") else None

    def replace(self, name: str, rows: xr.Dataset, since: Any) -> bool:
        """Write `rows` as a new group and publish it; False where the attributes are not of version `since` any more."""
        attrs, tag = self._node(name)
        if tag != since:
            return False
        number = int(attrs.get("fold_number", 0)) + 1
        new = dict(rows.attrs) | {"fold_number": number}
        group = f"_folds/{name}/{number:06d}-{uuid.uuid4().hex[:12]}"
        if rows.sizes["step"]:
            self._write(group, rows)
            new |= {"fold": group, "folded": rows.sizes["step"]}
        if not self._publish(name, new, since):
            return False
        for key in self.keys(f"_folds/{name}"):  # who began from an earlier version cannot publish any more
            if key.count("/") > 2 and int(key.split("/")[2].split("-")[0]) <= number and not key.startswith(group):
                self.delete([key])
        return True

    def recover(self) -> None:
        """Nothing can be half done."""

    def next_attempt(self) -> int:
        found = [key.split("/")[1] for key in self.keys("_attempts")]
        return max((int(number) for number in found if number.isdecimal()), default=-1) + 1

    def set_aside(self, attempt: int, name: str, rows: xr.Dataset) -> None:
        self._write(f"_attempts/{attempt}/{name}", rows)

    def attempts(self) -> dict[str, xr.Dataset]:
        found = sorted({"/".join(key.split("/")[:3]) for key in self.keys("_attempts") if key.count("/") > 3})
        return groups.attempts(found, self._read, self.attributes())

    def copy(self, write: Callable[[Any], object], attrs: dict[str, Any]) -> None:
        """Let `write` put groups, and then make them a trajectory."""
        with _told(self.path, "write"):
            write(ObjectStore(self.store))
        self.put("zarr.json", groups.node(attrs), "overwrite")

    # -- objects -----------------------------------------------------------------------------------------------------

    def keys(self, prefix: str) -> Iterator[str]:
        with _told(self.path, "list"):
            for batch in obstore.list(self.store, prefix or None):
                yield from (found["path"] for found in batch)

    def put(self, key: str, data: Any, mode: Any) -> bool:
        """Put one object, if `mode` allows it: "create", {"e_tag": the one that it must replace}, or "overwrite"."""
        try:
            with _told(f"{self.path}/{key}", "write"):
                obstore.put(self.store, key, data, mode=mode, use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
        except (NotSupportedError, NotImplementedError) as error:
            raise StoreError(
                f"{self.path} has no conditional puts ({_first(error)}), by which writers keep from losing rows: use S3, "
                "GCS, Azure or a folder; devmon compact RUN -o URL copies a finished run there all the same"
            ) from error
        return True

    def delete(self, keys: Iterable[str]) -> None:
        with _told(self.path, "delete in"):
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self.store, key)

    def _node(self, name: str) -> tuple[dict[str, Any], str]:
        key = _join(name, "zarr.json")
        with _told(f"{self.path}/{key}", "read"):
            try:
                found = obstore.get(self.store, key)
                data, tag = bytes(found.bytes()), found.meta["e_tag"]
            except FileNotFoundError as error:
                raise StoreError(f"{self.path}/{key} is gone: restore it from a copy") from error
        return groups.attributes(f"{self.path}/{key}", lambda: data), str(tag)

    def _publish(self, name: str, attrs: dict[str, Any], since: str | None) -> bool:
        return self.put(_join(name, "zarr.json"), groups.node(attrs), "create" if since is None else {"e_tag": since})

    def _write(self, group: str, rows: xr.Dataset) -> None:
        with _told(f"{self.path}/{group}", "write"):
            groups.write(ObjectStore(self.store), rows, group)

    def _read(self, group: str, only: list[str] | None = None) -> xr.Dataset:
        there = set(self.keys(group))
        with _told(f"{self.path}/{group}", "read"):
            store = ObjectStore(self.store, read_only=True)
            return groups.read(store, f"{self.path}/{group}", lambda key: f"{group}/{key}" in there, group, only)


class ObjectUnits(Units):
    """The rows of one watch since the last fold, one object each. Failures lie beside them."""

    def __init__(self, objects: Objects, name: str) -> None:
        super().__init__(f"{objects.path}/_units/{name}")
        self.objects = objects
        self.prefix = f"_units/{name}"

    def paths(self) -> list[str]:
        return list(self._listed())

    def refresh(self) -> None:
        listed = self._listed()
        self._chains = {key: chain for key, chain in self._chains.items() if listed.get(key) == chain.version}
        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(self._scan, (key for key in listed if key not in self._chains)))

    def weights(self, step: int) -> str | None:
        self._scan(key := self._key(step))
        return self._chains[key].rows[step].weights if key in self._chains else None

    def append(self, step: int, layout: bytes = b"", payload: Sequence[Any] = (), **header: Any) -> None:
        failure = "failure" in header
        pieces = record(json.dumps({"step": step, **header}).encode(), payload)
        data = b"".join(pieces if failure else [*record(b"", [layout]), *pieces])
        key = f"{self._key(step).removesuffix('.rows')}-{uuid.uuid4().hex[:8]}.failed" if failure else self._key(step)
        self.objects.put(key, data, "create")  # where it is there already, the trajectory compares

    def remove(self, paths: Iterable[str]) -> None:
        self.objects.delete(paths)

    def discard(self, step: int) -> None:
        self.objects.delete([self._key(step)])

    def _key(self, step: int) -> str:
        return f"{self.prefix}/{step:012d}.rows"

    def _listed(self) -> dict[str, str]:
        with _told(self.where, "list"):
            batches = obstore.list(self.objects.store, self.prefix)
            return {found["path"]: str(found["e_tag"]) for batch in batches for found in batch}

    def _scan(self, key: str) -> None:
        """Read the headers of an object; forget one that is gone."""
        try:
            with _told(f"{self.objects.path}/{key}", "read"):
                tag = str(obstore.head(self.objects.store, key)["e_tag"])
                if key in self._chains and self._chains[key].version == tag:
                    return
                file, chain = obstore.open_reader(self.objects.store, key, buffer_size=2**16), Chain(tag)
                while chain.end < file.size and scan(f"{self.objects.path}/{key}", file, chain, file.size):
                    pass
        except FileNotFoundError:
            self._chains.pop(key, None)
        except StoreError:
            with contextlib.suppress(FileNotFoundError):  # deleted by a fold while it was read
                obstore.head(self.objects.store, key)
                raise
            self._chains.pop(key, None)
        else:
            if chain.end < file.size:
                raise StoreError(f"{self.objects.path}/{key} is cut off: move it away; its step can be measured again")
            self._chains[key] = chain

    def _payloads(self, path: str, entries: list[Entry]) -> list[bytes]:
        with _told(f"{self.objects.path}/{path}", "read"):
            return [
                bytes(obstore.get_range(self.objects.store, path, start=e.at, length=e.size)) if e.size else b""
                for e in entries
            ]


@contextlib.contextmanager
def _told(where: str, what: str) -> Iterator[None]:
    """Say what could not be done; what is not there, or was changed by another, is for the caller."""
    try:
        yield
    except (FileNotFoundError, AlreadyExistsError, PreconditionError, NotSupportedError, NotImplementedError):
        raise
    except (BaseError, OSError) as error:
        cause = error if isinstance(error, OSError) else OSError(_first(error))
        raise StoreError(
            f"cannot {what} {where} ({_first(error)}): what is stored so far is intact; see to the network and the "
            "permissions, then run again"
        ) from cause


def _join(name: str, key: str) -> str:
    return f"{name}/{key}" if name else key


def _first(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
