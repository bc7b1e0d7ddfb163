"""What the commands print: rich tables of a run, of events, of costs and of a calibration's trials."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def run_view(trajectory: Any, run: str, held: Any = None) -> Any:
    """What `devmon show` prints: provenance, a table of the watches, a table of the latest values."""
    from rich.console import Group
    from rich.text import Text

    from devmon.analysis.reports.prose.run_words import alarms, one_set_of_weights, skipped, steps_of
    from devmon.analysis.run import ReadOnce, same_weights

    attrs, held = trajectory.attrs, held or ReadOnce(trajectory)
    title = Text(str(attrs.get("title", run)), style="bold")
    parts: list[Any] = [title.append(f"  run {attrs['run_id']}, seed {attrs['seed']}, {attrs['created']}", "not bold")]
    if left_out := skipped(attrs):
        parts.append(Text(f"left out to keep max_overhead: {left_out}"))
    if late := steps_of({name: [int(at) for at in steps] for name, steps in attrs.get("meant", {}).items()}):
        parts.append(Text(f"measured at the next step reached, for training passed over the one that was due: {late}"))
    if words := one_set_of_weights(same_weights(held)):
        parts.append(Text(f"{words}: check their files"))
    parts += [Text(line) for line in alarms(attrs)]
    return Group(*parts, watches_table(held, trajectory), latest_table(held))


def watches_table(held: Any, trajectory: Any) -> Any:
    """Each watch of a run (`devmon.analysis.run.ReadOnce`): its instrument, steps, failures and seconds."""
    from rich.table import Table

    table = Table("watch", "instrument", "steps", "from", "to", "failed", "seconds", box=None, header_style="bold")
    for name in held.names():
        dataset = held[name]
        steps = dataset["step"].values
        seconds = f"{float(dataset['seconds'].sum()):.1f}" if steps.size else ""
        first, last = (str(steps[0]), str(steps[-1])) if steps.size else ("", "")
        instrument, failed = dataset.attrs["instrument"].rsplit(".", 1)[-1], len(trajectory.failures(name)) or ""
        table.add_row(safe(name), safe(instrument), str(steps.size), first, last, str(failed), seconds)
    return table


def latest_table(held: Any) -> Any:
    """Each series of the whole run: its course in a line, its first value, and its latest with the error."""
    from rich.table import Table

    from devmon.analysis.derive.watch_series import series_of

    table = Table(box=None, header_style="bold", pad_edge=False)
    # the unit goes first where the console is narrow
    for column, least in {"series": 10, "course": 10, "first": 8, "latest": 15}.items():
        table.add_column(column, no_wrap=True, min_width=least)
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=40)
    for series in series_of(held, each=False):
        if len(series.values):
            error = f" ± {series.se[-1]:.2g}" if series.se is not None else ""
            first, latest = (f"{series.values[end]:.4g}" for end in (0, -1))
            refused = series.rejected is not None and series.rejected[-1]
            about = "rejected by the sampler's checks" if refused else safe(series.units)
            course = sparkline([float(v) for v, good in zip(series.values, series.good, strict=True) if good])
            table.add_row(safe(series.name), course, first, latest + error, about)
    return table


BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 10) -> str:
    """Finite values in their order as at most `width` bars, each the mean of as many neighbours.

    >>> sparkline([0, 0, 1, 2, 3, 3]), sparkline([1.0, 1.0]), sparkline([])
    ('▁▁▃▆██', '▁▁', '')
    """
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, spread = min(means), max(means) - min(means)
    places = [0 if spread == 0 else round((mean - low) / spread * (len(BARS) - 1)) for mean in means]
    return "".join(BARS[place] for place in places)


def list_table(lines: Mapping[str, str]) -> Any:
    """Names, each with a line about it."""
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    for name, text in lines.items():
        table.add_row(safe(name), safe(text))
    return table


def variables_table(variables: Sequence[Any]) -> Any:
    """What an instrument returns (`devmon.cli.describe.Variable`), with a column of nulls where there are any."""
    from rich.table import Table

    table = Table("returns", "dims", "unit", "meaning", box=None, header_style="bold")
    table.columns[0].no_wrap = True
    nulls = any(variable.null for variable in variables)
    if nulls:
        table.add_column("null")
    for variable in variables:
        cells = (variable.name, variable.dims, variable.unit, variable.meaning, variable.null)
        table.add_row(*map(safe, cells if nulls else cells[:-1]))
    return table


def plain_table(table: Any) -> Any:
    """A table of a report as a rich one."""
    from rich.table import Table

    shown = Table(box=None, header_style="bold", caption=safe(table.note) or None, caption_justify="left")
    for i, column in enumerate(table.columns):
        shown.add_column(safe(column), overflow="fold", no_wrap=bool(i))
    for row in table.rows:
        shown.add_row(*map(safe, row.cells), style="dim" if row.weak else "")
    return shown


def events_table(detection: Any) -> Any:
    """Every series with its events, or the outcome NO EVENT, UNRESOLVED or SAMPLER REJECTED, as something that rich
    prints: a table, or, where the console is too narrow for the names, the events of each series under its name."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for name, fit in detection.fits.items():
        cells = []
        for e in (event for event in detection.events if event.series == name):
            word, width = e.word + ("" if e.resolved else "*"), "" if e.width is None else f"{e.width:.2f}"
            where = (f"{e.step:.0f}", f"{e.interval[0]:.0f} to {e.interval[1]:.0f}")
            chance = ["<.001" if p < 0.0005 else f"{p:.3f}" for p in (e.p_value, e.q_value)]
            cells.append((word, *where, f"{e.size:+.3g}", width, *chance))
        rows[safe(name)] = cells or [(fit.outcome, *[""] * (len(EVENT_COLUMNS) - 1))]
    caption = (
        f"{len(detection.fits)} series, {detection.family} tests in the q-values. * the place, width or abruptness is "
        "not resolved: the report names the steps to add"
    )
    return _Events(rows, caption)


