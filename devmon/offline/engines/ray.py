"""`--engine ray`: a study as tasks of Ray, on this machine or on the cluster that RAY_ADDRESS names (extra `ray`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from devmon.errors import DevmonError
from devmon.offline.engines.processes import Ended, part
from devmon.offline.plan import Plan, pairs
from devmon.offline.study import Progress

PIECE = 4  # checkpoints of a task: all but the first are read while the one before is measured


def measure(plan: Plan, steps: Sequence[int], tell: Callable[[Progress], None] = lambda news: None) -> list[str]:
    """Do what is missing of `plan` at `steps`, in `plan.workers` tasks of a few checkpoints at a time.

    A task has one CPU and, where the cluster has GPUs, one GPU, which Ray chooses; `plan.options` are other options of
    `ray.remote` (num_gpus=0.5, max_retries=5). A task whose process dies is done again by Ray, without the rows that it
    had written. Returns the tasks that Ray gave up; raises DevmonError for what would end a single process.
    """
    try:
        import ray
    except ImportError:
        raise DevmonError('--engine ray needs Ray: pip install "devmon[ray]"') from None
    mine = not ray.is_initialized()
    if mine:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        options = {"num_cpus": plan.threads or 1, "max_retries": 3} | pairs(plan.options, "option")
        if plan.device in (None, "cuda") and ray.cluster_resources().get("GPU"):
            options = {"num_gpus": 1} | options
        held = ray.cluster_resources()
        for key, kind in (("num_cpus", "CPU"), ("num_gpus", "GPU")):  # Ray would wait for them for ever
            if options.get(key, 0) > held.get(kind, 0):
                raise DevmonError(
                    f"a task asks for {key}={options[key]} and the whole Ray cluster has {held.get(kind, 0):g}: give "
                    f"less, as in --option {key}=1, or add a node"
                )
        return _deal(ray, ray.remote(**options)(_task), plan, steps, tell)
    finally:
        if mine:
            ray.shutdown()


def _deal(ray: Any, task: Any, plan: Plan, steps: Sequence[int], tell: Callable[[Progress], None]) -> list[str]:
    """Keep `plan.workers` tasks going until all steps are done."""
    size = max(1, min(PIECE, len(steps) // (4 * plan.workers)))
    todo = [list(steps[i : i + size]) for i in range(0, len(steps), size)]
    going: dict[Any, list[int]] = {}
    lost: list[str] = []
    errors: list[str] = []
    while going or (todo and not errors):
        while todo and len(going) < plan.workers and not errors:
            piece = todo.pop(0)
            going[task.remote(plan, piece)] = piece
        (done,), _ = ray.wait(list(going))
        piece = going.pop(done)
        try:
            heard, ended = ray.get(done)
        except ray.exceptions.RayError as error:
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            lost.append(f"the task of steps {', '.join(map(str, piece))} died ({what})")
            continue
        for news in heard:
            tell(news)
        if ended.error is not None:
            errors.append(ended.error)
    if errors:
        raise DevmonError(errors[0])
    return lost


def _task(plan: Plan, steps: Sequence[int]) -> tuple[list[Progress], Ended]:
    news: list[Progress] = []
    return news, part(plan, steps, news.append)
