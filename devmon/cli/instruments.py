"""`devmon instruments`, `cost` and `demo`: what there is to measure with, what it costs, and one study to see."""

from __future__ import annotations

from typing import Annotated

import typer

from devmon.console import cost_table, safe
from devmon.errors import DevmonError


def instruments(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Explain this one.")] = None,
) -> None:
    """List the instruments, or explain one: formula, source, what the values mean, pitfalls, fields."""
    from devmon.cli import describe

    if name is not None:
        typer.echo(describe.explain(name))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    for known, kind in describe.instruments().items():
        table.add_row(known, safe(describe.summary(kind)))
    Console().print(table)


def cost(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="path/to/script.py:name or package.module:name, a list of watches, a Monitor, or a function that returns one.")],
    last: Annotated[int, typer.Option(min=0, help="The last step of the run.")],
    tokens_per_step: Annotated[int | None, typer.Option(min=1, help="Tokens in a training step, to compare with.")] = None,
) -> None:  # fmt: skip
    """Say what a list of watches will cost before a run: passes of each observation, observations, share of training."""
    from rich.console import Console

    from devmon.cost import estimates
    from devmon.offline.source import load_study

    _, watches = load_study(source)
    if watches is None:
        raise DevmonError(f"{source} has no watches: name a list of Watch, a Monitor, or what returns one")
    found = estimates(watches, last)
    training = None if tokens_per_step is None else 3 * tokens_per_step * last
    Console().print(cost_table(found, training))


def demo(context: typer.Context) -> None:
    from devmon.recipes.language_model import app as recipe

    recipe(context.args, prog_name="devmon demo")
