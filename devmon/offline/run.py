"""What `devmon measure` does and prints around a `Study`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from devmon.console import cost_table
from devmon.cost import estimates
from devmon.offline import forecast
from devmon.offline.plan import Plan
from devmon.offline.study import Event, Study


def run(plan: Plan, dry_run: bool) -> int:
    """Measure, or with `dry_run` say what would be; returns the exit code, 1 where anything is left unmeasured."""
    study = Study(plan, read_only=dry_run)
    work = study.missing()
    out, errors = (Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False) for stderr in (False, True))
    out.print(f"{len(study.steps)} of {len(study.series.steps)} checkpoints chosen; {len(work)} to measure")
    if dry_run:
        _tell(study, work, out)
        return 0
    study.record()
    counts: dict[str, int] = {}
    with _progress(errors) as progress:
        task = progress.add_task("rows", total=sum(map(len, work.values())))

        def tell(event: Event) -> None:
            counts[event.kind] = counts.get(event.kind, 0) + 1
            if event.kind != "said":
                progress.advance(task, 1 if event.watch else _rest(study, work, event.step))
            if event.kind != "measured":
                what = "skipped" if event.watch is None else f"{event.watch}{': failed' * (event.kind == 'failed')}"
                errors.print(f"step {event.step} {what} ({event.reason})")

        lost: list[str] = []
        if plan.engine == "processes" and plan.workers == 1:
            study.measure(tell=tell)
        elif work:
            lost = importlib.import_module(f"devmon.offline.engines.{plan.engine}").measure(
                study.frozen(), list(work), tell
            )
    study.trajectory.fold()
    for one in lost:
        errors.print(f"{one}: give the command again to measure the rest")
    bad = {"skipped": "checkpoints skipped", "failed": "measurements failed"}
    told = [f"{counts.get('measured', 0)} rows measured"] + [
        f"{counts[k]} {words}" for k, words in bad.items() if k in counts
    ]
    out.print(f"{', '.join(told)}: {study.trajectory.path}")
    return int(bool(lost or bad.keys() & counts.keys()))


def _tell(study: Study, work: Mapping[int, list[Any]], out: Console) -> None:
    """The steps, and each watch with what it costs."""
    out.print("steps: " + (", ".join(map(str, work)) or "none"))
    dues = [watch.name for due in work.values() for watch in due]
    found = [replace(one, observations=dues.count(one.name)) for one in estimates(study.watches, 0)]
    out.print(cost_table(found, None))
    out.print(forecast.memory(study))
    out.print(forecast.seconds(study, work, found))


def _rest(study: Study, work: Mapping[int, list[Any]], step: int) -> int:
    """The rows of a skipped checkpoint that will not come."""
    return sum(step not in study.trajectory.steps(watch.name) for watch in work[step])


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, speed_estimate_period=3600)
