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
    from devmon.analysis.derive import series_of as series_of
    from devmon.analysis.derive_llc import llc as llc
    from devmon.analysis.detect import Detection as Detection
    from devmon.analysis.detect import Detector as Detector
    from devmon.analysis.detect import Event as Event
    from devmon.analysis.detect import Fit as Fit
    from devmon.analysis.detect import detect as detect
    from devmon.analysis.detect import lead_lag as lead_lag
    from devmon.analysis.report import report as report
    from devmon.analysis.series import Series as Series
    from devmon.analysis.stages import stages as stages

_FILE_OF = {
    # what is derived from the stored measurements
    "llc": "derive_llc",
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
