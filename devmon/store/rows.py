"""Rows as bytes: records, each a head (lengths and checksums), a JSON header and a payload of plain array bytes.

A layout record (names, dimensions, dtypes, attributes, coordinates) precedes the rows that have it. A row is committed
once its record is whole: what a killed writer left half-written at the end was never acknowledged, and is no row.
Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import google_crc32c
import numpy as np
import xarray as xr

from devmon.errors import StoreError

TEXT = "OUST"  # kinds of NumPy dtype that hold text
MAGIC = b"dmU1"
# magic, bytes of header, of payload, CRC-32 of header, CRC-32C of payload, CRC-32 of this head
HEAD = struct.Struct("<4sIQIII")
LARGE = 2**20  # bytes: what is not copied twice, and what a checksum takes at a time


class Entry(NamedTuple):
    """Where a row lies in its file or object."""

    step: int
    weights: str
    seconds: float
    layout: bytes
    at: int
    size: int
    crc: int


@dataclass
class Records:
    """What is known of one file or object; `version` is what changes when another takes its place."""

    version: Any
    end: int = 0  # of the last whole record
    layout: bytes = b""
    rows: dict[int, Entry] = field(default_factory=dict)  # the first written of each step
    failed: dict[int, str] = field(default_factory=dict)


class Readable(Protocol):
    """A binary file, or a reader of an object."""

    def read(self, size: int, /) -> Any: ...
    def seek(self, offset: int, whence: int, /) -> int: ...


def record(header: bytes, payload: Sequence[Any]) -> list[Any]:
    """One record, as pieces of bytes; without a header the payload is a layout."""
    size = crc = 0
    for piece in payload:
        size, crc = size + len(piece), checksum(piece, crc)
    head = HEAD.pack(MAGIC, len(header), size, zlib.crc32(header), crc, 0)[:-4]
    return [head + struct.pack("<I", zlib.crc32(head)), header, *payload]


def checksum(piece: Any, crc: int = 0) -> int:
    """CRC-32C of bytes, or going on from that of the bytes before: a third of the time of zlib's CRC-32."""
    with memoryview(piece) as view:
        for start in range(0, len(view), LARGE):  # the extension takes nothing but bytes
            crc = google_crc32c.extend(crc, bytes(view[start : start + LARGE]))
    return crc


def sound(payload: bytes, crc: int) -> bool:
    """Whether a payload has its checksum: CRC-32C, or CRC-32 of rows that were written before it."""
    return crc in (checksum(payload), zlib.crc32(payload))


def scan(where: object, file: Readable, records: Records, size: int) -> bool:
    """Add the record at the file's position, `records.end`, to them; False where it is not whole."""
    start = records.end
    # The head says how long the rest is: what is longer than the file was not yet written whole.
    head = bytes(file.read(HEAD.size))
    if len(head) < HEAD.size:
        return False
    magic, header_size, payload_size, header_crc, payload_crc, head_crc = HEAD.unpack(head)
    if magic != MAGIC or zlib.crc32(head[:-4]) != head_crc:
        if not any(head) and not any(bytes(file.read(size))):  # space that a power cut left unwritten
            return False
        raise StoreError(damaged(where, start, "this is no record of devmon"))
    at = start + HEAD.size + header_size
    if at + payload_size > size:
        return False

    # A layout is read now; of a row the header alone, and its payload where the rows are read.
    header = bytes(file.read(header_size)) if header_size else b""
    if zlib.crc32(header) != header_crc:
        raise StoreError(damaged(where, start, "a header has a wrong checksum"))
    if header_size == 0:
        records.layout = bytes(file.read(payload_size))
        if not sound(records.layout, payload_crc):
            raise StoreError(damaged(where, start, "a layout has a wrong checksum"))
    else:
        try:
            h = json.loads(header)
            step = int(h["step"])
            if "failure" in h:
                records.failed[step] = str(h["failure"])
            else:
                entry = Entry(step, h["weights"], h["seconds"], records.layout, at, payload_size, payload_crc)
                records.rows.setdefault(step, entry)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(damaged(where, start, "a header is not readable")) from error
        file.seek(payload_size, os.SEEK_CUR)
    records.end = at + payload_size
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
        elif values.nbytes < LARGE:
            fixed.append(values.tobytes())
        else:
            fixed.append(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    layout = json.dumps([variables, coords, plain(dataset.attrs)]).encode()
    return layout, [*fixed, json.dumps(texts).encode()] if texts else fixed


def decode(layout: bytes, rows: list[tuple[Entry, bytes]]) -> xr.Dataset:
    """Rows of one layout as a dataset with a leading `step`."""
    variables, coords, attrs = json.loads(layout)

    # One line a row, (row, byte): a variable is then a range of columns. Text follows, as JSON.
    sizes = [
        0 if kind == "text" else int(np.dtype(kind).itemsize * np.prod(shape, dtype=int))
        for _, _, shape, kind, _ in variables
    ]
    fixed, n = sum(sizes), len(rows)
    packed = np.empty((n, fixed), dtype=np.uint8)
    for i, (_, payload) in enumerate(rows):
        packed[i] = np.frombuffer(payload, np.uint8, fixed)
    texts = [json.loads(payload[fixed:]) if len(payload) > fixed else [] for _, payload in rows]

    data, start, text = {}, 0, 0
    for (name, dims, shape, kind, attributes), size in zip(variables, sizes, strict=True):
        if kind == "text":
            values = np.array([column[text] for column in texts], dtype=object).reshape(n, *shape)
            text += 1
        elif n == 1 and size >= LARGE:  # no second copy
            values = packed[0, start : start + size].view(kind).reshape(n, *shape)
        else:
            values = np.ascontiguousarray(packed[:, start : start + size]).view(kind).reshape(n, *shape)
        data[name] = xr.Variable(("step", *dims), values, attributes)
        start += size

    # The coordinates of a row are in the layout; what differs from row to row is in the entries.
    labels = {
        name: xr.Variable(dims, _values(kind, flat).reshape(shape), attributes)
        for name, dims, shape, kind, attributes, flat in coords
    }
    entries = [entry for entry, _ in rows]
    labels["step"] = xr.Variable("step", np.array([entry.step for entry in entries], dtype=np.int64))
    labels["weights"] = xr.Variable("step", np.array([entry.weights for entry in entries], dtype=object))
    labels["seconds"] = xr.Variable("step", np.array([entry.seconds for entry in entries], dtype=np.float64))
    return xr.Dataset(data, labels, attrs)


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


def damaged(where: object, at: int, what: str) -> str:
    """What is said of a file whose rows before byte `at` are sound."""
    return (
        f"{where} is damaged at byte {at} ({what}): restore it from a copy, or keep the rows before that byte "
        f"(truncate -s {at} {where}), or move it away; lost steps can be measured again"
    )


def _values(kind: str, flat: Any) -> np.ndarray:
    if kind == "text":
        return np.array(flat, dtype=object)
    return np.frombuffer(bytes.fromhex(flat), dtype=np.dtype(kind)).copy()
