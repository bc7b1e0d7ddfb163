"""At which layer a score lies, for every score that a run stores by layer. Pure NumPy."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from devmon.analysis.derive.learning.passages import jackknifed
from devmon.analysis.derive.watch_series import followed, is_llc
from devmon.analysis.run import RunData, has_rows
from devmon.analysis.series import Series
from devmon.errors import DataError

Array = NDArray[np.float64]
SIGNAL = 3.0  # standard errors that a sum over layers must have for its centre; of less the centre is one of noise
DEPTHS = ("layer", "depth")


def layer_centre(dataset: xr.Dataset, variable: str) -> xr.Dataset:
    """The centre of gravity of a score over layers, Σ_ℓ ℓ s_ℓ / Σ_ℓ s_ℓ (as Tenney et al. 2019, 1905.05950, of mixing
    weights), at each step.

    `variable` is over step and `layer` (or `depth`), and perhaps `head`, whose scores are added. s is the score less
    its null where the dataset has one (`variable_null`, `control_variable`, `variable_reference`, or `majority`,
    `uniform` or `chance` for all); layers below it count negative, so the centre can lie outside.

    - `centre`, `centre_se` (step), layers: by a jackknife over the groups of items that the score is kept on, else from
      its standard errors as if layers were independent. NaN where Σ s is not above three of its standard errors.
    - `even`, layers: the centre of equal layers, the null of where it lies.

    Raises DataError for a variable that is not over layers.
    """
    given = dataset.get(variable)
    depth = next((name for name in DEPTHS if given is not None and name in given.dims), "")
    if given is None or not depth or not set(given.dims) <= {"step", depth, "head"}:
        raise DataError(
            f"layer_centre needs a variable over step and layer (or depth), and perhaps head; {variable!r} is over "
            f"{None if given is None else given.dims}"
        )
    score = _over(given, depth) - _null(dataset, variable, depth)
    layer = (
        np.asarray(dataset[depth].values, np.float64) if depth in dataset.coords else np.arange(score.shape[1]) * 1.0
    )

    # errors: of the groups where they are kept, else of independent layers
    centre = np.full(len(score), np.nan)
    se, total_se = centre.copy(), np.zeros(len(score))
    total = score.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        plain = score @ layer / total
        if (kept := dataset.get(f"{variable}_replicates")) is not None:
            by_group = np.stack([_over(kept.isel(replicate=i), depth) for i in range(kept.sizes["replicate"])])
            by_group = by_group - _null(dataset, variable, depth)
            total_se = by_group.sum(2).std(0, ddof=1) / np.sqrt(len(by_group))
            se = jackknifed(lambda s: s @ layer / s.sum(1), by_group)[1]
        elif (own := dataset.get(f"{variable}_se")) is not None:
            square = _over(own**2, depth)
            total_se = np.sqrt(square.sum(1))
            se = np.sqrt((square * (layer - plain[:, None]) ** 2).sum(1)) / np.abs(total)
    there = total > SIGNAL * total_se
    about = {"units": "layers", "long_name": f"layer at the centre of {variable}"}
    return xr.Dataset(
        {
            "centre": ("step", np.where(there, plain, np.nan), about),
            "centre_se": ("step", np.where(there, se, np.nan), {"units": "layers"}),
            "even": ((), float(layer.mean()), {"units": "layers"}),
        },
        coords={"step": dataset["step"].values},
    )


def layer_centres(trajectory: RunData) -> list[Series]:
    """`layer_centre` of every followed score of a run that is kept by layer, as series `watch/variable centre`.

    They are not among `series_of`: hand both to `detect` to search them.
    """
    found = []
    for name in trajectory.names():
        dataset = trajectory[name]
        for variable in followed(dataset) if has_rows(dataset) and not is_llc(dataset) else []:
            if set(dataset[variable].dims) - {"step", "head"} in ({"layer"}, {"depth"}):
                centre = layer_centre(dataset, variable)
                values, se = centre["centre"].values, centre["centre_se"].values
                if np.isfinite(values).any():
                    known = se if np.isfinite(se).any() else None
                    found.append(Series(f"{name}/{variable} centre", centre["step"].values, values, known, "layers"))
    return found


def _over(array: xr.DataArray, depth: str) -> Array:
    """(step, layer), heads added; an element that does not exist adds nothing."""
    array = array.sum("head", skipna=True) if "head" in array.dims else array
    return array.transpose("step", depth).values.astype(np.float64)


def _null(dataset: xr.Dataset, variable: str, depth: str) -> Array:
    """What the score is at each step and layer without anything there, (step, 1) or (step, layer); 0 if unknown."""
    own = (f"{variable}_null", f"control_{variable}", f"{variable}_reference")
    unit = dataset[variable].attrs.get("units")
    names = (*own, *(name for name in ("majority", "uniform", "chance") if name in dataset))
    name = next((name for name in names if name in dataset and dataset[name].attrs.get("units") == unit), None)
    if name is None or variable == "selectivity":  # which is less its control already
        return np.zeros((1, 1))
    null, heads = dataset[name], dataset.sizes["head"] if "head" in dataset[variable].dims else 1
    null = null.sum("head") if "head" in null.dims else null * heads
    null = null if depth in null.dims else null.expand_dims({depth: 1})
    return null.transpose("step", depth).values.astype(np.float64)
