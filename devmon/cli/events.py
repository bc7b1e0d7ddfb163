"""`devmon detect`, `compare`, `replay` and `report`: the phase transitions of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from devmon.cli.arguments import Run, open_run
from devmon.console import events_table, plain_table, safe
from devmon.errors import DevmonError

NULLS = typer.Option(min=19, help="Simulated nulls for each test.")
# of detect
RUN_OR_TABLE = typer.Argument(
    metavar="RUN",
    help="A run's store, the folder it is in, or its URL; or a log with a "
    "column of steps: CSV, JSON lines, trainer_state.json.",
)
SERIES = typer.Option("--series", help="Only series whose name contains this (repeatable).")
EACH = typer.Option("--each/--summary", help="Each head and layer, or only the summaries.")
ALPHA = typer.Option(min=0.001, max=0.5, help="False-alarm rate for each series.")
JSON = typer.Option("--json", help="Print JSON instead of a table.")
# of compare
RUNS = typer.Argument(metavar="RUN RUN...", help="Two runs or more of one kind, as seeds are.")
PAGE = typer.Option("-o", "--out", help="Also write a page: .html, .md or .json.")
WITHIN_OPTION = typer.Option(min=0.0, help="Decades by which matched events may be apart.")
# of replay
CURVES = typer.Argument(metavar="FILE", help="Your copy of the curves: CSV, or a pickled DataFrame.")
STEP_OPTION = typer.Option(help="Column of the steps.")
VALUE = typer.Option(help="Column of the values.")
SEED = typer.Option(help="Column that tells the runs apart.", show_default="one run")
ERROR = typer.Option(help="Column of the standard errors.", show_default="none")
WHERE = typer.Option(metavar="COLUMN=VALUE", help="Only these rows (repeatable).")
BOUNDARY = typer.Option(metavar="STEP", help="A published boundary (repeatable).")
REPLAY_TOLERANCE = typer.Option(min=0.001, max=0.99, help="Share of the step that counts as found.")
PICKLE = typer.Option("--allow-pickle", help="Unpickle FILE, which runs code it holds.")
# of report
REPORT = typer.Option("-o", "--out", help="A .html, .md or .json file.")
FIGURES = typer.Option(help="Also write the figures as PNG files into this folder.")


def detect(
    run: Annotated[str, RUN_OR_TABLE],
    series: Annotated[list[str] | None, SERIES] = None,
    all_heads: Annotated[bool, EACH] = False,
    alpha: Annotated[float, ALPHA] = 0.05,
    nulls: Annotated[int | None, NULLS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Find phase transitions: the main one and minor events, then each event with its kind, step, 90% interval, size,
    width, p-value and q-value.

    p is the share of simulated nulls (smooth drift with the same noise and autocorrelation) that show an event as
    prominent; q corrects it for the number of series (Benjamini-Hochberg). NO EVENT is a result.
    """
    from rich.console import Console

    from devmon.analysis import Detector
    from devmon.analysis import detect as run_detector
    from devmon.analysis.derive.from_anything import series_in
    from devmon.analysis.reports.prose.run_words import one_set_of_weights
    from devmon.analysis.run import same_weights
    from devmon.analysis.transitions.clusters import headline, main_first, transitions
    from devmon.analysis.transitions.schedule import is_rate, told_beside

    source = run if Path(run).is_file() else open_run(run)
    every = series_in(source)
    # the learning rate is what is done to the model: it is told beside the events, and is no series of theirs
    searched = [s for s in every if (all_heads or "[" not in s.name) and not is_rate(s.name)]
    if not searched:
        raise DevmonError("there is nothing to search beside the learning rate: give a log with another column")
    if series:
        known = ", ".join(s.name for s in searched)
        searched = [s for s in searched if any(part in s.name for part in series)]
        if not searched:
            raise DevmonError(f"no series contains {' or '.join(map(repr, series))}; the run has {known or 'none'}")
    settings: dict[str, Any] = {"alpha": alpha} | ({} if nulls is None else {"n_null": nulls})
    shared = one_set_of_weights([] if source is run else same_weights(source))
    with Console(stderr=True).status(f"searching {len(searched)} series"):
        detection = run_detector(searched, Detector(**settings))
    changes = main_first(transitions(detection))
    if as_json:
        said: dict[str, Any] = {"transitions": [change.to_dict() for change in changes], "one_set_of_weights": shared}
        said |= json.loads(detection.to_json())
        typer.echo(json.dumps(said, indent=1, allow_nan=False))
    else:
        if words := headline(changes):
            typer.echo(f"{words[0].upper()}{words[1:]}.")
        for words in told_beside(detection.events, every):
            typer.echo(safe(f"{words[0].upper()}{words[1:]}."))
        # what was done to the rows, but for blank cells, which are usual in a log
        done = {each.name: (*each.notes, *detection.fits[each.name].notes) for each in searched}
        for note in dict.fromkeys(note for notes in done.values() for note in notes if "are NaN" not in note):
            named = [name for name, notes in done.items() if note in notes]
            more = f" and {len(named) - 4} more" if len(named) > 4 else ""
            typer.echo(safe(f"{', '.join(named[:4])}{more}: {note}."))
        if shared:
            typer.echo(f"{shared[0].upper()}{shared[1:]}: what changes at them may be of the files alone.")
        Console().print(events_table(detection))


