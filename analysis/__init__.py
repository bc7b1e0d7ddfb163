"""Everything after the trajectory: derived series, events, stages, plots and the report. Needs no torch and no GPU.

Names are resolved when first used, so `import devmon.analysis` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if __name__ == "analysis":
    raise ImportError("import devmon.analysis, not analysis")

if TYPE_CHECKING:
    from devmon.analysis import plots as plots
    from devmon.analysis.agreement import agreement as agreement
    from devmon.analysis.alarms import Alarm as Alarm
    from devmon.analysis.alarms import Looks as Looks
    from devmon.analysis.alarms import provisional as provisional
    from devmon.analysis.derive import series_of as series_of
    from devmon.analysis.derive_circuit import circuit_overlap as circuit_overlap
    from devmon.analysis.derive_llc import llc as llc
    from devmon.analysis.derive_representation import cka as cka
    from devmon.analysis.derive_representation import drift as drift
    from devmon.analysis.derive_representation import similarity as similarity
    from devmon.analysis.detect import Detection as Detection
    from devmon.analysis.detect import Detector as Detector
    from devmon.analysis.detect import Event as Event
    from devmon.analysis.detect import Fit as Fit
    from devmon.analysis.detect import detect as detect
    from devmon.analysis.detect import lead_lag as lead_lag
    from devmon.analysis.essential import essential_dynamics as essential_dynamics
    from devmon.analysis.maps import training_map as training_map
    from devmon.analysis.mirage import mirage_guard as mirage_guard
    from devmon.analysis.mirage import twins_of as twins_of
    from devmon.analysis.phases import phase_types as phase_types
    from devmon.analysis.replay import replay as replay
    from devmon.analysis.report import report as report
    from devmon.analysis.robustness import Robustness as Robustness
    from devmon.analysis.robustness import robustness as robustness
    from devmon.analysis.runs import compare_runs as compare_runs
    from devmon.analysis.schedule import schedule_check as schedule_check
    from devmon.analysis.series import Series as Series
    from devmon.analysis.stages import stages as stages

_FILE_OF = {
    # what is derived from the stored measurements
    "llc": "derive_llc",
    "cka": "derive_representation",
    "circuit_overlap": "derive_circuit",
    "drift": "derive_representation",
    "similarity": "derive_representation",
    "essential_dynamics": "essential",
    "series_of": "derive",
    "Series": "series",
    # where training changed phase
    "Detector": "detect",
    "Fit": "detect",
    "Event": "detect",
    "Detection": "detect",
    "detect": "detect",
    "lead_lag": "detect",
    "stages": "stages",
    # the same while training goes on
    "Alarm": "alarms",
    "Looks": "alarms",
    "provisional": "alarms",
    # what speaks for and against it
    "Robustness": "robustness",
    "robustness": "robustness",
    "phase_types": "phases",
    "schedule_check": "schedule",
    "mirage_guard": "mirage",
    "twins_of": "mirage",
    "agreement": "agreement",
    # many runs, and published ones
    "compare_runs": "runs",
    "training_map": "maps",
    "replay": "replay",
    # what a reader sees
    "report": "report",
}
__all__ = [*_FILE_OF, "plots"]


class _Package(ModuleType):
    """Keeps `devmon.analysis.detect` the function, although importing the file of that name would hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _FILE_OF:
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name == "plots":
        return importlib.import_module("devmon.analysis.plots")
    if name not in _FILE_OF:
        raise AttributeError(f"devmon.analysis has no {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(importlib.import_module(f"devmon.analysis.{_FILE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Package
