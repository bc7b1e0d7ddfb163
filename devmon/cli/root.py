"""The command line: `devmon demo`, `instruments`, `cost`, `calibrate`, `measure`, `show`, `watch`, `detect`, `compare`, `replay`, `report`, `compact`, `export`.

Heavy imports happen inside the commands.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from devmon.console import cost_table, events_table, plain_table, run_view, safe, trials_table
from devmon.errors import DevmonError

HELP = """Watch how a neural network develops while it trains.

A [b]run[/b] is a Zarr store that devmon's Lightning callbacks fill during training (devmon.callbacks.Monitor).

[b]To see it all once[/b]: [cyan]devmon demo[/cyan] trains a small language model on real text, through its induction phase
transition, and writes runs/demo/report.html. [b]With a run of your own[/b]: [cyan]devmon show RUN[/cyan] says what it holds,
[cyan]devmon detect RUN[/cyan] finds its phase transitions, [cyan]devmon report RUN -o report.html[/cyan] writes the page.

[b]Before measuring the LLC[/b]: [cyan]devmon calibrate SOURCE CHECKPOINTS[/cyan] finds its step size and localisation."""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
ASKED = ("data", "loss", "mask", "steps", "weights", "tolerance", "max_steps")  # of a calibration
FOUND = ("gamma", "lr", "control_variate", "steps_per_draw")  # by a calibration
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's store, the folder it is in (runs/demo), or its URL.")]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
    help="Train a small language model and watch its induction phase transition (devmon demo --help).",
)
def demo(context: typer.Context) -> None:
    from devmon.recipes.language_model import app as recipe

    recipe(context.args, prog_name="devmon demo")


@app.command()
def instruments(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Explain this one.")] = None,
) -> None:
    """List the instruments, or explain one: formula, source, what the values mean, pitfalls, fields."""
    from devmon.cli import describe

    if name is not None:
        typer.echo(describe.explain(name))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    for known, kind in describe.instruments().items():
        table.add_row(known, safe(describe.summary(kind)))
    Console().print(table)


@app.command()
def cost(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="path/to/script.py:name or package.module:name, a list of watches, a Monitor, or a function that returns one.")],
    last: Annotated[int, typer.Option(min=0, help="The last step of the run.")],
    tokens_per_step: Annotated[int | None, typer.Option(min=1, help="Tokens in a training step, to compare with.")] = None,
) -> None:  # fmt: skip
    """Say what a list of watches will cost before a run: passes of each observation, observations, share of training."""
    from rich.console import Console

    from devmon.cli.describe import estimates
    from devmon.offline.source import load_study

    _, watches = load_study(source)
    if watches is None:
        raise DevmonError(f"{source} has no watches: name a list of Watch, a Monitor, or what returns one")
    found = estimates(watches, last)
    training = None if tokens_per_step is None else 3 * tokens_per_step * last
    Console().print(cost_table(found, training))


@app.command()
def calibrate(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="path/to/script.py:name or package.module:name.")],
    checkpoints: Annotated[Path, typer.Argument(metavar="CHECKPOINTS", help="A folder of Lightning checkpoints, or the run's folder that holds checkpoints/.")],
    into: Annotated[Path | None, typer.Option(metavar="RUN", show_default="the one beside the checkpoints", help="The run to write the choice into.")] = None,
    late: Annotated[int | None, typer.Option(show_default="the last", help="Step of the late checkpoint.")] = None,
    middle: Annotated[int | None, typer.Option(show_default="in the middle of the series, by count", help="Step of the middle checkpoint.")] = None,
    tolerance: Annotated[float, typer.Option(min=0.001, max=0.5, help="Error that the settings may cause, as a share of the LLC.")] = 0.02,
    max_steps: Annotated[int, typer.Option(min=1, help="Sampler steps that one chain of an estimate may cost.")] = 3000,
    prefix: Annotated[str | None, typer.Option(help="What the checkpoint's keys start with (net.), where several would do.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Also draw the trials into this file (calibration.png).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another calibration that the run holds.")] = False,
) -> None:  # fmt: skip
    """Find the LLC's lr and gamma, by short trials on a late and a middle checkpoint.

    SOURCE names a function without arguments that returns (model, LLC(...)): an untrained model, and the LLC with its
    data, loss, nbeta, batch size, kernel and mask; its lr and gamma are what is looked for. The trials are printed with
    the reasons and the line to paste. The run keeps them: LLC(data, loss, **run.attrs["calibration"]["settings"]).
    """
    from rich.console import Console

    from devmon.errors import InstrumentError
    from devmon.monitoring.fingerprint import identity
    from devmon.offline.source import checkpoint_series, late_and_middle, load_source, with_weights
    from devmon.sampling import Settings
    from devmon.sampling import calibrate as find
    from devmon.snapshot import weights_digest
    from devmon.store.trajectory import Trajectory

    if out is not None and out.suffix not in (".png", ".svg", ".pdf"):
        raise DevmonError(f"-o takes a .png, .svg or .pdf file, got {out}")
    model, instrument = load_source(source)
    if not isinstance(instrument.sampler, str):
        raise DevmonError(f"the LLC of {source} has a kernel with its own lr: name the kernel, as in sampler='baoab'")
    series = checkpoint_series(checkpoints)
    steps = dict(zip(("late", "middle"), late_and_middle(list(series), late, middle), strict=False))
    models = [with_weights(model, series[step], prefix) for step in steps.values()]
    beside = next(iter(series.values())).resolve().parent.parent / "trajectory.zarr"
    run = beside if into is None and (beside / "zarr.json").is_file() else into
    trajectory = None if run is None else Trajectory(_open(run).path)
    given = {k: v for k, v in _settings(instrument).items() if k not in FOUND and not (k == "nbeta" and v is None)}
    fields = identity(instrument)["fields"]
    record: dict[str, Any] = {
        **{name: fields[name] for name in ("data", "loss", "mask")},
        "source": source.replace("\\", "/").rpartition("/")[2],
        "steps": steps,
        "weights": [weights_digest(model) for model in models],
        "tolerance": tolerance,
        "max_steps": max_steps,
        "settings": given,
    }
    _refuse_another(trajectory, record, force)  # before anything is computed
    names = Settings.__dataclass_fields__.keys() & instrument.__dataclass_fields__.keys()
    start = Settings(**{name: getattr(instrument, name) for name in names})
    told = ", ".join(f"{name} checkpoint: step {step}" for name, step in steps.items())
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    errors.print(f"{told} ({len(series)} in the series); sampling can take minutes")
    try:
        with errors.status("sampling") as status:
            found = find(models, instrument.loss, instrument.data, start, tolerance=tolerance, max_steps=max_steps,
                         progress=status.update if errors.is_terminal else errors.print)  # fmt: skip
    except InstrumentError as error:
        raise InstrumentError(f"{error} ({told}; --late and --middle give others)") from error
    settings = _settings(found.settings)
    rounded = ("lr", "gamma") if instrument.nbeta is not None else ("lr", "gamma", "nbeta")
    settings |= {name: float(f"{settings[name]:.4g}") for name in rounded}  # the line and the stored are one thing
    trials = {str(name): _as_json(column.values) for name, column in found.trials.items()}
    record |= {
        "settings": settings,
        "reasons": found.reasons,
        "flat": found.flat,
        "systematic": found.systematic,
        "trials": trials,
    }
    Console().print(trials_table(found.trials, steps))
    typer.echo(f"\n{found.reasons}\n\n{llc_line(settings)}")
    if out is not None:
        from devmon.analysis import plots

        out.parent.mkdir(parents=True, exist_ok=True)
        with plots.style():
            plots.plot_calibration(found.trials)[0].savefig(out)
        errors.print(f"drawn: {safe(out)}")
    if trajectory is None:
        errors.print(f"no run lies beside the checkpoints ({safe(beside)}): nothing is stored; --into RUN stores it")
    else:
        _refuse_another(trajectory, record, force)
        trajectory.record(calibration=record)
        errors.print(f'stored: Trajectory("{trajectory.path}").attrs["calibration"]', markup=False)


@app.command()
def show(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay, and show what is committed (Ctrl-C ends it).")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How often --follow looks.")] = 2.0,
) -> None:  # fmt: skip
    """Say what a run holds: its provenance, and each watch with its instrument, steps, failures and latest values."""
    import time

    from rich.console import Console

    console = Console()
    if not follow:
        console.print(run_view(_open(run), run))
        return
    seen: object = None
    try:
        while True:
            trajectory = _open(run)
            now = {name: (trajectory.steps(name), len(trajectory.failures(name))) for name in trajectory}
            if now != seen:
                if console.is_terminal:
                    console.clear()
                console.print(run_view(trajectory, run))
                seen = now
            time.sleep(every)
    except KeyboardInterrupt:
        pass


@app.command()
def watch(
    run: Run,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")] = 8765,
    every: Annotated[float, typer.Option(min=0.5, metavar="SECONDS", help="How often to look for new steps.")] = 10.0,
) -> None:
    """Serve the report of a run to this machine alone, made again as steps are committed. Its events are provisional."""
    import threading

    from devmon.live.server import live_report, server
    from devmon.store.place import store_path

    try:
        serving = server(live := live_report(store_path(run), every), port)
    except OSError as error:
        raise DevmonError(f"port {port} cannot be opened ({error.strerror}): choose another with --port") from error
    stop = threading.Event()
    told = lambda line: typer.echo(line, err=True)  # noqa: E731
    threading.Thread(target=live.follow, args=(stop, told), daemon=True).start()
    typer.echo(f"http://127.0.0.1:{serving.server_port}/ (Ctrl-C ends it)")
    try:
        serving.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        stop.set()
        serving.server_close()


@app.command()
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
    from devmon.analysis.reports.writers import WRITERS
    from devmon.files import write_whole

    if out is not None and out.suffix not in WRITERS:
        raise DevmonError(f"-o takes a file that ends in {', '.join(WRITERS)}, got {out.name!r}")
    short = [Path(one.rstrip("/")).name for one in runs]
    names = short if len(set(short)) == len(short) else runs
    if len(set(names)) < 2:
        raise DevmonError("compare takes two runs or more, each named once")
    opened = {name: _open(run) for name, run in zip(names, runs, strict=True)}
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


@app.command()
def report(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", help="A .html, .md or .json file.")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="Also write the figures as PNG files into this folder.")] = None,
) -> None:
    """Write the report of a run, as one HTML file that opens offline, as Markdown (-o report.md) or JSON (-o report.json)."""
    from devmon.analysis import report as write

    typer.echo(write(_open(run), out, figures=figures))


@app.command()
def compact(
    run: Run,
    out: Annotated[str | None, typer.Option("-o", "--out", metavar="COPY", help="Write a small copy here instead: a folder, or a URL.")] = None,
) -> None:  # fmt: skip
    """Fold a run's new rows into its Zarr groups, or write a consolidated, sharded, compressed copy (-o copy.zarr)."""
    from devmon.store.compact import compact as write
    from devmon.store.trajectory import Trajectory

    trajectory = _open(run)
    if out is None:
        Trajectory(trajectory.path).fold()
        typer.echo(trajectory.path)
    else:
        typer.echo(write(trajectory, out))


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", help="A name that ends in .nc, .parquet, .csv or .zarr.")],
    watch: Annotated[str | None, typer.Option(show_default="all", help="Take this watch alone.")] = None,
) -> None:
    """Write a run as netCDF, Parquet, CSV or plain Zarr.

    CSV and Parquet hold the numbers without a dimension but step, one a line: watch, variable, step, value, se, units,
    verdict; LLC traces give the derived llc. netCDF and Zarr hold everything, one group a watch.
    """
    from devmon.store.export import export as write

    typer.echo(write(_open(run), out, watch=watch))


