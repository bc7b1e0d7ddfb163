"""The command line: `devmon demo`, `show`, `detect`, `report`. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from devmon.errors import DevmonError

HELP = """Watch how a neural network develops while it trains.

A [b]run[/b] is a Zarr store that devmon's Lightning callbacks fill during training (devmon.callbacks.Monitor).

[b]To see it all once[/b]: [cyan]devmon demo[/cyan] trains a small language model on real text, through its induction phase
transition, and writes runs/demo/report.html. [b]With a run of your own[/b]: [cyan]devmon show RUN[/cyan] says what it holds,
[cyan]devmon detect RUN[/cyan] finds its phase transitions, [cyan]devmon report RUN -o report.html[/cyan] writes the page."""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's store, or the folder it is in (runs/demo).")]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
    help="Train a small language model and watch its induction phase transition (devmon demo --help).",
)
def demo(context: typer.Context) -> None:
    from devmon.recipes.language_model import app as recipe

    recipe(context.args, prog_name="devmon demo")


@app.command()
def show(run: Run) -> None:
    """Say what a run holds: its provenance, and each watch with its instrument, steps, failures and latest values."""
    from rich.console import Console
    from rich.table import Table

    from devmon.analysis import series_of

    trajectory = _open(run)
    attrs = trajectory.attrs
    console = Console()
    console.print(
        f"[b]{_safe(attrs.get('title', run))}[/b]  run {attrs['run_id']}, seed {attrs['seed']}, {attrs['created']}"
    )
    table = Table("watch", "instrument", "steps", "from", "to", "failed", "seconds", box=None, header_style="bold")
    for name in trajectory:
        dataset = trajectory[name]
        steps = dataset["step"].values
        seconds = f"{float(dataset['seconds'].sum()):.1f}" if steps.size else ""
        first, last = (str(steps[0]), str(steps[-1])) if steps.size else ("", "")
        table.add_row(_safe(name), _safe(dataset.attrs["instrument"].rsplit(".", 1)[-1]), str(steps.size), first, last,
                      str(len(trajectory.failures(name)) or ""), seconds)  # fmt: skip
    console.print(table)
    values = Table("series", "first", "latest", "", box=None, header_style="bold")
    for series in series_of(trajectory):
        if "[" not in series.name and len(series.values):
            error = f"± {series.se[-1]:.2g}" if series.se is not None else ""
            values.add_row(_safe(series.name), f"{series.values[0]:.4g}", f"{series.values[-1]:.4g}",
                           f"{error} {series.units}")  # fmt: skip
    console.print(values)


@app.command()
def detect(
    run: Run,
    series: Annotated[list[str] | None, typer.Option("--series", help="Only series whose name contains this (repeatable).")] = None,
    all_heads: Annotated[bool, typer.Option("--each/--summary", help="Each head and layer, or only the summaries.")] = False,
    alpha: Annotated[float, typer.Option(min=0.001, max=0.5, help="False-alarm rate for each series.")] = 0.05,
    nulls: Annotated[int | None, typer.Option(min=19, help="Simulated nulls for each test.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:  # fmt: skip
    """Find phase transitions: each event with its kind, step, 90% interval, size, width, p-value and q-value.

    p is the share of simulated nulls (smooth drift with the same noise and autocorrelation) that show an event as
    prominent; q corrects it for the number of series (Benjamini-Hochberg). NO EVENT is a result.
    """
    from devmon.analysis import Detector, series_of
    from devmon.analysis import detect as run_detector

    found = [s for s in series_of(_open(run)) if (all_heads or "[" not in s.name)]
    if series:
        known = ", ".join(s.name for s in found)
        found = [s for s in found if any(part in s.name for part in series)]
        if not found:
            raise DevmonError(f"no series contains {' or '.join(map(repr, series))}; the run has {known or 'none'}")
    settings: dict[str, Any] = {"alpha": alpha} | ({} if nulls is None else {"n_null": nulls})
    from rich.console import Console

    with Console(stderr=True).status(f"searching {len(found)} series"):
        detection = run_detector(found, Detector(**settings))
    if as_json:
        typer.echo(detection.to_json())
    else:
        Console().print(events_table(detection))


@app.command()
def report(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", help="The HTML file to write.")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="Also write the figures as PNG files into this folder.")] = None,
) -> None:
    """Write the report of a run: one HTML file that opens offline, with stages, events, figures and provenance."""
    from devmon.analysis import report as write

    typer.echo(write(_open(run), out, figures=figures))


def main() -> None:
    """Entry point: errors of devmon are one line on standard error and exit code 1."""
    try:
        app()
    except DevmonError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def events_table(detection: Any) -> Any:
    """A rich table of every series: its events, or the outcome NO EVENT, UNRESOLVED or SAMPLER REJECTED."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", caption_justify="left", caption=(
        f"{len(detection.fits)} series, {detection.family} tests in the q-values. * the step between checkpoints, or the "
        "abruptness, is not resolved: the report names the steps to add"))  # fmt: skip
    for column in ("series", "outcome", "step", "90% interval", "size", "decades", "p", "q"):
        table.add_column(column, overflow="fold" if column == "series" else "ellipsis", no_wrap=column != "series")
    for name, fit in detection.fits.items():
        events = [event for event in detection.events if event.series == name]
        for e in events:
            table.add_row(_safe(name), e.kind + ("" if e.resolved else "*"), f"{e.step:.0f}",
                          f"{e.interval[0]:.0f} to {e.interval[1]:.0f}", f"{e.size:+.3g}",
                          "" if e.width is None else f"{e.width:.2f}", f"{e.p_value:.3f}", f"{e.q_value:.3f}")  # fmt: skip
        if not events:
            table.add_row(_safe(name), fit.outcome)
    return table


def _open(run: Path) -> Any:
    from devmon.trajectory import Trajectory

    inner = run / "trajectory.zarr"
    return Trajectory(inner if inner.is_dir() else run, "r")


def _safe(text: object) -> str:
    from rich.markup import escape

    return escape(str(text))


if __name__ == "__main__":
    main()
