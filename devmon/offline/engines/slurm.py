"""`--engine slurm`: a study as one array of SLURM jobs, by submitit (extra `slurm`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from devmon.errors import DevmonError
from devmon.offline.engines.processes import Ended, part
from devmon.offline.plan import Plan, pairs
from devmon.offline.study import Progress
from devmon.store.place import store_path
from devmon.store.trajectory import Trajectory

SOON, SELDOM = 0.5, 15.0  # seconds between looks at the run: at first, and as hours go by


class Job:
    """What a job of the array does; submitit hands it in again when SLURM ends it early (time limit, preemption)."""

    def __call__(self, plan: Plan, steps: Sequence[int]) -> tuple[list[Progress], Ended]:
        news: list[Progress] = []
        return news, part(plan, steps, news.append)

    def checkpoint(self, plan: Plan, steps: Sequence[int]) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, plan, steps)


def measure(plan: Plan, steps: Sequence[int], tell: Callable[[Progress], None] = lambda news: None) -> list[str]:
    """Do what is missing of `plan` at `steps` in an array of `plan.workers` jobs, and wait for them.

    `plan.options` are parameters of `submitit.AutoExecutor` (timeout_min=240, gpus_per_node=1, slurm_partition=gpu,
    slurm_array_parallelism=8), `folder` for its scripts and logs (RUN.jobs) and `cluster`: `local` runs the jobs as
    processes of this machine. Returns the jobs that died; raises DevmonError for what would end a single process.
    """
    try:
        import submitit
    except ImportError:
        raise DevmonError('--engine slurm needs submitit: pip install "devmon[slurm]"') from None
    options = pairs(plan.options, "option")
    folder = options.pop("folder", f"{plan.into}.jobs" if "://" not in plan.into else "devmon.jobs")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=options.pop("cluster", "slurm"))
        executor.update_parameters(name="devmon", cpus_per_task=plan.threads or 1)
        executor.update_parameters(**options)
        count = min(plan.workers, len(steps))
        jobs = executor.map_array(Job(), [plan] * count, [list(steps[n::count]) for n in range(count)]) if count else []
    except Exception as error:  # of submitit and of sbatch
        raise DevmonError(
            f"the jobs cannot be submitted ({error}): on a machine without SLURM, --option cluster=local"
        ) from error
    try:
        return _wait(jobs, plan, tell)
    except KeyboardInterrupt:
        names = sorted({job.job_id.partition("_")[0] for job in jobs})
        raise DevmonError(
            f"the jobs go on (scancel {' '.join(names)} ends them): give the command again for what is then missing"
        ) from None


def _wait(jobs: Sequence[Any], plan: Plan, tell: Callable[[Progress], None]) -> list[str]:
    """Tell of new rows until all jobs have ended, and of what they could not measure."""
    written, lost, errors = _written(plan), list[str](), list[str]()
    next(written)  # the rows of earlier commands
    waiting, pause = list(jobs), SOON
    while waiting:
        done = [job for job in waiting if job.done()]
        for news in next(written):
            tell(news)
        for job in done:
            waiting.remove(job)
            try:
                heard, ended = job.result()
            except Exception as error:  # of submitit: the job gave no result
                lost.append(f"job {job.job_id} died ({type(error).__name__}; its log: {Path(job.paths.stderr)})")
                continue
            for news in heard:
                if news.kind != "measured":
                    tell(news)
            if ended.error is not None:
                errors.append(ended.error)
        if waiting and not done:
            time.sleep(pause)
            pause = min(SELDOM, 1.2 * pause)
    if errors:
        raise DevmonError(errors[0])
    return lost


def _written(plan: Plan) -> Iterator[list[Progress]]:
    """The rows written since the last look, whoever wrote them; at the first look all that the run holds."""
    trajectory, seen = Trajectory(store_path(plan.into), "r"), set[tuple[int, str]]()
    while True:
        names = [name for name in trajectory if not plan.watch or name in plan.watch]
        now = {(step, name) for name in names for step in trajectory.steps(name)}
        yield [Progress("measured", step, name) for step, name in sorted(now - seen)]
        seen |= now
