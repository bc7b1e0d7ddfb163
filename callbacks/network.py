"""What a monitor sees of a LightningModule, and the strategies under which there is nothing whole to see."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import torch

from devmon.errors import DevmonError
from devmon.monitoring.loop import part

Model = str | Callable[[L.LightningModule], torch.nn.Module] | None
SHARDED_STRATEGIES = {"FSDPStrategy", "XLAFSDPStrategy", "ModelParallelStrategy"}


def refuse_sharded(strategy: object) -> None:
    """Raise `DevmonError` for a strategy under which no rank holds the whole model."""
    names = {kind.__name__ for kind in type(strategy).__mro__}
    if names & SHARDED_STRATEGIES or ("DeepSpeedStrategy" in names and getattr(strategy, "zero_stage_3", False)):
        raise DevmonError(
            f"{type(strategy).__name__} shards the weights over the ranks, and Monitor needs all of them on one: use "
            "Sidecar (devmon.callbacks), which gathers them and measures in a process beside, or train with "
            "strategy='ddp'"
        )


def network(pl_module: L.LightningModule, model: Model = None) -> torch.nn.Module:
    """The module that instruments see (the argument `model` of `Monitor`)."""
    if model is not None:
        return part(pl_module, model)
    if type(pl_module).forward is not L.LightningModule.forward:
        return pl_module
    children = [child for child in pl_module.children() if next(child.parameters(), None) is not None]
    if len(children) == 1:
        return children[0]
    raise DevmonError(
        f"{type(pl_module).__name__} defines no forward and has {len(children)} submodules with parameters: tell which "
        "one to measure, as in Monitor(..., model='net')"
    )
