"""`devmon suites`: which series of checkpoints are known by name."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = typer.Argument(metavar="NAME", help="Only those whose name contains this.", show_default="all")


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
