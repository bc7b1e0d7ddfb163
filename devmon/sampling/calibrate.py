"""Choosing step size, localisation and control variates where λ̂ is flat and the chains are healthy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from devmon.analysis.derive_llc import llc, scaled_excess
from devmon.errors import InstrumentError
from devmon.sampling.data import Examples, as_examples
from devmon.sampling.estimate import Settings, sample
from devmon.sampling.flat import Flat
from devmon.sampling.losses import Loss
from devmon.sampling.masks import as_mask

LR_SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)  # of 1 / the largest curvature of the log density
GAMMA_SHARES = (0.1, 0.01, 0.001, 0.0001)  # of the largest curvature of nbeta L


@dataclass(frozen=True)
class Calibration:
    """The settings chosen for a whole trajectory, the trials behind them, and the reasons in words.

    `trials` has one row a trial: `lr`, `gamma`, `model` (0 is the first model given), `llc`, `se`, `ess`, `rhat`,
    `temperature`, `verdict`. `flat` says whether a plateau was found; where none is, λ̂ depends on gamma and belongs
    beside it.
    """

    settings: Settings
    trials: xr.Dataset
    reasons: str
    flat: bool


def calibrate(
    models: nn.Module | Sequence[nn.Module],
    loss: Loss,
    data: Any,
    start: Settings | None = None,
    *,
    tolerance: float = 0.02,
    max_steps: int = 4000,
) -> Calibration:
    """Settings that suit all of `models` (a late checkpoint first, then a middle one), chosen by short trials.

    The largest curvature of nbeta L at w* sets the scale. Step sizes are tried from large to small, with control
    variates: the largest is taken whose heat (temperature above 1, in units of λ̂) and whose distance from the next
    smaller one are within `tolerance`. Then gamma: the largest for which a tenth of it gives the same λ̂ within
    tolerance or error. Control variates stay where gradient noise would heat by more than half the tolerance or would
    double the variance of the score. The number of steps a draw is what brings the error to `tolerance`, within
    `max_steps` a chain. All else, nbeta and kernel included, is taken from `start`.

    Raises InstrumentError where no step size gives a finite and stable run.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    start = start or Settings(lr=0.0, gamma=0.0, sampler="baoab")
    examples = as_examples(data)
    nbeta = examples.n / math.log(max(examples.n, 2)) if start.nbeta is None else start.nbeta
    trial = replace(start, nbeta=nbeta, draws=200, burn_in=200, steps_per_draw=1, control_variate=True)
    stiff = nbeta * max(largest_curvature(model, loss, examples, start) for model in models)
    rows: list[dict[str, Any]] = []

    def run(lr: float, gamma: float) -> list[tuple[xr.Dataset, xr.Dataset]]:
        found = [sample(model, loss, examples, replace(trial, lr=lr, gamma=gamma)) for model in models]
        derived = [(traces, llc(traces)) for traces in found]
        for number, (_, result) in enumerate(derived):
            names = ("llc", "se", "ess", "rhat", "temperature", "verdict")
            rows.append({"model": number, "lr": lr, "gamma": gamma} | {name: result[name].item() for name in names})
        return derived

    gamma = GAMMA_SHARES[1] * stiff
    by_lr = {lr: run(lr, gamma) for lr in (share / (stiff + gamma) for share in LR_SHARES)}
    rates = list(by_lr)
    usable = [
        lr
        for lr, smaller in zip(rates, [*rates[1:], rates[-1]], strict=True)
        if all(
            _cool(result, traces, tolerance) and _same(result, other, 2 * tolerance)
            for (traces, result), (_, other) in zip(by_lr[lr], by_lr[smaller], strict=True)
        )
    ]
    calm = [lr for lr in rates if all(result["verdict"].item() in ("ok", "not mixed") for _, result in by_lr[lr])]
    if not calm and not usable:
        seen = ", ".join(sorted({str(row["verdict"]) for row in rows}))
        raise InstrumentError(f"no step size from {rates[-1]:.2g} to {rates[0]:.2g} ran healthily ({seen}): check w*")
    lr = max(usable) if usable else min(calm)
    gammas = [share * stiff for share in GAMMA_SHARES]
    by_gamma = {g: by_lr[lr] if g == gamma else run(lr, g) for g in gammas}
    plateau = [
        g
        for g, smaller in zip(gammas, gammas[1:], strict=False)
        if all(
            _same(result, other, tolerance) and result["verdict"].item() == "ok"
            for (_, result), (_, other) in zip(by_gamma[g], by_gamma[smaller], strict=True)
        )
    ]
    gamma = max(plateau) if plateau else gamma
    chosen = by_gamma[gamma]
    variates = any(_variates_pay(traces, tolerance) for traces, _ in chosen)
    error = max(float(result["se"] / abs(result["llc"])) for _, result in chosen)
    wanted = 200 * (error / tolerance) ** 2 if math.isfinite(error) else math.inf
    draws = start.draws + start.burn_in
    per_draw = int(np.clip(math.ceil(wanted / start.draws), 1, max(1, max_steps // draws)))
    settings = replace(
        start, nbeta=nbeta, lr=lr, gamma=gamma, control_variate=variates, steps_per_draw=per_draw, mask=start.mask
    )
    reasons = (
        f"nbeta {nbeta:.4g}; the largest curvature of nbeta L is {stiff:.3g}. lr {lr:.3g} is "
        + ("the largest that leaves λ̂ where smaller steps put it" if usable else "the smallest tried; none was flat")
        + f" (within {tolerance:.0%} or its error). gamma {gamma:.3g} "
        + ("is the largest for which a tenth of it gives the same λ̂." if plateau else "lies on no plateau: λ̂ moves with "
        "gamma, so compare only estimates of the same gamma.")
        + f" Control variates {'pay: label noise would heat the chain or drown the score' if variates else 'do not pay'}."
        + f" {per_draw} steps a draw."
    )  # fmt: skip
    trials = xr.Dataset({name: ("trial", np.array([row[name] for row in rows])) for name in rows[0]})
    trials.attrs = {"kind": "calibration", "reasons": reasons, "lr": lr, "gamma": gamma, "nbeta": float(nbeta)}
    return Calibration(settings, trials, reasons, bool(usable) and bool(plateau))


def largest_curvature(model: nn.Module, loss: Loss, data: Any, settings: Settings, *, rounds: int = 12) -> float:
    """The largest curvature of the mean loss at w*, by power iteration on differences of gradients.

    Of large data a part stands for all, at least 512 examples. Differences need no second derivative, which fused attention lacks.
    """
    examples = as_examples(data)
    mask = as_mask(settings.mask, model)
    flat = Flat(model, loss, torch.float64, None if mask is None else mask.names)
    where = None if mask is None else mask.vector(flat.names, flat.shapes, flat.center)
    examples = examples.to(flat.center.device, torch.float64)
    generator = torch.Generator().manual_seed(settings.seed)
    size = max(512, int(1e8 / (flat.center.numel() * examples.numel())))
    index = torch.randperm(examples.n, generator=generator)[:size].to(flat.center.device)
    direction = torch.randn(flat.center.shape, generator=generator, dtype=torch.float64).to(flat.center.device)
    curvature = 0.0
    for _ in range(rounds):
        if where is not None:
            direction = direction * where
        direction = direction / direction.norm().clamp(min=1e-300)
        step = 1e-4 * (1 + flat.center.norm() / math.sqrt(flat.center.numel()))
        ends = [_gradient(flat, examples, index, flat.center + sign * step * direction) for sign in (1, -1)]
        product = (ends[0] - ends[1]) / (2 * step)
        curvature = float(product.norm() if where is None else (product * where).norm())
        direction = product
    if not math.isfinite(curvature) or curvature == 0:
        raise InstrumentError(f"the loss has curvature {curvature} at w*: nothing sets a scale, give lr and gamma")
    return curvature


def _gradient(flat: Flat, examples: Examples, index: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    total, grad = torch.zeros_like(position), torch.zeros_like(position)
    flat.bind(position, grad)
    for part in index.split(256):
        grad.zero_()
        flat.backward(examples.batch(part))
        total.add_(grad, alpha=len(part) / len(index))
    return total


def _cool(result: xr.Dataset, traces: xr.Dataset, tolerance: float) -> bool:
    if result["verdict"].item() not in ("ok", "not mixed"):
        return False
    heat = (result["temperature"].item() - 1) * traces.attrs["parameters"] / 2
    return heat <= max(tolerance * result["llc"].item(), result["se"].item())


def _same(one: xr.Dataset, other: xr.Dataset, tolerance: float) -> bool:
    difference = abs(one["llc"].item() - other["llc"].item())
    error = math.hypot(one["se"].item(), other["se"].item())
    return difference <= max(tolerance * abs(one["llc"].item()), 1.645 * error)


def _variates_pay(traces: xr.Dataset, tolerance: float) -> bool:
    """Whether the noise that control variates took away would have doubled the variance of the score, or heated the
    chain: E[linear²] = E‖w − w*‖² trace(noise) / parameters, if noise and displacement have no common direction."""
    kept = traces.isel(draw=slice(int(traces.attrs["burn_in"]), None))
    linear, excess = kept["linear"].values, scaled_excess(kept).values
    nbeta, lr, size = traces.attrs["nbeta"], traces.attrs["lr"], traces.attrs["parameters"]
    noise = size * (linear**2).mean() / max(float((kept["distance"].values ** 2).mean()), 1e-300)
    heat = lr * nbeta**2 * noise / 8
    return bool((nbeta * linear).var() > excess.var() or heat > 0.5 * tolerance * abs(excess.mean()))
