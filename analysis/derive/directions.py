"""When a direction of a concept became what it is, from what is stored of each step. Pure NumPy."""

from __future__ import annotations

import numpy as np
import xarray as xr

from devmon.errors import DataError


def direction_cosine(dataset: xr.Dataset, to: int | None = None) -> xr.Dataset:
    """Cosines of the directions of each step to those of one of them, by default the last.

    `dataset` is what `devmon.instruments.ConceptDirection` stores: `direction` (step, estimator, layer, dimension).

    - `cosine` (step, estimator, layer): 1 at the step itself; the most to expect before it is `cosine_halves`, the
      null is `cosine_random`, √(2/πd).
    - `cosine_before` (step, estimator, layer): cosine to the measured step before; NaN at the first.

    Raises DataError for another dataset, and where the step `to` was not measured.
    """
    if not {"step", "estimator", "layer", "dimension"} <= set(dataset.get("direction", xr.DataArray()).dims):
        raise DataError(
            "direction_cosine needs direction over (step, estimator, layer, dimension), as the watch of a "
            f"ConceptDirection stores it; got {dict(dataset.sizes)}: give trajectory[watch]"
        )
    steps = dataset["step"].values
    if to is not None and to not in steps:
        raise DataError(f"direction_cosine: step {to} was not measured; the steps are {steps.tolist()}")
    own = dataset["direction"].transpose("step", "estimator", "layer", "dimension").values.astype(np.float64)
    own = own / np.linalg.norm(own, axis=-1, keepdims=True)
    last = own[-1 if to is None else int(np.flatnonzero(steps == to)[0])]
    before = np.concatenate([np.full(own.shape[1:3], np.nan)[None], (own[1:] * own[:-1]).sum(-1)])
    dims = ("step", "estimator", "layer")
    names = {"units": "1"}
    found = {
        "cosine": (dims, (own * last).sum(-1), names | {"long_name": "cosine to the direction of the step compared"}),
        "cosine_before": (dims, before, names | {"long_name": "cosine to the direction of the step before"}),
    }
    kept = {name: dataset[name] for name in ("cosine_halves", "cosine_random") if name in dataset}
    return xr.Dataset(found, coords={name: dataset[name] for name in dims}, attrs={}).assign(kept)
