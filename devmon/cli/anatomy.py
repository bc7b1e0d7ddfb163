"""`devmon anatomy`: where the parts of a model are, as the line to declare them."""

from __future__ import annotations

from typing import Annotated

import typer

SOURCE = typer.Argument(
    metavar="SOURCE",
    help="path/to/script.py:name or package.module:name of a model, of (model, inputs), or of a function or class.",
)


def anatomy(source: Annotated[str, SOURCE]) -> None:
    """Propose the Layout of a model: what its parts are by what they compute, tried before it is said.

    One pass on made-up tokens (or the inputs that SOURCE returns beside the model) shows which modules run on what. The
    line to write into the model's class is printed, with what the first layer has, what has no place, and what else was
    tried and why it does not fit. A wrong declaration is refused with the line that fits. Exit code 1 where none does.
    """
    from devmon.anatomy.proposing.propose import anatomy_of
    from devmon.offline.source import load_model

    model, inputs = load_model(source)
    proposal = anatomy_of(model, inputs)
    typer.echo(str(proposal))
    raise typer.Exit(int(proposal.source == "none"))
