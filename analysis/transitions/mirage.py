"""Mirage guard: a jump of a thresholded score must also show in a continuous score of the same thing.

A share of hits (accuracy, exact match) can leap while what it thresholds moves smoothly (Schaeffer et al. 2023,
arXiv:2304.15004). Pairs are given, or declared by the instrument: a variable's attribute `continuous_twin` names the
continuous variable of the same watch ("loss"), or of another ("probe/loss").
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import xarray as xr

from devmon.analysis.derive.watch_series import elements, followed, is_llc
from devmon.analysis.detection.events import Event, meet
from devmon.analysis.detection.results import Detection
from devmon.analysis.run import RunData
from devmon.errors import DataError

SURVIVES, MIRAGE, OPEN = "survives", "only in a thresholded score", "not checked"


@dataclass(frozen=True)
class Survival:
    """An event of a thresholded score beside its continuous twin.

    `verdict` is "survives" (with the twin's nearest event of that kind, `beside`), "only in a thresholded score", or
    "not checked" where the twin was not searched or could not be. `note` gives the reason. Absence of an event in the
    twin is no proof of smoothness: it is as strong as the search of that series.
    """

    event: Event
    twin: str
    verdict: str
    beside: Event | None
    note: str


def mirage_guard(detection: Detection, twins: Mapping[str, str]) -> list[Survival]:
    """The verdict on every event of the series that `twins` maps to their continuous twins (see `twins_of`).

    An event survives where the twin has one of the same kind whose extent (interval and t10-t90 span) meets its own.
    The sign may differ: accuracy rises as loss falls.
    """
    unknown = sorted(set(twins) - set(detection.fits))
    if unknown:
        known = ", ".join(detection.fits) or "none"
        raise DataError(f"twins are given for {', '.join(unknown)}, which was not searched; the series are {known}")
    return [_survival(event, twins[event.series], detection) for event in detection.events if event.series in twins]


def twins_of(run: RunData, among: Collection[str] | None = None) -> dict[str, str]:
    """Each series of a run (as `series_of` names it) whose variable declares a `continuous_twin`, and that twin's name.

    Of arrays, the maximum goes with the twin's maximum and each element with the same element of the twin; where the
    twin is a scalar, all go with it. With `among`, only series of these names (those of `detection.fits`).
    """
    twins = {}
    for watch in run.names():
        dataset = run[watch]
        for variable in [] if is_llc(dataset) else followed(dataset):
            if not (declared := dataset[variable].attrs.get("continuous_twin")):
                continue
            other, _, name = str(declared).rpartition("/")
            other = other or watch
            source = run[other] if other in run.names() else None
            scalar = source is not None and name in source and source[name].dims == ("step",)
            for suffix in _suffixes(dataset[variable]):
                twins[f"{watch}/{variable}{suffix}"] = f"{other}/{name}{'' if scalar else suffix}"
    return {name: twin for name, twin in twins.items() if among is None or name in among}


def _suffixes(array: xr.DataArray) -> list[str]:
    if array.dims == ("step",):
        return [""]
    return [" max", *(f"[{label}]" for label, _ in elements(array.isel(step=slice(0, 1))))]


def _survival(event: Event, twin: str, detection: Detection) -> Survival:
    fit = detection.fits.get(twin)
    if fit is None:
        return Survival(event, twin, OPEN, None, f"{twin} was not searched: detect it together with {event.series}")
    if fit.outcome not in ("EVENTS", "NO EVENT"):
        return Survival(event, twin, OPEN, None, f"{twin}: {fit.outcome}")
    alike = [other for other in detection.events if other.series == twin and other.kind == event.kind]
    near = [other for other in alike if meet(other.extent, event.extent)]
    if near:
        return Survival(event, twin, SURVIVES, min(near, key=lambda other: abs(other.step - event.step)), "")
    where = ", ".join(f"{other.step:.0f}" for other in alike)
    note = f"{twin} has no {event.kind} there" + (f", only at step {where}" if where else "")
    return Survival(event, twin, MIRAGE, None, note)