# columns of an event, with the widest of what usually stands there
EVENT_COLUMNS = {"outcome": 16, "step": 8, "90% interval": 18, "size": 9, "decades": 7, "p": 5, "q": 5}


@dataclass(frozen=True)
class _Events:
    """Rows of events by the name of their series."""

    rows: Mapping[str, Sequence[Sequence[str]]]
    caption: str

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.table import Table
        from rich.text import Text

        whole = Table(box=None, header_style="bold", caption_justify="left", caption=self.caption)
        for column in ("series", *EVENT_COLUMNS):
            whole.add_column(column, no_wrap=True)
        for name, events in self.rows.items():
            for cells in events:
                whole.add_row(name, *cells)
        if console.measure(whole, options=options.update(max_width=10_000)).maximum <= options.max_width:
            yield whole
            return
        # too narrow: names stand alone and are never broken
        for i, (name, events) in enumerate(self.rows.items()):
            yield Text(name, style="bold", no_wrap=True, overflow="ignore")
            part = Table(box=None, show_header=i == 0, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
            part.add_column("", width=1)
            for column, width in EVENT_COLUMNS.items():
                part.add_column(column, width=width, overflow="fold")
            for cells in events:
                part.add_row("", *cells)
            yield part
        yield Text(self.caption, style="italic dim")


def cost_table(
    estimates: Sequence[Any], training: int | None, parameters: int | None = None, together: int | None = None
) -> Any:
    """A rich table of `devmon.cost.Estimate`s; `training` is the work of the training itself, in tokens, `parameters`
    how many the model has, where that is known, and `together` the memory of an observation with all watches."""
    from rich.table import Table

    caption = (
        "work: all that is done, in tokens passed forward (a backward pass counts as two), of each watch alone; "
        "shared: passes of the same tokens, which are made once"
    )
    if training is not None:
        caption += "; share: of a training step's forward and backward passes"
    copies = any(e.cost is not None and e.cost.copies is not None for e in estimates)
    memory = copies or any(e.memory is not None for e in estimates)
    if memory:
        caption += "; memory: at most, beside the model" + (" and, of copies of it, the activations" if copies else "")
    table = Table(box=None, header_style="bold", caption_justify="left", caption=caption)
    columns = ("watch", "instrument", "forwards", "backwards", "positions", "observations", "work")
    for column in (*columns, "memory") if memory else columns:
        table.add_column(column, justify="left" if column in ("watch", "instrument") else "right")
    if training is not None:
        table.add_column("share", justify="right")

    def add(
        name: str, kind: str, passes: Sequence[str], observations: str, work: int | None, style: str, held: str
    ) -> None:
        cells = [safe(name), safe(kind), *passes, observations, "unknown" if work is None else f"{work:.3g}"]
        if memory:
            cells.append(held)
        if training is not None:
            cells.append("" if work is None or not training else f"{work / training:.1%}")
        table.add_row(*cells, style=style)

    for e in estimates:
        passes, held = [""] * 3, ""
        if e.cost is not None and e.cost.copies is not None:
            held = f"{e.cost.copies:g} copies" if parameters is None else _gigabytes(e.cost.bytes(parameters))
        elif e.memory is not None:
            held = _gigabytes(e.memory)
        if e.cost is not None:
            passes = [f"{number:,}" for number in (e.cost.forwards, e.cost.backwards, e.cost.positions)]
        add(e.name, e.instrument, passes, f"{e.observations:,}", e.work, "", held)
    saved = sum(e.saved for e in estimates)
    if saved:
        add("shared", "", [""] * 3, "", -saved, "", "")
    work = sum(e.work for e in estimates if e.work is not None) - saved
    add("all", "", [""] * 3, "", work, "bold", "" if together is None else _gigabytes(together))
    return table


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def trials_table(trials: Any, steps: Mapping[str, int]) -> Any:
    """A rich table of a calibration's trials, those at the chosen lr and gamma in bold."""
    from rich.table import Table

    words = {"lr": "lr", "gamma": "gamma", "llc": "LLC", "se": "se", "ess": "ESS", "rhat": "R̂", "temperature": "temp."}
    numbers = {name: column for name, column in words.items() if name in trials}
    table = Table(box=None, header_style="bold")
    for column in ("checkpoint", *numbers.values(), "verdict"):
        table.add_column(column, no_wrap=True)
    names = [f"{name} {step}" for name, step in steps.items()]
    for i in range(trials.sizes["trial"]):
        row = {str(name): values.values[i] for name, values in trials.items()}
        chosen = all(row[name] == trials.attrs[name] for name in ("lr", "gamma"))
        cells = [f"{row[name]:.3g}" for name in numbers]
        table.add_row(names[int(row["model"])], *cells, safe(row["verdict"]), style="bold" if chosen else "")
    return table


def safe(text: object) -> str:
    from rich.markup import escape

    return escape(str(text))
