"""A disk that is full for some steps of a training."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest

from devmon import StoreError, Trajectory


class Disk(L.Callback):
    """Full from `full` on and free again from `free` on (optimizer steps done when the next one starts).

    Full means that the store's methods refuse; with `limit`, that the system lets this process write to no file.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full: int = 2, free: int = 10**9, limit: bool = False) -> None:
        self.full, self.free, self.limit, self.refused = full, free, limit, 0
        self.allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.is_full = False
        for method in ("append", "fail", "record", "fold"):
            monkeypatch.setattr(Trajectory, method, self.refusing(getattr(Trajectory, method)))

    def refusing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if not self.is_full:
                return method(*args, **kwargs)
            self.refused += 1
            if self.limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, self.allowed[1]))
                try:
                    return method(*args, **kwargs)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, self.allowed)
            raise StoreError("cannot write (No space left on device)") from OSError(
                errno.ENOSPC, "No space left on device"
            )

        return refuse

    def at(self, step: int) -> None:
        self.is_full = self.full <= step < self.free

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.at(trainer.global_step)
