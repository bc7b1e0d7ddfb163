"""Units: the rows of one watch that were committed since the last fold, in append-only files, one file a writer."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from devmon.errors import StoreError
from devmon.files import cannot_write, reason, remove_empty
from devmon.store.rows import Entry, Records, damaged, decode, record, scan, sound

CHUNK = 2**16  # bytes a write: 100 MB at once took four times as long
READS = 100  # until units that are folded away again and again while they are read are given up
FLUSH_EVERY = 1.0  # seconds: a power cut loses the rows since the last flush to the disk, a kill loses none


class Units:
    """What is common to files and objects (`devmon.store.object_units`): the records in each, by path or key."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._records: dict[Any, Records] = {}

    def paths(self) -> list[Any]:
        """Where rows lie now."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Take notice of what was written or folded since the last time, by any process."""
        raise NotImplementedError

    def append(self, step: int, layout: bytes = b"", payload: Sequence[Any] = (), **header: Any) -> None:
        """Commit one row (see `rows.encode`), or a failure, which has neither layout nor payload."""
        raise NotImplementedError

    def remove(self, paths: Iterable[Any]) -> None:
        """Delete what has been folded."""
        raise NotImplementedError

    def discard(self, step: int) -> None:
        """Take back the row at `step` that was just written (where writers hold no lock)."""
        raise NotImplementedError

    def weights(self, step: int) -> str | None:
        """The weights of the row at `step`, None where there is no row."""
        self.refresh()
        return next((r.rows[step].weights for r in self._records.values() if step in r.rows), None)

    def steps(self) -> set[int]:
        self.refresh()
        return {step for records in self._records.values() for step in records.rows}

    def failures(self) -> dict[int, str]:
        """Steps with a failure and no row, with the reason."""
        held = self.steps()
        failed = (item for records in self._records.values() for item in records.failed.items())
        return {step: why for step, why in failed if step not in held}

    def read(self) -> list[xr.Dataset]:
        """All rows, as one dataset with a leading `step` for each layout."""
        for _ in range(READS):
            try:
                return self._read()
            except FileNotFoundError:  # folded since it was listed: the rows are in the group now
                continue
        raise StoreError(f"{self.where} changes all the time: stop the other processes that fold this trajectory")

    def _payloads(self, path: Any, entries: list[Entry]) -> list[bytes]:
        raise NotImplementedError

    def _read(self) -> list[xr.Dataset]:
        self.refresh()
        rows: dict[bytes, list[tuple[Entry, bytes]]] = {}  # by layout
        seen: set[int] = set()
        for path, records in self._records.items():
            entries = [entry for entry in records.rows.values() if entry.step not in seen]
            seen.update(records.rows)
            for entry, payload in zip(entries, self._payloads(path, entries), strict=True):
                if not sound(payload, entry.crc):
                    raise StoreError(damaged(path, entry.at, f"step {entry.step} has a wrong checksum"))
                rows.setdefault(entry.layout, []).append((entry, payload))
        try:
            return [decode(layout, alike) for layout, alike in rows.items()]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise StoreError(
                f"a layout is not readable in {self.where} ({error}): restore it from a copy, or move it away; lost "
                "steps can be measured again"
            ) from error


class FileUnits(Units):
    """The unit files in `folder`; reading needs no lock, `append` and `remove` need the trajectory's.

    `converting` is for `devmon.store.migrations`: files of an earlier schema, which would be refused, are passed over.
    """

    def __init__(self, folder: Path, *, converting: bool = False) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self.converting = converting
        self._mine: tuple[int, Path] | None = None  # the process, since a fork copies this object, and its file
        self._flushed = -FLUSH_EVERY

    def paths(self) -> list[Path]:
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(
                f"cannot list {self.folder} ({reason(error)}): it should be a folder that can be read; move what is "
                "there away, or give permission"
            ) from error
        if not self.converting and any(name.endswith(".npz") for name in names):
            raise StoreError(
                f"{self.folder} holds rows of an earlier devmon, which are taken over when the run is opened for "
                "writing: devmon compact RUN. Where that refuses, move the .npz files away"
            )
        return [self.folder / name for name in names if name.endswith(".rows")]

    def refresh(self) -> None:
        paths = self.paths()
        if self._records:
            self._records = {path: records for path, records in self._records.items() if path in paths}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # folded since it was listed
                self._scan(path)

    def append(self, step: int, layout: bytes = b"", payload: Sequence[Any] = (), **header: Any) -> None:
        """To be called after `refresh`, under the same lock: the row goes to this writer's own file."""
        # A file of this process alone: after a fold, which took the last one away, it gets a new name.
        mine = self._mine
        if mine is None or mine[0] != os.getpid() or mine[1] not in self._records:
            mine = self._mine = (os.getpid(), self.folder / f"{uuid.uuid4().hex[:16]}.rows")
        path = mine[1]

        # A layout is written once, before the first of the rows that have it.
        written = self._records.get(path)
        pieces: list[Any] = []
        if layout and (written is None or layout != written.layout):
            pieces += record(b"", [layout])
        pieces += record(json.dumps({"step": step, **header}).encode(), payload)

        # The file is put back to its last whole record before a write, and after one that failed.
        before = written.end if written else 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                if file.tell() > before:
                    file.truncate(before)
                for piece in pieces:
                    for i in range(0, len(piece), CHUNK):
                        file.write(piece[i : i + CHUNK])
                file.flush()
                if time.monotonic() - self._flushed >= FLUSH_EVERY:
                    os.fsync(file.fileno())
                    self._flushed = time.monotonic()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise StoreError(cannot_write(path, error)) from error
        self._scan(path)

    def remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
        remove_empty(self.folder)
        remove_empty(self.folder.parent)

    def _scan(self, path: Path) -> None:
        """Read the headers that `path` gained since the last time."""
        try:
            now = os.stat(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        records = self._records.get(path)
        if records is None or records.version != now.st_ino or now.st_size < records.end:
            records = self._records[path] = Records(now.st_ino)
        if now.st_size == records.end:
            return
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(records.end)
                while records.end < size and scan(path, file, records, size):
                    pass
        except OSError as error:
            raise _unreadable(path, error) from error

    def _payloads(self, path: Path, entries: list[Entry]) -> list[bytes]:
        payloads = []
        with open(path, "rb") as file:
            for entry in entries:
                file.seek(entry.at)
                payloads.append(file.read(entry.size))
        return payloads


def _unreadable(path: Path, error: OSError) -> Exception:
    if isinstance(error, FileNotFoundError):
        return error
    return StoreError(f"cannot read {path} ({reason(error)}): give permission, or move what is there away")
