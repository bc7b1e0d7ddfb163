"""Monitors for the trainers of Lightning and transformers and for loops of Fabric, and checkpoints by step."""

from typing import TYPE_CHECKING, Any

if __name__ == "callbacks":
    raise ImportError("this folder installs as devmon.callbacks: write `from devmon.callbacks import Monitor`")

from devmon.callbacks.checkpoint_series import CheckpointSeries
from devmon.callbacks.fabric import FabricMonitor
from devmon.callbacks.monitor import Monitor
from devmon.callbacks.one_watch import InductionMonitor, LLCMonitor, RepresentationMonitor
from devmon.callbacks.sidecar import Sidecar
from devmon.checkpoints.folder import checkpoints, latest

if TYPE_CHECKING:
    from devmon.callbacks.trainer import TrainerMonitor as TrainerMonitor

__all__ = [
    "CheckpointSeries",
    "FabricMonitor",
    "InductionMonitor",
    "LLCMonitor",
    "Monitor",
    "RepresentationMonitor",
    "Sidecar",
    "TrainerMonitor",
    "checkpoints",
    "latest",
]


def __getattr__(name: str) -> Any:  # so that Lightning's users load no transformers
    if name == "TrainerMonitor":
        from devmon.callbacks.trainer import TrainerMonitor

        return TrainerMonitor
    raise AttributeError(f"module 'devmon.callbacks' has no attribute {name!r}")