@app.command(no_args_is_help=True)
def measure(
    series: Annotated[str | None, typer.Argument(metavar="SERIES", help="A folder of checkpoints, or owner/name on the Hugging Face hub.")] = None,
    into: Annotated[str | None, typer.Option(metavar="RUN", help="The run to write into, made where there is none.")] = None,
    source: Annotated[str | None, typer.Option(help="path/to/script.py:name or package.module:name: the model, the watches, or (model, watches).")] = None,
    preset: Annotated[str | None, typer.Option(help="economy, standard or full: the usual watches for a language model.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="PATH", help="The preset's probe batch: tokens (batch, pos) in a .npy, .pt or .safetensors file; or text to make it of: a file, a folder, a dataset on disk.")] = None,
    tokenizer: Annotated[str | None, typer.Option(show_default="the series'", help="What makes tokens of text: a folder, or owner/name on the hub.")] = None,
    sequences: Annotated[int | None, typer.Option(min=1, show_default="64 of text", help="Sequences of the probe batch.")] = None,
    length: Annotated[int | None, typer.Option(min=2, show_default="256 of text", help="Tokens of a sequence.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=2, show_default="the model's", help="Of the preset's random tokens.")] = None,
    bos: Annotated[int | None, typer.Option(min=0, help="The token that stands first, for the preset.")] = None,
    llc: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Add an LLC with this setting (repeatable), as in nbeta=30; examples=N is the number of its sequences.")] = None,
    watch: Annotated[list[str] | None, typer.Option(help="Only this watch (repeatable).")] = None,
    steps: Annotated[str | None, typer.Option(show_default="all", help="all, log:40, every:100, 0,10,20, 100-500, or several with commas.")] = None,
    pattern: Annotated[str | None, typer.Option(help="A regular expression with one group: the step in the checkpoints' names.")] = None,
    prefix: Annotated[str | None, typer.Option(help="What the checkpoints' keys start with (net.), where several would do.")] = None,
    dtype: Annotated[str | None, typer.Option(show_default="float32", help="Of models that the checkpoints bring themselves.")] = None,
    seed: Annotated[int | None, typer.Option(help="The run's seed.", show_default="the run's, or 0")] = None,
    allow_pickle: Annotated[bool | None, typer.Option("--allow-pickle", help="Read checkpoints that hold more than weights, which runs code they hold.")] = None,
    forget: Annotated[bool | None, typer.Option("--forget", help="Keep no revision of the hub on disk once it is measured.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, show_default="1", help="Processes, tasks or jobs at once: one thread each, or one GPU each.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, show_default="torch's of a single process, else 1", help="CPU threads of each.")] = None,
    engine: Annotated[str | None, typer.Option(show_default="processes", help="processes of this machine, ray or slurm.")] = None,
    options: Annotated[list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Of the engine (repeatable), as in num_gpus=1 (ray) or slurm_partition=gpu (slurm).")] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Do this part of N, for any scheduler of jobs.")] = None,
    device: Annotated[str | None, typer.Option(show_default="cuda where there is one", help="Where the model is put.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file of these options, series and into included.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured and what it costs; write nothing.")] = False,
) -> None:  # fmt: skip
    """Measure checkpoints that lie on disk or on the hub: the same instruments and numbers as during training.

    What the run holds is skipped, so an interrupted command goes on when it is given again. Checkpoints that cannot be
    read or do not fit, and instruments that fail, are named and recorded; the others are measured, and the exit code is 1.
    """
    given = {name: value for name, value in locals().items() if name not in ("config", "dry_run") and value != []}
    from devmon.offline.plan import Plan

    plan = Plan.read(config, given)
    if plan.engine == "processes" and plan.workers > 1 and not dry_run:
        from devmon.offline.engines import forkserver

        forkserver.start(plan)
    from devmon.offline.run import run

    raise typer.Exit(run(plan, dry_run))


def main() -> None:
    """Entry point: errors of devmon are one line on standard error and exit code 1."""
    try:
        app()
    except DevmonError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def llc_line(settings: Mapping[str, Any]) -> str:
    """The call of `LLC` with the calibrated settings, and those of the others that are not the defaults."""
    from devmon.instruments import LLC

    defaults = {name: field.default for name, field in LLC.__dataclass_fields__.items()}
    first = {name: settings[name] for name in ("nbeta", *FOUND)}
    others = {name: value for name, value in settings.items() if name not in first and value != defaults[name]}
    words = [f"{name}={value!r}" for name, value in (first | others).items()]
    return f"LLC(data, loss, {', '.join(words)}{'' if 'mask' in settings else ', mask=mask'})"


def _settings(settings: Any) -> dict[str, Any]:
    """The keyword arguments of `LLC` that JSON can hold: all but data, loss, and a mask of tensors."""
    from devmon.instruments import LLC
    from devmon.store.rows import plain

    values = {name: getattr(settings, name) for name in LLC.__dataclass_fields__ if name not in ("data", "loss")}
    patterns = values["mask"] if isinstance(values["mask"], list | tuple) else [values["mask"]]
    if not all(pattern is None or isinstance(pattern, str) for pattern in patterns):
        del values["mask"]
    return plain(values)


def _refuse_another(trajectory: Any, record: Mapping[str, Any], force: bool) -> None:
    """`IdentityError` where the run holds a calibration that was asked otherwise or chose other settings."""
    from devmon.errors import IdentityError

    held = None if trajectory is None else trajectory.attrs.get("calibration")
    if held is None or force:
        return
    known = held if isinstance(held, Mapping) else {}
    pairs = [(name, known.get(name), now) for name, now in record.items() if name in ASKED]
    pairs += [(name, known.get("settings", {}).get(name), now) for name, now in record["settings"].items()]
    differ = [f"{name}: stored {old}, now {now}" for name, old, now in pairs if old != now]
    if differ:
        raise IdentityError(
            f"{trajectory.path} holds another calibration ({'; '.join(differ)}): --force replaces it, --into gives "
            "another run"
        )


def _as_json(values: Any) -> list[Any]:
    """A column as JSON can hold it: null for NaN and infinity."""
    return [v if isinstance(v, str) or math.isfinite(v) else None for v in values.tolist()]


def _open(run: str | Path) -> Any:
    from devmon.store.place import store_path
    from devmon.store.trajectory import Trajectory

    return Trajectory(store_path(run), "r")
