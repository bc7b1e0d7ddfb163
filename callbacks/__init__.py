"""Lightning callbacks: add them to a trainer, and the run is measured while it trains."""

if __name__ == "callbacks":
    raise ImportError("this folder installs as devmon.callbacks: write `from devmon.callbacks import Monitor`")

from devmon.callbacks.checkpoints import CheckpointSeries, checkpoints, latest
from devmon.callbacks.monitor import InductionMonitor, LLCMonitor, Monitor, RepresentationMonitor

__all__ = [
    "CheckpointSeries",
    "InductionMonitor",
    "LLCMonitor",
    "Monitor",
    "RepresentationMonitor",
    "checkpoints",
    "latest",
]
