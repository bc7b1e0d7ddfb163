"""Results of lm-evaluation-harness (JSON) as series of a run: a watch a task, a row a step, metrics with errors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from devmon.checkpoints.axis import axis
from devmon.checkpoints.names import Name, tells_step
from devmon.checkpoints.suites import suite_of
from devmon.errors import DataError
from devmon.monitoring.fingerprint import identity
from devmon.store.trajectory import Trajectory

PREFIX = "eval."  # of the watches


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-evaluation-harness, as its results say: what must be equal at all steps."""

    task: str
    version: str
    shots: str
    limit: str


@dataclass(frozen=True)
class Result:
    """One file: the `revision` (or the folder) that names the step, and the metrics of each task with their errors."""

    file: Path
    model: str
    revision: str
    weights: str
    date: float
    tasks: dict[HarnessTask, dict[str, tuple[float, float]]]


@dataclass(frozen=True)
class Read:
    """What was read: `rows` put into the run, those that it `held`, and `said`, what is left out and why."""

    rows: int
    held: int
    said: list[str]


def read_results(
    places: Iterable[Path],
    into: Trajectory,
    *,
    pattern: str | None = None,
    stage: str | None = None,
    branch: str | None = None,
) -> Read:
    """Put the results of files, and of all results*.json in folders, into a run.

    A task is a watch, `eval.arc_easy`, with a variable for each metric and its error `_se` (NaN where the harness gives
    none). The step is told by the revision in the file's model_args, else by its folder, as names of checkpoints tell
    theirs (`devmon.checkpoints.axis`); stages begin where the run has them begin. Of several results of a task and
    step the last counts. Raises DataError where there are none, IdentityError for a task of another version, number
    of shots or limit than the run's.
    """
    results = [_read(file) for place in places for file in _files(place)]
    if not results:
        raise DataError("no results of lm-evaluation-harness there: expected files results*.json, or folders of them")
    models = {result.model for result in results}
    if len(models) > 1:
        raise DataError(f"these results are of several models ({', '.join(sorted(models))}): give each its own run")

    # the step of each: by its revision, or by the folder that it lies in
    model = next(iter(models))
    read = axis({result.revision for result in results}, model, pattern=pattern, suite=suite_of(model), stage=stage,
                branch=branch)  # fmt: skip
    begins = read.offsets | into.attrs.get("series", {}).get("offsets", {})
    steps = {name.text: _step(name, step, read.offsets, begins) for step, name in read.names.items()}
    said = read.said()

    # a row for each task and step, the last of several; rows of one task have all metrics that it ever has
    latest: dict[tuple[HarnessTask, int], tuple[Result, dict[str, tuple[float, float]]]] = {}
    for result in sorted(results, key=lambda result: result.date):
        if (step := steps.get(result.revision)) is None:
            continue
        for task, metrics in result.tasks.items():
            if (task, step) in latest:
                said.append(f"{task.task} at step {step}: {result.file} in place of {latest[task, step][0].file}")
            latest[task, step] = (result, metrics)
    names: dict[str, set[str]] = {}
    for (task, _), (_, metrics) in latest.items():
        names.setdefault(task.task, set()).update(metrics)
    rows = held = 0
    for (task, step), (result, metrics) in sorted(latest.items(), key=lambda item: (item[0][0].task, item[0][1])):
        watch = PREFIX + re.sub(r"[^\w.-]", "_", task.task)
        into.redeclare(watch, identity(task))
        if into.holds(watch, step):
            held += 1
            continue
        into.append(watch, step, _row(metrics, sorted(names[task.task])), weights=result.weights)
        rows += 1
    into.fold()
    return Read(rows, held, said)


def _step(name: Name, step: int, own: Mapping[str, int], begins: Mapping[str, int]) -> int:
    """The step on the run's axis: its stage may begin elsewhere than among these results alone."""
    return step - own.get(name.stage, 0) + begins.get(name.stage, 0)


def _row(metrics: Mapping[str, tuple[float, float]], names: Iterable[str]) -> xr.Dataset:
    variables: dict[str, Any] = {}
    for name in names:
        value, error = metrics.get(name, (np.nan, np.nan))
        variables[name] = ((), float(value), {"long_name": f"{name} of lm-evaluation-harness", "units": "1"})
        variables[f"{name}_se"] = ((), float(error), {"long_name": "its standard error", "units": "1"})
    return xr.Dataset(variables, attrs={"headline": [*names]})


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(place.rglob("results*.json"))
    if not place.is_file():
        raise DataError(f"there is no file or folder {place}: give results of lm-evaluation-harness")
    return [place]


def _read(file: Path) -> Result:
    try:
        held = json.loads(file.read_text())
        results, config = held["results"], held.get("config", {})
        if not isinstance(results, dict) or not all(isinstance(metrics, dict) for metrics in results.values()):
            raise TypeError("its results are no mapping of tasks")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is no result of lm-evaluation-harness ({type(error).__name__}: {error}): expected JSON "
            "with results"
        ) from None
    # the model and its revision, which older files have in one text: pretrained=…,revision=…
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(","))
    named = arguments.get("pretrained") or held.get("model_name") or str(config.get("model", ""))
    revision = arguments.get("revision") or config.get("model_revision")
    model = str(named).rstrip("/")
    if not revision:  # the last part of a folder of checkpoints tells the step, else the folder that the file lies in
        local = Path(model)
        told = tells_step(local.name)
        model, revision = (str(local.parent), local.name) if told else (model, file.parent.name)
    sha = config.get("model_sha") or hashlib.sha256(f"{model}@{revision}".encode()).hexdigest()[:16]
    tasks = {}
    for task, metrics in results.items():
        about = HarnessTask(
            str(task), str(held.get("versions", {}).get(task)), str(held.get("n-shot", {}).get(task)),
            str(config.get("limit")),
        )  # fmt: skip
        if numbers := _metrics(metrics):
            tasks[about] = numbers
    return Result(file, model, str(revision), f"harness:{sha}", float(held.get("date") or 0), tasks)


def _metrics(metrics: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The metrics of a task with their standard errors: `acc,none` is acc, another filter is part of the name."""
    found = {}
    for key, value in metrics.items():
        name, _, kind = key.partition(",")
        if name.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{name}_stderr,{kind}" if kind else f"{name}_stderr")
        full = re.sub(r"\W", "_", name if kind in ("", "none") else f"{name}_{kind}")
        found[full] = (float(value), float(error) if isinstance(error, int | float) else np.nan)
    return found
