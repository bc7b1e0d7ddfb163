"""`devmon instruments`, `cost` and `demo`: what there is to measure with, what it costs, and one study to see."""

from __future__ import annotations

from typing import Annotated

import typer

from devmon.console import cost_table, list_table, variables_table
from devmon.errors import DevmonError

NAME_ARGUMENT = typer.Argument(metavar="[NAME_ARGUMENT]", help="Explain this one.")
SOURCE = typer.Argument(
    metavar="SOURCE",
    help="path/to/script.py:name or package.module:name, a list of watches, a Monitor, or a function that returns one.",
)
LAST_OPTION = typer.Option(min=0, help="The last step of the run.")
TOKENS_PER_STEP = typer.Option(min=1, help="Tokens in a training step, to compare with.")


def instruments(name: Annotated[str | None, NAME_ARGUMENT] = None) -> None:
    """List the instruments, or explain one: formula, source, fields, and a table of the variables that it returns."""
    import inspect

    from rich.console import Console

    from devmon.cli import describe

    if name is None:
        Console().print(list_table({key: describe.summary(kind) for key, kind in describe.instruments().items()}))
        return
    kind = describe.instrument(name)
    parts = describe.description(inspect.getdoc(kind) or "")
    typer.echo(f"{describe.signature(kind)}\n\n{parts.above}")
    if parts.variables:
        typer.echo()
        Console().print(variables_table(parts.variables))
    if parts.below:
        typer.echo(f"\n{parts.below}")


def cost(
    source: Annotated[str, SOURCE],
    last: Annotated[int, LAST_OPTION],
    tokens_per_step: Annotated[int | None, TOKENS_PER_STEP] = None,
) -> None:
    """Say what watches will cost before a run: passes of an observation, how many observations, share of training."""
    from rich.console import Console

    from devmon.cost import estimates, together
    from devmon.offline.source import load_study

    model, watches = load_study(source)
    if watches is None:
        raise DevmonError(f"{source} has no watches: name a list of Watch, a Monitor, or what returns one")
    training = None if tokens_per_step is None else 3 * tokens_per_step * last  # a backward pass costs two forward
    parameters = None if model is None else sum(p.numel() for p in model.parameters())
    told = estimates(watches, last, model)
    Console().print(cost_table(told, training, parameters, together(watches, model)))


def demo(context: typer.Context) -> None:
    from devmon.recipes.language_model import app as recipe

    recipe(context.args, prog_name="devmon demo")
