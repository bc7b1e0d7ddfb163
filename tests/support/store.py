"""Small rows and identities for tests of the store, and what damages them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

WHO = {"instrument": "a.B", "fields": {"nbeta": "30"}, "fingerprint": "0", "doc": "Measures."}


def row(value: float = 1.0) -> xr.Dataset:
    return xr.Dataset({"total": ((), np.float64(value)), "verdict": ((), np.array("ok", dtype=object))})


def unit(path: Path) -> Path:
    """The file with the unfolded rows of the watch `hurt`."""
    (found,) = path.glob("_units/hurt/*.rows")
    return found


def flip(at: int) -> Callable[[bytes], bytes]:
    """Change the byte `at`."""
    return lambda data: data[:at] + bytes([data[at] ^ 0xFF]) + data[at % len(data) + 1 :]
