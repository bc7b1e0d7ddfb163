"""What `devmon measure` does and prints around a `Study`."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich import progress as bars
from rich.console import Console

from devmon.analysis.reports.prose.run_words import one_set_of_weights
from devmon.analysis.run import same_weights
from devmon.checkpoints.audit import Audit, audit
from devmon.console import cost_table
from devmon.cost import estimates, together
from devmon.offline import forecast, kept
from devmon.offline.plan import Plan
from devmon.offline.study import Progress, Study
from devmon.watch import Watch

SPEED_SECONDS = 3600.0  # seconds over which the speed of the bar is averaged: rows of an LLC take minutes each


def run(plan: Plan, dry_run: bool) -> int:
    """Measure, or with `dry_run` say what would be; returns the exit code, 1 where anything is left unmeasured."""
    # open everything that the plan names, and list what the run does not hold yet
    study = Study(plan, read_only=dry_run)
    work = study.missing()
    out, errors = (Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False) for stderr in (False, True))
    out.print(f"{len(study.steps)} of {len(study.series.steps)} checkpoints chosen; {len(work)} to measure")
    for line in study.series.axis.said():
        out.print(line)
    if study.settings and not plan.llc:
        told = " ".join(f"{name}={value}" for name, value in study.settings.items())
        chosen = "" if "lr" in study.settings else "; lr and gamma are chosen on the checkpoints"
        out.print(f"λ̂ with the settings published for this model: {told}{chosen} (--llc none leaves it out)")
    if plan.source is not None and plan.preset is None:
        when = "at their own steps, as in training" if plan.schedule else "at all chosen checkpoints"
        more = "" if plan.schedule else " (--schedule keeps to their own steps)"
        out.print(f"the watches of {plan.source} are measured {when}{more}")
    if study.assumed:
        out.print(study.assumed)
    found = audit(study.series, study.steps) if work else Audit({})
    for fault in found.faults:
        errors.print(str(fault))
    if dry_run:
        _print_plan(study, work, out)
        return 0
    kept.refuse_twins(study, found, work)
    kept.record(study, found)
    if work:
        study.choose()

    # measure in this process, or hand the steps to an engine; a line for every row that will be missing
    counts = Counter[str]()
    with _bar(errors) as bar:
        task = bar.add_task("rows", total=sum(map(len, work.values())))

        def tell(news: Progress) -> None:
            counts[news.kind] += 1
            if news.kind != "retried":
                bar.advance(task, 1 if news.watch else _left_out(study, work, news.step))
            if news.kind != "measured":
                what = "skipped" if news.watch is None else f"{news.watch}{': failed' * (news.kind == 'failed')}"
                errors.print(f"step {news.step} {what} ({news.reason})")

        lost: list[str] = []
        if plan.engine == "processes" and plan.workers == 1:
            study.measure(tell=tell)
        elif work:
            engine = importlib.import_module(f"devmon.offline.engines.{plan.engine}")
            lost = engine.measure(study.frozen(), list(work), tell)

    # the sum of it, and an exit code that a script can read
    study.trajectory.fold()
    for worker in lost:
        errors.print(f"{worker}: give the command again to measure the rest")
    sums = [f"{counts['measured']} rows measured"]
    sums += [f"{counts['skipped']} checkpoints skipped"] if counts["skipped"] else []
    sums += [f"{counts['failed']} measurements failed"] if counts["failed"] else []
    out.print(f"{', '.join(sums)}: {study.trajectory.path}")
    if words := one_set_of_weights(same_weights(study.trajectory)):
        errors.print(f"{words}: check the files of {study.series.name}, one of them may be another step's")
    return int(bool(lost or counts["skipped"] or counts["failed"]))


def _print_plan(study: Study, work: Mapping[int, Sequence[Watch]], out: Console) -> None:
    """The steps, each watch with what it costs, and what a process will need."""
    out.print("steps: " + (", ".join(map(str, work)) or "none"))
    due = Counter(watch.name for watches in work.values() for watch in watches)
    costs = [
        replace(estimate, observations=due[estimate.name]) for estimate in estimates(study.watches, 0, study.model)
    ]
    parameters = None if study.model is None else sum(p.numel() for p in study.model.parameters())
    out.print(cost_table(costs, None, parameters, together(study.watches, study.model)))
    out.print(forecast.memory(study))
    out.print(forecast.seconds(study, work, costs))


def _left_out(study: Study, work: Mapping[int, Sequence[Watch]], step: int) -> int:
    """How many rows of a skipped checkpoint will not come."""
    return sum(step not in study.trajectory.steps(watch.name) for watch in work[step])


def _bar(console: Console) -> bars.Progress:
    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        console=console,
        speed_estimate_period=SPEED_SECONDS,
    )
