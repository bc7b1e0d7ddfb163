"""`devmon measure`: the instruments on checkpoints that lie on disk or on the hub."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from devmon.offline.plan import Plan, kind_of

CONFIG = typer.Option(metavar="FILE", help="A TOML file of these options, series and into included.")
DRY_RUN = typer.Option("--dry-run", help="Say what would be measured and what it costs; write nothing.")


def measure(config: Path | None, dry_run: bool, **given: Any) -> None:
    """Measure checkpoints that lie on disk or on the hub: the same instruments and numbers as during training.

    What the run holds is skipped, so an interrupted command goes on when it is given again. Checkpoints that cannot be
    read or do not fit, and instruments that fail, are named and recorded; the others are measured, and the exit code is
    1.
    """
    plan = Plan.read(config, given)
    if plan.engine == "processes" and plan.workers > 1 and not dry_run:
        from devmon.offline.engines import forkserver

        forkserver.start(plan)  # before torch is imported here: the two import at the same time
    from devmon.offline.run import run

    raise typer.Exit(run(plan, dry_run))


def _parameter(entry: Field[Any]) -> inspect.Parameter:
    """The option that sets a field of the plan; None, or an empty list, where it is not given."""
    more: dict[str, Any] = {key: value for key, value in entry.metadata.items() if key not in ("flag", "also", "among")}
    kind = kind_of(entry.name)
    if kind is not bool and entry.default not in (MISSING, None, ()):
        more.setdefault("show_default", str(entry.default))
    if entry.name == "series":
        info: Any = typer.Argument(**more)
    else:
        # a flag of a bool is named, for typer would add its --no-
        flag = entry.metadata.get("flag", "--" + entry.name.replace("_", "-"))
        also = [entry.metadata["also"]] if "also" in entry.metadata else []
        info = typer.Option(flag, *also, **more)
    taken = list[str] if kind == tuple[str, ...] else kind
    return _keyword(entry.name, Annotated[taken | None, info])


def _keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


measure.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
    *map(_parameter, fields(Plan)),
    _keyword("config", Annotated[Path | None, CONFIG]),
    _keyword("dry_run", Annotated[bool, DRY_RUN], False),
])  # fmt: skip
