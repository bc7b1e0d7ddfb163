"""Units: the rows of one watch that were committed since the last fold, in append-only files, one file a writer.

A file is a chain of records: a head (lengths and checksums), a JSON header, a payload of plain array bytes. A layout record
(names, dimensions, dtypes, attributes, coordinates) precedes the rows that have it. A record is committed once it is whole:
what a killed writer left half-written at a file's end was never acknowledged, and is no row. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import xarray as xr

from devmon.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows: no lock, so one writer at a time
    fcntl = None  # type: ignore[assignment]

TEXT = "OUST"  # kinds of NumPy dtype that hold text
MAGIC = b"dmU1"
HEAD = struct.Struct("<4sIQIII")  # magic, bytes of header, bytes of payload, CRC of header, of payload, of this head
CHUNK = 2**16  # bytes a write: 100 MB at once took four times as long
FLUSH_EVERY = 1.0  # seconds: a power cut loses the rows since the last flush to the disk, a kill loses none


class Entry(NamedTuple):
    """Where a row lies in its file."""

    step: int
    weights: str
    seconds: float
    layout: bytes
    at: int
    size: int
    crc: int


@dataclass
class _File:
    inode: int
    end: int = 0  # of the last whole record
    layout: bytes = b""
    rows: dict[int, Entry] = field(default_factory=dict)  # the first written of each step
    failed: dict[int, str] = field(default_factory=dict)


class Units:
    """The unit files in `folder`; reading needs no lock, `append` needs the trajectory's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mine: tuple[int, Path] | None = None  # the process, since a fork copies this object, and its file
        self._files: dict[Path, _File] = {}
        self._flushed = -FLUSH_EVERY

    def paths(self) -> list[Path]:
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(
                f"cannot list {self.folder} ({_reason(error)}): it should be a folder that can be read; move what is "
                "there away, or give permission"
            ) from error
        if any(name.endswith(".npz") for name in names):
            raise StoreError(
                f"{self.folder} holds rows of an earlier devmon: fold them with the version that wrote them"
            )
        return [self.folder / name for name in names if name.endswith(".rows")]

    def refresh(self) -> None:
        """Take notice of what was written or folded since the last time, by any process."""
        paths = self.paths()
        if self._files:
            self._files = {path: known for path, known in self._files.items() if path in paths}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # folded since it was listed
                self._scan(path)

    def weights(self, step: int) -> str | None:
        """The weights of the row at `step`, None where there is no row."""
        self.refresh()
        return next((known.rows[step].weights for known in self._files.values() if step in known.rows), None)

    def steps(self) -> set[int]:
        self.refresh()
        return {step for known in self._files.values() for step in known.rows}

    def failures(self) -> dict[int, str]:
        """Steps with a failure and no row, with the reason."""
        held = self.steps()
        found = (item for known in self._files.values() for item in known.failed.items())
        return {step: reason for step, reason in found if step not in held}

    def read(self) -> list[xr.Dataset]:
        """All rows, as one dataset with a leading `step` for each layout."""
        for _ in range(100):
            try:
                return self._read()
            except FileNotFoundError:  # folded since it was listed: the rows are in the group now
                continue
        raise StoreError(f"{self.folder} changes all the time: stop the other processes that fold this trajectory")

    def append(self, step: int, layout: bytes = b"", payload: Sequence[Any] = (), **header: Any) -> None:
        """Commit one row (see `encode`; a failure has neither layout nor payload) to this writer's own file.

        To be called after `refresh`, under the same lock.
        """
        if (
            self._mine is None or self._mine[0] != os.getpid() or self._mine[1] not in self._files
        ):  # a new name after a fold
            self._mine = (os.getpid(), self.folder / f"{uuid.uuid4().hex[:16]}.rows")
        path = self._mine[1]
        records: list[Any] = []
        known = self._files.get(path)
        if layout and (known is None or layout != known.layout):
            records += _record(b"", [layout])
        records += _record(json.dumps({"step": step, **header}).encode(), payload)
        before = known.end if known else 0
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

    # -- private -----------------------------------------------------------------------------------------------------

    def _scan(self, path: Path) -> None:
        """Read the headers that `path` gained since the last time."""
        try:
            found = os.stat(path)
        except OSError as error:
            raise self._unreadable(path, error) from error
        known = self._files.get(path)
        if known is None or known.inode != found.st_ino or found.st_size < known.end:
            known = self._files[path] = _File(found.st_ino)
        if found.st_size == known.end:
            return
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(known.end)
                while known.end < size and _scan_record(path, file, known, size):
                    pass
        except OSError as error:
            raise self._unreadable(path, error) from error

    def _unreadable(self, path: Path, error: OSError) -> Exception:
        if isinstance(error, FileNotFoundError):
            return error
        return StoreError(f"cannot read {path} ({_reason(error)}): give permission, or move what is there away")

    def _read(self) -> list[xr.Dataset]:
        self.refresh()
        payloads: dict[bytes, list[tuple[Entry, bytes]]] = {}
        seen: set[int] = set()
        for path, known in self._files.items():
            with open(path, "rb") as file:
                for entry in known.rows.values():
                    if entry.step in seen:
                        continue
                    seen.add(entry.step)
                    file.seek(entry.at)
                    payload = file.read(entry.size)
                    if zlib.crc32(payload) != entry.crc:
                        raise StoreError(_damaged(path, entry.at, f"step {entry.step} has a wrong checksum"))
                    payloads.setdefault(entry.layout, []).append((entry, payload))
        try:
            return [decode(layout, rows) for layout, rows in payloads.items()]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise StoreError(
                f"a layout is not readable in {self.folder} ({error}): restore the folder from a copy, or move it away; "
                "lost steps can be measured again"
            ) from error


