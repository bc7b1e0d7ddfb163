"""Requests to an object store (S3, GCS, Azure, memory), with errors that say what could not be done. Needs obstore."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from devmon.errors import StoreError

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError, PreconditionError
    from zarr.storage import ObjectStore
except ImportError as error:
    raise StoreError('object stores need obstore: pip install "devmon[cloud]"') from error

READ_AHEAD = 2**16  # bytes a request of `reader`: the headers of a row and of its layout
MEMORY: dict[str, Any] = {}  # stores of `memory://NAME`, for this process


class Bucket:
    """The objects under the prefix of `store` (obstore's), by key; `path` is how it is named to the user.

    Reading raises FileNotFoundError where there is no such object, which is for the caller, and StoreError else.
    """

    def __init__(self, store: Any, path: str) -> None:
        self.store = store
        self.path = path

    @classmethod
    def at(cls, path: Any) -> Bucket:
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
                f"cannot open {path} ({_first_line(error)}): give a folder, a URL such as s3://bucket/run.zarr, or a "
                "store of obstore (obstore.store.S3Store(...))"
            ) from error
        return cls(store, path if isinstance(path, str) else repr(path))

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys below `prefix`, which ends where a part of a key does."""
        for key, _ in self._listed(prefix):
            yield key

    def versions(self, prefix: str) -> dict[str, str]:
        """The keys below `prefix`, and what changes when an object is replaced."""
        return dict(self._listed(prefix))

    def folders(self) -> list[str]:
        """The first parts of keys that have several."""
        with self.reported("list"):
            return [path.rstrip("/") for path in obstore.list_with_delimiter(self.store)["common_prefixes"]]

    def version(self, key: str) -> str:
        """What changes when the object is replaced."""
        with self.reported("read", key):
            return str(obstore.head(self.store, key)["e_tag"])

    def get(self, key: str) -> tuple[bytes, str]:
        """The object, and its version."""
        with self.reported("read", key):
            answer = obstore.get(self.store, key)
            return bytes(answer.bytes()), str(answer.meta["e_tag"])

    def reader(self, key: str) -> Any:
        """A file to read a part of the object from; its `size` is that of the object."""
        return obstore.open_reader(self.store, key, buffer_size=READ_AHEAD)

    def part(self, key: str, start: int, length: int) -> bytes:
        """Some bytes of the object."""
        with self.reported("read", key):
            return bytes(obstore.get_range(self.store, key, start=start, length=length)) if length else b""

    def put(self, key: str, data: Any, mode: Any) -> bool:
        """Put one object, if `mode` allows it: "create", {"e_tag": the one that it must replace}, or "overwrite"."""
        try:
            with self.reported("write", key):
                obstore.put(self.store, key, data, mode=mode, use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
        except (NotSupportedError, NotImplementedError) as error:
            raise StoreError(
                f"{self.path} has no conditional puts ({_first_line(error)}), by which writers keep from losing rows: "
                "use S3, GCS, Azure or a folder; devmon compact RUN -o URL copies a finished run there all the same"
            ) from error
        return True

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are gone are passed over."""
        with self.reported("delete in"):
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self.store, key)

    def zarr(self, *, read_only: bool = False) -> ObjectStore:
        """The same objects as a store of Zarr."""
        return ObjectStore(self.store, read_only=read_only)

    @contextlib.contextmanager
    def reported(self, what: str, key: str = "") -> Iterator[None]:
        """Turn errors of the store into StoreError; what is not there, or was changed by another, stays as it is."""
        where = f"{self.path}/{key}" if key else self.path
        try:
            yield
        except (FileNotFoundError, AlreadyExistsError, PreconditionError, NotSupportedError, NotImplementedError):
            raise
        except (BaseError, OSError) as error:
            cause = error if isinstance(error, OSError) else OSError(_first_line(error))
            raise StoreError(
                f"cannot {what} {where} ({_first_line(error)}): what is stored so far is intact; see to the network "
                "and the permissions, then run again"
            ) from cause

    def _listed(self, prefix: str) -> Iterator[tuple[str, str]]:
        with self.reported("list", prefix):
            for batch in obstore.list(self.store, prefix or None):
                yield from ((item["path"], str(item["e_tag"])) for item in batch)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
