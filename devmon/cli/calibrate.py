"""`devmon calibrate`: the LLC's step size and localisation from a series of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from devmon.console import safe, trials_table
from devmon.errors import DevmonError

SOURCE = typer.Argument(metavar="SOURCE", help="path/to/script.py:name or package.module:name.")
CHECKPOINTS = typer.Argument(
    metavar="CHECKPOINTS", help="A folder of checkpoints of any loop, the run's folder, or owner/name on the hub."
)
INTO = typer.Option(
    metavar="RUN", show_default="the one beside the checkpoints", help="The run to write the choice into."
)
LATE_OPTION = typer.Option(show_default="the last", help="Step of the late checkpoint.")
MIDDLE = typer.Option(show_default="in the middle of the series, by count", help="Step of the middle checkpoint.")
TOLERANCE_OPTION = typer.Option(min=0.001, max=0.5, help="Error that the settings may cause, as a share of the LLC.")
MAX_STEPS = typer.Option(min=1, help="Sampler steps that one chain of an estimate may cost.")
BUDGET = typer.Option(
    min=1, show_default="three estimates", help="Examples whose gradients the trials may take, all together."
)
PREFIX = typer.Option(help="What the checkpoint's keys start with (net.), where several would do.")
PATTERN = typer.Option(help="A regular expression with one group: the step in the checkpoints' names.")
ALLOW_PICKLE = typer.Option(
    "--allow-pickle", help="Read checkpoints that hold more than weights, which runs their code."
)
OUT = typer.Option("-o", "--out", help="Also draw the trials into this file (calibration.png).")
FORCE = typer.Option("--force", help="Replace another calibration that the run holds.")


def calibrate(
    source: Annotated[str, SOURCE],
    checkpoints: Annotated[Path, CHECKPOINTS],
    into: Annotated[str | None, INTO] = None,
    late: Annotated[int | None, LATE_OPTION] = None,
    middle: Annotated[int | None, MIDDLE] = None,
    tolerance: Annotated[float, TOLERANCE_OPTION] = 0.02,
    max_steps: Annotated[int, MAX_STEPS] = 3000,
    budget: Annotated[float | None, BUDGET] = None,
    prefix: Annotated[str | None, PREFIX] = None,
    pattern: Annotated[str | None, PATTERN] = None,
    allow_pickle: Annotated[bool, ALLOW_PICKLE] = False,
    out: Annotated[Path | None, OUT] = None,
    force: Annotated[bool, FORCE] = False,
) -> None:
    """Find the LLC's lr and gamma, by short trials on a late and a middle checkpoint.

    SOURCE names a function without arguments that returns (model, LLC(...)): an untrained model, and the LLC with its
    data, loss, nbeta, batch size, kernel and mask; its lr and gamma are what is looked for. Checkpoints of transformers
    bring their model: SOURCE may then return the LLC alone. The trials are printed with
    the reasons and the line to paste. The run keeps them: LLC(data, loss, **run.attrs["calibration"]["settings"]).
    """
    from rich.console import Console

    from devmon.offline.calibrate import calibrate_series

    if out is not None and out.suffix not in (".png", ".svg", ".pdf"):
        raise DevmonError(f"-o takes a .png, .svg or .pdf file, got {out}")
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    with errors.status("reading the checkpoints") as status:
        chosen = calibrate_series(
            source, checkpoints, into=into, late=late, middle=middle, tolerance=tolerance, max_steps=max_steps,
            budget=budget, prefix=prefix, pattern=pattern, allow_pickle=allow_pickle, force=force,
            progress=status.update if errors.is_terminal else errors.print,
        )  # fmt: skip
    trials = chosen.calibration.trials
    Console().print(trials_table(trials, chosen.record["steps"]))
    typer.echo(f"\n{chosen.record['reasons']}\n\n{chosen.line}")
    if out is not None:
        from devmon.analysis import plots

        out.parent.mkdir(parents=True, exist_ok=True)
        with plots.style():
            plots.plot_calibration(trials, chosen.record["fits"])[0].savefig(out)
        errors.print(f"drawn: {safe(out)}")
    if chosen.trajectory is None:
        errors.print(
            f"no run lies beside the checkpoints ({safe(chosen.beside)}): nothing is stored; --into RUN stores it"
        )
        return
    chosen.store(force)
    errors.print(f'stored: Trajectory("{chosen.trajectory.path}").attrs["calibration"]', markup=False)