def _scan_record(path: Path, file: IO[bytes], known: _File, size: int) -> bool:
    """Add the record at the file's position to what is known; False where it is not whole."""
    start = known.end
    head = file.read(HEAD.size)
    if len(head) < HEAD.size:
        return False
    magic, header_size, payload_size, header_crc, payload_crc, head_crc = HEAD.unpack(head)
    if magic != MAGIC or zlib.crc32(head[:-4]) != head_crc:
        if not any(head) and not any(file.read()):  # space that a power cut left unwritten
            return False
        raise StoreError(_damaged(path, start, "this is no record of devmon"))
    at = start + HEAD.size + header_size
    if at + payload_size > size:
        return False
    header = file.read(header_size)
    if zlib.crc32(header) != header_crc:
        raise StoreError(_damaged(path, start, "a header has a wrong checksum"))
    if header_size == 0:
        known.layout = file.read(payload_size)
        if zlib.crc32(known.layout) != payload_crc:
            raise StoreError(_damaged(path, start, "a layout has a wrong checksum"))
    else:
        try:
            h = json.loads(header)
            step = int(h["step"])
            if "failure" in h:
                known.failed[step] = str(h["failure"])
            else:
                entry = Entry(step, h["weights"], h["seconds"], known.layout, at, payload_size, payload_crc)
                known.rows.setdefault(step, entry)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(_damaged(path, start, "a header is not readable")) from error
        file.seek(payload_size, os.SEEK_CUR)
    known.end = at + payload_size
    return True


