"""`devmon detect`, `compare`, `replay` and `report`: the phase transitions of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from devmon.cli.arguments import Run, open_run
from devmon.console import events_table, plain_table, safe
from devmon.errors import DevmonError


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

    found = [s for s in series_of(open_run(run)) if (all_heads or "[" not in s.name)]
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


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN RUN...", help="Two runs or more of one kind, as seeds are.")
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Also write a page: .html, .md or .json.")] = None,
    within: Annotated[float, typer.Option(min=0.0, help="Decades by which matched events may be apart.")] = 0.1,
    nulls: Annotated[int | None, typer.Option(min=19, help="Simulated nulls for each test.")] = None,
) -> None:
    """Match the events of several runs, test which series comes first (sign test), and say what differs between them."""
    from rich.console import Console

    from devmon.analysis import Detector, compare_runs, series_of
    from devmon.analysis.reports.comparison import differences, matched_table, order_table, runs_content, summary
    from devmon.analysis.reports.drawing import write_whole
    from devmon.analysis.reports.writers import WRITERS

    if out is not None and out.suffix not in WRITERS:
        raise DevmonError(f"-o takes a file that ends in {', '.join(WRITERS)}, got {out.name!r}")
    short = [Path(one.rstrip("/")).name for one in runs]
    names = short if len(set(short)) == len(short) else runs
    if len(set(names)) < 2:
        raise DevmonError("compare takes two runs or more, each named once")
    opened = {name: open_run(run) for name, run in zip(names, runs, strict=True)}
    settings: dict[str, Any] = {} if nulls is None else {"n_null": nulls}
    console, series = Console(), {n: [s for s in series_of(t) if "[" not in s.name] for n, t in opened.items()}
    with Console(stderr=True).status(f"searching {len(opened)} runs"):
        found = compare_runs(series, Detector(**settings), within=within)
    console.print(safe(summary(found)))
    for table in (matched_table(found), order_table(found), differences(opened)):
        if table.rows:
            console.print(plain_table(table))
    if out is not None:
        write_whole(out, WRITERS[out.suffix](runs_content(opened, found)).encode())
        typer.echo(out)


def replay(
    curves: Annotated[Path, typer.Argument(metavar="FILE", help="Your copy of the curves: CSV, or a pickled DataFrame.")],
    step: Annotated[str, typer.Option(help="Column of the steps.")] = "step",
    value: Annotated[str, typer.Option(help="Column of the values.")] = "value",
    seed: Annotated[str | None, typer.Option(help="Column that tells the runs apart.", show_default="one run")] = None,
    error: Annotated[str | None, typer.Option(help="Column of the standard errors.", show_default="none")] = None,
    where: Annotated[list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only these rows (repeatable).")] = None,
    boundary: Annotated[list[float] | None, typer.Option(metavar="STEP", help="A published boundary (repeatable).")] = None,
    tolerance: Annotated[float, typer.Option(min=0.001, max=0.99, help="Share of the step that counts as found.")] = 0.1,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Unpickle FILE, which runs code it holds.")] = False,
) -> None:  # fmt: skip
    """Search published curves, each seed alone, and print the events found against the published boundaries."""
    from devmon.analysis import replay as run_replay

    pairs = [text.partition("=") for text in where or []]
    if wrong := [name for name, sign, _ in pairs if not sign]:
        raise DevmonError(f"--where takes COLUMN=VALUE, got {wrong[0]!r}")
    found = run_replay(curves, step=step, value=value, seed=seed, error=error, boundaries=boundary or (),
                       where={name: text for name, _, text in pairs}, tolerance=tolerance, allow_pickle=allow_pickle)  # fmt: skip
    typer.echo(found.to_text())


def report(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", help="A .html, .md or .json file.")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="Also write the figures as PNG files into this folder.")] = None,
) -> None:
    """Write the report of a run, as one HTML file that opens offline, as Markdown (-o report.md) or JSON (-o report.json)."""
    from devmon.analysis import report as write

    typer.echo(write(open_run(run), out, figures=figures))
