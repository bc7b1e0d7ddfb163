"""`devmon show`, `serve`, `compact`, `fix` and `export`: what is done with one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from devmon.analysis.run import ReadOnce
from devmon.cli.arguments import Run, open_run
from devmon.console import run_view
from devmon.errors import DevmonError

FOLLOW = typer.Option("--follow", "-f", help="Stay, and show what is committed (Ctrl-C ends it).")
EVERY = typer.Option(min=0.1, metavar="SECONDS", help="How often --follow looks.")
PORT = typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")
NEWS = typer.Option("--every", min=0.5, metavar="SECONDS", help="How often to look for new steps.")
COPY = typer.Option("-o", "--out", metavar="COPY", help="Write a small copy here instead: a folder, or a URL.")
DROP = typer.Option("--drop", metavar="WATCH", help="The watch to take out (repeatable).")
EXPORT_OPTION = typer.Option("-o", "--out", help="A name that ends in .nc, .parquet, .csv, .zarr or .tex.")
EVENTS = typer.Option("--events", help="Its events, as .csv or .tex, in place of its numbers.")
WATCH = typer.Option(show_default="all", help="Take this watch alone.")


def show(run: Run, follow: Annotated[bool, FOLLOW] = False, every: Annotated[float, EVERY] = 2.0) -> None:
    """Say what a run holds: its provenance, each watch with its instrument, steps and failures, the course of each
    series, and in one sentence what happened."""
    import time

    from rich.console import Console

    console = Console()
    if not follow:
        trajectory = open_run(run)
        held = ReadOnce(trajectory)
        console.print(run_view(trajectory, run, held))
        console.print(happened(held), style="bold", highlight=False)
        return
    seen: object = None
    try:
        while True:
            trajectory = open_run(run)
            now = {name: (trajectory.steps(name), len(trajectory.failures(name))) for name in trajectory}
            if now != seen:
                if console.is_terminal:
                    console.clear()
                console.print(run_view(trajectory, run))
                seen = now
            time.sleep(every)
    except KeyboardInterrupt:
        pass


def happened(held: ReadOnce) -> str:
    """What happened in a run, in one sentence; why that cannot be said where it cannot."""
    from devmon.analysis.reports.findings import examine
    from devmon.analysis.reports.prose.story import tell

    try:
        return tell(examine(held)).lead
    except DevmonError as error:
        return f"What happened cannot be said: {error}"


def serve(run: Run, port: Annotated[int, PORT] = 8765, every: Annotated[float, NEWS] = 10.0) -> None:
    """Serve a run's report to this machine alone, made again as steps are committed. Its events are provisional."""
    import threading

    from devmon.live.page import live_report
    from devmon.live.server import server
    from devmon.store.place import store_path

    try:
        serving = server(live := live_report(store_path(run), every), port)
    except OSError as error:
        raise DevmonError(f"port {port} cannot be opened ({error.strerror}): choose another with --port") from error
    stop = threading.Event()

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    threading.Thread(target=live.follow, args=(stop, tell), daemon=True).start()
    typer.echo(f"http://127.0.0.1:{serving.server_port}/ (Ctrl-C ends it)")
    try:
        serving.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        stop.set()
        serving.server_close()


def watch(run: Run, port: Annotated[int, PORT] = 8765, every: Annotated[float, NEWS] = 10.0) -> None:
    """The earlier name of `devmon serve`."""
    typer.echo("devmon watch is now devmon serve: the old name goes with the next version", err=True)
    serve(run, port, every)


def compact(run: Run, out: Annotated[str | None, COPY] = None) -> None:
    """Fold a run's new rows into its Zarr groups, or write a consolidated, sharded, compressed copy (-o copy.zarr)."""
    from devmon.store.compact import compact as write
    from devmon.store.trajectory import Trajectory

    trajectory = open_run(run)
    if out is None:
        Trajectory(trajectory.path).fold()
        typer.echo(trajectory.path)
    else:
        typer.echo(write(trajectory, out))


def fix(run: Run, drop: Annotated[list[str], DROP]) -> None:
    """Take watches out of a run, so that others may be measured under their names. No row is lost.

    Where a watch was measured with another instrument or other settings, the run refuses what is corrected: drop the
    watch and measure again (a corrected layout of the model needs no fix: it is accepted as it is measured). Its rows
    lie in the run as an earlier attempt (`Trajectory.attempts()`), its steps are measured anew by `devmon measure` or
    from there on by training.
    """
    from devmon.store.trajectory import Trajectory

    trajectory = Trajectory(open_run(run).path)
    known = trajectory.names()
    if unknown := [name for name in drop if name not in known]:
        raise DevmonError(f"{trajectory.path} holds no watch {unknown[0]!r}: it holds {', '.join(known) or 'none'}")
    for name in dict.fromkeys(drop):
        count = trajectory.drop(name)
        typer.echo(f"{name}: {count} row{'s' * (count != 1)} set aside, the watch is dropped")


def export(
    run: Run,
    out: Annotated[Path, EXPORT_OPTION],
    watch: Annotated[str | None, WATCH] = None,
    events: Annotated[bool, EVENTS] = False,
) -> None:
    """Write a run as netCDF, Parquet, CSV or plain Zarr, or its events as a table for a paper.

    CSV and Parquet hold the numbers without a dimension but step, one a line: watch, variable, step, value, se, units,
    verdict; LLC traces give the derived llc. netCDF and Zarr hold everything, one group a watch. With --events the
    run is searched, and CSV holds every event with its interval, p and q; -o NAME.tex is a LaTeX table (booktabs) of
    those that stand.
    """
    if events or out.suffix == ".tex":
        from devmon.analysis.reports.events_file import write_events
        from devmon.analysis.reports.findings import examine

        if watch is not None:
            raise DevmonError("--watch does not go with events: they are of the whole run")
        typer.echo(write_events(examine(open_run(run)), out))
        return
    from devmon.store.export import export as write

    typer.echo(write(open_run(run), out, watch=watch))
