"""Choosing step size, localisation and control variates where λ̂ is flat and the chains are healthy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from devmon.analysis.derive_llc import llc, mean_and_error, scaled_excess
from devmon.errors import InstrumentError
from devmon.sampling.data import Examples, as_examples
from devmon.sampling.estimate import Settings, sample
from devmon.sampling.flat import Flat
from devmon.sampling.losses import Loss
from devmon.sampling.masks import as_mask

LR_SHARES = (1.0, 0.3, 0.1, 0.03)  # of 1 / the largest curvature of the log density
GAMMA_SHARES = (0.1, 0.01, 0.001)  # of the largest curvature of nbeta L


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
    variates. Heat, the excess of the temperature over 1 in units of λ̂, grows like lr: the largest healthy step whose
    λ̂ agrees with that of the next smaller one is scaled down until its heat is `tolerance`. Then gamma: between the
    largest for which a tenth of it gives the same λ̂, within tolerance or error, and that tenth (where it mixes too). Control variates stay where gradient
    noise would heat by more than half the tolerance or would double the variance of the score. The number of steps a
    draw is what brings the error to `tolerance`, within `max_steps` a chain. All else, nbeta and kernel included, is
    taken from `start`.

    Raises InstrumentError where no step size gives a finite and stable run.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    start = start or Settings(lr=0.0, gamma=0.0, sampler="baoab")
    examples = as_examples(data)
    nbeta = examples.n / math.log(max(examples.n, 2)) if start.nbeta is None else start.nbeta
    trial = replace(start, nbeta=nbeta, draws=100, burn_in=100, steps_per_draw=1, control_variate=True)
    stiff = nbeta * max(largest_curvature(model, loss, examples, start) for model in models)
    rows: list[dict[str, Any]] = []

    def run(lr: float, gamma: float, steps: int = 1) -> list[tuple[xr.Dataset, xr.Dataset]]:
        settings = replace(trial, lr=lr, gamma=gamma, steps_per_draw=steps)
        derived = [(traces, llc(traces)) for traces in (sample(model, loss, examples, settings) for model in models)]
        for number, (_, result) in enumerate(derived):
            names = ("llc", "se", "ess", "rhat", "temperature", "verdict")
            rows.append({"model": number, "lr": lr, "gamma": gamma} | {name: result[name].item() for name in names})
        return derived

    gamma = GAMMA_SHARES[1] * stiff
    by_lr = {share / (stiff + gamma): run(share / (stiff + gamma), gamma) for share in LR_SHARES}
    rates = list(by_lr)
    calm = [lr for lr in rates if all(result["verdict"].item() in ("ok", "not mixed") for _, result in by_lr[lr])]
    if not calm:
        seen = ", ".join(sorted({str(row["verdict"]) for row in rows}))
        raise InstrumentError(f"no step size from {rates[-1]:.2g} to {rates[0]:.2g} ran healthily ({seen}): check w*")
    usable = [
        lr
        for lr, smaller in itertools.pairwise(rates)
        if lr in calm and all(_same(a, b, tolerance) for a, b in zip(by_lr[lr], by_lr[smaller], strict=True))
    ]
    lr = max(usable or calm)
    measured = [(tried, pair) for tried in calm if tried >= lr for pair in by_lr[tried]]
    lr = min(lr, *(tried * _cooling(result, traces, tolerance) for tried, (traces, result) in measured))
    by_gamma = {share * stiff: run(lr, share * stiff, steps=2) for share in GAMMA_SHARES}
    plateau = [
        (larger, smaller)
        for larger, smaller in itertools.pairwise(by_gamma)
        if all(
            a[1]["verdict"].item() == "ok" and _same(a, b, tolerance)
            for a, b in zip(by_gamma[larger], by_gamma[smaller], strict=True)
        )
    ]
    chosen = by_gamma[max(plateau)[0] if plateau else gamma]
    if plateau:
        larger, smaller = max(plateau)
        healthy = all(result["verdict"].item() == "ok" for _, result in by_gamma[smaller])
        gamma = math.sqrt(larger * smaller) if healthy else larger
    variates = any(_variates_pay(traces, tolerance) for traces, _ in chosen)
    error = max(float(result["se"] / abs(result["llc"])) for _, result in chosen)
    wanted = 2 * trial.draws * (error / tolerance) ** 2 if math.isfinite(error) else math.inf
    draws = start.draws + start.burn_in
    per_draw = int(np.clip(math.ceil(wanted / start.draws), 1, max(1, max_steps // draws)))
    settings = replace(
        start, nbeta=nbeta, lr=lr, gamma=gamma, control_variate=variates, steps_per_draw=per_draw, mask=start.mask
    )
    reasons = (
        f"nbeta {nbeta:.4g}; the largest curvature of nbeta L is {stiff:.3g}. lr {lr:.3g} keeps the chains' heat within "
        f"{tolerance:.1%} of λ̂" + ("" if usable else ", but no two step sizes tried agreed on λ̂")
        + f". gamma {gamma:.3g} "
        + ("lies on a plateau: a few times more and a few times less give the same λ̂." if plateau else "lies on no plateau: λ̂ moves with "
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


def _cooling(result: xr.Dataset, traces: xr.Dataset, tolerance: float) -> float:
    """The factor on lr that brings the heat of this trial to the tolerance; 1 where its heat is not sure."""
    heat = (result["temperature"].item() - 1) * traces.attrs["parameters"] / 2
    sure = heat > 2 * result["se"].item()
    return min(1.0, tolerance * max(result["llc"].item() - heat, 0.1 * heat) / heat) if sure else 1.0


def _same(one: tuple[xr.Dataset, xr.Dataset], other: tuple[xr.Dataset, xr.Dataset], tolerance: float) -> bool:
    """Whether two trials agree; they share noise and batches, so their difference is known better than either."""
    burn_in = int(one[0].attrs["burn_in"])
    excess = [scaled_excess(traces).values[:, burn_in:] for traces, _ in (one, other)]
    difference, error, _ = mean_and_error(excess[0] - excess[1], bool(one[0].attrs["shared_batches"]))
    return abs(difference) <= max(tolerance * abs(one[1]["llc"].item()), 1.645 * error)


def _variates_pay(traces: xr.Dataset, tolerance: float) -> bool:
    """Whether the noise that control variates took away would have doubled the variance of the score, or heated the
    chain: E[linear²] = E‖w − w*‖² trace(noise) / parameters, if noise and displacement have no common direction."""
    kept = traces.isel(draw=slice(int(traces.attrs["burn_in"]), None))
    linear, excess = kept["linear"].values, scaled_excess(kept).values
    nbeta, lr, size = traces.attrs["nbeta"], traces.attrs["lr"], traces.attrs["parameters"]
    noise = size * (linear**2).mean() / max(float((kept["distance"].values ** 2).mean()), 1e-300)
    heat = lr * nbeta**2 * noise / 8
    return bool((nbeta * linear).var() > excess.var() or heat > 0.5 * tolerance * abs(excess.mean()))
