"""A monitor that nobody closes: its rows are folded when it goes, or when the interpreter ends."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from contextlib import suppress

from devmon.store.trajectory import Trajectory


def fold_at_end(owner: object, trajectory: Trajectory) -> weakref.finalize:
    """Fold the trajectory when `owner` is collected, or at the end of the interpreter; `detach()` takes it back.

    Rows that are not folded are no less safe, but plain xarray does not see them.
    """
    finalizer = weakref.finalize(owner, _fold, trajectory, os.getpid())
    finalizer.atexit = False
    # Zarr writes by threads, which can be started until those of `concurrent.futures` are told to end: before that, in
    # the reverse order of registration, what is registered here is called.
    register = getattr(threading, "_register_atexit", atexit.register)
    with suppress(RuntimeError):  # the interpreter ends already
        register(finalizer)
    return finalizer


def _fold(trajectory: Trajectory, process: int) -> None:
    if os.getpid() == process:  # a fork of it has the same monitor
        with suppress(Exception):
            trajectory.fold()
