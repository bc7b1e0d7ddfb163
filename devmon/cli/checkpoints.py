"""`devmon suites`, `audit` and `evaluations`: series known by name, what is wrong in one, how it was evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

NAME = typer.Argument(metavar="NAME", help="Only those whose name contains this.", show_default="all")
SERIES = typer.Argument(metavar="SERIES", help="A folder of checkpoints, or owner/name on the Hugging Face hub.")
STEPS = typer.Option(help="all, log:40, every:100, 0,10,20, 100-500, or several with commas.")
PATTERN = typer.Option(help="A regular expression with one group: the step in the checkpoints' names.")
STAGE = typer.Option(help="One stage of the training, by its own count.", show_default="all")
BRANCH = typer.Option(help="An ingredient or a seed, by name.")
WEIGHTS = typer.Option(
    min=3, metavar="N", help="Also read N checkpoints, and look whether each descends from the last."
)
PICKLE = typer.Option("--allow-pickle", help="Read checkpoints that hold more than weights, which runs code they hold.")
FORGET = typer.Option("--forget", help="Keep no revision of the hub on disk once it was read.")
RESULTS = typer.Argument(metavar="RESULTS...", help="Files of lm-evaluation-harness, or folders of results*.json.")
INTO = typer.Option(metavar="RUN", help="The run to write into, made where there is none.")
JSON = typer.Option("--json", help="Print JSON instead of a table.")


def suites(name: Annotated[str, NAME] = "") -> None:
    """List the suites of checkpoints, and the trainers, whose names are known: repositories, names, stages, units.

    What has no row is read too where a number follows step, checkpoint, global_step or iter.
    """
    from devmon.checkpoints.suites import SUITES

    for suite in SUITES:
        if name.lower() not in suite.name.lower():
            continue
        typer.echo(f"{suite.name}: {suite.each or suite.repository or 'a folder'}")
        if suite.refused:
            typer.echo(f"    refused: {suite.refused}")
            continue
        typer.echo(f"    {suite.example}")
        if suite.unit != "steps":
            typer.echo(f"    counts {suite.unit}")
        if suite.stages:
            own = [stage for stage in suite.stages[1:] if suite.anew and stage not in suite.goes_on]
            counts = f"; a counter of their own: {', '.join(own)}" if own else ""
            typer.echo(f"    stages {', '.join(stage or '(no name)' for stage in suite.stages)}{counts}")
        if suite.llc:
            typer.echo(f"    λ̂: settings of {suite.source}")
        if suite.note:
            typer.echo(f"    {suite.note}")


def audit(
    series: Annotated[str, SERIES],
    steps: Annotated[str, STEPS] = "all",
    pattern: Annotated[str | None, PATTERN] = None,
    stage: Annotated[str | None, STAGE] = None,
    branch: Annotated[str | None, BRANCH] = None,
    weights: Annotated[int | None, WEIGHTS] = None,
    allow_pickle: Annotated[bool, PICKLE] = False,
    forget: Annotated[bool, FORGET] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Look for what is wrong in a series of checkpoints: equal files under several steps, formats that were not written
    again, shards that lack or are of another step, steps that lack.

    Of the hub the metadata alone are read, one request a revision; of a folder a few pieces of each file. --weights
    reads checkpoints too, and compares distances in weights. The exit code is 1 where there is a fault.
    """
    from rich.console import Console

    from devmon.checkpoints.audit import audit as audited
    from devmon.checkpoints.lineage import lineage
    from devmon.checkpoints.selection import select
    from devmon.checkpoints.series import Series

    opened = Series.open(
        series, pattern=pattern, stage=stage, branch=branch, allow_pickle=allow_pickle, forget=forget
    )  # fmt: skip
    with Console(stderr=True).status(f"looking at {series}") as status:
        found = audited(opened, select(opened.steps, steps), lambda step: status.update(f"files of step {step}"))
        opened.kinds |= found.kinds
        read = None if weights is None else lineage(opened, weights, lambda step: status.update(f"step {step}"))
    faults = [*found.faults, *(read.faults if read is not None else ())]
    if as_json:
        said: dict[str, Any] = {"series": opened.name, "said": opened.axis.said()}
        told = {str(step): {"stage": opened.stage[step], "tokens": opened.tokens[step]} for step in opened.steps}
        said |= {"checkpoints": told} | found.record()
        if read is not None:
            said["faults"] += [{"kind": f.kind, "steps": [*f.steps], "words": f.words} for f in read.faults]
            said["lineage"] = {"steps": read.steps, "distance": read.distance, "across": read.across, "size": read.size}
        typer.echo(json.dumps(said, indent=1, allow_nan=False))
    else:
        _print_audit(opened, found, faults, read)
    raise typer.Exit(int(bool(faults)))


def _print_audit(opened: Any, found: Any, faults: list[Any], read: Any) -> None:
    """What was looked at, then a line for every fault."""
    for line in opened.axis.said():
        typer.echo(line)
    files = sum(len(listing.files) for listing in found.listings.values())
    size = sum(file.size for listing in found.listings.values() for file in listing.files)
    typer.echo(
        f"{len(found.listings)} of {len(opened.steps)} checkpoints, {files} files of weights, {size / 1e9:.3g} GB"
    )
    if read is not None:
        typer.echo(f"{len(read.steps)} read: steps {', '.join(map(str, read.steps))}")
    if faults:
        width = max(len(fault.kind) for fault in faults)
        typer.echo(f"\n{len(faults)} fault{'s' * (len(faults) > 1)}:")
        for fault in faults:
            typer.echo(f"  {fault.kind:<{width}}  {fault.words}")
    else:
        typer.echo("no fault")
    for note in found.notes:
        typer.echo(f"note: {note}")


def evaluations(
    results: Annotated[list[Path], RESULTS],
    into: Annotated[str, INTO],
    pattern: Annotated[str | None, PATTERN] = None,
    stage: Annotated[str | None, STAGE] = None,
    branch: Annotated[str | None, BRANCH] = None,
) -> None:
    """Read results of lm-evaluation-harness into a run: a watch a task, each metric with its standard error, by step.

    The revision in a file's model_args tells the step, else the folder that it lies in.
    """
    from devmon.offline.harness import read_results
    from devmon.store.place import store_path
    from devmon.store.trajectory import Trajectory

    trajectory = Trajectory(store_path(into))
    read = read_results(results, trajectory, pattern=pattern, stage=stage, branch=branch)
    for line in read.said:
        typer.echo(line)
    typer.echo(f"{read.rows} rows read, {read.held} held before: {trajectory.path}")
