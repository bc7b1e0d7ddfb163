"""The same instrument in less memory: fewer examples, or fewer chains, at a time, and the same numbers."""

from __future__ import annotations

import copy
import re
from dataclasses import is_dataclass, replace
from typing import Any

import xarray as xr

from devmon.snapshot import Divisible, Snapshot

FULL = re.compile(r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory|MemoryError")


def in_parts(instrument: Any, parts: int) -> Any | None:
    """An instrument of the same identity that works in about a `parts`th of the memory; None where there is no such way.

    A `Divisible` one does its shares one after another: the `batch_size` of an LLC is part of its law, and stays. Others
    have `batch_size` examples in memory at a time, here a `parts`th of them, with the same numbers up to rounding.
    """
    kind = type(instrument)
    if isinstance(instrument, Divisible):

        def run(self: Any, snapshot: Snapshot) -> xr.Dataset:
            shares = [instrument.share(rank, parts) for rank in range(parts)]
            return instrument.join([share(snapshot) for share in shares if share is not None])

    elif is_dataclass(kind) and getattr(instrument, "batch_size", 1) > 1:
        smaller = replace(instrument, batch_size=max(1, instrument.batch_size // parts))

        def run(self: Any, snapshot: Snapshot) -> xr.Dataset:
            return smaller(snapshot)

    else:
        return None
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "__call__": run}
    twin = copy.copy(instrument)
    object.__setattr__(twin, "__class__", type(kind.__name__, (kind,), names))
    return twin
