"""`Mirror`: the headline numbers of each observation, sent to a logger too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import xarray as xr

from devmon.errors import DevmonError
from devmon.monitoring.companion import Companion
from devmon.monitoring.isolation import isolated

Send = Callable[[dict[str, float], int], object]


class Mirror(Companion):
    """Sends `devmon/<watch>/<variable>` at the optimizer step; of an LLC its `llc`, `se` and `accepted` (1 or 0).

    Arrays are in the trajectory only. A logger that fails is warned of once a watch; with `strict` it ends training.
    """

    def __init__(self, log: Any) -> None:
        self.send = sender(log)
        self._warned: set[str] = set()

    def measured(self, step: int, name: str, dataset: xr.Dataset | None) -> None:
        if dataset is None:
            return
        from devmon.analysis.derive.watch_series import numbers_of  # loads scipy: only where it is asked for

        try:
            with isolated():  # loggers may draw random names
                values = {f"devmon/{name}/{variable}": value for variable, value in numbers_of(dataset).items()}
                if values:
                    self.send(values, step)
        except Exception as error:
            if self.monitor.strict:
                raise
            if name not in self._warned:
                reason = f"{type(error).__name__}: {error}"
                text = f"{name} was measured at step {step} but not logged ({reason}); training goes on"
                warnings.warn(text, stacklevel=2)
            self._warned.add(name)


def sender(log: Any) -> Send:
    """How numbers are handed to `log`: by its method `log_metrics(values, step=…)` (Lightning, MLflow),
    `add_scalar(name, value, step)` (TensorBoard) or `log(values, step=…)` (Weights & Biases), or as a function.

    Raises `DevmonError` for anything else.
    """
    if callable(getattr(log, "log_metrics", None)):
        return lambda values, step: log.log_metrics(values, step=step)
    if callable(getattr(log, "add_scalar", None)):
        return lambda values, step: [log.add_scalar(name, value, step) for name, value in values.items()]
    if callable(getattr(log, "log", None)):
        return lambda values, step: log.log(values, step=step)
    if callable(log):
        return log
    raise DevmonError(
        f"log is a logger (with log_metrics, add_scalar or log) or a function of (values, step), got {log!r}; True "
        "sends to the loggers of a Lightning trainer or of Fabric, and a plain loop has none"
    )