def encode(dataset: xr.Dataset) -> tuple[bytes, list[Any]]:
    """The layout of a dataset (all but the values of its data variables) and those values, as pieces of bytes."""
    variables: list[Any] = []
    coords: list[Any] = []
    fixed: list[Any] = []
    texts: list[list[str]] = []
    coordinates = set(dataset.coords)
    for name, variable in dataset.variables.items():
        values = np.asarray(variable.values)
        text = values.dtype.kind in TEXT
        if values.dtype.kind == "V":
            raise StoreError(f"{name!r} has dtype {values.dtype}, which a trajectory cannot hold: cast it to float32")
        attrs = plain(variable.attrs) if variable.attrs else {}
        form = [str(name), variable.dims, values.shape, "text" if text else values.dtype.str, attrs]
        if name in coordinates:
            flat = as_text(values).ravel().tolist() if text else values.tobytes().hex()
            coords.append([*form, flat])
            continue
        variables.append(form)
        if text:
            texts.append(as_text(values).ravel().tolist())
        elif values.nbytes < 2**20:
            fixed.append(values.tobytes())
        else:
            fixed.append(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    layout = json.dumps([variables, coords, plain(dataset.attrs)]).encode()
    return layout, [*fixed, json.dumps(texts).encode()] if texts else fixed


def decode(layout: bytes, rows: list[tuple[Entry, bytes]]) -> xr.Dataset:
    """Rows of one layout as a dataset with a leading `step`."""
    variables, coords, attrs = json.loads(layout)
    sizes = [0 if kind == "text" else int(np.dtype(kind).itemsize * np.prod(shape, dtype=int))
             for _, _, shape, kind, _ in variables]  # fmt: skip
    fixed, n = sum(sizes), len(rows)
    packed = np.empty((n, fixed), dtype=np.uint8)
    for i, (_, payload) in enumerate(rows):
        packed[i] = np.frombuffer(payload, np.uint8, fixed)
    texts = [json.loads(payload[fixed:]) if len(payload) > fixed else [] for _, payload in rows]
    found, start, text = {}, 0, 0
    for (name, dims, shape, kind, attributes), size in zip(variables, sizes, strict=True):
        if kind == "text":
            values = np.array([column[text] for column in texts], dtype=object).reshape(n, *shape)
            text += 1
        elif n == 1 and size >= 2**20:  # no second copy of a large array
            values = packed[0, start : start + size].view(kind).reshape(n, *shape)
        else:
            values = np.ascontiguousarray(packed[:, start : start + size]).view(kind).reshape(n, *shape)
        found[name] = xr.Variable(("step", *dims), values, attributes)
        start += size
    entries = [entry for entry, _ in rows]
    labels = {
        name: xr.Variable(dims, _values(kind, flat).reshape(shape), attributes)
        for name, dims, shape, kind, attributes, flat in coords
    }
    labels["step"] = xr.Variable("step", np.array([entry.step for entry in entries], dtype=np.int64))
    labels["weights"] = xr.Variable("step", np.array([entry.weights for entry in entries], dtype=object))
    labels["seconds"] = xr.Variable("step", np.array([entry.seconds for entry in entries], dtype=np.float64))
    return xr.Dataset(found, labels, attrs)


def commit(path: Path, data: bytes) -> None:
    """Write `data` aside, flush it to the disk, and rename it to `path` in one step."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise StoreError(cannot_write(path, error)) from error


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; waits for its holder, and the lock of a process that died is free."""
    try:
        file = open(path, "ab")  # noqa: SIM115
    except OSError as error:
        raise StoreError(cannot_write(path, error)) from error
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise StoreError(
                    f"cannot lock {path} ({_reason(error)}): put the run on a file system with locks"
                ) from error
        yield


def as_text(values: np.ndarray) -> np.ndarray:
    """Text of any dtype as fixed-width `str`."""
    return (values.astype(object) if values.dtype.kind == "T" else values).astype(str)


def plain(attrs: Any) -> Any:
    """Attributes as JSON: NumPy scalars and arrays become Python values."""
    if isinstance(attrs, dict):
        return {str(key): plain(value) for key, value in attrs.items()}
    if isinstance(attrs, list | tuple):
        return [plain(item) for item in attrs]
    if isinstance(attrs, np.ndarray | np.generic):
        return attrs.tolist()
    return attrs if attrs is None or isinstance(attrs, bool | int | float | str) else str(attrs)


def _record(header: bytes, payload: Sequence[Any]) -> list[Any]:
    size = crc = 0
    for piece in payload:
        size, crc = size + len(piece), zlib.crc32(piece, crc)
    head = HEAD.pack(MAGIC, len(header), size, zlib.crc32(header), crc, 0)[:-4]
    return [head + struct.pack("<I", zlib.crc32(head)), header, *payload]


def _values(kind: str, flat: Any) -> np.ndarray:
    if kind == "text":
        return np.array(flat, dtype=object)
    return np.frombuffer(bytes.fromhex(flat), dtype=np.dtype(kind)).copy()


def _damaged(path: Path, at: int, what: str) -> str:
    return (
        f"{path} is damaged at byte {at} ({what}): restore it from a copy, or keep the rows before that byte "
        f"(truncate -s {at} {path}), or move the file away; lost steps can be measured again"
    )


def cannot_write(path: Path, error: OSError) -> str:
    return (
        f"cannot write {path} ({_reason(error)}): what is stored so far is intact; make room or give write permission, "
        "then run again"
    )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
