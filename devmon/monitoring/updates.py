"""What a monitor sees of the optimizer: its learning rates, and its updates for the instruments that ask for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import xarray as xr

from devmon.errors import DevmonError, StoreError
from devmon.monitoring.companion import Companion
from devmon.monitoring.wrappers import unwrapped
from devmon.snapshot import Update

SECOND = ("exp_avg_sq", "v")  # what optimizers call their second moments: torch's, and others'


class Rates(Companion):
    """The learning rate of the optimizer's first group after each observation, in the trajectory's `attrs["rates"]`
    (step to rate): a report asks whether an event is the schedule's (`devmon.analysis.transitions.schedule`)."""

    def after(self, step: int) -> None:
        if self.monitor.trajectory is None:
            return
        with suppress(DevmonError, OSError):  # what is no optimizer is told by who needs it, and so is a full disk
            for group in (group for each in _optimizers(self.monitor.optimizer) for group in each.param_groups):
                if isinstance(rate := group.get("lr"), int | float | torch.Tensor):  # Adafactor may have none
                    self.monitor.trajectory.note("rates", str(step), float(rate))
                return


class Updates(Companion):
    """Hooks on the optimizers of a training, before and after each of their steps, that only copy, and only at steps at
    which an instrument with `needs_update` is due: the weights before, the gradients used, the second moments.

    Where one of those instruments finds a precursor of a loss spike (`largest_rms` above `spike_rms`), the trajectory's
    `attrs["precursors"]` lists it, and the first is warned of.
    """

    def __init__(self) -> None:
        self.update: Update | None = None
        self._names: dict[torch.nn.Parameter, str] = {}
        self._handles: list[Any] = []
        self._made = 0  # updates since the last step that the monitor was given
        self._warned = False

    def attach(self, optimizers: Any, network: torch.nn.Module) -> None:
        """Watch these optimizers (None: there are none); names are those of `network`. Once a training, on rank 0."""
        self.detach()
        found = list(_optimizers(optimizers))
        if not found:
            return
        self._names = {parameter: name for name, parameter in unwrapped(network).named_parameters()}
        self.update = Update()
        for optimizer in found:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def after(self, step: int) -> None:
        """Nothing of an update outlives its measurement."""
        if self.update is not None:
            self.update = Update()

    def passed(self) -> None:
        """The monitor was given a step."""
        self._made = 0

    def measured(self, step: int, name: str, dataset: xr.Dataset | None) -> None:
        if dataset is None or "spike_rms" not in dataset.attrs:
            return
        largest, limit = float(dataset["largest_rms"]), float(dataset.attrs["spike_rms"])
        if not largest > limit:
            return
        part = str(dataset["part"].values[int(np.nanargmax(dataset["rms"].values))])
        trajectory = self.monitor.trajectory
        assert trajectory is not None
        try:
            entry = {"watch": name, "step": step, "part": part, "rms": largest, "limit": limit}
            trajectory.record(precursors=[*trajectory.attrs.get("precursors", []), entry])
        except (StoreError, OSError) as error:
            if self.monitor.strict:
                raise
            warnings.warn(f"a precursor of a loss spike was not recorded ({error})", stacklevel=3)
        if not self._warned:
            warnings.warn(
                f"step {step}: the gradient of {part} is {largest:.1f} times the root of its second moments, above "
                f"{limit}: often a loss spike follows within 8 updates",
                stacklevel=3,
            )
        self._warned = True

    def close(self) -> None:
        self.detach()

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.update = [], None

    def _due(self) -> bool:
        """Whether the step that this update makes is one at which an instrument asks for it."""
        step = (self.monitor.last or 0) + self._made + 1
        asking = [watch for watch in self.monitor.watches if getattr(watch.instrument, "needs_update", False)]
        densify = self.monitor.densify
        return any(step in watch.steps for watch in asking) or (densify is not None and densify.wants(step))

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.update is None or not self._due():
            return
        for parameter in self._parameters(optimizer):
            self.update.before[self._names[parameter]] = parameter.detach().clone()

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        due = self.update is not None and self._due()
        self._made += 1
        if self.update is None or not due:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names.get(parameter)
                if name is None or parameter.grad is None:
                    continue
                self.update.gradients[name] = parameter.grad.detach().clone()
                self.update.after[name] = parameter.detach().clone()
                state = optimizer.state.get(parameter, {})
                second = next((state[key] for key in SECOND if isinstance(state.get(key), torch.Tensor)), None)
                if second is not None and second.shape == parameter.shape and "betas" in group:
                    count = float(state.get("step", 1))
                    self.update.second_moments[name] = second.detach().clone()
                    self.update.adam[name] = float(group["betas"][1]), float(group.get("eps", 0.0)), count

    def _parameters(self, optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
        return [p for group in optimizer.param_groups for p in group["params"] if p in self._names]


def _optimizers(given: Any) -> Iterable[torch.optim.Optimizer]:
    """The optimizers of torch in what a loop calls its optimizer: one, several, or wrapped by a trainer."""
    if given is None:
        return
    if isinstance(given, list | tuple):
        for each in given:
            yield from _optimizers(each)
        return
    bare, seen = given, 0
    while not hasattr(bare, "register_step_pre_hook") or (hasattr(bare, "optimizer") and seen < 8):
        inner = getattr(bare, "optimizer", None)
        if inner is None:
            break
        bare, seen = inner, seen + 1
    if not hasattr(bare, "register_step_pre_hook"):
        raise DevmonError(f"expected an optimizer of torch, got {type(given).__name__}: hand over the one that steps")
    yield bare
