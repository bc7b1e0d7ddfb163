"""Choosing step size, localisation and control variates where λ̂ is flat and the chains are healthy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
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
GAMMA_RATIO = 10**0.5
GAMMA_SHARES = tuple(1 / GAMMA_RATIO**k for k in range(8))  # of the largest curvature of nbeta L
GAMMA_START = 2
MOST_STEPS = 8  # steps a draw of a trial
LEAST_VALLEY = 0.75

HEALTHY = ("ok", "not mixed")

Trial = tuple[xr.Dataset, xr.Dataset]  # traces and what is derived from them
Run = Callable[[float, float, int], list[Trial]]  # lr, gamma, steps a draw: a trial a model


@dataclass(frozen=True)
class Calibration:
    """The settings chosen for a whole trajectory, the trials behind them, and the reasons in words.

    `trials` has one row a trial: `lr`, `gamma`, `steps_per_draw`, `model` (0 is the first model given), `llc`, `se`,
    `ess`, `rhat`, `temperature`, `valley`, `verdict`. `flat` says whether a plateau was found; where none is, λ̂ depends on gamma and belongs
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
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Settings that suit all of `models` (a late checkpoint first, then a middle one), chosen by short trials.

    The largest curvature of nbeta L at w* sets the scale. Step sizes are tried from large to small, for the same time
    and with control variates, until λ̂ agrees with that of the next smaller one. Heat, the excess of the temperature
    over 1 in units of λ̂, grows like lr: where it is above `tolerance` lr is scaled down. Then gamma, which holds curved
    directions back too: it is lowered by √10 at a time until λ̂ moves by no more than `tolerance`, in trials that are
    lengthened while their error hides it. Where λ̂ never stops moving, the choice is the least gamma at which the chains
    mix and the loss still rises as in a valley (`devmon.analysis.llc`, `valley` at least 0.75), and `flat` is False.
    Control variates stay where gradient noise would heat by more than half the tolerance or would double the variance
    of the score. The number of steps a draw is what brings the error to `tolerance`, within `max_steps` a chain. All
    else, nbeta and kernel included, is taken from `start`. `progress` hears of each trial.

    Raises InstrumentError where no step size gives a finite and stable run.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    start = start or Settings(lr=0.0, gamma=0.0, sampler="baoab")
    examples = as_examples(data)
    nbeta = examples.n / math.log(max(examples.n, 2)) if start.nbeta is None else start.nbeta
    trial = replace(
        start,
        nbeta=nbeta,
        draws=100,
        burn_in=100,
        steps_per_draw=1,
        control_variate=True,
        chains=max(4, start.chains),
        examples=0,
        acceptance=False,
    )
    stiff = nbeta * max(largest_curvature(model, loss, examples, start) for model in models)
    rows: list[dict[str, Any]] = []

    def run(lr: float, gamma: float, steps: int) -> list[Trial]:
        trials = []
        for number, model in enumerate(models):
            if progress is not None:
                progress(f"lr {lr:.2g}, gamma {gamma:.3g}, checkpoint {number + 1} of {len(models)}")
            traces = sample(model, loss, examples, replace(trial, lr=lr, gamma=gamma, steps_per_draw=steps))
            trials.append((traces, llc(traces)))
            names = ("llc", "se", "ess", "rhat", "temperature", "valley", "verdict")
            found = {name: trials[-1][1][name].item() for name in names}
            rows.append({"model": number, "lr": lr, "gamma": gamma, "steps_per_draw": steps} | found)
        return trials

    lr, agreed = _step_size(run, stiff, GAMMA_SHARES[GAMMA_START] * stiff, tolerance)
    gamma, chosen, plateau = _localisation(run, lr, stiff, tolerance)
    variates = any(_variates_pay(traces, tolerance) for traces, _ in chosen)
    error = max(float(result["se"] / abs(result["llc"])) for _, result in chosen)
    spent = trial.chains * trial.draws * int(chosen[0][0].attrs["steps_per_draw"])
    wanted = spent * (error / tolerance) ** 2 / start.chains if math.isfinite(error) else math.inf
    draws = start.draws + start.burn_in
    per_draw = int(np.clip(math.ceil(wanted / start.draws), 1, max(1, max_steps // draws)))
    settings = replace(
        start, nbeta=nbeta, lr=lr, gamma=gamma, control_variate=variates, steps_per_draw=per_draw, mask=start.mask
    )
    reasons = (
        f"nbeta {nbeta:.4g}; the largest curvature of nbeta L is {stiff:.3g}. lr {lr:.3g} keeps the chains' heat within "
        f"{tolerance:.1%} of λ̂" + ("" if agreed else ", but no two step sizes tried agreed on λ̂")
        + f". gamma {gamma:.3g} "
        + ("lies on a plateau: three times more gives the same λ̂." if plateau else "lies on no plateau, but is the least "
        "at which the chains mix and stay in the valley of w*: λ̂ moves with gamma, so compare only estimates of the same one.")
        + f" Control variates {'pay: label noise would heat the chain or drown the score' if variates else 'do not pay'}."
        + f" {per_draw} steps a draw."
    )  # fmt: skip
    trials = xr.Dataset({name: ("trial", np.array([row[name] for row in rows])) for name in rows[0]})
    trials.attrs = {"kind": "calibration", "reasons": reasons, "lr": lr, "gamma": gamma, "nbeta": float(nbeta)}
    return Calibration(settings, trials, reasons, agreed and plateau)


def _step_size(run: Run, stiff: float, gamma: float, tolerance: float) -> tuple[float, bool]:
    """The step size, and whether λ̂ agreed with that of a smaller one. Trials are equally long in time lr · steps."""
    rates = [share / (stiff + gamma) for share in LR_SHARES]
    tried: dict[float, list[Trial]] = {}
    lr, agreed = rates[0], False
    for above, below in itertools.pairwise(rates):
        for rate in (above, below):
            if rate not in tried:
                tried[rate] = run(rate, gamma, min(round(rates[0] / rate), MOST_STEPS))
        healthy = all(result["verdict"].item() in HEALTHY for _, result in tried[above])
        if healthy and all(_same(*pair, tolerance) for pair in zip(tried[above], tried[below], strict=True)):
            lr, agreed = above, True
            break
    else:
        calm = [lr for lr, trials in tried.items() if all(r["verdict"].item() in HEALTHY for _, r in trials)]
        if not calm:
            seen = ", ".join(sorted({str(r["verdict"].item()) for trials in tried.values() for _, r in trials}))
            raise InstrumentError(
                f"no step size from {rates[-1]:.2g} to {rates[0]:.2g} ran healthily ({seen}): w* is perhaps no minimum; "
                f"take a later checkpoint or a smaller nbeta"
            )
        lr = max(calm)
    heats = [
        rate * _cooling(result, traces, tolerance) for rate in tried if rate >= lr for traces, result in tried[rate]
    ]
    return min(lr, *heats), agreed


def _localisation(run: Run, lr: float, stiff: float, tolerance: float) -> tuple[float, list[Trial], bool]:
    """gamma, its trials, and whether it lies on a plateau."""
    tried: dict[float, list[Trial]] = {}
    steps, above = 2, 0.0
    for share in GAMMA_SHARES:
        below = share * stiff
        tried[below] = run(lr, below, steps)
        if not all(_in_valley(result) for _, result in tried[below]):
            break
        if above:
            pairs = list(zip(tried[above], tried[below], strict=True))
            while steps < MOST_STEPS and any(_undecided(*pair, tolerance) for pair in pairs):
                steps *= 2
                tried[above], tried[below] = run(lr, above, steps), run(lr, below, steps)
                pairs = list(zip(tried[above], tried[below], strict=True))
            if all(_same(*pair, tolerance) for pair in pairs):
                mixed = [g for g in (below, above) if all(r["verdict"].item() == "ok" for _, r in tried[g])]
                if mixed:
                    return mixed[0], tried[mixed[0]], True
        above = below
    usable = [g for g, trials in tried.items() if all(r["verdict"].item() == "ok" and _in_valley(r) for _, r in trials)]
    gamma = min(usable) if usable else max(tried)
    return gamma, tried[gamma], False


def _in_valley(result: xr.Dataset) -> bool:
    return result["verdict"].item() in HEALTHY and result["valley"].item() >= LEAST_VALLEY


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


def _difference(one: Trial, other: Trial) -> tuple[float, float]:
    """How far two trials are apart and its error, over λ̂: they share noise and batches, which makes it small."""
    burn_in = int(one[0].attrs["burn_in"])
    excess = [scaled_excess(traces).values[:, burn_in:] for traces, _ in (one, other)]
    difference, error, _ = mean_and_error(excess[0] - excess[1], bool(one[0].attrs["shared_batches"]))
    scale = max(abs(other[1]["llc"].item()), 1e-300)
    return abs(difference) / scale, error / scale


def _same(one: Trial, other: Trial, tolerance: float) -> bool:
    difference, error = _difference(one, other)
    return difference <= max(tolerance, 1.645 * error)


def _undecided(one: Trial, other: Trial, tolerance: float) -> bool:
    """Whether the trials agree only because they are short."""
    difference, error = _difference(one, other)
    return tolerance / 2 < error and tolerance < difference + 1.645 * error and difference <= 1.645 * error


def _variates_pay(traces: xr.Dataset, tolerance: float) -> bool:
    """Whether the noise that control variates took away would have doubled the variance of the score, or heated the
    chain: E[linear²] = E‖w − w*‖² trace(noise) / parameters, if noise and displacement have no common direction."""
    kept = traces.isel(draw=slice(int(traces.attrs["burn_in"]), None))
    linear, excess = kept["linear"].values, scaled_excess(kept).values
    nbeta, lr, size = traces.attrs["nbeta"], traces.attrs["lr"], traces.attrs["parameters"]
    noise = size * (linear**2).mean() / max(float((kept["distance"].values ** 2).mean()), 1e-300)
    heat = lr * nbeta**2 * noise / 8
    return bool((nbeta * linear).var() > excess.var() or heat > 0.5 * tolerance * abs(excess.mean()))
