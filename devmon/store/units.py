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
from devmon.store.rows import Chain, Entry, damaged, decode, record, scan, sound

CHUNK = 2**16  # bytes a write: 100 MB at once took four times as long
FLUSH_EVERY = 1.0  # seconds: a power cut loses the rows since the last flush to the disk, a kill loses none


class Units:
    """What is common to files and objects (`devmon.store.objects`): the chains of rows, by path or key, and reading them."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._chains: dict[Any, Chain] = {}

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
        return next((chain.rows[step].weights for chain in self._chains.values() if step in chain.rows), None)

    def steps(self) -> set[int]:
        self.refresh()
        return {step for chain in self._chains.values() for step in chain.rows}

    def failures(self) -> dict[int, str]:
        """Steps with a failure and no row, with the reason."""
        held = self.steps()
        found = (item for chain in self._chains.values() for item in chain.failed.items())
        return {step: why for step, why in found if step not in held}

    def read(self) -> list[xr.Dataset]:
        """All rows, as one dataset with a leading `step` for each layout."""
        for _ in range(100):
            try:
                return self._read()
            except FileNotFoundError:  # folded since it was listed: the rows are in the group now
                continue
        raise StoreError(f"{self.where} changes all the time: stop the other processes that fold this trajectory")

    def _payloads(self, path: Any, entries: list[Entry]) -> list[bytes]:
        raise NotImplementedError

    def _read(self) -> list[xr.Dataset]:
        self.refresh()
        found: dict[bytes, list[tuple[Entry, bytes]]] = {}
        seen: set[int] = set()
        for path, chain in self._chains.items():
            entries = [entry for entry in chain.rows.values() if entry.step not in seen]
            seen.update(chain.rows)
            for entry, payload in zip(entries, self._payloads(path, entries), strict=True):
                if not sound(payload, entry.crc):
                    raise StoreError(damaged(path, entry.at, f"step {entry.step} has a wrong checksum"))
                found.setdefault(entry.layout, []).append((entry, payload))
        try:
            return [decode(layout, rows) for layout, rows in found.items()]
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
                f"{self.folder} holds rows of an earlier devmon, which are taken over when the run is opened for writing: "
                "devmon compact RUN. Where that refuses, move the .npz files away"
            )
        return [self.folder / name for name in names if name.endswith(".rows")]

    def refresh(self) -> None:
        paths = self.paths()
        if self._chains:
            self._chains = {path: chain for path, chain in self._chains.items() if path in paths}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # folded since it was listed
                self._scan(path)

    def append(self, step: int, layout: bytes = b"", payload: Sequence[Any] = (), **header: Any) -> None:
        """To be called after `refresh`, under the same lock: the row goes to this writer's own file."""
        if (
            self._mine is None or self._mine[0] != os.getpid() or self._mine[1] not in self._chains
        ):  # a new name after a fold
            self._mine = (os.getpid(), self.folder / f"{uuid.uuid4().hex[:16]}.rows")
        path = self._mine[1]
        records: list[Any] = []
        chain = self._chains.get(path)
        if layout and (chain is None or layout != chain.layout):
            records += record(b"", [layout])
        records += record(json.dumps({"step": step, **header}).encode(), payload)
        before = chain.end if chain else 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                if file.tell() > before:  # half a record, of a write that failed
                    file.truncate(before)
                for piece in records:
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
            found = os.stat(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        chain = self._chains.get(path)
        if chain is None or chain.version != found.st_ino or found.st_size < chain.end:
            chain = self._chains[path] = Chain(found.st_ino)
        if found.st_size == chain.end:
            return
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(chain.end)
                while chain.end < size and scan(path, file, chain, size):
                    pass
        except OSError as error:
            raise _unreadable(path, error) from error

    def _payloads(self, path: Path, entries: list[Entry]) -> list[bytes]:
        found = []
        with open(path, "rb") as file:
            for entry in entries:
                file.seek(entry.at)
                found.append(file.read(entry.size))
        return found


def _unreadable(path: Path, error: OSError) -> Exception:
    if isinstance(error, FileNotFoundError):
        return error
    return StoreError(f"cannot read {path} ({reason(error)}): give permission, or move what is there away")
