"""devmon: a monitor of how neural networks develop while they train."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    # what is measured, and when
    "Snapshot": "devmon.snapshot",
    "Instrument": "devmon.snapshot",
    "Divisible": "devmon.snapshot",
    "Watch": "devmon.watch",
    "every": "devmon.watch",
    "log_spaced": "devmon.watch",
    # measuring and keeping
    "observe": "devmon.monitoring.observe",
    "LoopMonitor": "devmon.monitoring.loop",
    "Series": "devmon.checkpoints.series",
    "Trajectory": "devmon.store.trajectory",
    # errors
    "DevmonError": "devmon.errors",
    "InstrumentError": "devmon.errors",
    "StoreError": "devmon.errors",
    "IdentityError": "devmon.errors",
    "DataError": "devmon.errors",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from devmon.checkpoints.series import Series as Series
    from devmon.errors import DataError as DataError
    from devmon.errors import DevmonError as DevmonError
    from devmon.errors import IdentityError as IdentityError
    from devmon.errors import InstrumentError as InstrumentError
    from devmon.errors import StoreError as StoreError
    from devmon.monitoring.loop import LoopMonitor as LoopMonitor
    from devmon.monitoring.observe import observe as observe
    from devmon.snapshot import Divisible as Divisible
    from devmon.snapshot import Instrument as Instrument
    from devmon.snapshot import Snapshot as Snapshot
    from devmon.store.trajectory import Trajectory as Trajectory
    from devmon.watch import Watch as Watch
    from devmon.watch import every as every
    from devmon.watch import log_spaced as log_spaced


def __getattr__(name: str) -> Any:  # names resolve when used, so that `import devmon` stays light
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'devmon' has no attribute {name!r}")
