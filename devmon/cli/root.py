"""The command line: `devmon COMMAND`. Every command is a function of a module beside this one.

Heavy imports happen inside the commands.
"""

from __future__ import annotations

import sys

import typer

from devmon.cli import anatomy, calibrate, checkpoints, events, hub, instruments, measure, runs
from devmon.errors import DevmonError

HELP = """Watch how a neural network develops while it trains.

A [b]run[/b] is a Zarr store that devmon's Lightning callbacks fill during training (devmon.callbacks.Monitor).

[b]To see it all once[/b]: [cyan]devmon demo[/cyan] trains a small language model on real text, through its induction
phase transition, and writes runs/demo/report.html. [b]With a run of your own[/b]: [cyan]devmon show RUN[/cyan] says
what it holds, [cyan]devmon detect RUN[/cyan] finds its phase transitions, [cyan]devmon report RUN -o report.html[/cyan]
writes the page.

[b]Before measuring the LLC[/b]: [cyan]devmon calibrate SOURCE CHECKPOINTS[/cyan] finds its step size and
localisation."""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
# to begin with
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
    help="Train a small language model and watch its induction phase transition (devmon demo --help).",
)(instruments.demo)
app.command()(instruments.instruments)
app.command()(instruments.cost)
app.command()(anatomy.anatomy)
# measuring checkpoints
app.command()(checkpoints.suites)
app.command(no_args_is_help=True)(checkpoints.audit)
app.command(no_args_is_help=True)(checkpoints.evaluations)
app.command()(calibrate.calibrate)
app.command(no_args_is_help=True)(measure.measure)
# a run
app.command()(runs.show)
app.command()(runs.serve)
app.command(hidden=True)(runs.watch)
app.command()(runs.compact)
app.command()(runs.fix)
app.command()(runs.export)
app.command(no_args_is_help=True)(hub.push)
app.command(no_args_is_help=True)(hub.pull)
# its events
app.command()(events.detect)
app.command()(events.compare)
app.command()(events.replay)
app.command()(events.report)


def main() -> None:
    """Entry point: errors of devmon are one line on standard error and exit code 1."""
    try:
        app()
    except DevmonError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
