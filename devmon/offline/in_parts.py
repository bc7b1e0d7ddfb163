"""The same instrument in less memory: fewer examples, or fewer chains, at a time, and the same numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, ClassVar

import xarray as xr

from devmon.snapshot import Divisible, Snapshot

FULL = re.compile(r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory|MemoryError")


@dataclass(frozen=True)
class InParts:
    """The instrument `of` in about a `parts`th of its memory.

    A `Divisible` instrument does its shares one after another: the `batch_size` of an LLC is part of its law, and
    stays. Another has `batch_size` examples in memory at a time, here a `parts`th of them, with the same numbers up to
    rounding.
    """

    of: Any
    parts: int
    stands_for_of: ClassVar[bool] = True  # so that its rows are those of the instrument (fingerprint.identity)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        if isinstance(self.of, Divisible):
            shares = [self.of.share(rank, self.parts) for rank in range(self.parts)]
            return self.of.join([share(snapshot) for share in shares if share is not None])
        return replace(self.of, batch_size=max(1, self.of.batch_size // self.parts))(snapshot)


def in_parts(instrument: Any, parts: int) -> InParts | None:
    """`instrument` in about a `parts`th of its memory; None where it can neither be shared out nor has a batch size."""
    if isinstance(instrument, Divisible) or (is_dataclass(instrument) and getattr(instrument, "batch_size", 1) > 1):
        return InParts(instrument, parts)
    return None
