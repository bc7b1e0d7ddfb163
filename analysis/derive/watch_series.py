"""`series_of(trajectory)`: every quantity of a run as a plain series over steps, ready to be drawn and searched."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import xarray as xr

from devmon.analysis.derive.components import component_llc, is_component_llc
from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.verdicts import accepted
from devmon.analysis.run import RunData, has_rows
from devmon.analysis.series import Series

MAX_ELEMENTS = 64  # an array with more elements than this is followed by its maximum only
_REFERENCES = ("uniform", "majority", "chance")  # variables that others are compared with, never followed by default


def series_of(
    trajectory: RunData, *, costs: bool = False, each: bool = True, scheduled_only: bool = False
) -> list[Series]:
    """All series of a run, in the order of its watches; those of one array follow its maximum.

    LLC traces give `llc/llc` with its standard error, points whose verdict is not `accepted` marked as rejected; those
    of a RestrictedLLC give `watch/llc[layer 0 head 1]` for each component. Any other watch gives the variables that are
    `followed`: a scalar as `watch/variable`, an array as `watch/variable max` (the largest element at each step, with
    that element's error) and, up to 64 elements, `watch/variable[layer=1, head=3]` each. An infinite value, and one
    whose `accepted` is 0, is marked as rejected. A variable's attribute `smallest_change` becomes the series'
    `smallest`. Values by group of items (`variable_replicates`), and of λ̂ by batch of draws, become `replicates`; those
    of a maximum are of the element that is largest at each step. A series has none that are not finite where its values
    are, and none of one group.

    - `costs`: each watch gives `watch/seconds` too, what its observations took
    - `each`: without it, arrays give their maximum alone
    - `scheduled_only`: the points that were measured only because an alarm was up (`attrs["densified"]`) are left out.
      They lie where something seemed to happen; a p-value that must not depend on that choice is one without them.

    Raises DataError where the traces of an LLC are malformed (see `llc`).
    """
    series: list[Series] = []
    densified = trajectory.attrs.get("densified", {}) if scheduled_only else {}
    for name in trajectory.names():
        dataset = trajectory[name]
        if name in densified:
            dataset = dataset.isel(step=~np.isin(dataset["step"].values, densified[name]))
        if has_rows(dataset):
            series += series_of_watch(name, dataset, costs=costs, each=each)
    return series


def series_of_watch(
    name: str, dataset: xr.Dataset, *, costs: bool = False, each: bool = True, estimate: xr.Dataset | None = None
) -> list[Series]:
    """The series of one watch, from its rows; `estimate` is `llc(dataset)`, or `component_llc(dataset)`, where that
    is known already."""
    if is_llc(dataset):
        series = _llc_series(name, llc(dataset) if estimate is None else estimate)
    elif is_component_llc(dataset):
        series = _component_series(name, component_llc(dataset) if estimate is None else estimate) if each else []
    else:
        series = _plain_series(name, dataset, each)
    if costs and "seconds" in dataset.coords:
        series.append(_series(f"{name}/seconds", dataset["seconds"].assign_attrs(units="s"), None, None))
    return series


def numbers_of(dataset: xr.Dataset) -> dict[str, float]:
    """The followed scalars of one observation (no `step` dimension); of LLC traces λ̂ as `llc`, its standard error `se`
    and `accepted`, 1 where the verdict leaves it of use."""
    if is_llc(dataset):
        derived = llc(dataset)
        usable = float(accepted(derived["verdict"].item()))
        return {"llc": float(derived["llc"]), "se": float(derived["se"]), "accepted": usable}
    row = dataset.expand_dims("step")
    return {name: float(dataset[name]) for name in followed(row) if dataset[name].ndim == 0}


def is_llc(dataset: xr.Dataset) -> bool:
    """Whether a watch's dataset holds sampling traces of an LLC."""
    return dataset.attrs.get("kind") == "llc"


def followed(dataset: xr.Dataset) -> list[str]:
    """The variables that are followed: `attrs["headline"]`, else every float scalar that is no error or reference."""
    named = dataset.attrs.get("headline")
    if named is None:
        arrays = {str(v): dataset.variables[v] for v in dataset.data_vars}
        scalars = [v for v, array in arrays.items() if array.dims == ("step",) and array.dtype.kind == "f"]
        return [v for v in scalars if not v.endswith("_se") and not is_reference(v)]
    if isinstance(named, str):  # one name, or a list that was stored as JSON text
        named = json.loads(named) if named.startswith("[") else [named]
    numbers = {
        str(v): "step" in dataset.variables[v].dims and _numeric(dataset.variables[v]) for v in dataset.data_vars
    }
    return [str(v) for v in named if numbers.get(v)]


def is_reference(variable: str) -> bool:
    """Whether a variable is a baseline for another one (uniform attention, a control task, a majority vote)."""
    return variable in _REFERENCES or variable.startswith("control_") or variable.endswith("_reference")


def units_of(array: xr.DataArray | xr.Variable) -> str:
    """The units for an axis or a table; empty where there are none ("1" says so)."""
    units = str(array.attrs.get("units", ""))
    return "" if units == "1" else units


def elements(array: xr.DataArray) -> Iterator[tuple[str, xr.DataArray]]:
    """Each element of an array over (step, ...) as (label, series over step), e.g. ("layer=1, head=3", ...).

    A dimension `replicate` stays. Layers come first, then heads, in whatever order the dimensions are stored.
    """
    dims = sorted(
        (str(dim) for dim in array.dims if dim not in ("step", "replicate")),
        key=lambda dim: (dim != "layer", dim != "head"),
    )
    for index in np.ndindex(*(array.sizes[dim] for dim in dims)):
        where = dict(zip(dims, index, strict=True))
        label = ", ".join(f"{d}={array[d].values[i] if d in array.coords else i}" for d, i in where.items())
        yield label, array.isel(where)


def _llc_series(name: str, estimate: xr.Dataset) -> list[Series]:
    rejected = ~accepted(estimate["verdict"].values)
    return [_series(f"{name}/llc", estimate["llc"], estimate["se"], estimate.get("llc_replicates"), rejected)]


def _component_series(name: str, derived: xr.Dataset) -> list[Series]:
    """The components of an LLC by component; random masks are what they are compared with, and no series."""
    random = set(derived["null"].values.tolist())
    series = []
    for i, label in enumerate(derived["component"].values):
        one = derived.isel(component=i, drop=True)
        if i not in random:
            rejected = ~accepted(one["verdict"].values)
            series.append(_series(f"{name}/llc[{label}]", one["llc"], one["se"], one.get("llc_replicates"), rejected))
    return series


def _plain_series(name: str, dataset: xr.Dataset, each: bool) -> list[Series]:
    series = []
    for variable in followed(dataset):
        if dataset.variables[variable].ndim == 1:
            series.append(_scalar(name, dataset, variable))
            continue
        array = dataset[variable].transpose("step", ...)
        error = _beside(dataset.get(f"{variable}_se"), array.dims)
        groups = _beside(dataset.get(f"{variable}_replicates"), ("replicate", *array.dims))
        rejected = _rejected(dataset, array)
        if array[0].size > 0:
            series.append(_series(f"{name}/{variable} max", *_largest(array, error, groups, rejected)))
            if each and array[0].size <= MAX_ELEMENTS:
                labels, values = zip(*elements(array), strict=True)
                errors, by_group, refused = (
                    [None] * len(values) if part is None else [element for _, element in elements(part)]
                    for part in (error, groups, rejected)
                )
                for label, *element in zip(labels, values, errors, by_group, refused, strict=True):
                    series.append(_series(f"{name}/{variable}[{label}]", *element))
    return series


def _scalar(name: str, dataset: xr.Dataset, variable: str) -> Series:
    """The series of one number a step, read without coordinates: to make these takes longer than all the rest."""
    known, values = dataset.variables, dataset.variables[variable]
    error = _beside(known.get(f"{variable}_se"), values.dims)
    groups = _beside(known.get(f"{variable}_replicates"), ("replicate", *values.dims))
    usable, refused = known.get("accepted"), None
    if usable is not None and set(usable.dims) <= set(values.dims):
        refused = np.broadcast_to(usable.values == 0, values.shape)
    return _series(f"{name}/{variable}", values, error, groups, refused, dataset["step"].values)


def _rejected(dataset: xr.Dataset, array: xr.DataArray) -> xr.DataArray | None:
    """Where `accepted`, over some of the dimensions of an array, is 0: the chains were not healthy there."""
    if "accepted" not in dataset or not set(dataset["accepted"].dims) <= set(array.dims):
        return None
    return (dataset["accepted"] == 0).broadcast_like(array).transpose(*array.dims)


def _beside(array: Any, dims: tuple[Hashable, ...]) -> Any:
    """The array in this order of dimensions, or None where it has others."""
    return array.transpose(*dims) if array is not None and set(array.dims) == set(dims) else None


def _series(
    name: str,
    values: xr.DataArray | xr.Variable,
    se: xr.DataArray | xr.Variable | None,
    groups: xr.DataArray | xr.Variable | None,
    refused: xr.DataArray | np.ndarray | None = None,
    steps: np.ndarray | None = None,
) -> Series:
    numbers, rejected = _floats(values), None if refused is None else np.asarray(refused, dtype=bool)
    error, by_group = (None if part is None else _floats(part) for part in (se, groups))
    if error is not None:
        error = np.where(np.isinf(error), np.nan, error)
    # groups of which one overflowed, or was lost, tell no error
    if by_group is not None and (len(by_group) < 2 or not np.isfinite(by_group[:, np.isfinite(numbers)]).all()):
        by_group = None
    infinite = np.isinf(numbers)
    if infinite.any():
        rejected = infinite if rejected is None else rejected | infinite
    steps = np.asarray(values["step"].values if steps is None else steps, dtype=np.int64)
    smallest = float(values.attrs.get("smallest_change", 0.0))
    return Series(name, steps, numbers, error, units_of(values), rejected, smallest, by_group)


def _largest(array: xr.DataArray, *parts: xr.DataArray | None) -> tuple[Any, ...]:
    """The largest element at each step (NaN where there is none), and that one of each of the parts beside it."""
    within = [dim for dim in array.dims if dim != "step"]
    flat = array.stack(element=within, create_index=False)
    best = flat.fillna(-np.inf).argmax("element")
    chosen = flat.isel(element=best).assign_attrs(array.attrs)
    of_best = (
        None if part is None else part.stack(element=within, create_index=False).isel(element=best) for part in parts
    )
    return chosen, *of_best


def _floats(array: xr.DataArray | xr.Variable) -> np.ndarray:
    return np.asarray(array.values, dtype=np.float64)


def _numeric(array: xr.Variable) -> bool:
    return array.dtype.kind in "fiub"
