"""Rows as bytes: the checksums of a record."""

from __future__ import annotations

import zlib

from devmon.store import rows


def test_checksums_are_of_the_bytes() -> None:
    head, header, *payload = rows.record(b"{}", [b"abc", memoryview(b"def")])
    assert rows.HEAD.unpack(head)[3:5] == (zlib.crc32(b"{}"), 0x53BCEFF1)
    assert (header, b"".join(payload)) == (b"{}", b"abcdef")


def test_rows_of_earlier_checksums_are_sound() -> None:
    payload = bytes(range(256)) * 5000
    assert rows.sound(payload, zlib.crc32(payload))
    assert rows.sound(payload, rows.checksum(payload))
    assert rows.checksum(payload[700:], rows.checksum(payload[:700])) == rows.checksum(payload)
    assert not rows.sound(payload[:-1] + b"x", zlib.crc32(payload))
