"""What several commands take: a run, named by its store, its folder or its URL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's store, the folder it is in (runs/demo), or its URL.")]


def open_run(run: str | Path) -> Any:
    """The run's trajectory, to be read."""
    from devmon.store.place import store_path
    from devmon.store.trajectory import Trajectory

    return Trajectory(store_path(run), "r")
