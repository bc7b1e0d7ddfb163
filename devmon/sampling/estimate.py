"""λ̂ from a model, a loss and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from devmon.analysis.derive.errors import Z
from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.verdicts import LOCALISED
from devmon.sampling.calibration import calibrate
from devmon.sampling.choosing.noise import noise_bias
from devmon.sampling.constants import NOISE_MATTERS
from devmon.sampling.data import as_examples
from devmon.sampling.kernels.sampler import Sampler
from devmon.sampling.losses import Loss
from devmon.sampling.traces import Settings, sample


def estimate_llc(
    model: nn.Module,
    loss: Loss,
    data: Any,
    *,
    nbeta: float | Sequence[float] | None = None,
    gamma: float | None = None,
    lr: float | None = None,
    chains: int = 4,
    draws: int = 200,
    burn_in: int | None = None,
    batch_size: int | None = None,
    steps_per_draw: int | None = None,
    sampler: str | Sampler = "baoab",
    control_variate: bool | None = None,
    shared_batches: bool = False,
    prior: float = 0.0,
    mask: Any = None,
    examples: int = 0,
    acceptance: bool = False,
    float64: bool = False,
    seed: int = 0,
) -> xr.Dataset:
    """λ̂ = nbeta (E[L(w)] − L(w*)) around the model's weights w*, with its error and verdict, and the traces.

    The scales. `loss(model, batch) -> (batch,)` gives one loss an example, and L is their *mean* over the data, never
    a sum. Twice the loss is twice nbeta: λ does not change, but how near λ̂ comes to it does, so with squared errors
    say whether you halve them (`regression_loss` does: unit noise). The law is exp(−nbeta L(w) − (gamma/2)‖w − w*‖²):
    `nbeta` is one number, inverse temperature times sample size, None for n / log n with n examples; several numbers
    are a ladder, and `devmon.analysis.ladder(result)` says whether λ̂, that of the first, is at its limit. `gamma` is
    the precision of the localising Gaussian, with its half. `lr` is the variance of the noise of one step, which moves
    by lr/2 times the gradient of the log density (`devmon.sampling.kernels.sgld`); the other kernels read it so too.
    `None` for `lr` or `gamma` calibrates both (`devmon.sampling.calibrate`), and chooses `control_variate` and
    `steps_per_draw` where these are None. With both given, `control_variate` None means: where the minibatch noise at
    w* would bias λ̂ by more than 1%, which may take a run without them to know.

    `draws` are kept after `burn_in` (None: half of `draws`) in each of `chains` chains. `data` is a tensor, a tuple or
    mapping of tensors, a list of batches, a DataLoader or a dataset; `loss` gets batches of the form the data has. The
    model is not touched. `mask` restricts what is sampled (`devmon.sampling.masks.as_mask`).

    Returns `llc`, `se`, `low`, `high`, `ess`, `rhat`, `temperature`, `verdict` … (`devmon.analysis.llc`) and the traces
    over (chain, draw), burn-in included. After a calibration attrs hold its reasons (`calibration`), the relative bias
    that minibatch noise leaves (`systematic`), whether λ̂ is at its limit within a tenth (`flat`), the share of the
    limit that it lacks (`missing`) and d log λ̂ / d log gamma (`slope`): `low` and `high` contain the first, and `high`
    the third. Where λ̂ is not flat, what would be "ok" is "localised", a lower bound, and `high` is infinite.
    Raises InstrumentError for settings that cannot be run, a loss that is not finite at w*, and a calibration that no
    step size passes.

    >>> import torch
    >>> from devmon.sampling import regression_loss
    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> result = estimate_llc(model, regression_loss, (x, model(x).detach()), lr=0.005, gamma=1.0, draws=300)
    >>> 1.2 < float(result["llc"]) < 1.8, result["verdict"].item()  # λ = 3/2
    (True, 'ok')
    """
    data = as_examples(data)
    settings = Settings(
        nbeta=nbeta,
        chains=chains,
        draws=draws,
        burn_in=draws // 2 if burn_in is None else burn_in,
        batch_size=min(64, data.n) if batch_size is None else batch_size,
        sampler=sampler,
        shared_batches=shared_batches,
        prior=prior,
        mask=mask,
        examples=examples,
        acceptance=acceptance,
        float64=float64,
    )
    # What is given is used as it is; what is not is calibrated, or for control variates read off the noise at w*.
    choices = {"lr": lr, "gamma": gamma, "control_variate": control_variate, "steps_per_draw": steps_per_draw}
    given: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    calibration = None
    if lr is None or gamma is None:
        calibration = calibrate(model, loss, data, settings, seed=seed)
        settings = replace(calibration.settings, nbeta=settings.nbeta)
    settings = replace(settings, **given)
    if calibration is None and control_variate is None:
        # λ̂ is at most d/2: what matters beside that needs no run to be known.
        variates = noise_bias(model, loss, data, settings, seed=seed) > NOISE_MATTERS
        settings = replace(settings, control_variate=variates)
    traces = sample(model, loss, data, settings, seed=seed)
    if calibration is None and control_variate is None and not settings.control_variate:
        known = llc(traces)
        if known["noise_bias"] > NOISE_MATTERS * abs(known["llc"]):
            traces = sample(model, loss, data, replace(settings, control_variate=True), seed=seed)
    result = llc(traces)
    attrs = result.attrs
    if calibration is not None:
        attrs = attrs | {name: getattr(calibration, name) for name in ("systematic", "missing", "slope")}
        attrs = attrs | {"calibration": calibration.reasons, "flat": int(calibration.flat)}
        # What minibatch noise leaves has both signs; what localisation takes away can only be above.
        half = Z * np.hypot(result["se"], calibration.systematic * abs(result["llc"]))
        result["low"] = result["llc"] - half
        result["high"] = result["llc"] / (1 - calibration.missing) + half if calibration.flat else np.inf + half
        if not calibration.flat and result["verdict"].item() == "ok":
            result["verdict"].values[...] = LOCALISED
    # A trace keeps its name, so that the whole can be derived again: `llc` has the number of that name.
    result = result.drop_vars([name for name in traces.data_vars if name in result])
    return xr.merge([result, traces], combine_attrs="drop").assign_attrs(attrs)
