"""Everything after the trajectory: derived series, events, stages, plots and the report. Needs no torch and no GPU.

Names are resolved when first used, so `import devmon.analysis` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ == "analysis":
    raise ImportError("import devmon.analysis, not analysis")

if TYPE_CHECKING:
    from devmon.analysis import plots as plots
    from devmon.analysis.derive.circuit import circuit_overlap as circuit_overlap
    from devmon.analysis.derive.code_length import prequential_code as prequential_code
    from devmon.analysis.derive.components import component_llc as component_llc
    from devmon.analysis.derive.directions import direction_cosine as direction_cosine
    from devmon.analysis.derive.essential import essential_dynamics as essential_dynamics
    from devmon.analysis.derive.features import feature_matches as feature_matches
    from devmon.analysis.derive.features import lens_overlap as lens_overlap
    from devmon.analysis.derive.influence import transition_data as transition_data
    from devmon.analysis.derive.ladder import ladder as ladder
    from devmon.analysis.derive.learning.layers import layer_centre as layer_centre
    from devmon.analysis.derive.learning.layers import layer_centres as layer_centres
    from devmon.analysis.derive.learning.since import since_first as since_first
    from devmon.analysis.derive.learning.steps import step_depths as step_depths
    from devmon.analysis.derive.learning.succession import head_succession as head_succession
    from devmon.analysis.derive.learning.tokens import token_learning as token_learning
    from devmon.analysis.derive.llc import llc as llc
    from devmon.analysis.derive.representation import cka as cka
    from devmon.analysis.derive.representation import drift as drift
    from devmon.analysis.derive.representation import similarity as similarity
    from devmon.analysis.derive.susceptibilities import sign_changes as sign_changes
    from devmon.analysis.derive.susceptibilities import susceptibility_components as susceptibility_components
    from devmon.analysis.derive.watch_series import series_of as series_of
    from devmon.analysis.detection.detector import Detector as Detector
    from devmon.analysis.detection.events import Event as Event
    from devmon.analysis.detection.events import Fit as Fit
    from devmon.analysis.detection.results import Detection as Detection
    from devmon.analysis.detection.search import detect as detect
    from devmon.analysis.reports.report import report as report
    from devmon.analysis.runs.compare import compare_runs as compare_runs
    from devmon.analysis.runs.maps import training_map as training_map
    from devmon.analysis.runs.replay import replay as replay
    from devmon.analysis.series import Series as Series
    from devmon.analysis.transitions.agreement import agreement as agreement
    from devmon.analysis.transitions.alarms import Alarm as Alarm
    from devmon.analysis.transitions.alarms import Looks as Looks
    from devmon.analysis.transitions.alarms import provisional as provisional
    from devmon.analysis.transitions.features import feature_births as feature_births
    from devmon.analysis.transitions.mirage import mirage_guard as mirage_guard
    from devmon.analysis.transitions.mirage import twins_of as twins_of
    from devmon.analysis.transitions.order import lead_lag as lead_lag
    from devmon.analysis.transitions.phases import phase_types as phase_types
    from devmon.analysis.transitions.robustness import Robustness as Robustness
    from devmon.analysis.transitions.robustness import robustness as robustness
    from devmon.analysis.transitions.schedule import schedule_check as schedule_check
    from devmon.analysis.transitions.stages import stages as stages

_HOME = {
    # what is derived from the stored measurements
    "llc": "derive.llc",
    "ladder": "derive.ladder",
    "component_llc": "derive.components",
    "prequential_code": "derive.code_length",
    "cka": "derive.representation",
    "circuit_overlap": "derive.circuit",
    "direction_cosine": "derive.directions",
    "drift": "derive.representation",
    "similarity": "derive.representation",
    "essential_dynamics": "derive.essential",
    "susceptibility_components": "derive.susceptibilities",
    "sign_changes": "derive.susceptibilities",
    "transition_data": "derive.influence",
    "feature_matches": "derive.features",
    "lens_overlap": "derive.features",
    "token_learning": "derive.learning.tokens",
    "head_succession": "derive.learning.succession",
    "layer_centre": "derive.learning.layers",
    "layer_centres": "derive.learning.layers",
    "since_first": "derive.learning.since",
    "step_depths": "derive.learning.steps",
    "series_of": "derive.watch_series",
    "Series": "series",
    # where training changed phase
    "Detector": "detection.detector",
    "Fit": "detection.events",
    "Event": "detection.events",
    "Detection": "detection.results",
    "detect": "detection.search",
    "lead_lag": "transitions.order",
    "stages": "transitions.stages",
    "feature_births": "transitions.features",
    # the same while training goes on
    "Alarm": "transitions.alarms",
    "Looks": "transitions.alarms",
    "provisional": "transitions.alarms",
    # what speaks for and against it
    "Robustness": "transitions.robustness",
    "robustness": "transitions.robustness",
    "phase_types": "transitions.phases",
    "schedule_check": "transitions.schedule",
    "mirage_guard": "transitions.mirage",
    "twins_of": "transitions.mirage",
    "agreement": "transitions.agreement",
    # many runs, and published ones
    "compare_runs": "runs.compare",
    "training_map": "runs.maps",
    "replay": "runs.replay",
    # what a reader sees
    "report": "reports.report",
}
__all__ = [*_HOME, "plots"]


def __getattr__(name: str) -> Any:
    if name == "plots":
        return importlib.import_module("devmon.analysis.plots")
    if name not in _HOME:
        raise AttributeError(f"devmon.analysis has no {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(importlib.import_module(f"devmon.analysis.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
