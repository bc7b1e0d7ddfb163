"""A monitor that nobody closes: its rows are folded when the interpreter ends."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from devmon.store.trajectory import Trajectory

_numbers = itertools.count()
_unclosed: dict[int, tuple[Trajectory, int]] = {}  # trajectories and the processes that opened them


def fold_at_end(trajectory: Trajectory) -> Callable[[], None]:
    """Fold the trajectory at the end of the interpreter; calling what is returned takes it back.

    Rows that are not folded are no less safe, but plain xarray does not see them. They are not folded when a monitor is
    collected: the collector may run while another write holds Zarr's locks, and would wait for itself.
    """
    number = next(_numbers)
    _unclosed[number] = trajectory, os.getpid()
    return partial(_take_back, number)  # no lambda: a callback that was trained with is copied and pickled


def _take_back(number: int) -> None:
    _unclosed.pop(number, None)


def _fold_all() -> None:
    while _unclosed:
        _, (trajectory, process) = _unclosed.popitem()
        if os.getpid() == process:  # a fork of it has the same monitors
            with suppress(Exception):
                trajectory.fold()


# Zarr writes by threads, which can be started until those of `concurrent.futures` are told to end: before that, in the
# reverse order of registration, what is registered here is called.
getattr(threading, "_register_atexit", atexit.register)(_fold_all)
