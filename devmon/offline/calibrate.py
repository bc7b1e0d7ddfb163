"""The LLC's step size and localisation from a series: sampled at a late and a middle checkpoint, kept in the run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from devmon.checkpoints.pretrained import causal_lm
from devmon.checkpoints.series import Checkpoint, Series
from devmon.checkpoints.weights import fitting
from devmon.errors import DataError, DevmonError, IdentityError, InstrumentError
from devmon.instruments import LLC
from devmon.monitoring.fingerprint import identity
from devmon.monitoring.isolation import private_copy
from devmon.offline.source import late_and_middle, load_source
from devmon.sampling import Calibration, Settings, calibrate
from devmon.snapshot import weights_digest
from devmon.store.place import store_path
from devmon.store.rows import plain
from devmon.store.trajectory import Trajectory

ASKED = (
    "data",
    "loss",
    "mask",
    "steps",
    "weights",
    "tolerance",
    "max_steps",
    "budget",
)  # what a calibration is asked with
CHOSEN = ("gamma", "lr", "control_variate", "steps_per_draw")
DIGITS = 4  # of the chosen numbers: far finer than λ̂ can tell apart, and short enough to paste


@dataclass(frozen=True)
class SeriesCalibration:
    """What was chosen on the checkpoints of a series.

    - `calibration`: the trials (an xarray dataset), the reasons, and how sure the choice is.
    - `record`: what a run keeps of it, in values that JSON can hold: what was asked, `steps` of the checkpoints by
      their names (late, middle), the chosen `settings` (keyword arguments of `LLC`), the reasons and the trials.
    - `trajectory`: the run that it belongs to, None where there is none.
    - `beside`: where a run beside the checkpoints would lie.
    """

    calibration: Calibration
    record: dict[str, Any]
    trajectory: Trajectory | None
    beside: Path

    @property
    def settings(self) -> dict[str, Any]:
        return self.record["settings"]

    @property
    def line(self) -> str:
        """The call of `LLC` with the chosen settings, and those of the others that are not its defaults."""
        defaults = {entry.name: entry.default for entry in fields(LLC)}
        first = {name: self.settings[name] for name in ("nbeta", *CHOSEN)}
        others = {n: value for n, value in self.settings.items() if n not in first and value != defaults[n]}
        words = [f"{name}={value!r}" for name, value in (first | others).items()]
        return f"LLC(data, loss, {', '.join(words)}{'' if 'mask' in self.settings else ', mask=mask'})"

    def store(self, force: bool = False) -> None:
        """Keep the record in the run, as `attrs["calibration"]`.

        Raises DevmonError where there is no run, and IdentityError where it holds another calibration, unless `force`.
        """
        if self.trajectory is None:
            raise DevmonError(
                f"no run lies beside the checkpoints ({self.beside}): name one with into=RUN (--into RUN)"
            )
        _refuse_another(self.trajectory, self.record, force)
        self.trajectory.record(calibration=self.record)


def calibrate_series(
    source: str,
    checkpoints: str | os.PathLike[str],
    *,
    into: str | os.PathLike[str] | None = None,
    late: int | None = None,
    middle: int | None = None,
    tolerance: float = 0.02,
    max_steps: int = 3000,
    budget: float | None = None,
    prefix: str | None = None,
    pattern: str | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> SeriesCalibration:
    """Choose the settings of an LLC by short trials on two checkpoints of a series; nothing is written.

    - `source`: path/to/script.py:name or package.module:name of a function that returns (model, LLC(...)), or the LLC
      alone for checkpoints that bring their architecture (transformers').
    - `checkpoints`: any `Series`, whatever loop saved it: a folder, the run's folder in which `checkpoints/` lies, or
      owner/name on the hub. `pattern` and `allow_pickle` are the series' own.
    - `into`: the run that the choice is for; by default the one beside the checkpoints, if there is one.
    - `late`, `middle`: steps of the checkpoints; by default the last, and the one in the middle of the series by count.
    - `tolerance`, `max_steps`, `budget`: of `devmon.sampling.calibrate`.
    - `prefix`: what the checkpoints' keys start with, where several would do.
    - `progress`: hears which checkpoints are taken, then of each trial.

    Raises DataError where source and checkpoints do not fit, IdentityError before anything is computed where the run
    holds the answer to another question (unless `force`), InstrumentError where no setting runs healthily.
    """
    # what is asked: the LLC, the weights of the two steps, and the run that may hold an answer
    model, instrument = load_source(source)
    if not isinstance(instrument.sampler, str):
        raise DevmonError(f"the LLC of {source} has a kernel with its own lr: name the kernel, as in sampler='baoab'")
    series = Series.open(checkpoints, pattern=pattern, allow_pickle=allow_pickle)
    if model is None and not series.pretrained:
        raise DataError(f"the checkpoints of {series.name} bring no config.json: let {source} return (model, LLC(...))")
    steps = dict(zip(("late", "middle"), late_and_middle(series.steps, late, middle), strict=False))
    config = series.config()
    models = [_filled(model, series.read(step), config, prefix) for step in steps.values()]
    places = [place.resolve() for place in series.places.values() if isinstance(place, Path)][:1]
    folders = [folder for place in places for folder in (place.parent.parent, place.parent)] or [Path(series.name)]
    stores = [folder / "trajectory.zarr" for folder in folders]
    beside = next((store for store in stores if (store / "zarr.json").is_file()), stores[0])
    run = beside if into is None and (beside / "zarr.json").is_file() else into
    trajectory = None if run is None else Trajectory(Trajectory(store_path(run), "r").path)  # "r" makes none
    described = identity(instrument)["fields"]
    kept = {n: value for n, value in _as_keywords(instrument).items() if n not in CHOSEN}
    if instrument.nbeta is None:
        del kept["nbeta"]  # then it is chosen too
    asked = {
        **{name: described[name] for name in ("data", "loss", "mask")},
        "source": source.replace("\\", "/").rpartition("/")[2],
        "steps": steps,
        "weights": [weights_digest(model) for model in models],
        "tolerance": tolerance,
        "max_steps": max_steps,
        **({} if budget is None else {"budget": budget}),
        "settings": kept,
    }
    _refuse_another(trajectory, asked, force)

    # the trials, from the instrument's own settings
    chosen_steps = ", ".join(f"{name} checkpoint: step {step}" for name, step in steps.items())
    progress(f"{chosen_steps} ({len(series.steps)} in the series); sampling can take minutes")
    try:
        answer = calibrate(
            models,
            instrument.loss,
            instrument.data,
            instrument,
            tolerance=tolerance,
            max_steps=max_steps,
            budget=budget,
            progress=progress,
        )
    except InstrumentError as error:
        raise InstrumentError(f"{error} ({chosen_steps}; --late and --middle give others)") from error

    # the record: rounded, so that the line to paste and what is stored are one instrument
    settings = _as_keywords(answer.settings)
    for name in ("lr", "gamma", *(("nbeta",) if instrument.nbeta is None else ())):
        settings[name] = float(f"{settings[name]:.{DIGITS}g}")
    record = asked | {
        "settings": settings,
        "reasons": answer.reasons,
        **{name: getattr(answer, name) for name in ("flat", "systematic", "missing", "cost")},
        "slope": answer.slope if math.isfinite(answer.slope) else None,
        "fits": [plain(vars(fit)) for fit in answer.fits],
        "trials": {str(name): _as_json(column.values) for name, column in answer.trials.items()},
    }
    return SeriesCalibration(answer, record, trajectory, beside)


def _filled(
    model: nn.Module | None, checkpoint: Checkpoint, config: Mapping[str, Any], prefix: str | None
) -> nn.Module:
    """A copy of the model with the weights of a checkpoint; without one, the model that the checkpoint brings."""
    if model is None:
        return causal_lm(checkpoint, dict(config), torch.float32)
    twin = private_copy(model)
    twin.load_state_dict(fitting(twin, checkpoint.state, checkpoint.name, prefix), strict=False)  # fitting is strict
    return twin


def _as_keywords(settings: Settings) -> dict[str, Any]:
    """The keyword arguments of `LLC` that JSON can hold: all but data, loss, and a mask of tensors."""
    values = {entry.name: getattr(settings, entry.name) for entry in fields(Settings)}
    patterns = values["mask"] if isinstance(values["mask"], list | tuple) else [values["mask"]]
    if not all(pattern is None or isinstance(pattern, str) for pattern in patterns):
        del values["mask"]
    return plain(values)


def _refuse_another(trajectory: Trajectory | None, record: Mapping[str, Any], force: bool) -> None:
    """`IdentityError` where the run holds a calibration that was asked otherwise or chose other settings."""
    held = None if trajectory is None else trajectory.attrs.get("calibration")
    if trajectory is None or held is None or force:
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


def _as_json(values: np.ndarray) -> list[Any]:
    """A column as JSON can hold it: null for NaN and infinity."""
    return [v if isinstance(v, str) or math.isfinite(v) else None for v in values.tolist()]
