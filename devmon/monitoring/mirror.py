"""`Mirror`: the headline numbers of each observation, and alarms, sent to a logger too."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import xarray as xr

from devmon.errors import DevmonError
from devmon.monitoring.companion import Companion
from devmon.monitoring.isolation import isolated

Send = Callable[[dict[str, float], int], object]


class Mirror(Companion):
    """Sends `devmon/<watch>/<variable>` at the optimizer step; of an LLC its `llc`, `se` and `accepted` (1 or 0).

    Arrays are in the trajectory only. Where alarms are looked for (`densify`), `devmon/alarms` is how many are up, and
    what is raised, withdrawn or settled is told in words: an alert of Weights & Biases, a text of TensorBoard. A logger
    that fails is warned of once a watch; with `strict` it ends training.
    """

    def __init__(self, log: Any) -> None:
        self.log, self.send = log, sender(log)
        self._warned: set[str] = set()
        self._told: dict[
            tuple[str, int], str
        ] = {}  # the status of each alarm, by its series and the step it was raised

    def begin(self, step: int) -> None:
        run = self.monitor.trajectory  # None on other ranks than the first
        known = [] if run is None or self.monitor.densify is None else run.attrs.get("alarms", [])
        self._told = {(alarm["series"], alarm["raised_at"]): alarm["status"] for alarm in known}

    def measured(self, step: int, name: str, dataset: xr.Dataset | None) -> None:
        if dataset is None:
            return
        from devmon.analysis.derive.watch_series import numbers_of  # loads scipy: only where it is asked for

        def send() -> None:
            values = {f"devmon/{name}/{variable}": value for variable, value in numbers_of(dataset).items()}
            if values:
                self.send(values, step)

        self._try(step, name, "was measured", send)

    def after(self, step: int) -> None:
        alarms = self._alarms()
        news = [alarm for alarm in alarms if self._told.get((alarm.series, alarm.raised_at)) != alarm.status]
        if not news:
            return
        self._told |= {(alarm.series, alarm.raised_at): alarm.status for alarm in news}

        def send() -> None:
            self.send({"devmon/alarms": float(sum(alarm.status == "up" for alarm in alarms))}, step)
            for alarm in news:
                tell(self.log, f"devmon: {alarm.series}", alarm.in_words(), step)

        self._try(step, "an alarm", "changed", send)

    def _alarms(self) -> Iterable[Any]:
        return () if self.monitor.densify is None else self.monitor.densify.alarms

    def _try(self, step: int, name: str, what: str, send: Callable[[], None]) -> None:
        try:
            with isolated():  # loggers may draw random names
                send()
        except Exception as error:
            if self.monitor.strict:
                raise
            if name not in self._warned:
                reason = f"{type(error).__name__}: {error}"
                text = f"{name} {what} at step {step} but not logged ({reason}); training goes on"
                warnings.warn(text, stacklevel=2)
            self._warned.add(name)


class Loggers:
    """The loggers of a trainer, which are found when there is something to log."""

    def __init__(self, find: Callable[[], Iterable[Any]]) -> None:
        self.find = find

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        for logger in self.find():
            logger.log_metrics(values, step=step)


def tell(log: Any, title: str, text: str, step: int) -> None:
    """Words to whoever takes them: `alert(title, text)` (Weights & Biases), `add_text(name, text, step)` (TensorBoard),
    of the logger itself or, of Lightning's, of its `experiment`. Other loggers take none."""
    if isinstance(log, Loggers):
        for logger in log.find():
            tell(logger, title, text, step)
        return
    takers: tuple[Any, ...] = (log, getattr(log, "experiment", None))
    for taker in takers:
        if callable(getattr(taker, "alert", None)):
            taker.alert(title=title, text=f"step {step}: {text}")
            return
        if callable(getattr(taker, "add_text", None)):
            taker.add_text("devmon/alarms", f"{title}: {text}", step)
            return


def sender(log: Any) -> Send:
    """How numbers are handed to `log`: by its method `log_metrics(values, step=…)` (Lightning, MLflow),
    `add_scalar(name, value, step)` (TensorBoard) or `log(values, step=…)` (Weights & Biases), or as a function.

    Raises `DevmonError` for anything else.
    """
    if callable(getattr(log, "log_metrics", None)):
        return partial(_by_metrics, log)
    if callable(getattr(log, "add_scalar", None)):
        return partial(_by_scalar, log)
    if callable(getattr(log, "log", None)):
        return partial(_by_log, log)
    if callable(log):
        return log
    raise DevmonError(
        f"log is a logger (with log_metrics, add_scalar or log) or a function of (values, step), got {log!r}; True "
        "sends to the loggers of a Lightning trainer or of Fabric, and a plain loop has none"
    )


# Functions of a module, not of a call: a monitor goes to other processes with them.
def _by_metrics(log: Any, values: dict[str, float], step: int) -> None:
    log.log_metrics(values, step=step)


def _by_scalar(log: Any, values: dict[str, float], step: int) -> None:
    for name, value in values.items():
        log.add_scalar(name, value, step)


def _by_log(log: Any, values: dict[str, float], step: int) -> None:
    log.log(values, step=step)
