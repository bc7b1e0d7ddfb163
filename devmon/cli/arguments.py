"""What several commands take: a run, named by its store, its folder or its URL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's store, the folder it is in (runs/demo), or its URL.")]


def open_run(run: str | Path) -> Any:
    """The run's trajectory, to be read."""
    from devmon.store.trajectory import Trajectory

    return Trajectory(store_path(run), "r")


def store_path(run: str | Path) -> str:
    """The store of a run that is named by its folder or by its store."""
    inner = Path(run) / "trajectory.zarr"
    return str(inner if inner.is_dir() else run)
