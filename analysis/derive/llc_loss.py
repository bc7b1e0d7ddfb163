"""The loss that an LLC is of: that of its own data at the measured weights, from the sampling traces."""

from __future__ import annotations

import numpy as np
import xarray as xr

from devmon.analysis.derive.errors import paired_batches
from devmon.analysis.derive.verdicts import accepted
from devmon.analysis.series import Series


def loss_of_llc(name: str, dataset: xr.Dataset, estimate: xr.Dataset) -> Series | None:
    """The mean loss at w* of the examples that the chains of an LLC watch met, as a series called `name/loss at w*`.

    `dataset` holds its traces, `baseline` over (step, chain, draw), in nats per token or whatever `loss` is in; without
    them there is no such series. `estimate` is `llc(dataset)`: a step whose λ̂ is rejected is rejected here too, so that
    both change between the same steps. The examples are the same at every step, so that the replicates (means over the
    batches of draws after burn-in) give changes of the loss their error.
    """
    if "baseline" not in dataset or set(dataset["baseline"].dims) != {"step", "chain", "draw"}:
        return None
    traces = dataset["baseline"].transpose("step", "chain", "draw")
    kept = traces.values[:, :, int(estimate.attrs.get("burn_in", 0)) :].astype(np.float64)
    rejected = ~accepted(estimate["verdict"].values)
    replicates = paired_batches(kept, bool(dataset.attrs.get("shared_batches")))
    units = str(dataset["loss"].attrs.get("units", "")) if "loss" in dataset else ""
    values = kept.mean((1, 2))
    return Series(f"{name}/loss at w*", traces["step"].values, values, None, units, rejected, 0.0, replicates)
