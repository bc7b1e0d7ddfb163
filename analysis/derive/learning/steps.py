"""How much later in depth an answer stands than the step that it needs, from stored ranks. Pure NumPy."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from devmon.analysis.derive.learning.passages import jackknifed
from devmon.errors import DataError

Array = NDArray[np.float64]
SURE = 3.0  # standard errors that the highest rank must be above that of another prompt's token


def step_depths(dataset: xr.Dataset) -> xr.Dataset:
    """The depth of half-maximum of bridge and answer, and how much later the answer is.

    `dataset` is a watch of `IntermediateSteps`. The curve over depth is the mean reciprocal rank less that of another
    prompt's token; the depth is where it first passes half of its highest, by straight lines between layers.

    - `bridge`, `answer` (step), layers, with `_se`: NaN where the curve never is three standard errors above 0
    - `lag` (step), layers, with `lag_se`: answer minus bridge, by the same groups of prompts. Null: 0 for an answer
      that needs no bridge, as where c is read off a directly

    Raises DataError for another dataset.
    """
    needed = ("bridge", "answer", "bridge_replicates", "answer_replicates", "bridge_other", "answer_other")
    if not set(needed) <= set(dataset.data_vars) or "step" not in dataset.dims:
        raise DataError(
            "step_depths needs the rows of IntermediateSteps, kept on groups of prompts; got "
            f"{sorted(map(str, dataset.data_vars))}: give trajectory[watch] of eight prompts or more"
        )
    depth = dataset["depth"].values.astype(np.float64)
    groups, there = {}, {}
    for name in ("bridge", "answer"):
        null = dataset[f"{name}_other"].transpose("step", "depth").values
        values = dataset[name].transpose("step", "depth").values - null
        errors = dataset[f"{name}_se"].transpose("step", "depth").values
        there[name] = (values > SURE * errors).any(1)
        kept = dataset[f"{name}_replicates"].transpose("replicate", "step", "depth").values.astype(np.float64)
        groups[name] = kept - null

    found: dict[str, list[float]] = {}
    for i in range(dataset.sizes["step"]):
        both = np.stack([groups[name][:, i] for name in ("bridge", "answer")], 1)  # (replicate, which, depth)
        value, se = jackknifed(lambda curves: _depths(depth, curves), both)
        for j, name in enumerate(("bridge", "answer", "lag")):
            sure = there[name][i] if name != "lag" else there["bridge"][i] and there["answer"][i]
            found.setdefault(name, []).append(value[j] if sure else np.nan)
            found.setdefault(f"{name}_se", []).append(se[j] if sure else np.nan)
    about = {"units": "layers"}
    return xr.Dataset(
        {name: ("step", np.array(values), about) for name, values in found.items()},
        coords={"step": dataset["step"].values},
    )


def _depths(depth: Array, curves: Array) -> Array:
    """Depth of half-maximum of two curves (which, depth), and the second's minus the first's."""
    places = []
    for curve in curves:
        half = curve.max() / 2
        at = int((curve >= half).argmax())
        part = 1.0 if at == 0 else (half - curve[at - 1]) / (curve[at] - curve[at - 1])
        places.append(depth[at] if at == 0 else depth[at - 1] + part * (depth[at] - depth[at - 1]))
    return np.array([*places, places[1] - places[0]])
