"""Settings that an instrument leaves open, chosen once for a run and kept in its `attrs["chosen"]`."""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr

from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.verdicts import accepted
from devmon.analysis.derive.watch_series import is_llc
from devmon.errors import InstrumentError
from devmon.monitoring.isolation import guarded, isolated, private_copy
from devmon.snapshot import Choosing
from devmon.store.trajectory import Trajectory

# Of the step where a choice could not be made: where it is tried again, and where a choice is confirmed. So a run of n
# steps is held up log n times at most.
AGAIN = 1.5


def chosen(
    trajectory: Trajectory,
    name: str,
    instrument: Choosing,
    step: int,
    model: torch.nn.Module,
    seed: int,
    memo: dict[Any, Any],
) -> dict[str, Any]:
    """The record of the run's choice for the watch `name`, made now where there is none yet.

    Raises InstrumentError where it cannot be made at this step, or is not to be tried again yet.
    """
    if (held := trajectory.attrs.get("chosen", {}).get(name)) is not None:
        return dict(held)
    tried = trajectory.attrs.get("choosing", {}).get(name)
    if tried is not None and step < AGAIN * tried:
        raise InstrumentError(f"lr and gamma could not be chosen at step {tried}: tried again from {AGAIN * tried:.0f}")
    try:
        with isolated(), guarded(model):
            # What it finds at the weights is there for those that measure at this step.
            known: dict[str, Any] = {"memo": memo} if hasattr(instrument, "at_center") else {}
            made = instrument.choose([private_copy(model)], seed, **known)
    except InstrumentError:
        keep(trajectory, "choosing", name, step)
        raise
    record = {"step": step} | made
    keep(trajectory, "chosen", name, record)
    return record


def confirm(trajectory: Trajectory, name: str, step: int, record: dict[str, Any], row: xr.Dataset) -> None:
    """Add to the record whether the first estimate well after the choice was accepted, and its verdict."""
    if "confirmed" in record or step < max(AGAIN * record["step"], record["step"] + 1) or not is_llc(row):
        return
    verdict = str(llc(row)["verdict"].item())
    about = {"step": step, "accepted": bool(accepted(verdict)), "verdict": verdict}
    keep(trajectory, "chosen", name, record | {"confirmed": about})


def keep(trajectory: Trajectory, key: str, name: str, value: Any) -> None:
    """`value` of the watch `name` under this key of the run's attributes."""
    trajectory.record(**{key: trajectory.attrs.get(key, {}) | {name: value}})


def forget_after(trajectory: Trajectory, step: int) -> None:
    """Choices made past a step from which training goes on anew are made again."""
    for key in ("chosen", "choosing"):
        held = trajectory.attrs.get(key, {})
        kept = {n: v for n, v in held.items() if (v["step"] if key == "chosen" else v) <= step}
        if kept != held:
            trajectory.record(**{key: kept})
