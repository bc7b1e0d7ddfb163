"""Units in an object store: each row that was committed since the last fold is one object, failures lie beside them."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from devmon.errors import StoreError
from devmon.store.bucket import Bucket
from devmon.store.rows import Entry, Records, record, scan
from devmon.store.units import Units

TOGETHER = 16  # requests at a time


class ObjectUnits(Units):
    """The rows of the watch `name` in `bucket`. A step is in the key of its row, so that no two writers can put it."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        super().__init__(f"{bucket.path}/_units/{name}")
        self.bucket = bucket
        self.prefix = f"_units/{name}"

    def paths(self) -> list[str]:
        return list(self.bucket.keys(self.prefix))

    def refresh(self) -> None:
        now = self.bucket.versions(self.prefix)
        self._records = {key: records for key, records in self._records.items() if now.get(key) == records.version}
        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(self._scan, (key for key in now if key not in self._records)))

    def weights(self, step: int) -> str | None:
        self._scan(key := self._key(step))
        return self._records[key].rows[step].weights if key in self._records else None

    def append(self, step: int, layout: bytes = b"", payload: Sequence[Any] = (), **header: Any) -> None:
        failure = "failure" in header
        pieces = record(json.dumps({"step": step, **header}).encode(), payload)
        data = b"".join(pieces if failure else [*record(b"", [layout]), *pieces])
        key = f"{self._key(step).removesuffix('.rows')}-{uuid.uuid4().hex[:8]}.failed" if failure else self._key(step)
        self.bucket.put(key, data, "create")  # where it is there already, the watch compares

    def remove(self, paths: Iterable[str]) -> None:
        self.bucket.delete(paths)

    def discard(self, step: int) -> None:
        self.bucket.delete([self._key(step)])

    def _key(self, step: int) -> str:
        return f"{self.prefix}/{step:012d}.rows"

    def _scan(self, key: str) -> None:
        """Read the headers of an object; forget one that is gone."""
        try:
            version = self.bucket.version(key)
            if key in self._records and self._records[key].version == version:
                return
            with self.bucket.reported("read", key):
                file, records = self.bucket.reader(key), Records(version)
                while records.end < file.size and scan(f"{self.bucket.path}/{key}", file, records, file.size):
                    pass
        except FileNotFoundError:
            self._records.pop(key, None)
        except StoreError:
            with contextlib.suppress(FileNotFoundError):  # deleted by a fold while it was read
                self.bucket.version(key)
                raise
            self._records.pop(key, None)
        else:
            if records.end < file.size:
                raise StoreError(f"{self.bucket.path}/{key} is cut off: move it away; its step can be measured again")
            self._records[key] = records

    def _payloads(self, path: str, entries: list[Entry]) -> list[bytes]:
        return [self.bucket.part(path, entry.at, entry.size) for entry in entries]
