"""`devmon push` and `pull`: runs as datasets of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from devmon.cli.arguments import Run, open_run

REPOSITORY = typer.Argument(metavar="OWNER/NAME", help="A dataset of the hub.")
PRIVATE = typer.Option("--private", help="Make it private, where it is made.")
INTO = typer.Option("-o", "--out", metavar="FOLDER", help="A new folder for the run.", show_default="runs/NAME")
REVISION = typer.Option(help="A branch, tag or commit.", show_default="the newest")


def push(run: Run, repository: Annotated[str, REPOSITORY], private: Annotated[bool, PRIVATE] = False) -> None:
    """Put a run on the Hugging Face hub as a dataset: a compact copy, its card, its report and its events.

    Log in once with `hf auth login`. A later push replaces the copy; other files of the dataset stay.
    """
    from rich.console import Console

    from devmon.analysis.reports.events_file import frame
    from devmon.analysis.reports.findings import examine
    from devmon.analysis.reports.prose.card import card
    from devmon.analysis.reports.report import content_of
    from devmon.analysis.reports.writers import WRITERS
    from devmon.store import hub

    trajectory = open_run(run)
    with Console(stderr=True).status("searching the run"):
        findings = examine(trajectory)
        files = {
            "README.md": card(findings, repository),
            "report.html": WRITERS[".html"](content_of(findings)),
            "events.csv": frame(findings).to_csv(index=False),
        }
    typer.echo(hub.push(trajectory, repository, files, private=private))


def pull(
    repository: Annotated[str, REPOSITORY],
    out: Annotated[Path | None, INTO] = None,
    revision: Annotated[str | None, REVISION] = None,
) -> None:
    """Bring a run that `devmon push` put on the Hugging Face hub into a new folder."""
    from devmon.store import hub

    typer.echo(hub.pull(repository, out or Path("runs", repository.rpartition("/")[2]), revision=revision))
