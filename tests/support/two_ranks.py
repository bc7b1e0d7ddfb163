"""Two processes that train together, and instruments that fail on one of them."""

from __future__ import annotations

import os
import random
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import lightning as L
import numpy as np
import torch
import xarray as xr

from devmon import InstrumentError, Snapshot
from devmon.offline.engines import forkserver
from devmon.offline.plan import Plan
from devmon.snapshot import Instrument, weights_digest

LIMIT = 240  # seconds for everything that two processes do, on a machine that does much else
IMPORTED = [*forkserver.STUDY, "lightning", "devmon.callbacks", "devmon.store.trajectory", "tests.support.two_ranks"]


def spawn_two(work: Callable[[int, Path], None], folder: Path) -> None:
    """Run `work(rank, folder)` in two processes; fails where they do not end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with patch.object(forkserver, "STUDY", IMPORTED):  # once for all such tests: two imports take longer than the work
        forkserver.start(Plan("none", "none", source="none"))
    context = torch.multiprocessing.start_processes(
        _one_of_two, (work, port, folder), nprocs=2, join=False, start_method="forkserver"
    )
    end = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=max(0.1, end - time.monotonic())):
            assert time.monotonic() < end, f"two processes did not end within {LIMIT} s: a rank waits for the other"
    finally:
        for process in context.processes:
            process.kill()


def _one_of_two(rank: int, work: Callable[[int, Path], None], port: int, folder: Path) -> None:
    """As torchrun would start it. The process group ends on both ranks at once: a rank that exits while the other still
    listens may abort."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "ranks"}
    os.environ |= ranks | address
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    work(rank, folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def raised(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        return " | ".join([type(error).__name__, str(error), *error.__notes__])
    return "nothing"


def after(module: L.LightningModule) -> list[str]:
    """All that a measurement on this rank could have moved, its own running statistics included."""
    return [weights_digest(module), str(random.random()), str(np.random.rand()), str(torch.rand(1).item())]  # noqa: NPY002


class Odd(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one}-{two}")


@dataclass(frozen=True)
class Divided:
    """`inner` on every rank; rank `rank` fails at `step` with the error `kind` (or returns what cannot be sent)."""

    inner: Instrument
    rank: int = -1
    step: int = -1
    kind: str = "RuntimeError"

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        return self.inner(snapshot)

    def share(self, rank: int, ranks: int) -> Instrument:
        def part(snapshot: Snapshot) -> xr.Dataset:
            if (rank, snapshot.step) != (self.rank, self.step):
                return self.inner(snapshot)
            if self.kind == "unsendable":
                return self.inner(snapshot).assign_attrs(local=lambda: None)
            raise {"RuntimeError": RuntimeError("no luck"), "Odd": Odd("no", "luck"),
                   "InstrumentError": InstrumentError("no fit")}[self.kind]  # fmt: skip

        return part

    def join(self, parts: list[xr.Dataset]) -> xr.Dataset:
        return xr.concat(parts, "rank").mean("rank", keep_attrs=True)
