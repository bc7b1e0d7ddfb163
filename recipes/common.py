"""What the recipes share: a run that resumes, numbers checked against intervals, errors in one line."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import math
import sysconfig
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from devmon import DevmonError, Trajectory, Watch, observe
from devmon.analysis import Detection
from devmon.analysis.reports.findings import examine
from devmon.analysis.reports.report import content_of
from devmon.analysis.reports.writers import WRITERS
from devmon.callbacks import CheckpointSeries, Monitor, checkpoints, latest
from devmon.files import write_whole
from devmon.offline.source import with_weights
from devmon.recipes.progress import Bar, quiet


@dataclass(frozen=True)
class Check:
    """A number of a study, the interval that it has to lie in, and what was published (or is exact)."""

    what: str
    value: float
    low: float = -math.inf
    high: float = math.inf
    published: str = ""

    @property
    def holds(self) -> bool:
        return self.low <= self.value <= self.high

    @property
    def interval(self) -> str:
        return f"{_text(self.low)} … {_text(self.high)}"


def fit(
    out: Path,
    make: Callable[[], L.LightningModule],
    watches: Iterable[Watch],
    *,
    steps: int,
    saved: Container[int],
    seed: int,
    console: Console,
    accelerator: str = "cpu",
    units: str = "nats",
    **attrs: Any,
) -> Trajectory:
    """Train `make()` for `steps`, watched; goes on from the last checkpoint of `out`. `attrs` are kept with the run.

    `units` are those of the training loss.
    """
    torch.set_num_threads(1)  # as fast as two for models this small, and the same numbers on any machine
    trajectory = Trajectory(out / "trajectory.zarr", seed=seed, threads=torch.get_num_threads(), **attrs)
    torch.manual_seed(seed)
    monitor = Monitor(trajectory, watches, strict=True)
    train(out, make(), [monitor], steps=steps, saved=saved, console=console, accelerator=accelerator, units=units)
    return trajectory


def train(
    out: Path,
    training: L.LightningModule,
    monitors: Iterable[L.Callback],
    *,
    steps: int,
    saved: Container[int],
    console: Console,
    accelerator: str = "cpu",
    units: str = "nats",
) -> None:
    """`fit` for monitors of one's own."""
    quiet()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*monitors, CheckpointSeries(out / "checkpoints", saved), Bar(console, steps, units)],
    )
    trainer.fit(training, ckpt_path=latest(out / "checkpoints"), weights_only=True)


class Batches(torch.utils.data.IterableDataset[Any]):
    """Batch number `step` is `draw(step)`, so that a resumed run sees what it would have seen."""

    def __init__(self, training: L.LightningModule, draw: Callable[[int], Any]) -> None:
        self.training, self.draw = training, draw

    def __iter__(self) -> Iterator[Any]:
        return map(self.draw, itertools.count(self.training.trainer.global_step))


def batches(training: L.LightningModule, draw: Callable[[int], Any]) -> torch.utils.data.DataLoader[Any]:
    """A data loader of `draw(step)` for the optimizer's steps from where the training stands."""
    return torch.utils.data.DataLoader(Batches(training, draw), batch_size=None)


def measure_checkpoints(
    out: Path,
    model: torch.nn.Module,
    watches: Iterable[Watch],
    trajectory: Trajectory,
    steps: Container[int] = range(10**9),
) -> None:
    """Add watches to a run from the checkpoints that it saved: what is already held is passed over."""
    watches = list(watches)
    held = {watch.name: trajectory.steps(watch.name) if watch.name in trajectory else [] for watch in watches}
    for step, path in checkpoints(out / "checkpoints").items():
        due = [watch for watch in watches if step in steps and step not in held[watch.name]]
        if due:
            observe(step, with_weights(model, path), due, trajectory)
    trajectory.fold()


def write_report(run: Trajectory, out: Path, detection: Detection) -> None:
    """OUT/report.html and OUT/figures/ of a run whose events are known already."""
    content = content_of(examine(run, detection=detection), figures=out / "figures")
    write_whole(out / "report.html", WRITERS[".html"](content, figures="figures").encode())


def conclude(out: Path, checks: Iterable[Check], console: Console, facts: Mapping[str, Any] | None = None) -> None:
    """Print the checks, keep them with the `facts` in OUT/results.json; raises DevmonError where one does not hold."""
    checks = list(checks)
    table = Table("", "measured", "expected", "published", box=None, pad_edge=False)
    for check in checks:
        style = None if check.holds else "red"
        table.add_row(check.what, _text(check.value), check.interval, check.published, style=style)
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    results = _finite({"checks": [asdict(check) for check in checks], **(facts or {})})
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    failed = [f"{check.what}: {_text(check.value)} is outside {check.interval}" for check in checks if not check.holds]
    if failed:
        raise DevmonError("; ".join(failed))


def docstrings() -> list[str]:
    """The docstrings of the top-level modules of the standard library."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(errors="ignore"))
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        texts += [inspect.cleandoc(text) for node in nodes if (text := ast.get_docstring(node)) and len(text) > 80]
    return texts


def packed(texts: list[str], encode: Callable[[str], list[int]], length: int, rows: int, seed: int) -> torch.Tensor:
    """`rows` sequences of the texts, one after another in a random order, drawn again when all were used."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while len(ids) < rows * length:
        for at in torch.randperm(len(texts), generator=generator).tolist():
            ids += encode(texts[at] + "\n")
    return torch.tensor(ids[: rows * length]).view(rows, length)


def crossing(steps: Any, values: Any, level: float, *, last: bool = False) -> float:
    """The step at which a curve first (or last) passes `level`, interpolated in log step; NaN where it never does.

    >>> crossing([0, 9, 99, 999], [4.0, 3.0, 1.0, 0.0], 2.0)
    30.622776601683793
    """
    x, above = np.log10(np.asarray(steps, dtype=float) + 1), np.asarray(values, dtype=float) - level
    at = np.flatnonzero(above[:-1] * above[1:] <= 0)
    if not len(at):
        return math.nan
    i = at[-1 if last else 0]
    share = above[i] / (above[i] - above[i + 1]) if above[i] != above[i + 1] else 0.0
    return float(10 ** (x[i] + share * (x[i + 1] - x[i])) - 1)


@contextmanager
def one_line_errors(console: Console) -> Iterator[None]:
    """Ends the process with one line where something is wrong, or where it is interrupted."""
    try:
        yield
    except DevmonError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("interrupted: what is measured is kept; give the same command to go on", soft_wrap=True)
        raise typer.Exit(130) from None


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """Numbers to four digits, text as it is."""
    drawn = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        drawn.add_row(*(_text(cell) if isinstance(cell, float) else str(cell) for cell in row))
    return drawn


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON cannot write."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: float) -> str:
    return "" if math.isinf(value) else f"{value:.4g}"
