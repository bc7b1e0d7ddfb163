"""A study in several processes: each takes the next checkpoint, and writes its rows to the one trajectory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import cast

import torch

from devmon.errors import DevmonError
from devmon.offline.engines.forkserver import start
from devmon.offline.plan import Plan
from devmon.offline.study import Progress, Study


@dataclass(frozen=True)
class Ended:
    """The final message of a worker: its work is done, or `error` ended it."""

    error: str | None = None


def part(plan: Plan, steps: Iterable[int], tell: Callable[[Progress], None]) -> Ended:
    """What one process of any engine does: what is missing at `steps`, with one thread where nothing else is asked."""
    try:
        Study(replace(plan, threads=plan.threads or 1)).measure(steps, tell)
    except DevmonError as error:
        return Ended(str(error))
    return Ended()


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Does not start CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [str(i) for i in range(count)] if named is None else [part.strip() for part in named.split(",")][:count]


def measure(plan: Plan, steps: Sequence[int], tell: Callable[[Progress], None] = lambda news: None) -> list[str]:
    """Do what is missing of `plan` at `steps` in `plan.workers` processes (each with one thread on a CPU, or one GPU).

    Each takes its next step when it begins to measure the last, so that a slow process takes fewer; the numbers do not
    depend on who measures (with the same number of threads). Returns the processes that died: what they had not
    measured is still missing, and the next call does it. Raises DevmonError, after all have ended, for what would end a
    single process.
    """
    # start the processes, each with a pipe of its own and a GPU where there are any
    context = start(plan)
    devices = gpus() if plan.device in (None, "cuda") else []
    todo, ended = iter(steps), dict[int, Ended]()
    workers: dict[Connection, int] = {}
    processes = []
    for worker in range(min(plan.workers, len(steps))):
        here, there = context.Pipe()
        device = devices[worker % len(devices)] if devices else None
        process = context.Process(target=_work, args=(plan, device, there), daemon=True)
        process.start()
        there.close()  # so that its end is seen here when the process dies
        workers[here] = worker
        processes.append(process)
    # deal the steps as they are asked for, until every pipe is closed
    try:
        while workers:
            for here in cast(list[Connection], wait(list(workers))):
                try:
                    message = here.recv()
                    if message is None:  # it asks for a step
                        here.send(None if any(end.error for end in ended.values()) else next(todo, None))
                except (EOFError, OSError):
                    del workers[here]
                    continue
                if isinstance(message, Progress):
                    tell(message)
                elif isinstance(message, Ended):
                    ended[workers[here]] = message
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    # a process without a final message was killed
    if errors := [end.error for end in ended.values() if end.error is not None]:
        raise DevmonError(errors[0])
    return [f"worker {n} died (exit code {dead.exitcode})" for n, dead in enumerate(processes) if n not in ended]


def _work(plan: Plan, device: str | None, connection: Connection) -> None:
    """One process."""
    gc.freeze()  # what was imported before is not searched for garbage
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before CUDA starts, so this is its cuda:0
    else:
        plan = replace(plan, device=plan.device or "cpu")

    def dealt() -> Iterator[int]:
        while True:
            connection.send(None)
            if (step := connection.recv()) is None:
                return
            yield step

    try:
        connection.send(part(plan, dealt(), connection.send))
    finally:
        connection.close()
