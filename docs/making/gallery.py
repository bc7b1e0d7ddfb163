"""The figures of every instrument: small trainings, measured as `devmon` measures, drawn as its report draws."""

from __future__ import annotations

import inspect
import tempfile
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import studies
import torch
from examples import EXAMPLES, SELDOM

import devmon.instruments
from devmon import Trajectory, Watch, observe
from devmon.analysis.derive.watch_series import is_llc
from devmon.analysis.detection.results import Detection
from devmon.analysis.reports.content import Figure
from devmon.analysis.reports.drawing import Page
from devmon.analysis.reports.figures import llc_figure
from devmon.analysis.reports.findings import Findings, examine
from devmon.analysis.reports.watches import watch_blocks

MOST = 2  # figures of a page, and panels of one figure


@dataclass(frozen=True)
class Shown:
    """The line that made an instrument, the study that it measured, in words and in code, and its figures."""

    line: str
    study: str
    code: str
    figures: tuple[Figure, ...]


def measured(study: str, folder: Path) -> Trajectory:
    """The run of a study: each of its instruments is a watch of the instrument's name."""
    names, models = getattr(studies, study)()
    run = Trajectory(folder / f"{study}.zarr", "a", seed=0)
    lines = EXAMPLES[study]
    watches = [Watch(name, eval(line, vars(devmon.instruments) | names), range(10_000)) for name, line in lines.items()]
    for index, (step, model) in enumerate(models.items()):
        due = [watch for watch in watches if index % 2 == 0 or watch.name not in SELDOM]
        observe(step, model, due, run)
    if failed := {name: run.failures(name) for name in run if run.failures(name)}:
        raise RuntimeError(f"examples of the pages of instruments failed: {failed}")
    return run


def figures(findings: Findings, name: str) -> tuple[Figure, ...]:
    page, data = Page(None), findings.run[name]
    if is_llc(data):
        return (llc_figure(page, name, findings.estimates[name], ()),)
    return tuple(block for block in watch_blocks(page, findings, name, MOST) if isinstance(block, Figure))[:MOST]


def gallery() -> dict[str, Shown]:
    """Every instrument that has an example, by name. Raises RuntimeError where one fails at a checkpoint."""
    torch.set_num_threads(1)
    shown = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for study, lines in EXAMPLES.items():
            run = measured(study, Path(folder))
            # Runs of five checkpoints are drawn as they are: there is too little of them to search for events.
            findings = examine(run, detection=Detection({}, (), 0, {}))
            code = textwrap.dedent(inspect.getsource(getattr(studies, study)))
            for name, line in lines.items():
                about = " ".join((getattr(studies, study).__doc__ or "").split())
                shown[name] = Shown(line, about, code, figures(findings, name))
    return shown
