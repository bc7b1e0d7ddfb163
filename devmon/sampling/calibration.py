"""Choosing step size, localisation and control variates where λ̂ is flat and the chains are healthy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xarray as xr
from torch import nn

from devmon.sampling.choosing.decisions import length, localisation, noise, step_size, variates
from devmon.sampling.choosing.extrapolation import Fit
from devmon.sampling.choosing.noise import noise_bias
from devmon.sampling.choosing.plan import Plan
from devmon.sampling.choosing.spectrum import spectrum
from devmon.sampling.choosing.trials import Trials, heated
from devmon.sampling.constants import (
    CURVATURE_EXAMPLES,
    CURVATURE_SHARE,
    FEWEST_EXAMPLES,
    LANCZOS_STEPS,
    NOISE_BATCHES,
    POWER_ROUNDS,
    PROBES,
)
from devmon.sampling.data import as_examples
from devmon.sampling.losses import Loss
from devmon.sampling.traces import Settings


@dataclass(frozen=True)
class Calibration:
    """The settings chosen for a whole trajectory, the trials behind them, and the reasons in words.

    - `settings`: those of `start`, with nbeta, lr, gamma, control_variate and steps_per_draw chosen
    - `trials`: one row a trial: `lr`, `gamma`, `steps_per_draw`, `model` (0 is the first model given), `llc`, `se`,
      `ess`, `rhat`, `temperature`, `anharmonicity`, `verdict`
    - `flat`: whether λ̂ is at its limit within a tenth. Where it is not, λ̂ is a lower bound of its limit, depends on
      gamma, and belongs beside it: a *localised* λ̂(nbeta, gamma)
    - `systematic`: the relative error of λ̂ by minibatch noise at this lr. It is common to all checkpoints
    - `missing`: the share of the limit that λ̂ lacks at these settings, as the spectrum of the Hessian and the fits say
    - `slope`: d log λ̂ / d log gamma at the choice, the steepest of the models: 0 on a plateau, −1 where λ̂ is a
      curvature trace; NaN where a single gamma could be tried
    - `fits`: λ̂(gamma) with its limit at gamma 0 and the interval of that, one a model (`Fit` of
      `devmon.sampling.choosing.extrapolation`); the limit is one where λ̂ is flat
    - `cost`: in examples' gradients
    """

    settings: Settings
    trials: xr.Dataset
    reasons: str
    flat: bool
    systematic: float
    missing: float = 0.0
    slope: float = float("nan")
    fits: tuple[Fit, ...] = ()
    cost: int = 0


def calibrate(
    models: nn.Module | Sequence[nn.Module],
    loss: Loss,
    data: Any,
    start: Settings | None = None,
    *,
    seed: int = 0,
    tolerance: float = 0.02,
    max_steps: int = 3000,
    budget: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Settings that suit all of `models` (a late checkpoint first, then a middle one), chosen by short trials.

    The spectrum of the Hessian of nbeta L at w* says which curvatures there are, and so which gamma and how many steps
    λ̂ needs if the loss is quadratic (`devmon.sampling.choosing.spectrum`). Trials then decide
    (`devmon.sampling.choosing.decisions`):

    - step size: lr from three quarters over the largest curvature downwards by √10 until the chains are healthy and
      the next smaller step gives the same λ̂, within `tolerance` or error
    - control variates where label noise at w* would bias λ̂ or drown the score
    - noise: the lr at which the bias of minibatch noise and what localisation takes away are smallest together
    - localisation: gamma from a third of that curvature down to where the spectrum says that λ̂ is flat, or chains of
      `max_steps` can follow; farther where λ̂ grows by more than the spectrum explains; never where the temperature is
      more than 0.15 from 1 or `anharmonicity` below 0.8 by more than their errors
    - length: the steps a draw that bring the error to `tolerance` after a burn-in as long as that of the trials, within
      `max_steps` a chain

    λ̂(gamma) over the trials is fitted and extrapolated to gamma 0. `budget`, in examples' gradients, is never exceeded;
    None allows three times the longest estimate, and the estimate is then made at least a third as costly as its
    calibration was. All else, nbeta and kernel included, is taken from `start`. `progress` hears of each trial and of
    the budget. Raises InstrumentError where no step size gives a finite and stable run.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    start = Settings(sampler="baoab") if start is None else start
    examples = as_examples(data)
    nbeta = start.nbeta_for(examples.n)
    start = replace(start, nbeta=nbeta)
    trials = Trials(
        models,
        loss,
        examples,
        start,
        seed=seed,
        tolerance=tolerance,
        max_steps=max_steps,
        budget=budget,
        progress=progress,
    )
    products = len(models) * (PROBES * LANCZOS_STEPS + POWER_ROUNDS)  # of the Hessian, each two gradients
    part = int(max(FEWEST_EXAMPLES, min(CURVATURE_EXAMPLES, CURVATURE_SHARE * trials.budget / 2 / products)))
    spectra = [spectrum(model, loss, examples, start, seed=seed, examples=part) for model in models]
    trials.spent = sum(each.gradients for each in spectra) + len(models) * NOISE_BATCHES * start.batch_size
    plan = Plan(trials, spectra)

    # Label noise is measured at w*: noise_bias is lr nbeta² trace / 4 d.
    spreads = [4 * noise_bias(model, loss, examples, replace(start, lr=1.0), seed=seed) for model in models]
    traces = [spread * float(each.counts.sum()) for spread, each in zip(spreads, spectra, strict=True)]
    trials.control_variate, why_variates = variates(trials, plan, traces)
    stable, steady, why_lr = step_size(trials, plan, trials.control_variate)
    quiet, target, bias, why_noise = noise(trials, plan, stable)
    local, why_gamma = localisation(trials, plan, quiet, target)
    steps_per_draw, why_length = length(trials, local.at)

    lr, gamma, control_variate = local.at.lr, local.at.gamma, local.at.control_variate
    # Noise that grew on the way to the chosen gamma shows in the temperature there.
    bias = max(bias, heated(trials.at(local.at)) if trials.affordable(local.at) else 0.0)
    settings = replace(start, lr=lr, gamma=gamma, control_variate=control_variate, steps_per_draw=steps_per_draw)
    missing = max(local.missing, plan.of_estimate(lr, gamma, steps_per_draw)[0])
    slope = max((fit.slope for fit in local.fits), key=abs, default=float("nan"))
    scale = f"nbeta {nbeta:.4g}; the largest curvature of nbeta L is {plan.scale:.3g}."
    told = [
        f"As gamma falls λ̂ goes from {f.value[1]:.3g} to {f.limit:.3g} [{f.low:.3g}, {f.high:.3g}]."
        for f in local.fits[:1]
        if local.flat
    ]
    reasons = " ".join([scale, why_variates, why_lr, why_noise, why_gamma, *told, why_length])
    attrs = {"kind": "calibration", "reasons": reasons, "lr": lr, "gamma": gamma, "nbeta": float(nbeta)}
    return Calibration(
        settings,
        trials.table().assign_attrs(attrs),
        reasons,
        steady and local.flat,
        bias,
        missing,
        slope,
        local.fits,
        trials.spent,
    )
