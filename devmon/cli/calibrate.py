"""`devmon calibrate`: the LLC's step size and localisation from a series of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from devmon.cli.arguments import open_run
from devmon.console import safe, trials_table
from devmon.errors import DevmonError

ASKED = ("data", "loss", "mask", "steps", "weights", "tolerance", "max_steps")  # of a calibration
FOUND = ("gamma", "lr", "control_variate", "steps_per_draw")  # by a calibration


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
    trajectory = None if run is None else Trajectory(open_run(run).path)
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