def compare(
    runs: Annotated[list[str], RUNS],
    out: Annotated[Path | None, PAGE] = None,
    within: Annotated[float, WITHIN_OPTION] = 0.1,
    nulls: Annotated[int | None, NULLS] = None,
) -> None:
    """Match the events of several runs, test which series comes first (sign test), and say what differs among them."""
    from rich.console import Console

    from devmon.analysis import Detector, compare_runs, series_of
    from devmon.analysis.reports.comparison import differences, matched_table, order_table, runs_content, summary
    from devmon.analysis.reports.prose.seeds import labels_together
    from devmon.analysis.reports.writers import WRITERS
    from devmon.files import write_whole

    # what is compared: runs by the last part of their names, or by the whole where that is one for several
    if out is not None and out.suffix not in WRITERS:
        raise DevmonError(f"-o takes a file that ends in {', '.join(WRITERS)}, got {out.name!r}")
    short = [Path(run.rstrip("/")).name for run in runs]
    names = short if len(set(short)) == len(short) else runs
    if len(set(names)) < 2:
        raise DevmonError("compare takes two runs or more, each named once")
    opened = {name: open_run(run) for name, run in zip(names, runs, strict=True)}
    series = {name: [s for s in series_of(run) if "[" not in s.name] for name, run in opened.items()}
    # each run is searched by itself, then events are matched
    settings: dict[str, Any] = {} if nulls is None else {"n_null": nulls}
    with Console(stderr=True).status(f"searching {len(opened)} runs"):
        comparison = compare_runs(series, Detector(**settings), within=within)
    console = Console()
    console.print(safe(summary(comparison, labels_together(opened))))
    for table in (matched_table(comparison), order_table(comparison), differences(opened)):
        if table.rows:
            console.print(plain_table(table))
    if out is not None:
        write_whole(out, WRITERS[out.suffix](runs_content(opened, comparison)).encode())
        typer.echo(out)


def replay(
    curves: Annotated[Path, CURVES],
    step: Annotated[str, STEP_OPTION] = "step",
    value: Annotated[str, VALUE] = "value",
    seed: Annotated[str | None, SEED] = None,
    error: Annotated[str | None, ERROR] = None,
    where: Annotated[list[str] | None, WHERE] = None,
    boundary: Annotated[list[float] | None, BOUNDARY] = None,
    tolerance: Annotated[float, REPLAY_TOLERANCE] = 0.1,
    allow_pickle: Annotated[bool, PICKLE] = False,
) -> None:
    """Search published curves, each seed by itself, and print the events beside the published boundaries."""
    from devmon.analysis import replay as run_replay

    pairs = [text.partition("=") for text in where or []]
    if wrong := [name for name, sign, _ in pairs if not sign]:
        raise DevmonError(f"--where takes COLUMN=VALUE, got {wrong[0]!r}")
    replayed = run_replay(
        curves, step=step, value=value, seed=seed, error=error, boundaries=boundary or (),
        where={name: text for name, _, text in pairs}, tolerance=tolerance, allow_pickle=allow_pickle,
    )  # fmt: skip
    typer.echo(replayed.to_text())


def report(
    run: Run,
    out: Annotated[Path, REPORT] = Path("report.html"),
    figures: Annotated[Path | None, FIGURES] = None,
) -> None:
    """Write a run's report: one HTML file that opens offline, Markdown (-o report.md) or JSON (-o report.json)."""
    from devmon.analysis import report as write

    typer.echo(write(open_run(run), out, figures=figures))
