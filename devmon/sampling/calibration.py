"""Choosing step size, localisation and control variates where λ̂ is flat and the chains are healthy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xarray as xr
from torch import nn

from devmon.sampling.curvature import largest_curvature
from devmon.sampling.data import as_examples
from devmon.sampling.decisions import length, localisation, noise, step_size
from devmon.sampling.losses import Loss
from devmon.sampling.traces import Settings
from devmon.sampling.trials import Trials


@dataclass(frozen=True)
class Calibration:
    """The settings chosen for a whole trajectory, the trials behind them, and the reasons in words.

    - `settings`: those of `start`, with nbeta, lr, gamma, control_variate and steps_per_draw chosen
    - `trials`: one row a trial: `lr`, `gamma`, `steps_per_draw`, `model` (0 is the first model given), `llc`, `se`,
      `ess`, `rhat`, `temperature`, `anharmonicity`, `verdict`
    - `flat`: whether a plateau was reached; where none is, λ̂ depends on gamma and belongs beside it
    - `systematic`: the relative error of λ̂ that these settings leave: the bias of minibatch noise at this lr, and what
      still moves with gamma. It is common to all checkpoints
    """

    settings: Settings
    trials: xr.Dataset
    reasons: str
    flat: bool
    systematic: float


def calibrate(
    models: nn.Module | Sequence[nn.Module],
    loss: Loss,
    data: Any,
    start: Settings | None = None,
    *,
    seed: int = 0,
    tolerance: float = 0.02,
    max_steps: int = 3000,
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Settings that suit all of `models` (a late checkpoint first, then a middle one), chosen by short trials.

    The largest curvature of nbeta L at w* sets the scale; then four decisions (`devmon.sampling.decisions`):

    - step size: lr from one over that curvature downwards by √10 until the chains are healthy and the next smaller step
      gives the same λ̂, within `tolerance` or error, in the same time lr · steps
    - localisation: gamma from a third of that curvature downwards by √10, for as long as the chains fill their flat
      directions (temperature from 0.8 to 1.15) and the loss still rises as around w* (`anharmonicity` of
      `devmon.analysis.llc` at least 0.75). lr is reduced further wherever minibatch noise inflates the temperature;
      trials get longer until the change between two gammas exceeds its error. The choice is where λ̂ moved least
    - noise: control variates where they pay, and lr lowered until the bias of minibatch noise is at most half of
      `tolerance`, or of the error that `max_steps` allow
    - length: the steps a draw that bring the error to `tolerance` after a burn-in as long as that of the trials, within
      `max_steps` a chain

    All else, nbeta and kernel included, is taken from `start`. `progress` hears of each trial. Raises InstrumentError
    where no step size gives a finite and stable run.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    start = Settings(sampler="baoab") if start is None else start
    examples = as_examples(data)
    nbeta = start.nbeta_for(examples.n)
    start = replace(start, nbeta=nbeta)
    curvature = nbeta * max(largest_curvature(model, loss, examples, start, seed=seed) for model in models)
    trials = Trials(
        models, loss, examples, start, seed=seed, tolerance=tolerance, max_steps=max_steps, progress=progress
    )

    stable, why_lr = step_size(trials, curvature)
    local, why_gamma = localisation(trials, stable.at, curvature)
    quiet, why_noise = noise(trials, local.at)
    steps_per_draw, why_length = length(trials, quiet.at)

    lr, gamma, control_variate = quiet.at.lr, quiet.at.gamma, quiet.at.control_variate
    settings = replace(start, lr=lr, gamma=gamma, control_variate=control_variate, steps_per_draw=steps_per_draw)
    systematic = math.hypot(quiet.error, local.error)
    scale = f"nbeta {nbeta:.4g}; the largest curvature of nbeta L is {curvature:.3g}."
    left = f"Beside its own error λ̂ is uncertain by {systematic:.1%}, from lr and gamma."
    reasons = " ".join([scale, why_lr, why_gamma, why_noise, why_length, left])
    attrs = {"kind": "calibration", "reasons": reasons, "lr": lr, "gamma": gamma, "nbeta": float(nbeta)}
    return Calibration(settings, trials.table().assign_attrs(attrs), reasons, stable.flat and local.flat, systematic)
